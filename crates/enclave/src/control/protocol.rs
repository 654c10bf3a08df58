//! The words of the control protocol, version 1.
//!
//! A client sends one [`Request`], the server one [`Reply`]. After a reply with [`Answer::Stream`], frames of console output follow, then an
//! empty frame, then another reply: [`Answer::Ended`] if the enclave has ended, [`Answer::Detached`] otherwise. Unknown fields are ignored on both sides; a new
//! meaning needs a new version.

use serde::{Deserialize, Serialize};

use crate::report::{Description, EndReport};

/// The version of the protocol described here.
pub const VERSION: u32 = 1;

/// The longest request in bytes.
pub const MAX_REQUEST_BYTES: u32 = 4 << 10;

/// The longest answer, and the longest piece of console output, in bytes.
pub const MAX_ANSWER_BYTES: u32 = 4 << 20;

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The client's version of the protocol.
    pub protocol: u32,
    /// What it wants.
    #[serde(flatten)]
    pub command: Command,
}

/// What a client can want.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Command {
    /// A description; with `measured`, not before the measurements are known (within reason).
    Describe {
        /// Whether to wait for the measurements.
        measured: bool,
    },
    /// The end; answered when the VM is gone. The connection then stays open until the enclave process ends.
    Terminate,
    /// To wait for the end.
    Wait,
    /// The console's output from the oldest byte that is kept, in any mode.
    Logs {
        /// Whether to go on until the enclave ends.
        follow: bool,
    },
    /// The console as CID 0 gives it: as [`Command::Logs`], but in debug mode only, and always to the end.
    Console,
}

impl Command {
    /// Whether the answer may take as long as the enclave runs.
    #[must_use]
    pub fn is_long(self) -> bool {
        !matches!(self, Self::Describe { .. })
    }
}

/// What the server sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The server's version of the protocol.
    pub protocol: u32,
    /// Its answer.
    pub answer: Answer,
}

/// What the server can answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Answer {
    /// To `describe`.
    Description(Box<Description>),
    /// To `terminate` and `wait`, and behind a stream: how the enclave ended.
    Ended(EndReport),
    /// To `logs` and `console`: output follows.
    Stream,
    /// Behind a stream: the enclave goes on.
    Detached,
    /// The request cannot be answered.
    Failed {
        /// Why, for programs.
        failure: Failure,
        /// Why, for people.
        message: String,
    },
}

/// Why a request cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Failure {
    /// Another version of the protocol.
    Version,
    /// No request of this protocol.
    Malformed,
    /// The enclave is not in debug mode.
    NotDebug,
    /// Too many others are being answered.
    Busy,
    /// The caller is neither the enclave's user nor root.
    NotAllowed,
    /// There is no console here.
    NoConsole,
}
