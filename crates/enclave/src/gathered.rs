//! The owner's side of an enclave's memory: taken when it is added, sent when it starts.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nitroxide_device::{DeviceCode, MemoryRun};
use nitroxide_engine::FileRange;
use rustix::fs::{SealFlags, fcntl_add_seals, fstat, ftruncate};

use crate::given::{Given, Held};
use crate::memory::{LinearMemory, copy_range, punch, sealable_memory, write_zeros};
use crate::options::{MemoryMode, ParentMemory};
use crate::packet::{self, FILES_PER_PACKET, RANGES_PER_PACKET, RangeSpec, ToProcess};

/// The memory of one slot.
#[derive(Debug, Default)]
pub(crate) struct SlotMemory {
    ranges: Vec<FileRange>,
    /// In copying mode: the copy, and how long it is.
    copy: Option<(Arc<OwnedFd>, u64)>,
    /// Pages of the parent's that no other enclave may have.
    held: Held,
}

impl SlotMemory {
    /// Nothing yet; `given` is what all slots of a launcher have.
    pub(crate) fn new(given: Arc<Given>) -> Self {
        Self { held: Held::new(given), ..Self::default() }
    }

    /// Takes a run of the parent's memory.
    ///
    /// # Errors
    ///
    /// EFAULT where the parent has no such memory or it is with an enclave already, ENOMEM where there is no room for a copy, EIO where the
    /// parent's pages cannot be taken out of its files. Nothing is kept then, and the parent has its content.
    pub(crate) fn add(&mut self, parent: &dyn ParentMemory, mode: MemoryMode, run: MemoryRun) -> Result<(), DeviceCode> {
        let pieces = parent.resolve(run).ok_or(DeviceCode::EFAULT)?;
        let total = pieces.iter().try_fold(0_u64, |sum, piece| sum.checked_add(piece.size));
        if total != Some(run.size) {
            return Err(DeviceCode::EFAULT);
        }
        if !matches!(mode, MemoryMode::Isolated | MemoryMode::Shared) {
            return self.keep(pieces, mode, run.size);
        }
        let Some(mark) = self.held.take(&pieces) else {
            tracing::warn!(gpa = run.gpa.0, "The parent's pages at this address are with an enclave already, by another address.");
            return Err(DeviceCode::EFAULT);
        };
        self.keep(pieces, mode, run.size).inspect_err(|_| self.held.give_back(mark))
    }

