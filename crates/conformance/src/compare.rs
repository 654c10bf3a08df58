//! Compares two transcripts of the same steps: every difference is in the table of [`RULES`], or it is a failure.
//!
//! Left is the C driver, right another home. After a difference that changes what follows, the rest of the case, or of the enclave's part in it, is not
//! compared, and counted so. docs/conformance.md, "Rules".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::step::ENCLAVES;
use crate::transcript::{Line, Transcript};
use crate::{LEFT_OUT, NO_ENCLAVE};

/// At least so many of a hundred steps must be compared.
pub const MIN_COMPARED_PERCENT: u64 = 95;

/// What a difference means for the steps behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// They can be compared.
    GoOn,
    /// Those of this enclave cannot, until it is closed.
    Enclave,
    /// Those of no enclave can, until all are closed.
    Enclaves,
}

/// A difference that is meant.
pub struct Rule {
    /// Its name; W numbers are those of docs/driver.md, "Weaknesses".
    pub id: &'static str,
    /// Why.
    pub reason: &'static str,
    /// What follows.
    pub then: Then,
    /// Is it this one?
    fits: fn(&Step<'_>) -> bool,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

/// One step of both sides, and what was before it in the case.
struct Step<'a> {
    call: &'a str,
    left: &'a str,
    right: &'a str,
    before: &'a [(Line, Line)],
}

impl Step<'_> {
    fn is(&self, what: &str) -> bool {
        self.call.contains(what)
    }

    /// Steps before it on this enclave since it was made.
    fn since_made(&self) -> impl Iterator<Item = &(Line, Line)> {
        let enclave = enclave_of(self.call).map(|(enclave, _)| enclave);
        let own = move |call: &str| enclave.is_some() && enclave_of(call).map(|(enclave, _)| enclave) == enclave;
        self.before.iter().rev().filter(move |(line, _)| own(&line.call)).take_while(|(line, _)| !line.call.contains("CREATE_VM"))
    }

    /// Was there such a call before in the case?
    fn earlier(&self, call: impl Fn(&str) -> bool) -> bool {
        self.before.iter().any(|(left, _)| call(&left.call))
    }

    /// Does the device refuse this command by a fault that was set before?
    fn refusing(&self, command: &str) -> bool {
        self.earlier(|call| call.starts_with(&format!("faults \"{command}")) && call.contains("=-"))
    }

    /// Did both sides refuse memory of some enclave because a page of it is an enclave's already?
    fn memory_was_refused_for_a_page(&self) -> bool {
        self.before.iter().any(|(left, right)| {
            left.call.contains("SET_MEMORY") && [&left.answer, &right.answer].iter().all(|answer| *answer == ALREADY_USED)
        })
    }

    /// Was this enclave started?
    fn started(&self) -> bool {
        self.since_made().any(|(left, _)| left.call.contains(" START ") && (left.answer.starts_with('0') || left.answer == "EFAULT"))
    }

    /// Did the device or the owner check refuse a vCPU of an enclave that is still there?
    fn vcpu_was_refused(&self) -> bool {
        let mut sides = Behind::default();
        let mut refused = [false; ENCLAVES];
        for (left, right) in self.before {
            sides.follow(left, right);
            let Some((enclave, what)) = enclave_of(&left.call) else { continue };
            if let Some(place) = refused.get_mut(enclave) {
                let gone = !sides.sides.iter().any(|side| side.has(enclave));
                *place = !gone && (*place || what.starts_with("ADD_VCPU") && is_device_code(&left.answer));
            }
        }
        refused.contains(&true)
    }

    /// Did the device refuse memory of this enclave that this call's touches?
    fn memory_was_refused(&self) -> bool {
        // Answers that come before the device is asked.
        let checked = |answer: &str| answer.starts_with("NE_ERR") && !matches!(answer, ALREADY_USED | MAX_REGIONS);
        let Some(wanted) = region(self.call) else { return false };
        self.since_made().any(|(left, _)| {
            let refused = left.answer != "0" && left.answer != "EFAULT" && left.answer != NO_ENCLAVE && !checked(&left.answer);
            refused && region(&left.call).is_some_and(|kept| wanted.touches(&kept))
        })
    }
}

