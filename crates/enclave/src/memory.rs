//! An enclave's memory in its process: pieces of files, one after the other, read as one.
//!
//! Files are read with pread and written with pwrite, never mapped here: a file that somebody truncates is then an error and not a SIGBUS.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nitroxide_eif::ReadAt;
use nitroxide_engine::FileRange;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{Errno, pread, pwrite};

/// How much is copied at a time, in bytes.
const COPY_BYTES: usize = 1 << 20;

/// Memory as file ranges in linear order.
#[derive(Clone, Debug)]
pub(crate) struct LinearMemory {
    ranges: Vec<FileRange>,
    size: u64,
}

impl LinearMemory {
    /// Joins ranges that continue each other in one file.
    ///
    /// # Errors
    ///
    /// When sizes do not add up in 64 bits.
    pub(crate) fn new(ranges: impl IntoIterator<Item = FileRange>) -> io::Result<Self> {
        let mut joined: Vec<FileRange> = Vec::new();
        let mut size = 0_u64;
        for range in ranges {
            let end = range.offset.checked_add(range.size);
            size = size.checked_add(range.size).filter(|_| end.is_some()).ok_or(io::ErrorKind::InvalidInput)?;
            match joined.last_mut() {
                // Both sums were checked when the pieces came in.
                Some(last) if Arc::ptr_eq(&last.file, &range.file) && last.offset + last.size == range.offset => last.size += range.size,
                _ => joined.push(range),
            }
        }
        Ok(Self { ranges: joined, size })
    }

    /// The ranges, joined.
    pub(crate) fn ranges(&self) -> &[FileRange] {
        &self.ranges
    }

    /// Bytes in all.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Gives the pages of a part back to the system; they read as zeros afterwards. Partial pages are zeroed.
    ///
    /// # Errors
    ///
    /// When a file system cannot do it.
    pub(crate) fn punch(&self, offset: u64, size: u64) -> io::Result<()> {
        self.each_part(offset, size, |file, offset, size| Ok(punch(file, offset, size)?))
    }

    /// The same pieces in the order of their files and offsets, joined.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub(crate) fn in_file_order(&self) -> io::Result<Self> {
        let mut ranges = self.ranges.clone();
        ranges.sort_by_key(|range| (Arc::as_ptr(&range.file), range.offset));
        Self::new(ranges)
    }

    /// A copy in one new memory file, without the holes.
    ///
    /// # Errors
    ///
    /// When memory is short or a file is shorter than its range.
    pub(crate) fn gathered(&self) -> io::Result<Self> {
        let file = sealable_memory("enclave-memory")?;
        ftruncate(&file, self.size)?;
        let mut at = 0;
        for range in &self.ranges {
            copy_range(range, &file, at)?;
            at += range.size; // Stays below the sum that was checked.
        }
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Self::new([FileRange { file: Arc::new(file), offset: 0, size: self.size }])
    }

    /// Calls `act` with the file, offset and size of each piece of a part of the memory.
    fn each_part(&self, offset: u64, size: u64, mut act: impl FnMut(&OwnedFd, u64, u64) -> io::Result<()>) -> io::Result<()> {
        let end = offset.checked_add(size).filter(|end| *end <= self.size).ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut base = 0;
        for range in &self.ranges {
            let (from, to) = (offset.max(base), end.min(base + range.size));
            if from < to {
                act(&range.file, range.offset + (from - base), to - from)?;
            }
            base += range.size;
        }
        Ok(())
    }
}

impl ReadAt for LinearMemory {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        self.each_part(offset, rest.len() as u64, |file, offset, size| {
            // A part is at most as long as the buffer.
            let count = usize::try_from(size).map_err(io::Error::other)?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut_checked(count).ok_or(io::ErrorKind::UnexpectedEof)?;
            rest = later;
            read_all_at(file, now, offset)
        })
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

/// Gives the pages of a part of a file back to the system; it reads as zeros then. Partial pages are zeroed.
pub(crate) fn punch(file: &OwnedFd, offset: u64, size: u64) -> rustix::io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, size)
}

/// Makes a part of a file zero whose pages cannot be given back.
pub(crate) fn write_zeros(file: &OwnedFd, offset: u64, size: u64) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let count = usize::try_from(size - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        write_all_at(file, ZEROS.get(..count).unwrap_or_default(), offset.saturating_add(at))?;
        at += count as u64;
    }
    Ok(())
}

/// A new memory file that can be sealed later.
pub(crate) fn sealable_memory(name: &str) -> io::Result<OwnedFd> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?)
}

