//! `nitroxide-conformance`: runs cases on this machine's `/dev/nitro_enclaves` and prints the transcript; compares transcripts.
//!
//! docs/conformance.md. Small enough to read its own arguments: it runs in places that have nothing else.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use nitroxide_conformance::control::{Control, NoControl, Pci, Socket};
use nitroxide_conformance::real::Real;
use nitroxide_conformance::transcript::{Case, Transcript, run_all};
use nitroxide_conformance::{Target, bench, cases, compare, coverage, probes, random, record, stress, vsock};

const USAGE: &str = "\
Usage:
  nitroxide-conformance run [--filter TEXT] [--dangerous|--shapes] [TARGET]  directed cases; prints a transcript
  nitroxide-conformance random --seed S --sequences N [--steps N] [--compact] [TARGET]
  nitroxide-conformance compare C_DRIVER OTHER [--steps N]              two transcripts; fails on unknown differences
  nitroxide-conformance probe NAME                                      one weakness; may leave the driver broken
  nitroxide-conformance coverage TRANSCRIPT [--steps N]                 which call met which answer how often
  nitroxide-conformance stress --seconds N [--threads T] [--seed S] [--no-unbind] [--exact-only] [--control pci|none]
                                                                        many calls at once; fails on anything impossible or lost
  nitroxide-conformance vsock [--filter TEXT]                           AF_VSOCK on this machine, over its own CID; prints a transcript
  nitroxide-conformance bench [--rounds N]                              how long each call takes
TARGET: [--target real|core] [--control pci|none|/SOCKET] [--like TRANSCRIPT (a core with the layout of this one)]
Needs root, 110 free huge pages of 2 MiB, and the pool 2-5 of 6 CPUs in cores of two threads.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match act(&arguments) {
        Ok(good) => ExitCode::from(u8::from(!good)),
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

fn act(arguments: &[String]) -> Result<bool, String> {
    let value = |name: &str| arguments.iter().position(|word| word == name).and_then(|place| arguments.get(place + 1)).map(String::as_str);
    let flag = |name: &str| arguments.iter().any(|word| word == name);
    let number = |name: &str, otherwise: u64| match value(name) {
        None => Ok(otherwise),
        Some(text) => text.parse::<u64>().map_err(|_| format!("{name} needs a number, not `{text}`.")),
    };
    let steps = usize::try_from(number("--steps", u64::try_from(random::DEFAULT_STEPS).unwrap_or(16))?).unwrap_or(random::DEFAULT_STEPS);
    match arguments.first().map(String::as_str) {
        Some("run") => {
            let mut list = match (flag("--dangerous"), flag("--shapes")) {
                (true, _) => cases::dangerous(),
                (_, true) => cases::shapes(),
                _ => cases::directed(),
            };
            list.retain(|case| case.name.contains(value("--filter").unwrap_or("")));
            print!("{}", run_all(target(&value)?.as_mut(), list).text());
            Ok(true)
        }
        Some("random") => {
            let list: Vec<Case> = random::cases(number("--seed", 1)?, number("--sequences", 100)?, steps).collect();
            let transcript = run_all(target(&value)?.as_mut(), list);
            print!("{}", if flag("--compact") { record::compact(&transcript) } else { transcript.text() });
            Ok(true)
        }
        Some("compare") => {
            let (Some(left), Some(right)) = (arguments.get(1), arguments.get(2)) else { return Err(USAGE.to_owned()) };
            let report = compare::compare(&read(left, steps)?, &read(right, steps)?);
            print!("{report}");
            Ok(report.is_good())
        }
        Some("probe") => {
            probes::run(arguments.get(1).ok_or(USAGE)?, arguments.get(2).map(String::as_str)).map_err(|error| error.to_string())?;
            Ok(true)
        }
        Some("coverage") => {
            print!("{}", coverage::Coverage::of(&read(arguments.get(1).ok_or(USAGE)?, steps)?));
            Ok(true)
        }
        Some("stress") => {
            let options = stress::Options {
                seconds: number("--seconds", 60)?,
                threads: number("--threads", 8)?,
                seed: number("--seed", 1)?,
                unbind: !flag("--no-unbind"),
                control: value("--control") != Some("none"),
                exact_only: flag("--exact-only"),
            };
            stress::run(&options).map_err(|error| error.to_string())
        }
        Some("vsock") => {
            vsock::run(value("--filter").unwrap_or(""));
            Ok(true)
        }
        Some("bench") => {
            bench::run(number("--rounds", 200)?).map_err(|error| error.to_string())?;
            Ok(true)
        }
        _ => Err(USAGE.to_owned()),
    }
}

/// A transcript, plain or compact.
fn read(path: &str, steps: usize) -> Result<Transcript, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("`{path}` cannot be read: {error}"))?;
    Transcript::parse(&text)
        .or_else(|line| record::expand(&text, steps).ok_or(line))
        .map_err(|line| format!("`{path}` is no transcript: line {line}; a compact one needs the --steps that it was made with."))
}

fn target<'a>(value: &impl Fn(&str) -> Option<&'a str>) -> Result<Box<dyn Target>, String> {
    match value("--target").unwrap_or("real") {
        "real" => {
            let control: Box<dyn Control> = match value("--control") {
                Some("none") => Box::new(NoControl),
                Some(path) if path.starts_with('/') => {
                    Box::new(Socket::connect(path).map_err(|error| format!("`{path}` cannot be reached: {error}"))?)
                }
                Some("pci") => Box::new(Pci::find().ok_or("No device here has a test control; start it with --test-control.")?),
                _ => Pci::find().map_or_else(|| Box::new(NoControl) as Box<dyn Control>, |pci| Box::new(pci)),
            };
            Ok(Box::new(Real::open(control).map_err(|error| error.to_string())?))
        }
        #[cfg(feature = "core")]
        "core" => {
            let like = value("--like").map(|path| read(path, random::DEFAULT_STEPS)).transpose()?.unwrap_or_default();
            Ok(Box::new(nitroxide_conformance::simulated::Core::like(&like)))
        }
        other => Err(format!("There is no target `{other}` here; real or core.")),
    }
}
