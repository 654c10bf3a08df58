//! Commands on a terminal: a new pseudoterminal, and the second stage that makes it a session's own.
//!
//! A process of its own, so that nothing has to be done between fork and exec.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// The word that makes this program the second stage; the program to become and its arguments follow.
pub const STAGE: &str = "terminal";

/// A new pseudoterminal: the side that we keep, and the command's.
///
/// # Errors
///
/// What openpt(3) and the like give, e.g. without /dev/pts.
pub fn open(rows: u16, columns: u16) -> io::Result<(File, File)> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let name = rustix::pty::ptsname(&ours, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
    let ours = File::from(ours);
    resize(&ours, rows, columns)?;
    Ok((ours, File::from(theirs)))
}

/// Tells the terminal its size, and with it the programs on it.
///
/// # Errors
///
/// What the ioctl gives.
pub fn resize(terminal: &File, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// Makes standard input the controlling terminal of a new session and becomes the program. Returns only a failure.
pub fn second_stage(mut arguments: impl Iterator<Item = OsString>) -> impl fmt::Display {
    let become_program = || -> io::Result<()> {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        let program = arguments.next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Err(Command::new(program).args(arguments).exec())
    };
    format!("cannot start a session: {}", become_program().err().unwrap_or_else(|| io::ErrorKind::Other.into()))
}
