//! The driver's questions and answers in front of `nitroxide device --engine none`: each START makes a process and takes donated memory, as with a machine.

use nitroxide_conformance::compare::{Report, compare};
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_conformance::{cases, random, record};
use nitroxide_testkit::guest_program;
use nitroxide_testkit::parent_vm::ParentVm;

const NITROXIDE: &str = env!("CARGO_BIN_EXE_nitroxide");

/// Fewer than where starts cost nothing (crates/conformance/tests/drivers): one takes about 50 ms here.
const SEQUENCES: u64 = 150;

#[test]
fn c_driver_says_the_same_where_enclaves_are_processes_and_nothing_is_left() {
    let vm = ParentVm::builder()
        .memory_mib(1024)
        .cpus(6)
        .threads_per_core(2)
        .hugepages(140)
        .pool(cases::POOL)
        .program(guest_program("nitroxide-conformance"))
        .device_program(NITROXIDE)
        .device_arguments(["--engine", "none", "--test-control"])
        .boot();
    let directed = Transcript::parse(&vm.check("nitroxide-conformance run --control pci")).expect("a transcript");
    let random = vm.check(&format!("nitroxide-conformance random --control pci --compact --seed 1 --sequences {SEQUENCES}"));
    let random = record::expand(&random, random::DEFAULT_STEPS).expect("a transcript");
    let reports = [
        compare(&directed, &run_all(&mut Core::like(&directed), cases::directed())),
        compare(&random, &run_all(&mut Core::like(&random), random::cases(1, SEQUENCES, random::DEFAULT_STEPS))),
    ];
    for report in &reports {
        println!("{report}");
    }
    assert!(reports.iter().all(Report::is_good), "{reports:#?}\n{}", vm.device_log());
}
