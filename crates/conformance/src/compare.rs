//! Compares two transcripts of the same steps: every difference is in the table of [`RULES`], or it is a failure.
//!
//! Left is the C driver, right another home. After a difference that changes what follows, the rest of the case, or of the enclave's part in it, is not
//! compared, and counted so. docs/conformance.md, "Rules".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::present::{Present, enclave_of};
use crate::rules::{RULES, Step, Then};
use crate::step::ENCLAVES;
use crate::transcript::{Line, Transcript};
use crate::{LEFT_OUT, NO_ENCLAVE};

/// At least so many of a hundred steps must be compared.
pub const MIN_COMPARED_PERCENT: u64 = 95;

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

/// Which steps cannot be compared at the moment.
#[derive(Default)]
struct Behind {
    sides: [Present; 2],
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
    use crate::rules::{ALREADY_USED, MAX_REGIONS, NOT_INIT};

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
