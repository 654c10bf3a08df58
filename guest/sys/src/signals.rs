//! Waiting for signals the way PID 1 does: all blocked, taken one by one (sigwaitinfo(2)).
#![expect(unsafe_code, reason = "signal masks and sigwaitinfo have no safe wrapper in rustix or std")]

use std::{io, time::Duration};

/// Unblocks every signal for the calling thread: what a process does that may have inherited blocked ones.
pub fn unblock_all() {
    // SAFETY: `sigset_t` is plain data; sigemptyset initialises it completely, and the old mask is not asked for. It cannot fail.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Signals blocked for this thread, waited for by [`Signals::next`].
///
/// A program started with `std::process::Command` inherits the blocked signals: it must begin with [`unblock_all`].
#[derive(Debug)]
pub struct Signals {
    set: libc::sigset_t,
}

impl Signals {
    /// Blocks every signal for the calling thread. Call it before other threads exist.
    ///
    /// # Errors
    ///
    /// None in practice: sigprocmask(2) fails only for an invalid `how`.
    pub fn block_all() -> io::Result<Self> {
        // SAFETY: `sigset_t` is plain data; sigfillset initialises it completely.
        let set = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigfillset(&raw mut set);
            set
        };
        // SAFETY: `set` is an initialised set and the old mask is not asked for.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
        if result == 0 { Ok(Self { set }) } else { Err(io::Error::from_raw_os_error(result)) }
    }

    /// Blocks the named signals for the calling thread. Call it before other threads exist.
    ///
    /// # Errors
    ///
    /// EINVAL for something that is no signal.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: `sigset_t` is plain data; sigemptyset initialises it completely.
        let mut set = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            set
        };
        for signal in signals {
            // SAFETY: `set` is an initialised set; a number that is no signal gives EINVAL.
            if unsafe { libc::sigaddset(&raw mut set, *signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: `set` is an initialised set and the old mask is not asked for.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result == 0 { Ok(Self { set }) } else { Err(io::Error::from_raw_os_error(result)) }
    }

    /// Waits for the next signal, for at most `timeout`; `None` when none came.
    pub fn next(&self, timeout: Duration) -> Option<i32> {
        let limit = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(timeout.subsec_nanos().cast_signed()),
        };
        // SAFETY: the set is initialised, no siginfo is asked for, and `limit` lives for the call.
        let signal = unsafe { libc::sigtimedwait(&raw const self.set, std::ptr::null_mut(), &raw const limit) };
        (signal > 0).then_some(signal)
    }
}
