//! The core against an independent model of the semantics: random calls, random misfortunes, no divergence.
//!
//! Every sequence runs on a fresh machine. The core talks to the device model over registers; a [`recorder::Recorder`] in
//! between keeps each command and what came of it. The [`reference::Reference`] (written apart, from docs/driver.md, over plain
//! sets and maps) is given the same call and that record, and says which commands had to be sent and what the caller gets. After
//! every call the device must hold no page and no CPU that the core thinks is free; at the end nothing may be held at all.
//!
//! A divergence prints seed and shrunk sequence. `NITROXIDE_MODEL_SEQUENCES` and `NITROXIDE_MODEL_SEED` change the run.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

#[path = "../support/mod.rs"]
mod support;

mod recorder;
mod reference;
mod run;
mod sequence;

use std::panic::{catch_unwind, AssertUnwindSafe};

use sequence::{generate, shrink, Operation};

/// Sequences of an ordinary run.
const SEQUENCES: u64 = 100_000;
/// Any number; each sequence has its own seed, this one plus its index.
const SEED: u64 = 0x4e69_7472_6f78_6964;

#[test]
fn random_sequences_do_not_diverge_from_the_model() {
    let number = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (sequences, seed) = (number("NITROXIDE_MODEL_SEQUENCES", SEQUENCES), number("NITROXIDE_MODEL_SEED", SEED));
    let mut seen = run::Seen::default();
    for index in 0..sequences {
        let seed = seed.wrapping_add(index);
        let operations = generate(seed);
        match attempt(&operations) {
            Ok(run) => seen.add(&run),
            Err(first) => {
                let shrunk = shrink(operations, |operations| attempt(operations).is_err());
                let last = attempt(&shrunk).map_or_else(|error| error, |_| first);
                let listing: String = shrunk.iter().map(|operation| format!("    {operation:?}\n")).collect();
                panic!("diverged with seed {seed}: {last}\n{listing}");
            }
        }
    }
    println!("{sequences} sequences: {seen:?}");
    seen.assert_rich(sequences);
}

fn attempt(operations: &[Operation]) -> Result<run::Seen, String> {
    catch_unwind(AssertUnwindSafe(|| run::run(operations))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
    })
}
