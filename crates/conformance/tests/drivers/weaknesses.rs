//! The weaknesses that no comparison of transcripts shows, each in a machine of its own: what the C driver does, and that our module does not.
//!
//! `observe_*` takes the driver, and there is a table of answers for each. W numbers: docs/driver.md, "Weaknesses"; W2, W5, W11 to W14, W18 and W19 are
//! rules of the comparison: [`transcripts`](crate::transcripts) and [`shapes`](crate::shapes) show them on both.

use std::process::Command;
use std::time::{Duration, Instant};

use nitroxide_conformance::cases;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_testkit::parent_vm::{Driver, ParentVm, Process};

use crate::machines::{PATIENCE, complaint, machine, null_device, ours, run};

/// What was asked, and what was answered.
type Observed = Vec<(String, String)>;

/// What is expected of one driver.
type Table<'a> = &'a [(&'a str, &'a str)];

const COMPLAINT: &str = "the kernel's complaint";

/// Every line of the table was observed; of several answers to the same the last one counts.
#[track_caller]
fn assert_observed(observed: &Observed, table: Table<'_>) {
    for (what, answer) in table {
        let found = observed.iter().rfind(|(asked, _)| asked == what);
        assert_eq!(found.map(|(_, answer)| answer.as_str()), Some(*answer), "{what}: {observed:#?}");
    }
}

/// What was observed is in the table, and the kernel had nothing to complain of.
#[track_caller]
fn assert_sound(observed: &Observed, table: Table<'_>) {
    assert_observed(observed, table);
    assert_observed(observed, &[(COMPLAINT, "nothing")]);
}

