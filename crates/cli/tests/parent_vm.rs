//! A parent VM on `nitroxide device`, with the distribution's own driver, unmodified, or with our module: what clients inside it see is the same.
//!
//! Two boots with much in each for either driver: the project's own client with reboots, and programs of others (the kernel's sample, QEMU).
#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nitroxide_testkit::images::ImageSpec;
use nitroxide_testkit::parent_vm::{Builder, Driver, ParentVm};
use nitroxide_testkit::{Setup, kernel_module, ne_ioctl_sample};
use serde_json::Value;

/// How long a boot of an enclave on a busy machine may take. It only ends hangs.
const PATIENCE: Duration = Duration::from_secs(240);

const NITROXIDE: &str = env!("CARGO_BIN_EXE_nitroxide");

/// One VM with enclaves at a time: the kernel's sample waits for a heartbeat for 60 s, which a machine of two cores must keep.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn builder(directory: &Path) -> Builder {
    let image = directory.join("hello.eif");
    ImageSpec::hello().build(&image);
    ParentVm::builder().device_program(NITROXIDE).program(NITROXIDE).file(image, "/root/hello.eif")
}

#[test]
fn the_stock_driver_serves_enclaves_to_our_client_until_they_are_closed_and_across_reboots() {
    serve_our_client(Driver::C);
}

#[test]
fn the_module_serves_enclaves_to_our_client_until_they_are_closed_and_across_reboots() {
    serve_our_client(Driver::Rust(kernel_module()));
}

fn serve_our_client(driver: Driver) {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let mut vm = builder(directory.path()).driver(driver).memory_mib(1024).hugepages(256).cpus(6).pool("1-4").may_reboot().boot();

    // The probe.
    assert_eq!(vm.check("cat /sys/module/nitro_enclaves/parameters/ne_cpus"), "1-4\n");
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0,5\n");
    vm.check("test -c /dev/nitro_enclaves");
    check_kernel_log(&vm);

    // Two enclaves at once, from the sample image of the main job.
    let (first, second) = (start(&vm, ""), start(&vm, "--debug-mode"));
    assert_ne!(first["EnclaveCID"], second["EnclaveCID"]);
    let described = json(&vm, "nitroxide describe-enclaves");
    let measured = json(&vm, "nitroxide describe-eif --eif-path hello.eif");
    assert_eq!(described.as_array().unwrap().len(), 2);
    for enclave in described.as_array().unwrap() {
        assert_eq!(enclave["State"], "RUNNING", "{described}");
        for name in ["PCR0", "PCR1", "PCR2"] {
            assert_eq!(enclave["Measurements"][name], measured["Measurements"][name], "{described}");
        }
    }
    // vsock from inside the parent; the enclave's own NSM says what the file measures (and zeros in debug mode).
    for enclave in [&first, &second] {
        assert_eq!(ask(&vm, enclave, "echo over vsock"), "over vsock\n");
        assert_eq!(ask(&vm, enclave, "cid"), format!("{}\n", enclave["EnclaveCID"]));
    }
    let pcr0 = measured["Measurements"]["PCR0"].as_str().unwrap();
    assert!(ask(&vm, &first, "pcrs").contains(pcr0));
    assert!(ask(&vm, &second, "pcrs").contains(&"0".repeat(96)));
    // Only the one in debug mode has a console for the parent.
    let mut console = vm.start(&format!("nitroxide console --enclave-id {}", second["EnclaveID"].as_str().unwrap()));
    assert!(console.wait_for("hello: listening", PATIENCE), "{}\n{}", console.printed(), vm.everything());
    assert_ne!(vm.run(&format!("nitroxide console --enclave-id {}", first["EnclaveID"].as_str().unwrap())).status, 0);

    // Closing the descriptor ends the enclave: here its owner is killed.
    assert_eq!(free_pages(&vm), 0);
    vm.check(&format!("kill -9 {}", first["ProcessID"]));
    vm.check("until grep -q 'HugePages_Free: *128' /proc/meminfo; do sleep 0.1; done");
    assert_eq!(json(&vm, "nitroxide describe-enclaves").as_array().unwrap().len(), 1);
    assert_eq!(ask(&vm, &second, "echo still there"), "still there\n");
    vm.check("nitroxide terminate-enclave --all");
    assert!(console.wait(PATIENCE).is_ok());
    assert_eq!(free_pages(&vm), 256);
    check_kernel_log(&vm);

    // An enclave that ends by itself.
    let enclave = start(&vm, "");
    let waiting = format!("nitroxide wait --enclave-id {}", enclave["EnclaveID"].as_str().unwrap());
    let mut waiting = vm.start(&waiting);
    assert_eq!(ask(&vm, &enclave, "exit 7"), "exiting with status 7\n");
    let waited = waiting.wait(PATIENCE);
    assert!(waited.is_ok(), "{waited:?}\n{}", vm.everything());
    vm.check("until grep -q 'HugePages_Free: *256' /proc/meminfo; do sleep 0.1; done");

    // A restart of the guest with a running enclave leaves nothing of it.
    let _forgotten = start(&vm, "");
    assert_eq!(enclave_processes(&mut vm), 1);
    vm.reboot();
    eventually("the enclave of the guest's former life is gone", || enclave_processes(&mut vm) == 0);
    assert_eq!(free_pages(&vm), 256);
    check_kernel_log(&vm);
    let enclave = start(&vm, "");
    assert_eq!(ask(&vm, &enclave, "echo a new life"), "a new life\n");

    // The parent crashes: everything ends, and the device takes the next one.
    vm.kill();
    eventually("the enclave of the crashed parent is gone", || enclave_processes(&mut vm) == 0);
    assert!(vm.device().unwrap().status().is_none(), "{}", vm.device_log());
}

