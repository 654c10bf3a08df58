//! Standard output: JSON and text, without a panic when the reader has gone.
//!
//! Only results go to standard output; progress and remarks go to standard error ([`crate::remarks`]).

use std::io::{self, Write};

use serde::Serialize;

use crate::{codes::ErrorCode, failure::Failure};

/// Prints a value as indented JSON with a line end.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(ErrorCode::SERDE, "The result cannot be written as JSON").because(error))?;
    text.push('\n');
    bytes(text.as_bytes())
}

/// Prints bytes as they are. A reader that has gone (`| head`) is no failure.
pub fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    match write(bytes) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(ErrorCode::FILE_OPERATION, "Standard output cannot be written").because(error))
        }
        _ => Ok(()),
    }
}

/// As [`bytes`], but says what happened.
pub fn write(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}
