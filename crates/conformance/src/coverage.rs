//! What a transcript tried: which call met which answer how often, and how far its enclaves came.
//!
//! So that random cases that no longer reach something are noticed. docs/conformance.md, "Random cases".

use std::collections::BTreeMap;
use std::fmt;

use crate::present::{Present, enclave_of};
use crate::transcript::Transcript;
use crate::{LEFT_OUT, NO_ENCLAVE};

/// What came of counting.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    /// Steps.
    pub steps: u64,
    /// Steps for which there was a descriptor to act on.
    pub reached: u64,
    /// Cases.
    pub cases: u64,
    /// Enclaves that were made.
    pub made: u64,
    /// Enclaves that were started.
    pub started: u64,
    /// Enclaves that ended by themselves.
    pub ended: u64,
    /// Cases with two or more enclaves at once.
    pub cases_with_two: u64,
    /// Enclaves that were made after another of the same case was closed.
    pub made_again: u64,
    /// How often a call met an answer; values of successful calls are `ok`.
    pub pairs: BTreeMap<(String, String), u64>,
}

/// Pairs that random cases meet on the C driver, from its order of checks (docs/driver.md). 258 cannot be reached at all, 264 and 273 need other memory
/// (docs/conformance.md, "Shapes").
pub const EXPECTED: &[(&str, &[&str])] = &[
    ("CREATE_VM", &["ok", "EFAULT", "NE_ERR_NO_CPUS_AVAIL_IN_POOL", "EIO", "EINVAL", "ENOMEM", "returns -5000", "errno 512"]),
    (
        "ADD_VCPU",
        &[
            "ok",
            "EFAULT",
            "EIO",
            "NE_ERR_VCPU_ALREADY_USED",
            "NE_ERR_VCPU_NOT_IN_CPU_POOL",
            "NE_ERR_NOT_IN_INIT_STATE",
            "NE_ERR_INVALID_VCPU",
            "NE_ERR_NO_CPUS_AVAIL_IN_POOL",
            "EINVAL",
        ],
    ),
    ("LOAD_INFO", &["ok", "EFAULT", "NE_ERR_NOT_IN_INIT_STATE", "NE_ERR_INVALID_FLAG_VALUE"]),
    (
        "SET_MEMORY",
        &[
            "ok",
            "EFAULT",
            "EIO",
            "ENOMEM",
            "NE_ERR_INVALID_FLAG_VALUE",
            "NE_ERR_NOT_IN_INIT_STATE",
            "NE_ERR_INVALID_MEM_REGION_SIZE",
            "NE_ERR_UNALIGNED_MEM_REGION_ADDR",
            "NE_ERR_INVALID_MEM_REGION_ADDR",
            "NE_ERR_MEM_REGION_ALREADY_USED",
            "NE_ERR_MEM_NOT_HUGE_PAGE",
            "NE_ERR_MEM_MAX_REGIONS",
        ],
    ),
    (
        "START",
        &[
            "ok",
            "EFAULT",
            "EIO",
            "EINVAL",
            "NE_ERR_INVALID_FLAG_VALUE",
            "NE_ERR_INVALID_ENCLAVE_CID",
            "NE_ERR_NOT_IN_INIT_STATE",
            "NE_ERR_NO_MEM_REGIONS_ADDED",
            "NE_ERR_ENCLAVE_MEM_MIN_SIZE",
            "NE_ERR_NO_VCPUS_ADDED",
            "NE_ERR_FULL_CORES_NOT_USED",
            "returns -5000",
            "errno 512",
        ],
    ),
    ("poll", &["0x0", "0x5", "0x10"]),
    ("ioctl", &["ENOTTY"]),
    ("pool", &["ok", "EPERM", "EINVAL", "ERANGE"]),
    ("Read", &["EINVAL"]),
    ("Write", &["EBADF", "EINVAL"]),
    ("Seek", &["ok"]),
    ("Map", &["ENODEV"]),
];

impl Coverage {
    /// Counts.
    #[must_use]
    pub fn of(transcript: &Transcript) -> Self {
        let mut all = Self::default();
        for case in transcript.lines.chunk_by(|a, b| a.case == b.case) {
            all.cases += 1;
            let (mut present, mut most, mut made) = (Present::default(), 0, 0);
            // The last steps only close.
            let before_closing = case.iter().rposition(|line| line.call == "faults \"\"").unwrap_or(case.len());
            for (place, line) in case.iter().enumerate() {
                let call = kind(&line.call);
                if place < before_closing {
                    all.steps += 1;
                    all.reached += u64::from(!matches!(line.answer.as_str(), NO_ENCLAVE | "in use" | LEFT_OUT));
                    *all.pairs.entry((call.to_owned(), answer(call, &line.answer))).or_default() += 1;
                }
                let ok = line.answer == "0" || line.answer.starts_with("0 ");
                present.follow(line);
                match call {
                    "CREATE_VM" if ok => {
                        all.made_again += u64::from(made > 0 && present.open_count() <= made);
                        made += 1;
                    }
                    "START" if ok => all.started += 1,
                    "ends" if ok => all.ended += 1,
                    _ => {}
                }
                most = most.max(present.count());
            }
            all.made += made as u64;
            all.cases_with_two += u64::from(most >= 2);
        }
        all
    }

    /// The part of all steps that had something to act on, in tenths of a percent.
    #[must_use]
    pub fn reached_permille(&self) -> u64 {
        self.reached * 1000 / self.steps.max(1)
    }

    /// Expected pairs that never occurred.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let pairs = EXPECTED.iter().flat_map(|(call, answers)| answers.iter().map(move |answer| (*call, *answer)));
        let met = |call: &str, answer: &str| self.pairs.contains_key(&(call.to_owned(), answer.to_owned()));
        pairs.filter(|(call, answer)| !met(call, answer)).map(|(call, answer)| format!("{call} -> {answer}")).collect()
    }
}

/// The name of a call without its arguments.
fn kind(call: &str) -> &str {
    let what = enclave_of(call).map_or_else(|| call.strip_prefix("device ").unwrap_or(call), |(_, what)| what);
    if what == "close by other" { what } else { what.split(' ').next().unwrap_or(what) }
}

/// An answer without its values.
fn answer(call: &str, answer: &str) -> String {
    let value = answer == "0" || answer.starts_with("0 ") || (call == "pool" && answer.parse::<u32>().is_ok());
    match call {
        _ if value => "ok",
        "read" | "online" | "memory" | "huge" => "ok",
        _ => answer,
    }
    .to_owned()
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let permille = self.reached_permille();
        writeln!(f, "{} cases, {} steps: {}.{} % had something to act on", self.cases, self.steps, permille / 10, permille % 10)?;
        writeln!(
            f,
            "{} enclaves made ({} after others), {} started, {} ended by themselves; {} cases with two or more at once",
            self.made, self.made_again, self.started, self.ended, self.cases_with_two
        )?;
        for ((call, answer), count) in &self.pairs {
            writeln!(f, "  {count:>6}  {call} -> {answer}")?;
        }
        for pair in self.missing() {
            writeln!(f, "  NEVER   {pair}")?;
        }
        Ok(())
    }
}