const ALREADY_USED: &str = "NE_ERR_MEM_REGION_ALREADY_USED";
const MAX_REGIONS: &str = "NE_ERR_MEM_MAX_REGIONS";
const NOT_INIT: &str = "NE_ERR_NOT_IN_INIT_STATE";

/// Not a success, and none of the driver's own codes: what the owner check and the device say.
fn is_device_code(answer: &str) -> bool {
    !answer.starts_with('0') && !answer.starts_with("NE_ERR") && answer != "EFAULT" && answer != NO_ENCLAVE
}

/// The memory that a call gives away.
struct Given<'a> {
    area: &'a str,
    first: u64,
    end: u64,
}

impl Given<'_> {
    fn touches(&self, other: &Given<'_>) -> bool {
        self.area == other.area && self.first < other.end && other.first < self.end.max(self.first + 1)
    }
}

/// The memory of `e0 SET_MEMORY Pages+8M size 4M flags 0`; `None` of another call, or of one with sizes that are none.
fn region(call: &str) -> Option<Given<'_>> {
    let mut words = call.split_once(" SET_MEMORY ")?.1.split(' ');
    let bytes = |text: &str| match text.strip_suffix('M') {
        Some(number) => number.parse::<u64>().ok()?.checked_mul(1 << 20),
        None if text == "0" => Some(0),
        None => u64::from_str_radix(text.strip_prefix("0x")?, 16).ok(),
    };
    let (area, offset) = words.next()?.split_once('+')?;
    let (first, size) = (bytes(offset)?, bytes(words.nth(1)?)?);
    Some(Given { area, first, end: first.checked_add(size)? })
}