/// Lines of a transcript, without case and step, or of a probe.
fn lines(text: &str) -> Observed {
    let line = |line: &str| {
        let (what, answer) = line.split_once(" -> ")?;
        let what = what.split_once(": ").filter(|(place, _)| place.contains('/')).map_or(what, |(_, what)| what);
        Some((what.to_owned(), answer.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

/// What a program in the machine printed, and whether the kernel complained.
fn observed(text: &str, vm: &ParentVm) -> Observed {
    let mut observed = lines(text);
    observed.push((COMPLAINT.to_owned(), complaint(vm).to_owned()));
    observed
}

/// A dangerous case.
fn observe_case(driver: Driver, name: &str) -> Observed {
    let vm = machine(driver).boot();
    observed(&run(&vm, &format!("run --dangerous --control pci --filter {name}")), &vm)
}

fn observe_probe(driver: Driver, name: &str) -> Observed {
    let vm = machine(driver).boot();
    observed(&run(&vm, &format!("probe {name}")), &vm)
}

/// A probe that does not end by itself, since its end would be the next fault, or would wait for a device that does not answer.
fn observe_until_done(vm: &ParentVm, name: &str) -> Observed {
    let mut probe = vm.start(&format!("nitroxide-conformance probe {name} 2>&1"));
    assert!(probe.wait_for("done", PATIENCE), "{}\n{}", probe.printed(), vm.everything());
    observed(&probe.printed(), vm)
}

/// The same case by the core.
fn core(name: &str) -> Observed {
    let mut core = Core::like(&Transcript::default());
    let said = run_all(&mut core, cases::dangerous().into_iter().filter(|case| case.name == name));
    lines(&said.text())
}

const W1_ASKED: Table<'static> = &[("refused, of 4 KiB", "8000"), ("refused, transparent huge", "16")];

#[test]
fn w1_refused_pages_are_lost_in_the_c_driver() {
    let observed = observe_probe(Driver::C, "refused-pages");
    assert_observed(&observed, W1_ASKED);
    assert_observed(&observed, &[("memory is lost, of 4 KiB", "true"), ("memory is lost, transparent huge", "true")]);
}

#[test]
fn w1_refused_pages_come_back_in_the_module() {
    let observed = observe_probe(ours(), "refused-pages");
    assert_observed(&observed, W1_ASKED);
    assert_sound(&observed, &[("memory is lost, of 4 KiB", "false"), ("memory is lost, transparent huge", "false")]);
}

/// W2 and W3 take two minutes each, since the driver waits that long; all four machines wait at the same time.
#[test]
fn w2_w3_lost_and_late_replies_are_believed_by_the_c_driver_and_not_by_the_module() {
    let boot = |driver: Driver| machine(driver).boot();
    let machines = [boot(Driver::C), boot(ours()), boot(Driver::C), boot(ours())];
    let [c_lost, our_lost, c_late, our_late] = std::thread::scope(|scope| {
        let names = ["lost-info", "lost-info", "late-reply", "late-reply"];
        let threads: Vec<_> = machines.iter().zip(names).map(|(vm, name)| scope.spawn(move || observe_until_done(vm, name))).collect();
        let mut ended = threads.into_iter().map(|thread| thread.join().expect("the probe is done"));
        std::array::from_fn(|_| ended.next().expect("there are four"))
    });
    assert_observed(&c_lost, &[("the one that runs is said to have ended", "true")]);
    assert_sound(&our_lost, &[("the one that runs is said to have ended", "false")]);
    let late = ("ADD_VCPU whose reply comes too late", "ETIMEDOUT");
    assert_observed(&c_late, &[late, ("the next one", "0"), ("replies until it returned", "1")]);
    assert_sound(&our_late, &[late, ("the next one", "0"), ("replies until it returned", "2")]);
}

#[test]
fn w4_device_that_goes_with_open_descriptors_is_a_fault_in_the_c_driver() {
    let observed = observe_until_done(&machine(Driver::C).boot(), "unbind");
    assert_observed(&observed, &[("an enclave runs", "true"), ("the device file is there", "false"), ("poll", "0")]);
    assert_observed(&observed, &[("CREATE_VM", "killed"), ("ADD_VCPU", "killed"), ("close of the enclave that ran", "killed")]);
    assert_observed(&observed, &[(COMPLAINT, "Oops")]);
}

#[test]
fn w4_device_that_goes_with_open_descriptors_is_an_end_in_the_module() {
    let vm = machine(ours()).boot();
    let observed = observe_until_done(&vm, "unbind");
    let poll_hup = ("poll", "16");
    assert_sound(&observed, &[("an enclave runs", "true"), ("the device file is there", "false"), poll_hup]);
    assert_observed(&observed, &[("CREATE_VM", "ENODEV"), ("ADD_VCPU", "ENODEV"), ("close of the enclave that ran", "0")]);
    // Bound again, it serves again, and everything is free.
    vm.check("for f in /sys/bus/pci/devices/*; do [ $(cat $f/device) = 0xe4c1 ] && echo ${f##*/} > /sys/bus/pci/drivers/nitro_enclaves/bind; done; true");
    assert!(vm.check("grep HugePages_Free /proc/meminfo").ends_with(" 140\n"), "{}", vm.everything());
    assert!(run(&vm, "probe create").contains("CREATE_VM -> 0"), "{}", vm.everything());
    // Nothing is left of the first time: the kernel counts one user of the device, not two.
    assert_eq!(vm.check("cd /sys/bus/pci/drivers/nitro_enclaves/0*/ && cat enable"), "1\n");
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
}

#[test]
fn w6_interrupts_before_the_driver_is_ready_are_a_fault_in_the_c_driver() {
    let vm = machine(Driver::C).boot();
    let mut probe = vm.start("nitroxide-conformance probe early-interrupts 2>&1");
    let began = Instant::now();
    // Its first line is another one's first line, too ("BUG: …"), and comes a moment before the word that is waited for.
    while complaint(&vm) != "Oops" {
        assert!(began.elapsed() < PATIENCE, "{}\n{}", probe.printed(), vm.everything());
        std::thread::sleep(Duration::from_millis(20));
    }
    probe.close_input();
}

#[test]
fn w6_interrupts_before_the_driver_is_ready_are_taken_by_the_module() {
    let observed = observe_probe(ours(), "early-interrupts");
    assert_sound(&observed, &[("the device file is there", "true"), ("CREATE_VM", "0")]);
}

const W7_ASKED: Table<'static> = &[("ADD_VCPU by the receiver", "EIO")];

#[test]
fn w7_strangers_are_taken_for_the_maker_by_the_c_driver() {
    let observed = observe_probe(Driver::C, "mm-identity");
    assert_observed(&observed, W7_ASKED);
    assert_observed(&observed, &[("some of 400 strangers are taken for the maker", "true")]);
}

#[test]
fn w7_strangers_stay_strangers_in_the_module() {
    let observed = observe_probe(ours(), "mm-identity");
    assert_observed(&observed, W7_ASKED);
    assert_sound(&observed, &[("some of 400 strangers are taken for the maker", "false")]);
}

/// Bookkeeping of 900 GiB cannot be had in one piece. The module's grows with the pages, of which the first one is not there.
const W8_MODULE: Table<'static> = &[("e0 SET_MEMORY Unmapped+0 size 921600M flags 0", "EFAULT")];
const W8: Table<'static> = &[("e0 SET_MEMORY Unmapped+0 size 921600M flags 0", "ENOMEM")];

#[test]
fn w8_900_gib_at_once_are_a_warning_of_the_kernel_with_the_c_driver() {
    let observed = observe_case(Driver::C, "w8-900-gib");
    assert_observed(&observed, W8);
    assert_observed(&observed, &[(COMPLAINT, "WARNING")]);
    assert_observed(&core("w8-900-gib"), W8);
}

#[test]
fn w8_900_gib_at_once_are_refused_in_silence_by_the_module() {
    assert_sound(&observe_case(ours(), "w8-900-gib"), W8_MODULE);
}

#[test]
fn w9_slow_start_holds_up_the_pool_and_a_killed_caller_in_the_c_driver() {
    let observed = observe_until_done(&machine(Driver::C).boot(), "slow-start");
    assert_observed(&observed, &[("the pool is written meanwhile", "not while START is under way")]);
    assert_observed(&observed, &[("the killed caller is gone before its reply", "false")]);
}

#[test]
fn w9_slow_start_holds_up_only_its_caller_in_the_module_and_a_kill_ends_that() {
    let observed = observe_until_done(&machine(ours()).boot(), "slow-start");
    assert_sound(&observed, &[("the pool is written meanwhile", "EPERM"), ("the killed caller is gone before its reply", "true")]);
}

const W10_C: Table<'static> = &[("pool \"2-3\"", "EPERM"), ("memory of slots", "64M")];
const W10_OURS: Table<'static> = &[("memory of slots", "0M")];

#[test]
fn w10_stop_that_fails_at_close_leaves_everything_behind_in_the_c_driver() {
    assert_observed(&observe_case(Driver::C, "w10-stop-fails"), W10_C);
    assert_observed(&core("w10-stop-fails"), W10_OURS);
}

#[test]
fn w10_stop_that_fails_at_close_is_repeated_by_the_module() {
    assert_sound(&observe_case(ours(), "w10-stop-fails"), W10_OURS);
}

#[test]
fn w10_free_that_fails_at_close_leaves_everything_behind_in_the_c_driver() {
    assert_observed(&observe_case(Driver::C, "w10-free-fails"), W10_C);
    assert_observed(&core("w10-free-fails"), W10_OURS);
}

#[test]
fn w10_free_that_fails_at_close_is_repeated_by_the_module() {
    assert_sound(&observe_case(ours(), "w10-free-fails"), W10_OURS);
}

/// Two devices in one machine: what CREATE_VM says, and how many of them the driver has.
fn observe_second_device(driver: Driver) -> (ParentVm, Process, Observed) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::new(null_device());
    command.arg("--socket").arg(folder.path().join("ne.sock")).arg("--vsock").arg(folder.path().join("vsock.sock"));
    command.env("XDG_RUNTIME_DIR", folder.path());
    let second = Process::start(&command).expect("the program setpriv starts");
    let began = Instant::now();
    while !second.log().text().contains("{\"Socket\"") {
        assert!(began.elapsed() < PATIENCE, "{}", second.log().text());
        std::thread::sleep(Duration::from_millis(5));
    }
    let socket = folder.path().join("ne.sock");
    let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#, socket.display());
    let vm = machine(driver).qemu_arguments(["-device", &device]).boot();
    let text = run(&vm, "probe create");
    let mut observed = lines(&text);
    let bound = vm.check("ls -d /sys/bus/pci/drivers/nitro_enclaves/0000:* | wc -l");
    observed.push(("devices of the driver".to_owned(), bound.trim().to_owned()));
    (vm, second, observed)
}

#[test]
fn w17_second_device_takes_the_first_ones_place_and_leaves_none_in_the_c_driver() {
    let (vm, _second, observed) = observe_second_device(Driver::C);
    assert_observed(&observed, &[("CREATE_VM", "killed"), ("devices of the driver", "1")]);
    assert_eq!(complaint(&vm), "Oops");
}

#[test]
fn w17_second_device_is_left_alone_by_the_module_until_the_first_has_gone() {
    let (vm, _second, observed) = observe_second_device(ours());
    assert_observed(&observed, &[("CREATE_VM", "0"), ("devices of the driver", "1")]);
    // The first goes, the second can be bound; then the first one has to wait.
    let all = vm.check("grep -l 0xe4c1 /sys/bus/pci/devices/*/device | cut -d/ -f6");
    let names: Vec<&str> = all.lines().collect();
    let [first, second] = names[..] else { panic!("two devices, not {all}") };
    vm.check(&format!("cd /sys/bus/pci/drivers/nitro_enclaves && echo {first} > unbind && echo {second} > bind"));
    assert!(run(&vm, "probe create").contains("CREATE_VM -> 0"), "{}", vm.everything());
    assert_ne!(vm.run(&format!("echo {first} > /sys/bus/pci/drivers/nitro_enclaves/bind")).status, 0);
    assert!(run(&vm, "probe create").contains("CREATE_VM -> 0"), "{}", vm.everything());
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
}

#[test]
fn w20_slot_zero_is_taken_and_never_freed_by_the_c_driver() {
    let observed = observe_probe(Driver::C, "uid-zero");
    assert_observed(&observed, &[("CREATE_VM", "0"), ("commands for it", "1"), ("commands at close", "0")]);
}

#[test]
fn w20_slot_zero_is_freed_and_refused_by_the_module() {
    let observed = observe_probe(ours(), "uid-zero");
    assert_sound(&observed, &[("CREATE_VM", "EIO"), ("commands for it", "2"), ("commands at close", "0")]);
}

const W20_POOL: Table<'static> = &[("pool \"2-3\" and blanks, 511 bytes", "511"), ("pool \"2-3\" and blanks, 512 bytes", "ENOSPC")];

/// The C driver's limit is documented for programs, so it is kept: the case `pool-length` has it, and the core says the same.
#[test]
fn w20_pool_text_of_511_bytes_is_taken_and_of_512_refused() {
    for text in [
        nitroxide_conformance::record::C_DRIVER_DIRECTED.to_owned(),
        run_all(&mut Core::like(&Transcript::default()), cases::directed()).text(),
    ] {
        let observed = lines(&text);
        let of = |length: usize| {
            observed.iter().find(|(call, _)| call.contains(&format!("of {length} bytes"))).map(|(_, answer)| answer.clone())
        };
        let found = [511, 512].map(|length| (format!("pool \"2-3\" and blanks, {length} bytes"), of(length).unwrap_or_default()));
        assert_observed(&found.to_vec(), W20_POOL);
    }
}

/// What is no weakness, and the same in both: a descriptor kept over exec, callers by interrupt 0x80, two threads that make the same calls.
fn exec_and_compat_and_threads(driver: Driver) {
    let vm = machine(driver).boot();
    let observed = lines(&run(&vm, "probe exec"));
    assert_observed(
        &observed,
        &[
            ("ADD_VCPU", "0"),
            ("ADD_VCPU after exec", "EIO"),
            ("SET_MEMORY after exec", "EIO"),
            ("LOAD_INFO after exec", "0"),
            ("START after exec", "NE_ERR_NO_MEM_REGIONS_ADDED"),
        ],
    );
    let compat = lines(&run(&vm, "probe compat"));
    assert_observed(&compat, &[("CREATE_VM", "ENOTTY"), ("ADD_VCPU", "ENOTTY")]);
    let threads = lines(&run(&vm, "probe threads"));
    let none = "NE_ERR_NO_CPUS_AVAIL_IN_POOL";
    // Whoever comes first: afterwards it is as after one of the orders.
    assert_observed(&threads, &[("SET_MEMORY", "0 NE_ERR_MEM_REGION_ALREADY_USED"), ("START", "0 NE_ERR_NOT_IN_INIT_STATE")]);
    assert!(threads.contains(&("ADD_VCPU".to_owned(), format!("0 0 0 0 {none} {none} {none} {none}"))), "{threads:#?}");
    assert_eq!(complaint(&vm), "nothing");
}

#[test]
fn descriptor_kept_over_exec_and_calls_at_once_and_32_bit_callers_with_the_c_driver() {
    exec_and_compat_and_threads(Driver::C);
}

#[test]
fn descriptor_kept_over_exec_and_calls_at_once_and_32_bit_callers_with_the_module() {
    exec_and_compat_and_threads(ours());
}
