//! A file that was handed to clients, and when the last of their descriptors and mappings of it is gone: [`Handed`], [`Watch`].
//!
//! Clients get one open file description, which dup, fork and messages share, with an exclusive flock() on it. The lock goes with the description, so another
//! description of the same file, kept here, can take it when, and only when, nobody has the first one any more. inotify says when to try.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;

/// Which file it is, whoever opens it: device and inode.
pub(crate) type Identity = (u64, u64);

/// The description that is handed to a client; it must then be dropped here.
#[derive(Debug)]
pub(crate) struct Handed {
    description: OwnedFd,
    identity: Identity,
}

impl Handed {
    /// Another description of a file that stays here, opened with `flags`.
    ///
    /// # Errors
    ///
    /// EMFILE and the like.
    pub(crate) fn new(kept: BorrowedFd<'_>, flags: OFlags) -> io::Result<Self> {
        let description = reopen(kept, flags)?;
        flock(&description, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { identity: identity(kept)?, description })
    }

    /// What the client gets.
    pub(crate) fn description(&self) -> BorrowedFd<'_> {
        self.description.as_fd()
    }

    /// Which file it is.
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }
}

/// Another description of the same file.
pub(crate) fn reopen(kept: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", kept.as_raw_fd());
    Ok(open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// Which file it is.
pub(crate) fn identity(file: BorrowedFd<'_>) -> io::Result<Identity> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Has nobody the description that was handed out? `kept` is the file's own one here.
pub(crate) fn is_closed(kept: BorrowedFd<'_>) -> bool {
    flock(kept, FlockOperation::NonBlockingLockExclusive) != Err(Errno::WOULDBLOCK)
}

/// Tells when something handed out was closed somewhere. It may be nothing that matters: look with [`is_closed`].
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: OwnedFd,
}

impl Watch {
    /// # Errors
    ///
    /// EMFILE if this user has too many of them.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)? })
    }

    /// Watches a file, for as long as it is there.
    ///
    /// # Errors
    ///
    /// ENOSPC if this user has too many.
    pub(crate) fn add(&self, kept: BorrowedFd<'_>) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", kept.as_raw_fd());
        inotify::add_watch(&self.inotify, path, WatchFlags::CLOSE_NOWRITE | WatchFlags::CLOSE_WRITE)?;
        Ok(())
    }

    /// Readable when something was closed.
    pub(crate) fn queue(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Forgets what has come.
    pub(crate) fn drain(&self) {
        let mut bytes = [0; 4096];
        while rustix::io::read(&self.inotify, &mut bytes).is_ok_and(|count| count > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn is_told(watch: &Watch) -> bool {
        let queue = watch.queue();
        let told = poll(&mut [PollFd::new(&queue, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0;
        watch.drain();
        told
    }

    #[test]
    fn last_close_of_a_pipe_is_seen_before_and_after_its_end_and_no_other() {
        for ends_first in [false, true] {
            let watch = Watch::new().unwrap();
            let (kept, alive) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            watch.add(kept.as_fd()).unwrap();
            let handed = Handed::new(kept.as_fd(), OFlags::RDONLY).unwrap();
            assert_eq!(handed.identity(), identity(kept.as_fd()).unwrap());
            let mut alive = Some(alive);
            if ends_first {
                alive = None;
            }
            let copy = handed.description().try_clone_to_owned().unwrap();
            drop(handed);
            let _ = is_told(&watch);
            assert!(!is_closed(kept.as_fd()));
            drop(reopen(kept.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK).unwrap());
            assert!(is_told(&watch) && !is_closed(kept.as_fd()), "somebody opened it again, and closed that");
            drop(copy);
            assert!(is_told(&watch) && is_closed(kept.as_fd()));
            drop(alive);
        }
    }

    #[test]
    fn memory_file_is_closed_when_its_mappings_are_gone_too() {
        let kept = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let handed = Handed::new(kept.as_fd(), OFlags::RDWR).unwrap();
        assert!(!is_closed(kept.as_fd()));
        drop(handed);
        assert!(is_closed(kept.as_fd()));
    }
}
