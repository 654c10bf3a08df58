//! The heartbeat: one byte to the parent and back, by which nitro-cli and others know that the enclave has booted.
//!
//! CID 3, port 9000, 0xB7 both ways. AWS's init ends the enclave when nobody listens; ours goes on after a while, since the
//! application itself may not need the parent, unless `nitroxide.heartbeat=required` stands on the kernel's command line.

use std::{
    fs::File,
    io::{self, Read, Write},
    thread,
    time::{Duration, Instant},
};

use nitroxide_guest_sys::vsock;
use rustix::io::Errno;

use crate::say;

const PORT: u32 = 9000;
const BEAT: u8 = 0xB7;
/// How long a listener may take to appear: the parent binds its port before it starts the enclave, so a refusal rarely mends itself.
const REFUSED_FOR: Duration = Duration::from_secs(3);
/// How long a parent that does not answer at all is waited for; a busy host makes this slow.
const SILENT_FOR: Duration = Duration::from_secs(60);

/// What to do when nobody answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Say so and go on.
    Optional,
    /// End the enclave, as AWS's init does.
    Required,
    /// Do not even try.
    Off,
}

impl Policy {
    /// Reads `nitroxide.heartbeat=required|optional|off` from the kernel's command line; the last one counts.
    pub fn from_command_line(command_line: &str) -> Self {
        let mut policy = Self::Optional;
        for word in command_line.split_whitespace() {
            match word.strip_prefix("nitroxide.heartbeat=") {
                Some("required") => policy = Self::Required,
                Some("off") => policy = Self::Off,
                Some(_) => policy = Self::Optional,
                None => {}
            }
        }
        policy
    }
}

/// Sends the heartbeat.
///
/// # Errors
///
/// Only under [`Policy::Required`]: what went wrong.
pub fn beat(policy: Policy) -> Result<(), String> {
    if policy == Policy::Off {
        return Ok(());
    }
    let failure = match connect().and_then(exchange) {
        Ok(()) => {
            say!("heartbeat answered by the parent");
            return Ok(());
        }
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NODEV | Errno::AFNOSUPPORT | Errno::NETUNREACH | Errno::ADDRNOTAVAIL) => format!("no vsock device ({error})"),
            Some(Errno::CONNRESET | Errno::CONNREFUSED) => "nobody listens on port 9000 of the parent".to_owned(),
            _ => error.to_string(),
        },
    };
    if policy == Policy::Required {
        return Err(format!("No heartbeat: {failure}, and the kernel's command line says nitroxide.heartbeat=required"));
    }
    say!("warning: no heartbeat: {failure}; going on without");
    Ok(())
}

fn connect() -> io::Result<File> {
    let begin = Instant::now();
    loop {
        let error = match vsock::connect(vsock::PARENT_CID, PORT, Duration::from_secs(20)) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let limit = match Errno::from_io_error(&error) {
            Some(Errno::CONNRESET | Errno::CONNREFUSED) => REFUSED_FOR,
            Some(Errno::TIMEDOUT | Errno::AGAIN | Errno::INTR) => SILENT_FOR,
            _ => return Err(error),
        };
        if begin.elapsed() >= limit {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn exchange(mut stream: File) -> io::Result<()> {
    stream.write_all(&[BEAT])?;
    let mut answer = [0_u8];
    stream.read_exact(&mut answer)?;
    if answer == [BEAT] { Ok(()) } else { Err(io::Error::other(format!("the parent answered {:#04x} instead of {BEAT:#04x}", answer[0]))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_is_read_from_the_command_line_and_the_last_word_counts() {
        assert_eq!(Policy::from_command_line("console=ttyS0 quiet"), Policy::Optional);
        assert_eq!(Policy::from_command_line("nitroxide.heartbeat=required quiet"), Policy::Required);
        assert_eq!(Policy::from_command_line("nitroxide.heartbeat=required nitroxide.heartbeat=off\n"), Policy::Off);
    }
}
