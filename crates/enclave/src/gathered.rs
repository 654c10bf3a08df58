//! The owner's side of an enclave's memory: taken when it is added, sent when it starts.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nitroxide_device::{DeviceCode, MemoryRun};
use nitroxide_engine::FileRange;
use rustix::fs::ftruncate;

use crate::memory::{LinearMemory, copy_range, sealable_memory};
use crate::options::{MemoryMode, ParentMemory};
use crate::packet::{self, FILES_PER_PACKET, RANGES_PER_PACKET, RangeSpec, ToProcess};

/// The memory of one slot.
#[derive(Debug, Default)]
pub(crate) struct SlotMemory {
    ranges: Vec<FileRange>,
    /// In copying mode: the copy, and how long it is.
    copy: Option<(Arc<OwnedFd>, u64)>,
}

impl SlotMemory {
    /// Takes a run of the parent's memory.
    ///
    /// # Errors
    ///
    /// EFAULT where the parent has no such memory, ENOMEM where there is no room for a copy.
    pub(crate) fn add(&mut self, parent: &dyn ParentMemory, mode: MemoryMode, run: MemoryRun) -> Result<(), DeviceCode> {
        let pieces = parent.resolve(run).ok_or(DeviceCode::EFAULT)?;
        let total = pieces.iter().try_fold(0_u64, |sum, piece| sum.checked_add(piece.size));
        if total != Some(run.size) {
            return Err(DeviceCode::EFAULT);
        }
        if mode == MemoryMode::Copied {
            let copied = self.copied(&pieces, run.size).map_err(|error| {
                tracing::warn!(%error, "The parent's memory cannot be copied.");
                DeviceCode::ENOMEM
            })?;
            self.ranges.push(copied);
        } else {
            self.ranges.extend(pieces);
        }
        Ok(())
    }

    fn copied(&mut self, pieces: &[FileRange], size: u64) -> io::Result<FileRange> {
        let (file, begin) = match &self.copy {
            Some((file, length)) => (Arc::clone(file), *length),
            None => (Arc::new(sealable_memory("enclave-memory")?), 0),
        };
        let end = begin.checked_add(size).ok_or(io::ErrorKind::InvalidInput)?;
        ftruncate(&file, end)?;
        let mut at = begin;
        for piece in pieces {
            if let Err(error) = copy_range(piece, &file, at) {
                let _ = ftruncate(&file, begin); // Nothing of the run is kept.
                return Err(error);
            }
            at += piece.size;
        }
        self.copy = Some((Arc::clone(&file), end));
        Ok(FileRange { file, offset: begin, size })
    }

    /// Sends everything to an enclave process.
    pub(crate) fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let memory = LinearMemory::new(self.ranges.iter().cloned())?;
        let mut numbers: HashMap<*const OwnedFd, usize> = HashMap::new();
        let mut files: Vec<BorrowedFd<'_>> = Vec::new();
        let mut ranges = Vec::with_capacity(memory.ranges().len());
        for range in memory.ranges() {
            let file = *numbers.entry(Arc::as_ptr(&range.file)).or_insert_with(|| {
                files.push(range.file.as_fd());
                files.len() - 1
            });
            ranges.push(RangeSpec { file, offset: range.offset, size: range.size });
        }
        for some in files.chunks(FILES_PER_PACKET) {
            packet::send(&socket, &ToProcess::Files, some)?;
        }
        for some in ranges.chunks(RANGES_PER_PACKET) {
            packet::send(&socket, &ToProcess::Ranges(some.to_vec()), &[])?;
        }
        Ok(())
    }
}
