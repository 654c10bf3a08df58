//! Both drivers in one virtual machine: the C driver says what was recorded, our module says the same but for the weaknesses, and the core says what each says.
//!
//! `NITROXIDE_RECORD=1` writes the record anew, `NITROXIDE_RECORD=directed` only that of the directed cases.

use std::path::Path;
use std::time::Instant;

use nitroxide_conformance::compare::{Report, compare};
use nitroxide_conformance::coverage::Coverage;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_conformance::{cases, random, record};
use nitroxide_testkit::kernel_module;
use nitroxide_testkit::parent_vm::{Driver, ParentVm};

use crate::machines::{complaint, machine, run};

const SEQUENCES: u64 = 2000;

/// What a driver says in the directed and the random cases, as text.
struct Said {
    directed: String,
    random: String,
}

impl Said {
    fn by(vm: &ParentVm, driver: &str) -> Self {
        let started = Instant::now();
        let directed = run(vm, "run --control pci");
        let random = run(vm, &format!("random --control pci --compact --seed 1 --sequences {SEQUENCES}"));
        println!("{driver}: {SEQUENCES} random sequences and the directed cases in {:.0} s", started.elapsed().as_secs_f64());
        Self { directed, random }
    }

    fn directed(&self) -> Transcript {
        Transcript::parse(&self.directed).expect("our program prints a transcript")
    }

    fn random(&self) -> Transcript {
        record::expand(&self.random, random::DEFAULT_STEPS).expect("our program prints a transcript")
    }
}

/// A driver beside the core in a machine of the same kind: the reports on directed and random cases.
fn beside_core(directed: &Transcript, random: &Transcript) -> [Report; 2] {
    let cases = random::cases(1, SEQUENCES, random::DEFAULT_STEPS);
    [compare(directed, &run_all(&mut Core::like(directed), cases::directed())), compare(random, &run_all(&mut Core::like(random), cases))]
}

#[track_caller]
fn assert_good(who: &str, reports: &[Report]) {
    for report in reports {
        println!("{who}: {report}");
    }
    assert!(reports.iter().all(Report::is_good), "{who}: the reports above");
}

#[test]
fn c_driver_says_what_was_recorded_and_module_and_core_say_the_same() {
    let vm = machine(Driver::C).file(kernel_module(), "modules/nitroxide.ko").boot();
    let said = Said::by(&vm, "the C driver");
    if let Some(what) = std::env::var_os("NITROXIDE_RECORD") {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("record");
        std::fs::write(folder.join("c-driver-directed.txt"), &said.directed).unwrap();
        if what != "directed" {
            std::fs::write(folder.join("c-driver-random.txt"), &said.random).unwrap();
        }
    }
    let (directed, random) = (said.directed(), said.random());
    let coverage = Coverage::of(&random);
    println!("{coverage}");
    assert!(coverage.missing().is_empty(), "{coverage}");
    assert_good("the C driver and the core", &beside_core(&directed, &random));

    // In the same machine: answers depend on which huge pages are neighbours, and that is another at every boot.
    vm.check(&format!("rmmod nitro_enclaves && insmod /modules/nitroxide.ko ne_cpus={}", cases::POOL));
    let ours = Said::by(&vm, "the module");
    let (our_directed, our_random) = (ours.directed(), ours.random());
    let reports = [compare(&directed, &our_directed), compare(&random, &our_random)];
    assert_good("the C driver and the module", &reports);
    for id in ["W2", "W5", "W11", "W12", "W13", "W13-write", "W18", "W19"] {
        assert!(reports.iter().any(|report| report.used.contains_key(id)), "no step shows {id} on both drivers");
    }
    // The core is compiled into the module, so that its answers differ for one reason alone: after a SLOT_INFO that failed the module's timer asks again, and
    // sees an end, where the small home around the core waits for the next event.
    let reports = beside_core(&our_directed, &our_random);
    assert_good("the module and the core", &reports);
    assert!(reports.iter().all(|report| report.used.keys().all(|id| *id == "W2")), "{reports:#?}");
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());

    // The layout of memory is another each time, and few answers depend on it: those are compared above, with the layout as it is.
    if std::env::var_os("NITROXIDE_RECORD").is_none() {
        let recorded = Transcript::parse(record::C_DRIVER_DIRECTED).unwrap();
        if recorded.head_value("layout") == directed.head_value("layout") {
            assert_eq!(record::first_difference(&recorded, &directed), None);
            let recorded = record::expand(record::C_DRIVER_RANDOM, random::DEFAULT_STEPS).unwrap();
            assert_eq!(record::first_difference(&recorded, &random), None);
        } else {
            println!("the record was made with another layout of memory; it is not compared line by line");
        }
    }
}
