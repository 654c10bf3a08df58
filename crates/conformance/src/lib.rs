//! Drives any `/dev/nitro_enclaves`, writes down every answer, and compares two such transcripts.
//!
//! A *case* is a list of [`step::Op`]s; a [`Target`] performs them: [`real::Real`] by system calls, [`simulated::Core`] with the driver core in
//! process. [`cases`] has the directed ones, [`random`] makes more from a seed. [`compare`] compares two transcripts, [`rules`] are the differences that are
//! meant. [`stress`] and [`mod@bench`] need no transcript: the first looks for what many callers at once can break, the second takes times. docs/conformance.md.

pub mod bench;
pub mod cases;
pub mod compare;
pub mod control;
pub mod coverage;
mod guess;
mod machine;
mod present;
pub mod probes;
pub mod random;
pub mod real;
pub mod record;
pub mod rules;
#[cfg(feature = "core")]
pub mod simulated;
mod sockets;
pub mod step;
pub mod stress;
mod sys;
pub mod transcript;
pub mod vsock;

use step::Op;

/// Something that can perform steps: a home of the driver.
pub trait Target {
    /// What the transcript's head says of it, as `name: value`.
    fn head(&self) -> Vec<(String, String)>;

    /// Performs one step and gives its answer, one line without a line break.
    fn perform(&mut self, op: &Op) -> String;
}

/// What a target says of a step that it has no means for, instead of an answer.
pub const LEFT_OUT: &str = "left out";

/// What a target says of a step on an enclave that is not there.
pub const NO_ENCLAVE: &str = "no enclave";
