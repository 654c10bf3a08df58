//! The owner's side of an enclave's memory: taken when it is added, sent when it starts.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nitroxide_device::{DeviceCode, MemoryRun};
use nitroxide_engine::FileRange;
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};

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
                // Nothing of the run is kept: what comes here next may have holes. After a start that failed the file cannot shrink any more.
                let _ = fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, begin, size);
                let _ = ftruncate(&file, begin);
                return Err(error);
            }
            at += piece.size;
        }
        self.copy = Some((Arc::clone(&file), end));
        Ok(FileRange { file, offset: begin, size })
    }

    /// Sends everything to an enclave process.
    pub(crate) fn send(&self, socket: impl AsFd) -> io::Result<()> {
        if let Some((file, _)) = &self.copy {
            // Whoever gets it maps it, and would die of SIGBUS if another did shrink it.
            fcntl_add_seals(file, SealFlags::SHRINK)?;
        }
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

#[cfg(test)]
mod tests {
    use nitroxide_abi::Gpa;
    use rustix::fs::fcntl_get_seals;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    /// A parent with one file, in which addresses are offsets.
    struct Parent(Arc<OwnedFd>);

    impl ParentMemory for Parent {
        fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
            Some(vec![FileRange { file: Arc::clone(&self.0), offset: run.gpa.0, size: run.size }])
        }
    }

    #[test]
    fn a_copy_that_was_sent_cannot_shrink_and_takes_more_memory_all_the_same() {
        let parent = Parent(Arc::new(sealable_memory("parent").unwrap()));
        ftruncate(&parent.0, 2 << 20).unwrap();
        crate::memory::write_all_at(&parent.0, b"content", 4096).unwrap();
        let mut memory = SlotMemory::default();
        let run = MemoryRun { gpa: Gpa(0), size: 1 << 20 };
        memory.add(&parent, MemoryMode::Copied, run).unwrap();
        let (ours, _theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();

        memory.send(&ours).unwrap();

        let file = Arc::clone(&memory.ranges[0].file);
        assert!(fcntl_get_seals(&file).unwrap().contains(SealFlags::SHRINK));
        assert!(ftruncate(&file, 0).is_err());
        memory.add(&parent, MemoryMode::Copied, run).unwrap();
        let mut copied = [0; 7];
        crate::memory::read_all_at(&file, &mut copied, (1 << 20) + 4096).unwrap();
        assert_eq!(&copied, b"content");
    }
}