#[test]
fn the_kernels_own_sample_and_qemu_boot_enclaves_to_heartbeat_and_see_their_end_with_the_stock_driver() {
    serve_programs_of_others(Driver::C);
}

#[test]
fn the_kernels_own_sample_and_qemu_boot_enclaves_to_heartbeat_and_see_their_end_with_the_module() {
    serve_programs_of_others(Driver::Rust(kernel_module()));
}

fn serve_programs_of_others(driver: Driver) {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let qemu = Setup::locate().root().join("usr/bin/qemu-system-x86_64");
    let vm = builder(directory.path()).driver(driver).program(ne_ioctl_sample()).program(qemu).memory_mib(1280).hugepages(264).boot();

    // The sample: 256 regions of 2 MiB, two vCPUs, a heartbeat on port 9000, then it polls. It sleeps for minutes, so it is ended once it has seen the end.
    let mut sample = vm.start_on_terminal("exec ne_ioctl_sample /root/hello.eif");
    assert!(sample.wait_for("Entering sleep", Duration::from_secs(55)), "{}\n{}\n{}", sample.printed(), vm.everything(), consoles(&vm));
    let printed = sample.printed();
    assert!(!printed.contains("Error"), "{printed}");
    let cid: u64 = printed.split("Enclave started, CID ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap();
    assert_eq!(ask(&vm, &serde_json::json!({ "EnclaveCID": cid }), "exit 0"), "exiting with status 0\n");
    assert!(sample.wait_for("Received POLLHUP", PATIENCE), "{}\n{}", sample.printed(), vm.everything());
    sample.signal(15);
    assert!(sample.wait(PATIENCE).is_ok());
    vm.check("until grep -q 'HugePages_Free: *264' /proc/meminfo; do sleep 0.1; done");
    check_kernel_log(&vm);

    // QEMU as a client, unmodified: it does not poll, so that a signal ends it.
    let plain =
        "exec qemu-system-x86_64 -M nitro -accel nitro -kernel /root/hello.eif -m 256M -smp 2 -nographic -trace 'nitro*' -monitor none";
    let mut qemu = vm.start(plain);
    assert!(qemu.wait_for("nitro_heartbeat_done", PATIENCE), "{}\n{}", qemu.printed(), vm.everything());
    assert!(qemu.printed().contains("nitro_enclave_started"), "{}", qemu.printed());
    qemu.signal(15);
    assert!(qemu.wait(PATIENCE).is_ok());
    vm.check("until grep -q 'HugePages_Free: *264' /proc/meminfo; do sleep 0.1; done");

    // In debug mode it shows the enclave's console.
    let mut qemu = vm.start(&plain.replace("-accel nitro ", "-accel nitro,debug-mode=on "));
    assert!(qemu.wait_for("hello: listening", PATIENCE), "{}\n{}", qemu.printed(), vm.everything());
    assert!(qemu.wait_for("nitro_heartbeat_done", PATIENCE), "{}\n{}", qemu.printed(), vm.everything());
    qemu.signal(15);
    assert!(qemu.wait(PATIENCE).is_ok());
    vm.check("until grep -q 'HugePages_Free: *264' /proc/meminfo; do sleep 0.1; done");
    check_kernel_log(&vm);
    vm.check("rmmod nitro_enclaves");
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0-3\n");
}

/// Starts an enclave of 256 MiB in the parent.
fn start(vm: &ParentVm, options: &str) -> Value {
    json(vm, &format!("nitroxide --quiet run-enclave --device host --eif-path hello.eif --memory 256 --cpu-count 2 {options}"))
}

/// Asks the sample application, once it listens.
fn ask(vm: &ParentVm, enclave: &Value, question: &str) -> String {
    let cid = &enclave["EnclaveCID"];
    vm.check(&format!(
        "for i in $(seq 300); do echo '{question}' | nitroxide vsock connect {cid} 5005 2>/dev/null && exit; sleep 0.2; done; exit 1"
    ))
}

fn json(vm: &ParentVm, command: &str) -> Value {
    let printed = vm.check(command);
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("`{command}` printed no JSON ({error}): {printed}"))
}