/// Fills `buffer` from `offset`.
pub(crate) fn read_all_at(file: impl AsFd, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match pread(&file, &mut *buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffer = std::mem::take(&mut buffer).get_mut(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Writes all of `buffer` at `offset`.
pub(crate) fn write_all_at(file: impl AsFd, mut buffer: &[u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match pwrite(&file, buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                buffer = buffer.get(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// What is looked for in pieces of this size when memory is copied.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Copies what is there of a range to `at` in `target`, where nothing is yet, leaving holes and zeros as holes.
pub(crate) fn copy_range(range: &FileRange, target: &OwnedFd, at: u64) -> io::Result<()> {
    let end = range.offset.checked_add(range.size).ok_or(io::ErrorKind::InvalidInput)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut position = range.offset;
    while position < end {
        let (begin, stop) = next_data(&range.file, position, end)?;
        position = begin;
        while position < stop {
            let count = usize::try_from(stop - position).map_or(COPY_BYTES, |left| left.min(COPY_BYTES));
            let piece = buffer.get_mut(..count).unwrap_or_default();
            read_all_at(&range.file, piece, position)?;
            // Zeros need no pages: an enclave of which the parent has touched every page is mostly that.
            for (chunk, offset) in piece.chunks(ZEROS.len()).zip((0..).step_by(ZEROS.len())) {
                if ZEROS.get(..chunk.len()) != Some(chunk) {
                    write_all_at(target, chunk, at + (position - range.offset) + offset)?;
                }
            }
            position += count as u64;
        }
    }
    Ok(())
}

/// The next stretch of a file from `position` on that is no hole, cut at `end`; empty at `end` if there is none.
fn next_data(file: &OwnedFd, position: u64, end: u64) -> io::Result<(u64, u64)> {
    let begin = match rustix::fs::seek(file, SeekFrom::Data(position)) {
        Ok(begin) => begin.clamp(position, end),
        // Nothing but a hole up to the file's end; or the file is too short, which reading would tell, and zeros are as good.
        Err(Errno::NXIO) => return Ok((end, end)),
        // A file that does not know holes.
        Err(_) => return Ok((position, end)),
    };
    match rustix::fs::seek(file, SeekFrom::Hole(begin)) {
        Ok(stop) if stop > begin => Ok((begin, stop.min(end))),
        _ => Ok((begin, end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANULE: u64 = 2 << 20;

    fn file(content: &[u8], size: u64) -> Arc<OwnedFd> {
        let file = sealable_memory("test").unwrap();
        ftruncate(&file, size).unwrap();
        write_all_at(&file, content, 0).unwrap();
        Arc::new(file)
    }

    fn range(file: &Arc<OwnedFd>, offset: u64, size: u64) -> FileRange {
        FileRange { file: Arc::clone(file), offset, size }
    }

    #[test]
    fn neighbours_in_one_file_become_one_range() {
        let (a, b) = (file(b"", 4 * GRANULE), file(b"", GRANULE));
        let pieces = [range(&a, 0, GRANULE), range(&a, GRANULE, GRANULE), range(&b, 0, GRANULE), range(&a, 2 * GRANULE, GRANULE)];
        let memory = LinearMemory::new(pieces).unwrap();
        assert_eq!(memory.ranges().iter().map(|range| range.size).collect::<Vec<_>>(), [2 * GRANULE, GRANULE, GRANULE]);
        assert_eq!(memory.size(), 4 * GRANULE);
    }

    #[test]
    fn reads_cross_the_borders_of_files() {
        let (a, b) = (file(b"ab", 2), file(b"cdef", 4));
        let memory = LinearMemory::new([range(&a, 0, 2), range(&b, 1, 3)]).unwrap();
        let mut bytes = [0; 4];
        memory.read_exact_at(&mut bytes, 1).unwrap();
        assert_eq!(&bytes, b"bdef");
        assert!(memory.read_exact_at(&mut bytes, 2).is_err());
        assert!(memory.read_exact_at(&mut bytes, u64::MAX).is_err());
    }

    #[test]
    fn gathering_keeps_content_and_holes() {
        let (a, b) = (file(b"first", GRANULE), file(b"second", GRANULE));
        let memory = LinearMemory::new([range(&a, 0, GRANULE), range(&b, 0, GRANULE)]).unwrap();
        let gathered = memory.gathered().unwrap();
        assert_eq!(gathered.ranges().len(), 1);
        let mut bytes = [0; 6];
        gathered.read_exact_at(&mut bytes, GRANULE).unwrap();
        assert_eq!(&bytes, b"second");
        let blocks = rustix::fs::fstat(&gathered.ranges()[0].file).unwrap().st_blocks;
        assert!(blocks * 512 < 64 << 10, "{blocks} blocks are more than two pages");
    }

    #[test]
    fn pieces_that_came_in_descending_order_are_one_in_the_files_order() {
        let (a, b) = (file(b"", 300 * GRANULE), file(b"", GRANULE));
        let descending = (0..300).rev().map(|piece| range(&a, piece * GRANULE, GRANULE));
        let memory = LinearMemory::new(descending.chain([range(&b, 0, GRANULE)])).unwrap();
        assert_eq!(memory.ranges().len(), 301);
        let ordered = memory.in_file_order().unwrap();
        assert_eq!((ordered.ranges().len(), ordered.size()), (2, memory.size()));
    }

    #[test]
    fn a_punched_part_reads_as_zeros() {
        let a = file(&[7; 10_000], GRANULE);
        let memory = LinearMemory::new([range(&a, 0, GRANULE)]).unwrap();
        memory.punch(100, 9_000).unwrap();
        let mut bytes = [1; 10_000];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..100].iter().chain(&bytes[9_100..]).all(|byte| *byte == 7));
        assert!(bytes[100..9_100].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn sizes_that_do_not_add_up_are_refused() {
        let a = file(b"", 0);
        assert!(LinearMemory::new([range(&a, u64::MAX, 2)]).is_err());
        assert!(LinearMemory::new([range(&a, 0, u64::MAX), range(&a, 0, u64::MAX)]).is_err());
    }
}
