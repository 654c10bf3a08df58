//! Starting a process that outlives us: its own session, nothing of ours but one socket.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
};

/// Starts this program again with a hidden command, whose standard input is a socket to us, in the root directory and without any other
/// descriptor of ours. The new process must call [`leave_session`] first.
pub fn spawn(hidden_command: &str) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    close_on_exec();
    let child = Command::new("/proc/self/exe")
        .arg0("nitroxide")
        .arg(hidden_command)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()?;
    Ok((child, ours))
}

/// Leaves the terminal: signals and hang-ups of the starting shell do not reach us any more.
pub fn leave_session() {
    // Fails only for a process group leader, which a process started by `spawn` is not.
    let _ = rustix::process::setsid();
}

/// Marks whatever we inherited ourselves (a shell's `3>file`, a lock) so that the new process does not keep it open.
#[expect(unsafe_code, reason = "close_range has no safe wrapper in rustix or std")]
fn close_on_exec() {
    // SAFETY: with CLOSE_RANGE_CLOEXEC nothing is closed in this process; only a flag of its descriptors changes. A kernel before 5.11 refuses.
    let _ = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or(0)) };
}