/// The differences that are meant; the first that fits is taken.
pub const RULES: &[Rule] = &[
    Rule {
        id: "W5",
        reason: "a device code that is no errno reaches the caller as EIO, not as it is",
        then: Then::GoOn,
        fits: |step| (step.left.starts_with("returns -") || odd_errno(step.left)) && step.right == "EIO",
    },
    Rule {
        id: "W19",
        reason: "the C driver has none of the extension's commands",
        then: Then::GoOn,
        fits: |step| (step.is("ioctl 0x0000ae3") || step.is("ioctl 0x0000ae20")) && step.left == "ENOTTY",
    },
    Rule {
        id: "W2",
        reason: "a failed SLOT_INFO changes nothing; the C driver takes it for the state INIT and hangs up",
        then: Then::Enclaves,
        fits: |step| {
            let hung_up = step.is(" poll") && step.left == "0x10" && step.right == "0x0";
            let is_call = ["ADD_VCPU", "LOAD_INFO", "SET_MEMORY", " START "].into_iter().any(|call| step.is(call));
            let init_again = is_call && step.right == NOT_INIT && step.left != NOT_INIT;
            (hung_up || init_again)
                && step.started()
                && step.refusing("info")
                && step.earlier(|call| call == "event" || call.ends_with(" ends"))
        },
    },
    Rule {
        id: "W13-write",
        reason: "pages are pinned for writing; the C driver takes pages that are mapped read only",
        then: Then::Enclave,
        fits: |step| step.is("SET_MEMORY ReadOnly") && step.left == "0" && step.right == "EFAULT",
    },
    Rule {
        id: "W14",
        reason: "a part of a page of 1 GiB is refused; the C driver gives all of the page away",
        then: Then::Enclave,
        fits: |step| step.is("SET_MEMORY Gigantic+0 size 2M") && step.left == "0" && step.right == "NE_ERR_INVALID_PAGE_SIZE",
    },
    Rule {
        id: "W18",
        reason: "a CPU that was brought online by hand is not given away",
        then: Then::Enclaves,
        fits: |step| {
            step.is("ADD_VCPU")
                && step.left.starts_with("0 cpu")
                && step.earlier(|call| call.starts_with("cpu") && call.ends_with("online"))
        },
    },
    Rule {
        id: "W11",
        reason: "a core stays in the pool if its vCPU was refused; in the C driver it moves to the enclave before the owner and the device are asked",
        then: Then::Enclaves,
        fits: |step| {
            let missing = matches!(step.left, "NE_ERR_NO_CPUS_AVAIL_IN_POOL" | "NE_ERR_VCPU_NOT_IN_CPU_POOL");
            // Right is what the driver says where the core is in the pool: success, EFAULT, the owner check, or the device.
            let there = !step.right.starts_with("NE_ERR");
            let expected = if step.is("ADD_VCPU") {
                // Another core is the first one, or the last one is gone.
                (step.left.starts_with("0 cpu") && step.right.starts_with("0 cpu")) || (missing && there)
            } else if step.is("CREATE_VM") {
                step.left == "NE_ERR_NO_CPUS_AVAIL_IN_POOL" && there
            } else {
                step.is(" START ") && step.left == "NE_ERR_FULL_CORES_NOT_USED" && there
            };
            expected && step.vcpu_was_refused()
        },
    },
    Rule {
        id: "W12",
        reason: "a region of which the device took nothing is not kept; in the C driver its range stays used",
        then: Then::Enclave,
        // Refused by a fault, for too many pieces, or because an enclave has the page (W13).
        fits: |step| step.is("SET_MEMORY") && step.left == ALREADY_USED && step.memory_was_refused(),
    },
    Rule {
        id: "W12-pages",
        reason: "pages of a region of which the device took nothing go back at once, in the C driver at the last close",
        then: Then::GoOn,
        fits: |step| {
            let numbers = step.left.parse::<u64>().ok().zip(step.right.parse::<u64>().ok());
            step.is("huge pages in use") && numbers.is_some_and(|(left, right)| left > right) && step.refusing("add-mem")
        },
    },
    Rule {
        id: "W13",
        reason: "a page that another enclave has is refused before the device is asked, whose answer was made to be another one here",
        then: Then::Enclave,
        // By a fault, or because the device was told to take fewer pieces than it had promised the driver.
        fits: |step| {
            let limited = step.left == MAX_REGIONS && step.earlier(|call| call.starts_with("max regions"));
            step.is("SET_MEMORY") && step.right == ALREADY_USED && (limited || is_device_code(step.left) && step.refusing("add-mem"))
        },
    },
    Rule {
        id: "W13-runs",
        reason: "memory with a page of another enclave is refused as a whole; the C driver has given the device the runs before that page, and they stay",
        then: Then::Enclaves,
        fits: |step| {
            let shows = ["SET_MEMORY", " START ", "memory of slots", "huge pages in use"].into_iter().any(|call| step.is(call));
            shows && step.memory_was_refused_for_a_page()
        },
    },
];

/// Errnos that no user space knows, or that it would repeat calls for.
fn odd_errno(answer: &str) -> bool {
    let number = answer.strip_prefix("errno ").and_then(|number| number.parse::<u32>().ok());
    answer == "EINTR" || answer == "ERESTART" || answer == "NE_ERR_NOT_IN_RUNNING_STATE" || number.is_some_and(|number| number > 133)
}

/// A difference that no rule knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Of the C driver.
    pub left: Line,
    /// Of the other.
    pub right: Line,
    /// The lines of the case up to it, as both sides said them.
    pub story: Vec<String>,
}

/// What came of a comparison.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Cases.
    pub cases: usize,
    /// Steps of all cases.
    pub steps: u64,
    /// Steps that were compared, differences by rules among them.
    pub compared: u64,
    /// Steps behind a difference that changes what follows.
    pub behind: u64,
    /// Steps that one side had no means for.
    pub left_out: u64,
    /// How often each rule was used.
    pub used: BTreeMap<&'static str, u64>,
    /// Differences without a rule.
    pub differences: Vec<Difference>,
    /// The two are no transcripts of the same steps.
    pub mismatch: Option<String>,
}

impl Report {
    /// Is everything as it must be?
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.differences.is_empty() && self.mismatch.is_none() && self.compared * 100 >= self.steps * MIN_COMPARED_PERCENT && self.steps > 0
    }

    /// Adds another comparison.
    pub fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.steps += other.steps;
        self.compared += other.compared;
        self.behind += other.behind;
        self.left_out += other.left_out;
        for (id, count) in other.used {
            *self.used.entry(id).or_default() += count;
        }
        self.differences.extend(other.differences);
        self.mismatch = self.mismatch.take().or(other.mismatch);
    }
}