fn free_pages(vm: &ParentVm) -> u64 {
    vm.check("awk '/HugePages_Free/ { print $2 }' /proc/meminfo").trim().parse().unwrap()
}

/// Neither the driver nor the kernel has anything to complain about, but that our module is not signed.
fn check_kernel_log(vm: &ParentVm) {
    let complaints =
        vm.run("dmesg | grep -v 'module verification failed' | grep -E 'nitro_enclaves.*([Ee]rror|[Ff]ail)|WARNING:|BUG:|Oops|Call Trace'");
    assert_eq!(complaints.stdout, "", "{}", vm.everything());
}

/// What the enclaves have printed, as the host sees it; for failures.
fn consoles(vm: &ParentVm) -> String {
    let log = vm.device_log();
    let answer = log.lines().find(|line| line.starts_with('{')).unwrap_or_default();
    let world = serde_json::from_str::<Value>(answer).unwrap_or_default()["RuntimeDirectory"].as_str().unwrap_or_default().to_owned();
    let ask =
        |arguments: &[&str]| common::text(&common::run(common::nitroxide().env("NITROXIDE_RUNTIME_DIR", &world).args(arguments)).stdout);
    let described: Value = serde_json::from_str(&ask(&["describe-enclaves"])).unwrap_or_default();
    let ids = described.as_array().into_iter().flatten().filter_map(|enclave| enclave["EnclaveID"].as_str());
    ids.map(|id| format!("{id}:\n{}\n", ask(&["logs", "--enclave-id", id]))).collect()
}

/// How many enclave processes the device has.
fn enclave_processes(vm: &mut ParentVm) -> usize {
    let device = vm.device().unwrap().id();
    let tasks = PathBuf::from(format!("/proc/{device}/task"));
    let lists = std::fs::read_dir(tasks).unwrap().filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    lists.map(|list| list.split_whitespace().count()).sum()
}

fn eventually(what: &str, mut happens: impl FnMut() -> bool) {
    let started = Instant::now();
    while !happens() {
        assert!(started.elapsed() < PATIENCE, "not so: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
