//! The unmodified C driver in a virtual machine: the record is what it says, and the driver core says the same.
//!
//! `NITROXIDE_RECORD=1` writes the record anew, `NITROXIDE_RECORD=directed` only that of the directed cases.

#![cfg(feature = "core")]

mod common;

use std::path::Path;
use std::time::Instant;

use nitroxide_conformance::compare::compare;
use nitroxide_conformance::coverage::Coverage;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_conformance::{cases, random, record};
use nitroxide_testkit::parent_vm::Driver;

use common::{machine, run};

const SEQUENCES: u64 = 2000;
#[test]
fn c_driver_says_what_was_recorded_and_core_says_the_same() {
    let vm = machine(Driver::C).boot();
    let run = |arguments: &str| run(&vm, arguments);
    let directed_text = run("run --control pci");
    if std::env::var_os("NITROXIDE_RECORD").is_some_and(|what| what == "directed") {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("record/c-driver-directed.txt"), &directed_text).unwrap();
        return;
    }
    let started = Instant::now();
    let random_text = run(&format!("random --control pci --compact --seed 1 --sequences {SEQUENCES}"));
    println!("{SEQUENCES} random sequences in {:.0} s", started.elapsed().as_secs_f64());
    if std::env::var_os("NITROXIDE_RECORD").is_some() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("record");
        std::fs::write(folder.join("c-driver-directed.txt"), &directed_text).unwrap();
        std::fs::write(folder.join("c-driver-random.txt"), &random_text).unwrap();
    }

    let directed = Transcript::parse(&directed_text).unwrap();
    let report = compare(&directed, &run_all(&mut Core::like(&directed), cases::directed()));
    println!("directed: {report}");
    let good = report.is_good();

    let said = record::expand(&random_text, random::DEFAULT_STEPS).unwrap();
    let coverage = Coverage::of(&said);
    println!("{coverage}");
    assert!(coverage.missing().is_empty(), "{coverage}");
    let cases = random::cases(1, SEQUENCES, random::DEFAULT_STEPS);
    let report = compare(&said, &run_all(&mut Core::like(&said), cases));
    println!("random: {report}");
    assert!(good && report.is_good(), "the reports above");

    // The layout of memory is another each time, and few answers depend on it: those are compared above, with the layout as it is.
    if std::env::var_os("NITROXIDE_RECORD").is_none() {
        let recorded = Transcript::parse(record::C_DRIVER_DIRECTED).unwrap();
        if recorded.head_value("layout") == directed.head_value("layout") {
            assert_eq!(record::first_difference(&recorded, &directed), None);
            let recorded = record::expand(record::C_DRIVER_RANDOM, random::DEFAULT_STEPS).unwrap();
            assert_eq!(record::first_difference(&recorded, &said), None);
        } else {
            println!("the record was made with another layout of memory; it is not compared line by line");
        }
    }
}
