//! The lock of one directory of a world: whoever changes the directory's entries holds it.
//!
//! It is an flock on a fresh open of the directory itself, so that it needs no file of its own and also excludes threads of one
//! process from each other. It is held for a few system calls, never while waiting for anything.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

/// How long to wait for a holder that does not let go, for example one stopped by a debugger.
const PATIENCE: Duration = Duration::from_secs(10);

/// The exclusive right to change one directory's entries; ends on drop.
#[derive(Debug)]
pub struct DirLock {
    file: OwnedFd,
}

impl DirLock {
    /// Takes the lock of the directory `dir`, waiting for short holders.
    ///
    /// # Errors
    ///
    /// `EWOULDBLOCK` when another process held it for ten seconds; otherwise what `openat` or `flock` gave.
    pub fn take(dir: impl AsFd) -> rustix::io::Result<Self> {
        // A fresh open file description: an flock belongs to that, not to the process or the thread.
        let file = openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let begin = Instant::now();
        let mut pause = Duration::from_micros(50);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { file }),
                Err(Errno::WOULDBLOCK) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(5));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Explicitly: a child between fork and exec still holds a copy of the descriptor, and closing ours would not unlock.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}
