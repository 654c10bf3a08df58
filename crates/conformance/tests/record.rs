//! The driver core against what the C driver was recorded to say: no virtual machine needed.

#![cfg(feature = "core")]

use nitroxide_conformance::compare::{Report, compare};
use nitroxide_conformance::coverage::Coverage;
use nitroxide_conformance::rules::RULES;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_conformance::{cases, random, record};

fn good(report: &Report) {
    println!("{report}");
    assert!(report.is_good(), "{report}");
}

#[test]
fn core_says_in_every_directed_case_what_the_c_driver_was_recorded_to_say() {
    let recorded = Transcript::parse(record::C_DRIVER_DIRECTED).unwrap();
    let report = compare(&recorded, &run_all(&mut Core::like(&recorded), cases::directed()));
    good(&report);
    // A core with the C driver's weaknesses would differ from it nowhere. W14 needs a page of 1 GiB (tests/shapes.rs),
    // W13-runs pages that happen to lie in several runs.
    let all: Vec<_> = RULES.iter().map(|rule| rule.id).filter(|id| !["W14", "W13-runs"].contains(id)).collect();
    assert!(all.iter().all(|id| report.used.contains_key(id)), "{report}");
    // The owner check once, and the device once.
    assert_eq!(report.used.get("W11"), Some(&2), "{report}");
}

#[test]
fn core_says_in_random_cases_what_the_c_driver_was_recorded_to_say() {
    let recorded = record::expand(record::C_DRIVER_RANDOM, random::DEFAULT_STEPS).unwrap();
    let count = recorded.lines.chunk_by(|a, b| a.case == b.case).count();
    let cases = random::cases(1, u64::try_from(count).unwrap(), random::DEFAULT_STEPS);
    good(&compare(&recorded, &run_all(&mut Core::like(&recorded), cases)));
}

/// At least so many of a thousand random steps have something to act on.
const MIN_REACHED_PERMILLE: u64 = 970;

#[test]
fn random_cases_reach_every_code_that_they_can_reach_and_start_many_enclaves() {
    let coverage = Coverage::of(&record::expand(record::C_DRIVER_RANDOM, random::DEFAULT_STEPS).unwrap());
    println!("{coverage}");
    assert!(coverage.missing().is_empty() && coverage.reached_permille() >= MIN_REACHED_PERMILLE, "{coverage}");
    assert!(coverage.started * 5 >= coverage.made && coverage.ended * 3 >= coverage.started, "{coverage}");
    assert!(coverage.cases_with_two * 2 >= coverage.cases && coverage.made_again * 10 >= coverage.made, "{coverage}");
}

#[test]
fn core_says_the_same_twice() {
    let run = || run_all(&mut Core::new(6, 2, &[40, 64], "2-5"), random::cases(5, 300, 24));
    let first = run();
    assert_eq!(first, run());
    assert_eq!(record::expand(&record::compact(&first), 24), Some(first));
}

#[test]
fn core_holds_nothing_after_any_case() {
    let mut core = Core::new(6, 2, &[104], "2-5");
    // What a dangerous case leaves over, the next close gives back.
    run_all(&mut core, cases::dangerous());
    let all = run_all(&mut core, random::cases(9000, 2000, 24).chain(cases::directed()));
    for case in all.lines.chunk_by(|a, b| a.case == b.case) {
        let last = case.last().unwrap();
        assert_eq!((last.call.as_str(), last.answer.as_str()), ("memory of slots", "0M"), "{}", last.case);
    }
}
