//! The broom: what killed processes left behind, and what is alive.
//!
//! Nothing depends on sweeping: a stale file is taken over where it is met. Sweeping only keeps directories short. It works under
//! each directory's lock, so it never removes what somebody is just taking.

use std::path::PathBuf;

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, flock, fstat, openat, unlinkat};
use rustix::io::Errno;

use crate::claim::{ClaimError, Kind};
use crate::dir::{Room, World, is_same_file};
use crate::id::slot_of_enclave_id;
use crate::lock::DirLock;
use crate::rendezvous::Found;

/// What a sweep did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Claim files without a holder, removed.
    pub claims: usize,
    /// Socket files without a socket, removed.
    pub sockets: usize,
    /// What does not belong there and was left alone.
    pub foreign: Vec<PathBuf>,
}

/// What a claim file turned out to be.
enum Entry {
    Gone,
    Live,
    Removed,
    Stale,
    Foreign,
}

impl World {
    /// Removes what killed processes left behind.
    ///
    /// # Errors
    ///
    /// When a directory cannot be read or locked; single files that cannot be removed are only counted as foreign.
    pub fn sweep(&self) -> Result<Swept, ClaimError> {
        let mut swept = Swept::default();
        for kind in Kind::ALL {
            let held = self.lock_claims(kind)?;
            for name in self.entries(kind.room())? {
                match self.look_at_claim(&held, kind, &name, true) {
                    Ok(Entry::Removed) => swept.claims += 1,
                    Ok(Entry::Live | Entry::Gone) => {}
                    Ok(Entry::Stale | Entry::Foreign) | Err(_) => swept.foreign.push(self.display(kind.room(), &name)),
                }
            }
        }
        for room in [Room::Enclaves, Room::Vsock, Room::ParentPorts, Room::HypervisorPorts] {
            let failed = |errno| ClaimError::from_errno(self.display(room, ""), errno);
            let _held = DirLock::take(self.room(room)).map_err(failed)?;
            for name in self.entries(room)? {
                if room == Room::Vsock && (name == "0" || name == "3") {
                    continue; // The directories of the hypervisor's and the parent's ports.
                }
                match self.probe(room, &name) {
                    Ok(Found::Bound | Found::Nothing) => {}
                    Ok(Found::Stale) if unlinkat(self.room(room), &name, AtFlags::empty()).is_ok() => swept.sockets += 1,
                    Ok(Found::Stale | Found::Foreign) | Err(_) => swept.foreign.push(self.display(room, &name)),
                }
            }
        }
        Ok(swept)
    }

    /// The slot uids of the enclaves whose control sockets are bound at this moment, sorted.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn enclaves(&self) -> Result<Vec<u64>, ClaimError> {
        let mut slots = Vec::new();
        for name in self.entries(Room::Enclaves)? {
            let Some(slot_uid) = name.strip_suffix(".sock").and_then(slot_of_enclave_id) else { continue };
            if matches!(self.probe(Room::Enclaves, &name), Ok(Found::Bound)) {
                slots.push(slot_uid);
            }
        }
        slots.sort_unstable();
        Ok(slots)
    }

    /// The file names of the claims that are held at this moment.
    pub(crate) fn live_claims(&self, kind: Kind) -> Result<Vec<String>, ClaimError> {
        let held = self.lock_claims(kind)?;
        self.live_claims_under(&held, kind)
    }

    /// As [`World::live_claims`], for who has the directory's lock already.
    pub(crate) fn live_claims_under(&self, held: &DirLock, kind: Kind) -> Result<Vec<String>, ClaimError> {
        let mut live = Vec::new();
        for name in self.entries(kind.room())? {
            if matches!(self.look_at_claim(held, kind, &name, false), Ok(Entry::Live)) {
                live.push(name);
            }
        }
        Ok(live)
    }

    /// Looks at one claim file under its directory's lock and, if asked, removes it when nobody holds it.
    fn look_at_claim(&self, _held: &DirLock, kind: Kind, name: &str, remove: bool) -> rustix::io::Result<Entry> {
        let dir = self.room(kind.room());
        // Not blocking: what lies there may be a pipe.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match openat(dir, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(Entry::Gone),
            Err(Errno::LOOP | Errno::NXIO) => return Ok(Entry::Foreign),
            Err(errno) => return Err(errno),
        };
        if rustix::fs::FileType::from_raw_mode(fstat(&file)?.st_mode) != rustix::fs::FileType::RegularFile {
            return Ok(Entry::Foreign);
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(Entry::Live),
            Err(errno) => return Err(errno),
        }
        let entry = if !is_same_file(dir, name, &file)? {
            Entry::Gone
        } else if remove {
            unlinkat(dir, name, AtFlags::empty())?;
            Entry::Removed
        } else {
            Entry::Stale
        };
        // Explicitly, for the sake of children between fork and exec.
        let _ = flock(&file, FlockOperation::Unlock);
        Ok(entry)
    }

    /// The names in a directory, without `.` and `..`; names that are not UTF-8 are none of ours and left out.
    fn entries(&self, room: Room) -> Result<Vec<String>, ClaimError> {
        let failed = |errno| ClaimError::from_errno(self.display(room, ""), errno);
        let mut names = Vec::new();
        for entry in Dir::read_from(self.room(room)).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        Ok(names)
    }
}
