//! Transcripts: a head, and one line per step: `case/step: call -> answer`.

use std::fmt::Write as _;

use crate::Target;
use crate::step::{ENCLAVES, Op};

/// A named list of steps.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its name, without blanks and slashes.
    pub name: String,
    /// Its steps.
    pub ops: Vec<Op>,
}

/// One step and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The case.
    pub case: String,
    /// The step, from 1.
    pub step: usize,
    /// The call.
    pub call: String,
    /// The answer.
    pub answer: String,
}

/// A head and lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    /// `name: value`.
    pub head: Vec<(String, String)>,
    /// In the order of the run.
    pub lines: Vec<Line>,
}

impl Transcript {
    /// The value of a line of the head.
    #[must_use]
    pub fn head_value(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Reads a transcript; `Err` has the number of the line that is none.
    ///
    /// # Errors
    ///
    /// The number of the first line that is neither head nor step.
    pub fn parse(text: &str) -> Result<Self, usize> {
        let mut transcript = Self::default();
        for (number, line) in (1_usize..).zip(text.lines()) {
            if line.is_empty() {
                continue;
            }
            if let Some(head) = line.strip_prefix("# ") {
                let (name, value) = head.split_once(": ").ok_or(number)?;
                transcript.head.push((name.to_owned(), value.to_owned()));
                continue;
            }
            transcript.lines.push(Line::parse(line).ok_or(number)?);
        }
        Ok(transcript)
    }

    /// The text that [`Transcript::parse`] reads.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.head {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# {name}: {value}");
        }
        for line in &self.lines {
            let _ = writeln!(text, "{}/{}: {} -> {}", line.case, line.step, line.call, line.answer);
        }
        text
    }
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let (place, rest) = line.split_once(": ")?;
        let (case, step) = place.rsplit_once('/')?;
        let (call, answer) = rest.rsplit_once(" -> ")?;
        Some(Self { case: case.to_owned(), step: step.parse().ok()?, call: call.to_owned(), answer: answer.to_owned() })
    }
}

/// Runs a case, and closes what it left open, as steps of their own.
pub fn run(target: &mut dyn Target, case: &Case, into: &mut Vec<Line>) {
    let mut ops = case.ops.clone();
    ops.push(Op::Faults(String::new()));
    for enclave in 0..ENCLAVES {
        let kept = case.ops.contains(&Op::Keep(enclave));
        ops.extend(kept.then_some(Op::Unkeep(enclave)));
        let made = case.ops.iter().any(|op| matches!(op, Op::Create { enclave: made, .. } if *made == enclave));
        ops.extend(made.then_some(Op::Close(enclave)));
    }
    ops.extend([Op::MaxRegions(4096), Op::Usage]);
    for (step, op) in (1..).zip(&ops) {
        let answer = target.perform(op);
        into.push(Line { case: case.name.clone(), step, call: op.to_string(), answer });
    }
}

/// Runs cases and gives the transcript.
pub fn run_all(target: &mut dyn Target, cases: impl IntoIterator<Item = Case>) -> Transcript {
    let mut transcript = Transcript { head: target.head(), lines: Vec::new() };
    for case in cases {
        run(target, &case, &mut transcript.lines);
    }
    transcript
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_as_it_was_written() {
        let line = Line { case: "pool".to_owned(), step: 3, call: "pool \"2: -> 3\"".to_owned(), answer: "EINVAL".to_owned() };
        let transcript = Transcript { head: vec![("kernel".to_owned(), "7.3".to_owned())], lines: vec![line] };
        assert_eq!(Transcript::parse(&transcript.text()), Ok(transcript));
        assert_eq!(Transcript::parse("# a: b\nno step\n"), Err(2));
    }
}