impl Report {
    /// Why it is not good, or that it is; one line.
    fn verdict(&self) -> String {
        match (&self.mismatch, self.differences.len()) {
            (Some(mismatch), _) => format!("NOT THE SAME STEPS: {mismatch}"),
            (None, 0) if self.is_good() => "GOOD: every difference has its reason".to_owned(),
            (None, 0) if self.steps == 0 => "NOT GOOD: nothing to compare".to_owned(),
            (None, 0) => format!("NOT GOOD: less than {MIN_COMPARED_PERCENT} % of the steps could be compared"),
            (None, 1) => "NOT GOOD: one difference without a reason".to_owned(),
            (None, count) => format!("NOT GOOD: {count} differences without a reason"),
        }
    }
}

impl fmt::Display for Report {
    /// The verdict, the counts, the reasons, and then the differences without one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        let permille = self.compared.saturating_mul(1000) / self.steps.max(1);
        writeln!(f, "{}", self.verdict())?;
        writeln!(
            f,
            "{} cases, {} steps: {} compared ({}.{} %), {} behind a known difference, {} left out",
            self.cases,
            self.steps,
            self.compared,
            permille / 10,
            permille % 10,
            self.behind,
            self.left_out,
        )?;
        for rule in RULES {
            if let Some(count) = self.used.get(rule.id) {
                writeln!(f, "  {} x{count}: {}", rule.id, rule.reason)?;
            }
        }
        let unused: Vec<&str> = RULES.iter().map(|rule| rule.id).filter(|id| !self.used.contains_key(id)).collect();
        if !unused.is_empty() {
            writeln!(f, "  not needed: {}", unused.join(", "))?;
        }
        for difference in self.differences.iter().take(SHOWN) {
            let Line { case, step, call, .. } = &difference.left;
            writeln!(f, "\nDIFFERENCE {case}/{step}: {call}\n  left:  {}\n  right: {}", difference.left.answer, difference.right.answer)?;
            for line in &difference.story {
                writeln!(f, "    {line}")?;
            }
            match case.strip_prefix('s').filter(|seed| seed.parse::<u64>().is_ok()) {
                Some(seed) => writeln!(f, "  again: nitroxide-conformance random --seed {seed} --sequences 1")?,
                None => writeln!(f, "  again: nitroxide-conformance run --filter {case}")?,
            }
        }
        match self.differences.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => writeln!(f, "\n... and {more} more"),
        }
    }
}

/// Which enclaves are there, on one side of a case.
#[derive(Default)]
struct Side {
    open: [bool; ENCLAVES],
    kept: [bool; ENCLAVES],
}

impl Side {
    fn follow(&mut self, line: &Line) {
        let Some((enclave, what)) = enclave_of(&line.call) else { return };
        let (Some(open), Some(kept)) = (self.open.get_mut(enclave), self.kept.get_mut(enclave)) else { return };
        match what {
            _ if line.answer != "0" => {}
            "CREATE_VM" => *open = true,
            "kept by other" => *kept = true,
            "close" => *open = false,
            "close by other" => *kept = false,
            _ => {}
        }
    }

    fn has(&self, enclave: usize) -> bool {
        self.open.get(enclave) == Some(&true) || self.kept.get(enclave) == Some(&true)
    }
}

/// The enclave that a call is about, and the call.
fn enclave_of(call: &str) -> Option<(usize, &str)> {
    let (enclave, what) = call.strip_prefix('e')?.split_once(' ')?;
    Some((enclave.parse().ok()?, what))
}

/// Which steps cannot be compared at the moment.
#[derive(Default)]
struct Behind {
    sides: [Side; 2],
    enclaves: [bool; ENCLAVES],
}

impl Behind {
    fn covers(&self, call: &str) -> bool {
        match enclave_of(call) {
            Some((enclave, _)) => self.enclaves.get(enclave) == Some(&true),
            None => (call == "memory of slots" || call.starts_with("pool ")) && self.enclaves.contains(&true),
        }
    }

