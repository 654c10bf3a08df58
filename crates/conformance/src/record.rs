//! What a driver said, small enough to keep: random cases are made from their seeds, so that only the answers are written down.

use std::fmt::Write as _;

use crate::random;
use crate::transcript::{self, Line, Transcript};
use crate::{Target, step::Op};

/// Answers do not contain it.
const BETWEEN: char = '|';

/// The answers of random cases: the head, then one line per case, `s<seed> answer|answer|...`.
#[must_use]
pub fn compact(transcript: &Transcript) -> String {
    let head = Transcript { head: transcript.head.clone(), lines: Vec::new() };
    let mut text = head.text();
    for lines in transcript.lines.chunk_by(|a, b| a.case == b.case) {
        let answers: Vec<&str> = lines.iter().map(|line| line.answer.as_str()).collect();
        let name = lines.first().map_or("", |line| line.case.as_str());
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name} {}", answers.join(&BETWEEN.to_string()));
    }
    text
}

/// The transcript of [`compact`]'s text, with the steps made anew; `None` if it is none, or was made by another generator.
#[must_use]
pub fn expand(text: &str, steps: usize) -> Option<Transcript> {
    let (head, rest) = text.split_at(text.find("\ns").map_or(text.len(), |place| place + 1));
    let mut transcript = Transcript::parse(head).ok()?;
    for line in rest.lines() {
        let (name, answers) = line.split_once(' ')?;
        let answers: Vec<&str> = answers.split(BETWEEN).collect();
        let mut replay = Replay(answers.into_iter());
        transcript::run(&mut replay, &random::case(name.strip_prefix('s')?.parse().ok()?, steps), &mut transcript.lines);
        if replay.0.next().is_some() {
            return None;
        }
    }
    Some(transcript)
}

/// Says what was recorded.
struct Replay<'a>(std::vec::IntoIter<&'a str>);

impl Target for Replay<'_> {
    fn head(&self) -> Vec<(String, String)> {
        Vec::new()
    }
    fn perform(&mut self, _op: &Op) -> String {
        self.0.next().unwrap_or("nothing was recorded").to_owned()
    }
}

/// The directed cases as recorded of the C driver.
pub const C_DRIVER_DIRECTED: &str = include_str!("../record/c-driver-directed.txt");
/// The random cases as recorded of the C driver, by [`compact`].
pub const C_DRIVER_RANDOM: &str = include_str!("../record/c-driver-random.txt");

/// Are these the same answers, line by line?
#[must_use]
pub fn first_difference<'a>(one: &'a Transcript, other: &'a Transcript) -> Option<(&'a Line, &'a Line)> {
    one.lines.iter().zip(&other.lines).find(|(one, other)| one != other)
}
