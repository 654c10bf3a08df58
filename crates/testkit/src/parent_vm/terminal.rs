//! The user's terminal, connected to one in the parent VM.

use std::io::{self, IsTerminal, Read, Write};
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::control::{Control, JobError};

/// How often the terminal's size is looked at.
const SIZE_INTERVAL: Duration = Duration::from_millis(500);

/// Runs `script` (empty: a shell) until it ends. Where standard input and output are a terminal it gets one too; otherwise it gets pipes.
pub fn interact(control: &Control, script: &str) -> io::Result<i32> {
    let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    // A terminal that does not know its size says zero.
    let known = || tcgetwinsize(io::stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    let size = || known().map_or((25, 80), |size| (size.ws_row, size.ws_col));
    let mut shown = size();
    let (mut job, _raw) = if is_terminal {
        (control.start_on_terminal(script, shown), Some(Raw::set()?))
    } else {
        (control.start(if script.is_empty() { "exec sh" } else { script }), None)
    };
    let input = job.sender();
    // It ends with the process: a read of standard input cannot be broken off.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let length = io::stdin().lock().read(&mut buffer).unwrap_or(0);
            if input.give(buffer.get(..length).unwrap_or_default()).is_err() || length == 0 {
                return;
            }
        }
    });
    let mut out = io::stdout();
    loop {
        if let Some(piece) = job.next_output(SIZE_INTERVAL) {
            out.write_all(&piece)?;
            out.flush()?;
        } else if job.has_ended() {
            break;
        }
        if is_terminal && size() != shown {
            shown = size();
            job.resize(shown.0, shown.1);
        }
    }
    match job.wait(Duration::ZERO) {
        Ok(output) => Ok(output.status),
        Err(JobError::Gone(_)) => Err(io::Error::other("the parent VM ended")),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// The terminal passes everything on as it is typed; dropped, it is as before.
struct Raw(Termios);

impl Raw {
    fn set() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