    fn keep(&mut self, pieces: Vec<FileRange>, mode: MemoryMode, size: u64) -> Result<(), DeviceCode> {
        if mode.copies() {
            let copied = self.copied(&pieces, size).map_err(|error| {
                tracing::warn!(%error, "The parent's memory cannot be copied.");
                DeviceCode::ENOMEM
            })?;
            if mode == MemoryMode::Isolated {
                self.take_out(&pieces, &copied)?;
            }
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
        if u64::try_from(fstat(&file)?.st_size).unwrap_or(0) < end {
            ftruncate(&file, end)?;
        }
        let mut at = begin;
        for piece in pieces {
            if let Err(error) = copy_range(piece, &file, at) {
                // Nothing of the run is kept: what comes here next may have holes. After a start that failed the file cannot shrink any more.
                let _ = punch(&file, begin, size);
                let _ = ftruncate(&file, begin);
                return Err(error);
            }
            at += piece.size;
        }
        self.copy = Some((Arc::clone(&file), end));
        Ok(FileRange { file, offset: begin, size })
    }

    /// Takes pieces that were copied out of the parent's files.
    ///
    /// A parent that writes meanwhile writes zeros away or into its own new pages; the copy is not touched.
    fn take_out(&mut self, pieces: &[FileRange], copied: &FileRange) -> Result<(), DeviceCode> {
        for (number, piece) in pieces.iter().enumerate() {
            if let Err(errno) = punch(&piece.file, piece.offset, piece.size) {
                tracing::warn!(%errno, "The parent's pages cannot be taken out of its memory; let QEMU use memory-backend-memfd.");
                put_back(pieces.get(..number).unwrap_or_default(), copied);
                // The copy is forgotten.
                let _ = punch(&copied.file, copied.offset, copied.size);
                self.copy = Some((Arc::clone(&copied.file), copied.offset));
                return Err(DeviceCode::EIO);
            }
        }
        Ok(())
    }

    /// Makes memory that the enclave had together with the parent zero. Called when nothing of the enclave runs any more.
    pub(crate) fn scrub(&self, mode: MemoryMode) {
        if mode != MemoryMode::Shared {
            return;
        }
        for FileRange { file, offset, size } in &self.ranges {
            if let Err(error) = punch(file, *offset, *size).or_else(|_| write_zeros(file, *offset, *size)) {
                tracing::error!(%error, "The enclave's memory is given back to the parent with the enclave's content.");
            }
        }
    }

    /// Bytes in all.
    pub(crate) fn bytes(&self) -> u64 {
        // Each sum was checked when its piece came in.
        self.ranges.iter().fold(0, |sum: u64, range| sum.saturating_add(range.size))
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

/// Gives pieces that were taken out their content again, from the beginning of their copy.
fn put_back(pieces: &[FileRange], copied: &FileRange) {
    let mut from = copied.offset;
    for piece in pieces {
        let source = FileRange { file: Arc::clone(&copied.file), offset: from, size: piece.size };
        if let Err(error) = copy_range(&source, &piece.file, piece.offset) {
            tracing::error!(%error, "What was taken out of the parent's memory cannot be put back; it reads zeros there.");
        }
        from = from.saturating_add(piece.size); // Within the copy.
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

    fn parent_with(content: &[u8], at: u64, size: u64) -> (Parent, Arc<OwnedFd>) {
        let file = Arc::new(sealable_memory("parent").unwrap());
        ftruncate(&file, size).unwrap();
        crate::memory::write_all_at(&file, content, at).unwrap();
        (Parent(Arc::clone(&file)), file)
    }

    fn read(file: &OwnedFd, at: u64) -> [u8; 6] {
        let mut bytes = [0xAA; 6];
        crate::memory::read_all_at(file, &mut bytes, at).unwrap();
        bytes
    }

    fn blocks(file: &OwnedFd) -> i64 {
        fstat(file).unwrap().st_blocks
    }

    #[test]
    fn isolated_memory_is_the_enclaves_and_gone_from_the_parent() {
        let (parent, file) = parent_with(b"secret", 5 << 20, 8 << 20);
        // A page of zeros that is really there.
        crate::memory::write_all_at(&file, &vec![0; 2 << 20], 2 << 20).unwrap();
        let before = blocks(&file);
        let mut memory = SlotMemory::default();
        memory.add(&parent, MemoryMode::Isolated, MemoryRun { gpa: Gpa(4 << 20), size: 2 << 20 }).unwrap();
        memory.add(&parent, MemoryMode::Isolated, MemoryRun { gpa: Gpa(2 << 20), size: 2 << 20 }).unwrap();
        assert_eq!(read(&file, 5 << 20), [0; 6]);
        assert!(before >= 4096 && blocks(&file) == 0, "{before} {}", blocks(&file));
        let copy = Arc::clone(&memory.ranges[0].file);
        assert_eq!(&read(&copy, 1 << 20), b"secret");
        assert!(blocks(&copy) < 512, "zeros are copied: {}", blocks(&copy));
        // What the parent writes now is its own.
        crate::memory::write_all_at(&file, b"change", 5 << 20).unwrap();
        assert_eq!(&read(&copy, 1 << 20), b"secret");
        drop(memory);
        assert_eq!(&read(&file, 5 << 20), b"change");
    }

    #[test]
    fn hundreds_of_pieces_keep_their_order() {
        let parent = Parent(Arc::new(sealable_memory("parent").unwrap()));
        let granule = 2_u64 << 20;
        ftruncate(&parent.0, 600 * granule).unwrap();
        let mut memory = SlotMemory::default();
        for piece in (0..600_u64).rev() {
            crate::memory::write_all_at(&parent.0, &piece.to_le_bytes(), piece * granule).unwrap();
            memory.add(&parent, MemoryMode::Isolated, MemoryRun { gpa: Gpa(piece * granule), size: granule }).unwrap();
        }
        assert_eq!(memory.bytes(), 600 * granule);
        let linear = LinearMemory::new(memory.ranges.iter().cloned()).unwrap();
        assert_eq!(linear.ranges().len(), 1);
        for place in 0..600_u64 {
            let mut bytes = [0; 8];
            crate::memory::read_all_at(&linear.ranges()[0].file, &mut bytes, place * granule).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), 599 - place);
        }
    }

    #[test]
    fn shared_memory_is_the_very_pages_and_zero_when_it_is_given_back() {
        let (parent, file) = parent_with(b"shared", 2 << 20, 4 << 20);
        crate::memory::write_all_at(&file, b"before", 0).unwrap();
        let mut memory = SlotMemory::default();
        memory.add(&parent, MemoryMode::Shared, MemoryRun { gpa: Gpa(2 << 20), size: 2 << 20 }).unwrap();
        assert!(Arc::ptr_eq(&memory.ranges[0].file, &file));
        memory.scrub(MemoryMode::Shared);
        assert_eq!((read(&file, 2 << 20), &read(&file, 0)), ([0; 6], b"before"));
    }

    /// A parent with several pieces for whatever is asked.
    struct Pieces(Vec<FileRange>);

    impl ParentMemory for Pieces {
        fn resolve(&self, _: MemoryRun) -> Option<Vec<FileRange>> {
            Some(self.0.clone())
        }
    }

    #[test]
    fn a_parent_keeps_its_content_when_one_of_its_files_cannot_be_punched() {
        let (_, good) = parent_with(b"secret", 4096, 2 << 20);
        let (_, sealed) = parent_with(b"sealed", 4096, 2 << 20);
        fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
        let piece = |file: &Arc<OwnedFd>| FileRange { file: Arc::clone(file), offset: 0, size: 2 << 20 };
        let given = Arc::<Given>::default();
        let mut memory = SlotMemory::new(Arc::clone(&given));
        let parent = Pieces(vec![piece(&good), piece(&sealed)]);
        assert_eq!(memory.add(&parent, MemoryMode::Isolated, MemoryRun { gpa: Gpa(0), size: 4 << 20 }), Err(DeviceCode::EIO));
        assert_eq!((&read(&good, 4096), &read(&sealed, 4096), memory.bytes()), (b"secret", b"sealed", 0));
        // Another may have what was not taken, and this slot goes on with an empty copy.
        let run = MemoryRun { gpa: Gpa(0), size: 2 << 20 };
        let mut other = SlotMemory::new(given);
        other.add(&Pieces(vec![piece(&good)]), MemoryMode::Isolated, run).unwrap();
        memory.add(&Parent(Arc::new(sealable_memory("empty").unwrap())), MemoryMode::Copied, run).unwrap();
        assert_eq!(read(&memory.ranges[0].file, memory.ranges[0].offset + 4096), [0; 6]);
    }

    #[test]
    fn no_two_enclaves_have_one_page_by_whatever_address() {
        let (_, file) = parent_with(b"shared", 0, 4 << 20);
        let given = Arc::<Given>::default();
        let run = |gpa| MemoryRun { gpa: Gpa(gpa), size: 2 << 20 };
        let parent = Pieces(vec![FileRange { file: Arc::clone(&file), offset: 0, size: 2 << 20 }]);
        for mode in [MemoryMode::Shared, MemoryMode::Isolated] {
            let (mut one, mut other) = (SlotMemory::new(Arc::clone(&given)), SlotMemory::new(Arc::clone(&given)));
            one.add(&parent, mode, run(0)).unwrap();
            assert_eq!(one.add(&parent, mode, run(1 << 30)), Err(DeviceCode::EFAULT));
            assert_eq!(other.add(&parent, mode, run(1 << 30)), Err(DeviceCode::EFAULT));
            assert_eq!((one.bytes(), other.bytes()), (2 << 20, 0));
            drop(one);
            other.add(&parent, mode, run(1 << 30)).unwrap();
        }
    }

    #[test]
    fn zeros_are_written_where_pages_cannot_be_given_back() {
        let (_, file) = parent_with(&[7; 3 << 20], 0, 4 << 20);
        write_zeros(&file, 4096, (2 << 20) - 1).unwrap();
        assert_eq!((read(&file, 4090), read(&file, 4096)), ([7; 6], [0; 6]));
        assert_eq!(read(&file, (2 << 20) + 4095), [7; 6]);
    }

    #[test]
    fn memory_that_the_parent_does_not_have_is_refused() {
        struct Nothing;
        impl ParentMemory for Nothing {
            fn resolve(&self, _: MemoryRun) -> Option<Vec<FileRange>> {
                None
            }
        }
        let mut memory = SlotMemory::default();
        let run = MemoryRun { gpa: Gpa(0), size: 2 << 20 };
        assert_eq!(memory.add(&Nothing, MemoryMode::Isolated, run), Err(DeviceCode::EFAULT));
        assert_eq!(memory.bytes(), 0);
    }
}
