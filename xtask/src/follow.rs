//! Following what a program prints until it has said what is waited for: consoles, which go on for as long as their enclave.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};

use crate::context;

/// Starts a program and shows its standard output until a line contains `words`, then kills it; returns when nothing holds that output any more.
///
/// # Errors
///
/// When the program ends before, or `patience` does: that only ends hangs.
pub fn until(command: &mut Command, words: &str, patience: Duration) -> Result<()> {
    let shown = context::show(command);
    let mut program =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().into_diagnostic().wrap_err_with(|| format!("Starting `{shown}`"))?;
    let output = program.stdout.take().ok_or_else(|| miette!("`{shown}` has no output"))?;
    let (lines, received) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let outcome = wait_for(words, &received, patience).wrap_err_with(|| format!("Following `{shown}`"));
    let _already_ended = program.kill();
    let _status = program.wait();
    // To its end, not to the next line: what else holds the output ends too.
    received.iter().for_each(drop);
    let _joined = reader.join();
    outcome
}

fn wait_for(words: &str, received: &Receiver<String>, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("   | {line}");
                if line.contains(words) {
                    return Ok(());
                }
            }
            Err(RecvTimeoutError::Timeout) => bail!("{words:?} did not come within {} s", patience.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("It ended without {words:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never used up.
    const LONG: Duration = Duration::from_secs(600);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_program_that_goes_on_is_ended_once_it_has_said_the_words() {
        until(&mut shell("echo one; echo the other; exec sleep 1000"), "other", LONG).unwrap();
    }

    #[test]
    fn a_program_that_ends_without_the_words_is_an_error() {
        let error = until(&mut shell("echo one"), "other", LONG).unwrap_err();
        assert!(format!("{error:?}").contains("ended without"), "{error:?}");
    }

    #[test]
    fn a_program_that_says_nothing_is_ended_when_patience_is() {
        let error = until(&mut shell("exec sleep 1000"), "other", Duration::ZERO).unwrap_err();
        assert!(format!("{error:?}").contains("did not come"), "{error:?}");
    }
}
