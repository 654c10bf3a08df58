//! Which signals end a command that stays, in order: those of the terminal and SIGTERM; not SIGHUP where the command was started with nohup(1).

use std::{fs, io};

use nitroxide_guest_sys::signals::Signals;
use rustix::process::Signal;

/// Blocks those of `wanted` that are to end this process, for this thread and those it starts.
///
/// # Errors
///
/// What blocking gives.
pub fn block(wanted: &[Signal]) -> io::Result<Signals> {
    // A blocked signal comes although it is ignored (signal(7)), so that has to be asked. A file that cannot be read ignores nothing.
    let hangs_on = ignores(&fs::read_to_string("/proc/self/status").unwrap_or_default(), Signal::HUP);
    let ending: Vec<i32> = wanted.iter().filter(|signal| **signal != Signal::HUP || !hangs_on).map(|signal| signal.as_raw()).collect();
    Signals::block(&ending)
}

/// Whether a process with this /proc/PID/status ignores a signal (proc_pid_status(5), "SigIgn").
fn ignores(status: &str, signal: Signal) -> bool {
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok()).unwrap_or(0);
    let bit = u32::try_from(signal.as_raw()).ok().and_then(|number| 1_u64.checked_shl(number.checked_sub(1)?)).unwrap_or(0);
    mask & bit != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        let status = "Name:\tx\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000004\n";
        assert!(ignores(status, Signal::HUP));
        assert!(!ignores(status, Signal::INT));
        assert!(!ignores("", Signal::HUP));
    }
}
