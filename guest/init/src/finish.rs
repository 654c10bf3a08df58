//! The end: tell the parent's side how the application ended, then power off.

use std::{fmt, io::Write, thread, time::Duration};

use nitroxide_guest_sys::vsock;
use rustix::system::{RebootCommand, reboot};

use crate::say;

/// The port on CID 3 that takes the exit status (docs/guest-init.md). It is not AWS's, where the connection is refused, which is no error.
const PORT: u32 = 9001;
/// Exit status when init itself failed: the one container engines use for their own errors.
const INIT_FAILED: u8 = 125;

/// How the application ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this status.
    Exited(u8),
    /// By this signal.
    Signalled(u8),
}

impl Ending {
    /// Init could not start the application.
    pub const INIT_FAILED: Self = Self::Exited(INIT_FAILED);

    /// The two bytes that go to the parent's side: kind, code.
    pub const fn to_bytes(self) -> [u8; 2] {
        match self {
            Self::Exited(code) => [1, code],
            Self::Signalled(signal) => [2, signal],
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with status {code}"),
            Self::Signalled(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

/// Reports and powers off.
pub fn end(ending: Ending) -> ! {
    report(ending);
    rustix::fs::sync();
    // The serial port needs a moment to drain its last line on slow machines.
    let _ = std::io::stdout().flush();
    let error = reboot(RebootCommand::PowerOff).err();
    say!("cannot power off ({error:?}), restarting instead");
    let error = reboot(RebootCommand::Restart).err();
    say!("cannot restart either ({error:?})");
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// Ends a second stage that could not become the application.
#[expect(clippy::exit, reason = "a child of init that failed has nothing to unwind and its status is its message")]
pub fn leave_child(code: u8) -> ! {
    std::process::exit(i32::from(code))
}

fn report(ending: Ending) {
    let Ok(mut stream) = vsock::connect(vsock::PARENT_CID, PORT, Duration::from_secs(5)) else {
        // Nobody wants to know: a parent on EC2, for example.
        return;
    };
    if let Err(error) = stream.write_all(&ending.to_bytes()) {
        say!("warning: cannot report the exit status: {error}");
        return;
    }
    // Wait for the other side to close (5 s at most, the stream's own limit), so that the status is not overtaken by the power-off.
    let _ = rustix::net::shutdown(&stream, rustix::net::Shutdown::Write);
    let _ = std::io::Read::read(&mut stream, &mut [0_u8; 1]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ending_is_reported_as_kind_and_code() {
        assert_eq!(Ending::Exited(42).to_bytes(), [1, 42]);
        assert_eq!(Ending::Signalled(9).to_bytes(), [2, 9]);
        assert_eq!(Ending::INIT_FAILED.to_bytes(), [1, 125]);
    }
}
