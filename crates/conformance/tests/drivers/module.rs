//! What only our module has or promises: statistics, tracepoints, memory that is counted, CPUs that stay offline, a device that is pulled out (docs/kernel.md).

use nitroxide_testkit::kernel_module;
use nitroxide_testkit::parent_vm::{Driver, Job, ParentVm};

use crate::machines::{PATIENCE, complaint, machine, ours, run};

/// The device's PCI function, as a line of shell that sets `$d`.
const FIND_DEVICE: &str = "for d in /sys/bus/pci/devices/*; do [ $(cat $d/device) = 0xe4c1 ] && break; done";

/// An enclave of 64 MiB and the CPUs 2 and 3 that runs until its process is ended.
fn hold(vm: &ParentVm) -> Job {
    let mut holder = vm.start("exec nitroxide-conformance probe hold 2>&1");
    assert!(holder.wait_for("done", PATIENCE), "{}\n{}", holder.printed(), vm.everything());
    holder
}

fn end(vm: &ParentVm, mut holder: Job) {
    holder.signal(9);
    assert!(holder.wait(PATIENCE).is_ok(), "{}", vm.everything());
}

fn statistic(vm: &ParentVm, name: &str) -> String {
    vm.check(&format!("cat /sys/class/misc/nitro_enclaves/statistics/{name}")).trim().to_owned()
}

#[test]
fn an_enclaves_cpus_stay_offline_and_its_memory_is_counted_until_it_is_closed() {
    let vm = machine(ours()).boot();
    vm.check("echo 1 > /sys/module/nitro_enclaves/parameters/account_memlock");
    let holder = hold(&vm);
    assert_eq!(["cpus_donated", "bytes_pinned", "enclaves_started"].map(|name| statistic(&vm, name)), ["2", "67108864", "1"]);
    assert_eq!(vm.check("awk '/VmLck/ { print $2 }' /proc/$(pidof nitroxide-conformance)/status"), "65536\n");
    assert!(vm.check("cat /proc/$(pidof nitroxide-conformance)/fdinfo/*").contains("ne_memory_bytes:\t67108864\n"));
    assert_ne!(vm.run("echo 1 > /sys/devices/system/cpu/cpu2/online").status, 0);
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0-1\n");

    end(&vm, holder);
    assert_eq!(["cpus_donated", "bytes_pinned", "enclaves_ended"].map(|name| statistic(&vm, name)), ["0", "0", "1"]);
    vm.check("echo 1 > /sys/devices/system/cpu/cpu2/online");
    vm.check("rmmod nitro_enclaves");
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0-5\n");
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
}

#[test]
fn device_that_is_pulled_out_ends_its_enclave_and_is_found_again() {
    let vm = machine(ours()).boot();
    let holder = hold(&vm);
    vm.check(&format!("{FIND_DEVICE}; echo 1 > $d/remove"));
    vm.check("[ ! -e /dev/nitro_enclaves ]");
    // Before its descriptor is closed: the next device needs what it had.
    assert!(vm.check("grep HugePages_Free /proc/meminfo").ends_with(" 108\n"), "the process still has its mapping");
    vm.check("echo 1 > /sys/bus/pci/rescan");
    assert_eq!(["cpus_donated", "bytes_pinned"].map(|name| statistic(&vm, name)), ["0", "0"]);
    assert!(run(&vm, "probe create").contains("CREATE_VM -> 0"), "{}", vm.everything());
    end(&vm, holder);
    assert!(vm.check("grep HugePages_Free /proc/meminfo").ends_with(" 140\n"), "{}", vm.everything());
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
}

#[test]
fn pool_that_cannot_be_makes_loading_fail_and_a_cpu_that_does_not_come_back_is_named() {
    let vm = machine(Driver::None).file(kernel_module(), "modules/nitroxide.ko").boot();
    for (pool, said) in [("0-1", "Invalid argument"), ("2", "Invalid argument"), ("99", "out of range"), ("x", "Invalid argument")] {
        let output = vm.run(&format!("insmod /modules/nitroxide.ko ne_cpus={pool} 2>&1"));
        assert!(output.status != 0 && output.stdout.contains(said), "{pool}: {}", output.stdout);
        assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0-5\n");
        vm.check("[ ! -e /sys/module/nitro_enclaves ]");
    }
    vm.check("insmod /modules/nitroxide.ko ne_cpus=2-5 && cat /sys/module/nitro_enclaves/version | grep nitroxide");
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online /sys/module/nitro_enclaves/parameters/ne_cpus"), "0-1\n2-5\n");

    // One that the kernel itself does not bring back.
    vm.check("cd /sys/devices/system/cpu; grep workqueue:prepare hotplug/states | cut -d : -f 1 | tr -d ' ' > cpu3/hotplug/fail");
    vm.check("rmmod nitro_enclaves");
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0-2,4-5\n");
    assert!(vm.console().contains("CPU 3 cannot be brought online again"), "{}", vm.console());
    vm.check("echo 1 > /sys/devices/system/cpu/cpu3/online");
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
}

#[test]
fn tracepoints_show_calls_commands_and_why_a_call_is_refused() {
    let vm = machine(ours()).boot();
    vm.check("mount -t tracefs none /sys/kernel/tracing; echo 1 > /sys/kernel/tracing/events/nitro_enclaves/enable");
    end(&vm, hold(&vm));
    run(&vm, "run --control pci --filter vcpu-foreign");
    let trace = vm.check("cat /sys/kernel/tracing/trace");
    for line in [
        "ne_command: slot=0x",
        "command=ENCLAVE_START rc=0",
        "word=0xc004ae21 result=0",
        "ne_state: slot=0x",
        "Only the process that created the enclave",
    ] {
        assert!(trace.contains(line), "{line}:\n{trace}");
    }
}