    fn begin(&mut self, then: Then, call: &str) {
        match (then, enclave_of(call)) {
            (Then::GoOn, _) => {}
            (Then::Enclave, Some((enclave, _))) => self.enclaves.iter_mut().skip(enclave).take(1).for_each(|behind| *behind = true),
            (Then::Enclaves, _) | (Then::Enclave, None) => self.enclaves = [true; ENCLAVES],
        }
    }

    /// After a step: an enclave that is gone on both sides can be compared again; all of them at once, for cores and pages are shared.
    fn follow(&mut self, left: &Line, right: &Line) {
        for (side, line) in self.sides.iter_mut().zip([left, right]) {
            side.follow(line);
        }
        let dirty = (0..ENCLAVES).filter(|enclave| self.enclaves.get(*enclave) == Some(&true));
        if dirty.into_iter().all(|enclave| self.sides.iter().all(|side| !side.has(enclave))) {
            self.enclaves = Default::default();
        }
    }
}

/// Compares the C driver's transcript with another.
#[must_use]
pub fn compare(left: &Transcript, right: &Transcript) -> Report {
    let mut report = Report { cases: left.lines.iter().map(|line| &line.case).collect::<BTreeSet<_>>().len(), ..Report::default() };
    if left.lines.len() != right.lines.len() {
        report.mismatch = Some(format!("{} steps and {}", left.lines.len(), right.lines.len()));
    }
    let mut before: Vec<(Line, Line)> = Vec::new();
    let mut behind = Behind::default();
    for (left, right) in left.lines.iter().zip(&right.lines) {
        if (&left.case, left.step, &left.call) != (&right.case, right.step, &right.call) {
            report.mismatch.get_or_insert_with(|| {
                format!("{}/{}: {} and {}/{}: {}", left.case, left.step, left.call, right.case, right.step, right.call)
            });
            break;
        }
        if before.last().is_none_or(|(last, _)| last.case != left.case) {
            before.clear();
            behind = Behind::default();
        }
        report.steps += 1;
        if left.answer == LEFT_OUT || right.answer == LEFT_OUT {
            report.left_out += 1;
        } else if behind.covers(&left.call) {
            report.behind += 1;
        } else {
            report.compared += 1;
            if left.answer != right.answer {
                behind.begin(judge(left, right, &before, &mut report), &left.call);
            }
        }
        behind.follow(left, right);
        before.push((left.clone(), right.clone()));
    }
    report
}

