//! The weaknesses of the C driver that break the machine, each in a machine of its own: what is seen, and that the core does not do it.
//!
//! `observe_*` takes the driver, so that another driver can be held against the opposite table. W numbers: docs/driver.md, "Weaknesses".

#![cfg(feature = "core")]

mod common;

use nitroxide_conformance::cases;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_testkit::parent_vm::{Driver, ParentVm};

use common::{PATIENCE, machine, run};

/// What was asked, and what was answered.
type Observed = Vec<(String, String)>;

/// What is expected of one driver.
type Table = &'static [(&'static str, &'static str)];

/// Every line of the table was observed; of several answers to the same the last one counts.
fn assert_observed(observed: &Observed, table: Table) {
    for (what, answer) in table {
        let found = observed.iter().rfind(|(asked, _)| asked == what);
        assert_eq!(found.map(|(_, answer)| answer.as_str()), Some(*answer), "{what}: {observed:#?}");
    }
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

/// A dangerous case, and whether the kernel complained.
fn observe_case(driver: Driver, name: &str) -> Observed {
    let vm = machine(driver).boot();
    let mut observed = lines(&run(&vm, &format!("run --dangerous --control pci --filter {name}")));
    observed.push(complaint(&vm));
    observed
}

fn complaint(vm: &ParentVm) -> (String, String) {
    let console = vm.console();
    let kind = ["Oops", "WARNING"].into_iter().find(|word| console.contains(word)).unwrap_or("nothing");
    ("the kernel's complaint".to_owned(), kind.to_owned())
}

fn observe_probe(driver: Driver, name: &str) -> Observed {
    let vm = machine(driver).boot();
    let mut observed = lines(&run(&vm, &format!("probe {name}")));
    observed.push(complaint(&vm));
    observed
}

/// The same case by the core.
fn core(name: &str) -> Observed {
    let mut core = Core::like(&Transcript::default());
    let said = run_all(&mut core, cases::dangerous().into_iter().filter(|case| case.name == name));
    lines(&said.text())
}

#[test]
fn w1_refused_pages_are_lost_in_the_c_driver() {
    let observed = observe_probe(Driver::C, "refused-pages");
    assert_observed(&observed, &[("refused", "8000"), ("memory is lost", "true")]);
}

const W4_C: Table =
    &[("the device file is there", "false"), ("CREATE_VM", "killed"), ("ADD_VCPU", "killed"), ("the kernel's complaint", "Oops")];

fn observe_w4_unbind(driver: Driver) -> Observed {
    let vm = machine(driver).boot();
    let mut probe = vm.start("nitroxide-conformance probe unbind 2>&1");
    assert!(probe.wait_for("done", PATIENCE), "{}\n{}", probe.printed(), vm.console());
    let mut observed = lines(&probe.printed());
    observed.push(complaint(&vm));
    observed
}

/// Only in `cargo xtask soak`: the reply that comes too late takes two minutes.
#[test]
fn w3_late_reply_is_taken_for_the_next_one_by_the_c_driver() {
    if std::env::var_os("NITROXIDE_SOAK").is_none() {
        println!("left out: it takes minutes, NITROXIDE_SOAK is not set");
        return;
    }
    let observed = observe_probe(Driver::C, "late-reply");
    let table: Table = &[("ADD_VCPU whose reply comes after 130 s", "ETIMEDOUT"), ("the next one returns before its own reply", "true")];
    assert_observed(&observed, table);
}

#[test]
fn w4_device_that_goes_with_open_descriptors_is_a_fault_in_the_c_driver() {
    assert_observed(&observe_w4_unbind(Driver::C), W4_C);
}

#[test]
fn w7_strangers_are_taken_for_the_maker_by_the_c_driver() {
    let observed = observe_probe(Driver::C, "mm-identity");
    assert_observed(&observed, &[("ADD_VCPU by the receiver", "EIO"), ("some of 400 strangers are taken for the maker", "true")]);
}

#[test]
fn w8_900_gib_at_once_are_a_warning_of_the_kernel_with_the_c_driver() {
    // The answer itself is the same.
    let answer: Table = &[("e0 SET_MEMORY Unmapped+0 size 921600M flags 0", "ENOMEM")];
    let observed = observe_case(Driver::C, "w8-900-gib");
    assert_observed(&observed, answer);
    assert_observed(&observed, &[("the kernel's complaint", "WARNING")]);
    assert_observed(&core("w8-900-gib"), answer);
}

const W10_C: Table = &[("pool \"2-3\"", "EPERM"), ("memory of slots", "64M")];
const W10_OURS: Table = &[("memory of slots", "0M")];

#[test]
fn w10_stop_that_fails_at_close_leaves_everything_behind_in_the_c_driver() {
    assert_observed(&observe_case(Driver::C, "w10-stop-fails"), W10_C);
    assert_observed(&core("w10-stop-fails"), W10_OURS);
}

#[test]
fn w10_free_that_fails_at_close_leaves_everything_behind_in_the_c_driver() {
    assert_observed(&observe_case(Driver::C, "w10-free-fails"), W10_C);
    assert_observed(&core("w10-free-fails"), W10_OURS);
}

#[test]
fn w20_slot_zero_is_taken_and_never_freed_by_the_c_driver() {
    let observed = observe_probe(Driver::C, "uid-zero");
    assert_observed(&observed, &[("CREATE_VM", "0"), ("commands for it", "1"), ("commands at close", "0")]);
}

const W20_POOL: Table = &[("pool \"2-3\" and blanks, 511 bytes", "511"), ("pool \"2-3\" and blanks, 512 bytes", "ENOSPC")];

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

#[test]
fn descriptor_kept_over_exec_and_calls_at_once_and_32_bit_callers() {
    let vm = machine(Driver::C).boot();
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
    assert_observed(&vec![complaint(&vm)], &[("the kernel's complaint", "nothing")]);
}
