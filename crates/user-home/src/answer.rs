//! How a call ends: [`Answer`].

use std::os::fd::OwnedFd;

use nitroxide_abi::Code;

use crate::handed::Handed;

/// What the caller gets.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The kernel makes the call.
    GoesOn,
    /// The call's value.
    Value(i64),
    /// Its errno, 256 to 275 among them.
    Error(i32),
    /// A descriptor for this open file, closed on exec or not.
    Descriptor(OwnedFd, bool),
    /// The same for a file that is watched.
    Handed(Handed, bool),
    /// The call was answered already, by other means.
    Done,
}

impl From<Result<u32, Code>> for Answer {
    fn from(result: Result<u32, Code>) -> Self {
        match result {
            Ok(value) => Self::Value(value.into()),
            Err(code) => Self::Error(code.number()),
        }
    }
}

impl From<Result<(), Code>> for Answer {
    fn from(result: Result<(), Code>) -> Self {
        result.map(|()| 0).into()
    }
}

impl From<std::io::Error> for Answer {
    /// ENOMEM where the system gave no errno.
    fn from(error: std::io::Error) -> Self {
        Self::Error(error.raw_os_error().unwrap_or(libc::ENOMEM))
    }
}