/// A step that differs: what of the rest is beyond comparing?
fn judge(left: &Line, right: &Line, before: &[(Line, Line)], report: &mut Report) -> Then {
    let step = Step { call: &left.call, left: &left.answer, right: &right.answer, before };
    if let Some(rule) = RULES.iter().find(|rule| (rule.fits)(&step)) {
        *report.used.entry(rule.id).or_default() += 1;
        return rule.then;
    }
    let told = before.iter().filter(|(left, _)| left.answer != NO_ENCLAVE);
    let story =
        told.map(|(left, right)| format!("{}/{}: {} -> {} | {}", left.case, left.step, left.call, left.answer, right.answer)).collect();
    report.differences.push(Difference { left: left.clone(), right: right.clone(), story });
    Then::Enclaves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(lines: &[(&str, &str, &str)]) -> Transcript {
        let mut transcript = Transcript::default();
        for (step, (case, call, answer)) in (1..).zip(lines) {
            transcript.lines.push(Line { case: (*case).to_owned(), step, call: (*call).to_owned(), answer: (*answer).to_owned() });
        }
        transcript
    }

    #[test]
    fn the_same_is_good() {
        let one = transcript(&[("a", "e0 CREATE_VM", "0"), ("a", "e0 close", "0")]);
        assert!(compare(&one, &one).is_good());
    }

    #[test]
    fn an_unknown_difference_is_a_failure_with_what_was_before() {
        let left = transcript(&[("s7", "e0 CREATE_VM", "0"), ("s7", "e0 poll", "0x0"), ("s7", "e0 close", "0")]);
        let right = transcript(&[("s7", "e0 CREATE_VM", "0"), ("s7", "e0 poll", "0x10"), ("s7", "e0 close", "0")]);
        let report = compare(&left, &right);
        assert!(!report.is_good());
        assert_eq!((report.compared, report.behind, report.differences.len()), (2, 1, 1));
        assert!(report.to_string().contains("random --seed 7 --sequences 1"), "{report}");
    }

    #[test]
    fn a_meant_difference_is_counted_and_what_follows_is_not_compared() {
        let steps = |first: &'static str, second: &'static str| {
            transcript(&[
                ("a", "e0 CREATE_VM", "0"),
                ("a", "e0 START cid 0 flags 0", "0 cid 16"),
                ("a", "faults \"info=-EIO\"", "0"),
                ("a", "event", "0"),
                ("a", "e0 poll", first),
                ("a", "e0 poll", second),
                ("b", "e0 poll", "0x0"),
            ])
        };
        let report = compare(&steps("0x10", "0x10"), &steps("0x0", "0x0"));
        assert_eq!((report.used.get("W2"), report.compared, report.behind), (Some(&1), 6, 1));
        assert!(report.differences.is_empty());
    }

    /// What a rule says of these last answers after that story.
    fn last(story: &[(&str, &str)], call: &str, left: &str, right: &str) -> Option<&'static str> {
        let mut lines: Vec<_> = story.iter().map(|(call, answer)| ("a", *call, *answer)).collect();
        lines.push(("a", call, left));
        let left = transcript(&lines);
        let mut other = left.clone();
        other.lines.last_mut().unwrap().answer = right.to_owned();
        compare(&left, &other).used.into_keys().next()
    }

    const STARTED: [(&str, &str); 4] =
        [("e0 CREATE_VM", "0"), ("e0 START cid 0 flags 0", "0 cid 16"), ("faults \"info=-EIO\"", "0"), ("event", "0")];

    #[test]
    fn w13_runs_wants_memory_that_both_sides_have_refused() {
        let call = "e1 SET_MEMORY Pages+2M size 2M flags 0";
        let refused = [("e2 CREATE_VM", "0"), ("e1 CREATE_VM", "0"), ("e2 SET_MEMORY Pages+4M size 4M flags 0", ALREADY_USED)];
        assert_eq!(last(&refused, call, ALREADY_USED, "0"), Some("W13-runs"));
        assert_eq!(last(&refused, "memory of slots", "4194304", "0"), Some("W13-runs"));
        assert_eq!(last(&refused, "e1 ADD_VCPU 0", "0 cpu 2", "0 cpu 3"), None);
        assert_eq!(last(&refused[..2], call, ALREADY_USED, "0"), None);
    }

    #[test]
    fn w13_wants_a_device_that_was_told_to_take_fewer_pieces() {
        let call = "e1 SET_MEMORY Pages+2M size 2M flags 0";
        let story = [("e1 CREATE_VM", "0"), ("max regions 1", "0")];
        assert_eq!(last(&story, call, MAX_REGIONS, ALREADY_USED), Some("W13"));
        assert_eq!(last(&story[..1], call, MAX_REGIONS, ALREADY_USED), None);
        assert_eq!(last(&story, call, ALREADY_USED, MAX_REGIONS), None);
    }

    #[test]
    fn w2_wants_a_refused_look_at_an_enclave_that_runs_and_the_answers_of_both_sides() {
        assert_eq!(last(&STARTED, "e0 poll", "0x10", "0x0"), Some("W2"));
        assert_eq!(last(&STARTED, "e0 ADD_VCPU 0", "0 cpu 2", NOT_INIT), Some("W2"));
        // The other way round, another answer, and each cause missing.
        assert_eq!(last(&STARTED, "e0 poll", "0x0", "0x10"), None);
        assert_eq!(last(&STARTED, "e0 ADD_VCPU 0", NOT_INIT, "0 cpu 2"), None);
        assert_eq!(last(&STARTED, "e0 ADD_VCPU 0", "0 cpu 2", "EFAULT"), None);
        assert_eq!(last(&STARTED, "memory of slots", "0M", "64M"), None);
        for (missing, line) in STARTED.iter().enumerate().skip(1) {
            let story: Vec<_> = STARTED.iter().enumerate().filter(|(place, _)| *place != missing).map(|(_, line)| *line).collect();
            assert_eq!(last(&story, "e0 poll", "0x10", "0x0"), None, "without {line:?}");
        }
    }

    #[test]
    fn w11_wants_a_refused_vcpu_of_an_enclave_that_is_there_and_the_answers_of_both_sides() {
        const NONE: &str = "NE_ERR_NO_CPUS_AVAIL_IN_POOL";
        let story = [("e0 CREATE_VM", "0"), ("e0 ADD_VCPU 2 by other", "EIO")];
        assert_eq!(last(&story, "e0 ADD_VCPU 0", "0 cpu 3", "0 cpu 2"), Some("W11"));
        assert_eq!(last(&story, "e1 CREATE_VM", NONE, "0"), Some("W11"));
        assert_eq!(last(&story, "e0 START cid 0 flags 0", "NE_ERR_FULL_CORES_NOT_USED", "0 cid 16"), Some("W11"));
        assert_eq!(last(&story, "e1 CREATE_VM", "0", NONE), None);
        assert_eq!(last(&story, "e0 START cid 0 flags 0", "0 cid 16", "NE_ERR_FULL_CORES_NOT_USED"), None);
        assert_eq!(last(&story, "e0 ADD_VCPU 9", "NE_ERR_INVALID_VCPU", "0 cpu 3"), None);
        assert_eq!(last(&story[..1], "e1 CREATE_VM", NONE, "0"), None);
        let closed = [story[0], story[1], ("e0 close", "0")];
        assert_eq!(last(&closed, "e1 CREATE_VM", NONE, "0"), None);
    }

    #[test]
    fn w12_wants_memory_that_the_device_refused_and_that_this_call_touches() {
        let story = [("e0 CREATE_VM", "0"), ("e0 SET_MEMORY Pages+8M size 4M flags 0", "EIO")];
        assert_eq!(last(&story, "e0 SET_MEMORY Pages+10M size 2M flags 0", ALREADY_USED, "0"), Some("W12"));
        assert_eq!(last(&story, "e0 SET_MEMORY Pages+12M size 2M flags 0", ALREADY_USED, "0"), None);
        assert_eq!(last(&story, "e0 SET_MEMORY Alias+8M size 2M flags 0", ALREADY_USED, "0"), None);
        assert_eq!(last(&story, "e1 SET_MEMORY Pages+8M size 2M flags 0", ALREADY_USED, "0"), None);
        assert_eq!(last(&story, "e0 SET_MEMORY Pages+8M size 2M flags 0", "0", ALREADY_USED), None);
    }

    #[test]
    fn first_line_is_the_verdict() {
        let one = transcript(&[("a", "e0 CREATE_VM", "0")]);
        assert!(compare(&one, &one).to_string().starts_with("GOOD"));
        assert!(compare(&one, &transcript(&[("a", "e0 CREATE_VM", "EIO")])).to_string().starts_with("NOT GOOD: one difference"));
        assert!(compare(&one, &transcript(&[("b", "e0 CREATE_VM", "0")])).to_string().starts_with("NOT THE SAME STEPS"));
    }

    #[test]
    fn too_few_compared_steps_are_a_failure() {
        let left = transcript(&[("a", "event", "left out"), ("a", "e0 poll", "0x0")]);
        assert!(!compare(&left, &left).is_good());
    }

    #[test]
    fn other_steps_are_no_comparison() {
        let report = compare(&transcript(&[("a", "event", "0")]), &transcript(&[("a", "unmap", "0")]));
        assert!(report.mismatch.is_some() && !report.is_good());
    }

    #[test]
    fn every_rule_has_a_name_of_its_own_and_a_reason() {
        let ids: BTreeSet<_> = RULES.iter().map(|rule| rule.id).collect();
        assert_eq!(ids.len(), RULES.len());
        assert!(RULES.iter().all(|rule| !rule.reason.is_empty()));
    }
}
