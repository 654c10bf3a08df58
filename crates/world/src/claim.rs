//! Claims: who holds a slot, a CID, a CPU, a share of memory or a name.
//!
//! A claim is a small file with an flock on it. The lock belongs to the open file description, so it can be passed to another
//! process (SCM_RIGHTS) and ends when the last holder closes it, however that holder dies. The file itself means nothing: a file
//! without a lock is rubbish that the next claim takes over and [`World::sweep`](crate::World::sweep) removes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, flock, fstat, ftruncate, openat, unlinkat};
use rustix::io::Errno;

use crate::dir::{Room, World, is_same_file};
use crate::lock::DirLock;

/// What can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A slot uid of the device.
    Slot,
    /// An enclave's CID.
    Cid,
    /// A CPU of the pool.
    Cpu,
    /// A share of the memory that enclaves may have.
    Memory,
    /// An enclave's name.
    Name,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] = [Self::Slot, Self::Cid, Self::Cpu, Self::Memory, Self::Name];

    pub(crate) fn room(self) -> Room {
        match self {
            Self::Slot => Room::Slots,
            Self::Cid => Room::Cids,
            Self::Cpu => Room::Cpus,
            Self::Memory => Room::Memory,
            Self::Name => Room::Names,
        }
    }
}

/// Why something could not be claimed.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum ClaimError {
    /// `{0}` is held by a running process.
    Taken(PathBuf),
    /// Nothing of this kind is left in `{0}`.
    Exhausted(PathBuf),
    /// `{0}` cannot be claimed: the value is outside what is allowed ({1}).
    Invalid(String, &'static str),
    /// `{0}` is not a plain file, so it is not ours to lock; remove it.
    Foreign(PathBuf),
    /// No space is left for `{0}`; free some, or set NITROXIDE_RUNTIME_DIR to a directory elsewhere.
    NoSpace(PathBuf),
    /// `{0}` cannot be written; set NITROXIDE_RUNTIME_DIR to a directory on a writable file system.
    NotWritable(PathBuf, #[source] std::io::Error),
    /// `{0}` stays locked by another process, which seems to be stopped; continue or end it.
    Busy(PathBuf),
    /// `{0}` cannot be opened or locked.
    Io(PathBuf, #[source] std::io::Error),
}

impl ClaimError {
    /// The errno that a device or a system call answers with.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::Taken(_) => Errno::ADDRINUSE,
            Self::Exhausted(_) | Self::NoSpace(_) => Errno::NOSPC,
            Self::Invalid(..) => Errno::INVAL,
            Self::Foreign(_) => Errno::EXIST,
            Self::NotWritable(_, error) | Self::Io(_, error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
            Self::Busy(_) => Errno::BUSY,
        };
        errno.raw_os_error()
    }

    pub(crate) fn from_errno(path: PathBuf, errno: Errno) -> Self {
        match errno {
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace(path),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => Self::NotWritable(path, errno.into()),
            Errno::LOOP | Errno::ISDIR | Errno::NXIO | Errno::NODEV => Self::Foreign(path),
            Errno::WOULDBLOCK => Self::Busy(path),
            _ => Self::Io(path, errno.into()),
        }
    }
}

/// Something held for as long as this value, or a descriptor made of it, lives in some process.
#[derive(Debug)]
pub struct Claim {
    world: World,
    kind: Kind,
    name: String,
    /// `None` only after [`Claim::hand_over`].
    file: Option<OwnedFd>,
}

impl Claim {
    /// What is held.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The file's name in its directory: a number in the kind's own notation, or an escaped name.
    #[must_use]
    pub fn file_name(&self) -> &str {
        &self.name
    }

    /// The descriptor that holds the lock. Sent to another process, it keeps the claim for as long as either process lives.
    #[must_use]
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Gives the lock away: the claim ends when the returned descriptor and all its copies are closed. Use [`World::adopt`] to make a claim of
    /// it again, in this process or another.
    #[must_use]
    pub fn hand_over(mut self) -> Option<OwnedFd> {
        self.file.take()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        let dir = self.world.room(self.kind.room());
        // We hold the lock, so the entry is ours unless somebody removed it by hand.
        if is_same_file(dir, &self.name, file).unwrap_or(false) {
            let _ = unlinkat(dir, &self.name, AtFlags::empty());
        }
        // Explicitly, for the sake of children between fork and exec, which still have copies of the descriptor.
        let _ = flock(file, FlockOperation::Unlock);
    }
}

impl World {
    /// Claims the entry `name` of a kind, under the directory's lock `_held`.
    pub(crate) fn claim_entry(&self, _held: &DirLock, kind: Kind, name: &str) -> Result<Claim, ClaimError> {
        let path = || self.display(kind.room(), name);
        let dir = self.room(kind.room());
        // Not blocking: what lies there may be a pipe.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        loop {
            let file = openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| ClaimError::from_errno(path(), errno))?;
            let stat = fstat(&file).map_err(|errno| ClaimError::from_errno(path(), errno))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(ClaimError::Foreign(path()));
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(ClaimError::Taken(path())),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(ClaimError::from_errno(path(), errno)),
            }
            // A holder that ended between our open and our lock has unlinked the file: then we hold a lock that nobody can see.
            if !is_same_file(dir, name, &file).map_err(|errno| ClaimError::from_errno(path(), errno))? {
                continue;
            }
            let claim = Claim { world: self.clone(), kind, name: name.to_owned(), file: Some(file) };
            claim.note().map_err(|errno| ClaimError::from_errno(path(), errno))?;
            return Ok(claim);
        }
    }

    /// Takes the lock under which claims of one kind are made.
    pub(crate) fn lock_claims(&self, kind: Kind) -> Result<DirLock, ClaimError> {
        DirLock::take(self.room(kind.room())).map_err(|errno| ClaimError::from_errno(self.display(kind.room(), ""), errno))
    }

    /// Makes a claim of a descriptor that [`Claim::hand_over`] or [`Claim::as_fd`] gave, usually in another process.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Foreign`] when the descriptor is not the entry `file_name` of this world, [`ClaimError::Taken`] when it does not hold the
    /// lock and somebody else does.
    pub fn adopt(&self, kind: Kind, file_name: &str, file: OwnedFd) -> Result<Claim, ClaimError> {
        let path = || self.display(kind.room(), file_name);
        if file_name.is_empty() || file_name.contains('/') {
            return Err(ClaimError::Invalid(file_name.to_owned(), "a name in the claim's directory"));
        }
        if !is_same_file(self.room(kind.room()), file_name, &file).map_err(|errno| ClaimError::from_errno(path(), errno))? {
            return Err(ClaimError::Foreign(path()));
        }
        // Locking again through the same open file description succeeds and changes nothing.
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Claim { world: self.clone(), kind, name: file_name.to_owned(), file: Some(file) }),
            Err(Errno::WOULDBLOCK) => Err(ClaimError::Taken(path())),
            Err(errno) => Err(ClaimError::from_errno(path(), errno)),
        }
    }
}

impl Claim {
    /// Writes the holder's process id into the file. For people only: no decision reads it.
    fn note(&self) -> rustix::io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        ftruncate(file, 0)?;
        let text = format!("{}\n", std::process::id());
        rustix::io::pwrite(file, text.as_bytes(), 0)?;
        Ok(())
    }
}
