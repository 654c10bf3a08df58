//! Memory of a local parent: sealed memory files at guest-physical addresses that are made up.
//!
//! [`LocalMemory`] is the parent's memory as a launcher sees it. A [`Piece`] is a part of it; it is there for as long as the value lives,
//! first with the client ([`Memory`]), then with the driver core ([`DonatedPages`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nitroxide_abi::limits::GRANULE;
use nitroxide_abi::{Code, Gpa};
use nitroxide_device::MemoryRun;
use nitroxide_driver::{Page, Pages};
use nitroxide_enclave::ParentMemory;
use nitroxide_engine::FileRange;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::lock;
use crate::image::split;
use crate::served::ServedMemory;

/// Where made-up addresses begin: 4 GiB, where nothing can be mistaken for a small number.
const FIRST_GPA: u64 = 4 << 30;

/// Where they end: x86-64 has no more physical address bits than 52.
const LAST_GPA: u64 = 1 << 52;

/// The parent's memory that exists at the moment. Addresses are never given twice.
#[derive(Debug)]
pub struct LocalMemory {
    pieces: Mutex<Pieces>,
}

#[derive(Debug)]
struct Pieces {
    next_gpa: u64,
    by_gpa: BTreeMap<u64, FileRange>,
}

impl Default for LocalMemory {
    fn default() -> Self {
        Self { pieces: Mutex::new(Pieces { next_gpa: FIRST_GPA, by_gpa: BTreeMap::new() }) }
    }
}

impl ParentMemory for LocalMemory {
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
        let pieces = lock(&self.pieces);
        let mut ranges = Vec::new();
        let (mut gpa, mut left) = (run.gpa.0, run.size);
        while left > 0 {
            let (start, range) = pieces.by_gpa.range(..=gpa).next_back()?;
            let skip = gpa - start;
            let size = range.size.checked_sub(skip).filter(|size| *size > 0)?.min(left);
            ranges.push(FileRange { file: Arc::clone(&range.file), offset: range.offset.checked_add(skip)?, size });
            left -= size;
            gpa = gpa.checked_add(size)?;
        }
        Some(ranges)
    }
}

impl LocalMemory {
    /// Bytes of memory that exist.
    #[must_use]
    pub fn size(&self) -> u64 {
        lock(&self.pieces).by_gpa.values().fold(0, |sum, range| sum.saturating_add(range.size))
    }

    fn insert(self: &Arc<Self>, range: FileRange) -> io::Result<Piece> {
        let mut pieces = lock(&self.pieces);
        let gpa = pieces.next_gpa;
        // A gap of one granule keeps pieces apart: the driver must not take two for one run.
        let next = gpa.checked_add(range.size).and_then(|end| end.checked_add(GRANULE)).filter(|next| *next < LAST_GPA);
        pieces.next_gpa = next.ok_or(io::ErrorKind::OutOfMemory)?;
        pieces.by_gpa.insert(gpa, range.clone());
        Ok(Piece { memory: Arc::clone(self), gpa: Gpa(gpa), range })
    }
}

/// A piece of the parent's memory. Dropped, it is there no more.
#[derive(Debug)]
pub(crate) struct Piece {
    memory: Arc<LocalMemory>,
    gpa: Gpa,
    range: FileRange,
}

impl Piece {
    pub(crate) fn gpa(&self) -> Gpa {
        self.gpa
    }

    pub(crate) fn size(&self) -> u64 {
        self.range.size
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        lock(&self.memory.pieces).by_gpa.remove(&self.gpa.0);
    }
}

/// Memory for an enclave: one sealed memory file, cut into pieces.
#[derive(Debug)]
pub(crate) struct Memory {
    pieces: Vec<Piece>,
    size: u64,
}

impl Memory {
    /// `bytes` of memory, a multiple of 2 MiB above zero, in pieces of at most `piece_bytes`, which is one too.
    pub(crate) fn allocate(memory: &Arc<LocalMemory>, bytes: u64, piece_bytes: u64) -> io::Result<Self> {
        let file = Arc::new(sealed_file(bytes)?);
        let mut pieces = Vec::new();
        let mut offset = 0;
        while offset < bytes {
            let size = piece_bytes.min(bytes - offset);
            pieces.push(memory.insert(FileRange { file: Arc::clone(&file), offset, size })?);
            offset += size;
        }
        Ok(Self { pieces, size: bytes })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn belongs_to(&self, memory: &Arc<LocalMemory>) -> bool {
        self.pieces.iter().all(|piece| Arc::ptr_eq(&piece.memory, memory))
    }

    pub(crate) fn into_pieces(self) -> Vec<Piece> {
        self.pieces
    }

    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let sizes = self.pieces.iter().map(Piece::size);
        split(sizes, offset, bytes, |piece, offset, part| {
            let range = self.pieces.get(piece).map(|piece| &piece.range).ok_or(io::ErrorKind::InvalidInput)?;
            write_all_at(&range.file, range.offset.saturating_add(offset), part)
        })
    }
}

/// A memory file whose size nobody can change: a VM that runs in it would die of SIGBUS if it shrank.
fn sealed_file(bytes: u64) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("nitroxide-enclave-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

fn write_all_at(file: &OwnedFd, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or(&[]);
                offset = offset.saturating_add(u64::try_from(written).unwrap_or(u64::MAX));
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Pieces that the driver core holds for an enclave. To it each is one huge page, however large.
#[derive(Debug, Default)]
pub struct DonatedPages {
    pieces: Vec<Piece>,
}

impl DonatedPages {
    /// Adds memory as one page, however large it is.
    ///
    /// # Errors
    ///
    /// ENOMEM if it is none.
    pub fn donate(&mut self, memory: ServedMemory) -> Result<Page, Code> {
        memory.0.into_pieces().into_iter().map(|piece| self.add(piece)).last().ok_or(Code::ENOMEM)
    }

    pub(crate) fn add(&mut self, piece: Piece) -> Page {
        let page = page(&piece);
        self.pieces.push(piece);
        page
    }
}

impl Pages for DonatedPages {
    fn count(&self) -> usize {
        self.pieces.len()
    }

    fn get(&self, index: usize) -> Option<Page> {
        self.pieces.get(index).map(page)
    }

    fn keep(&mut self, count: usize) {
        self.pieces.truncate(count);
    }
}

fn page(piece: &Piece) -> Page {
    Page { gpa: piece.gpa, size: piece.range.size, offset: 0, huge: true, node: super::machine::NODE }
}

/// The client's side of one SET_USER_MEMORY_REGION: it gives one piece, whose made-up address is the region's address.
pub(crate) struct OnePiece {
    piece: Option<Piece>,
    is_owner: bool,
}

impl OnePiece {
    pub(crate) fn new(piece: Piece, is_owner: bool) -> Self {
        Self { piece: Some(piece), is_owner }
    }
}

impl nitroxide_driver::Client for OnePiece {
    type Pages = DonatedPages;

    // Arguments are passed as values here, never through memory.
    fn read(&mut self, _address: u64, _bytes: &mut [u8]) -> Result<(), Code> {
        Err(Code::EFAULT)
    }

    fn write(&mut self, _address: u64, _bytes: &[u8]) -> Result<(), Code> {
        Err(Code::EFAULT)
    }

    fn is_owner(&self) -> bool {
        self.is_owner
    }

    fn is_user_range(&self, _address: u64, _size: u64) -> bool {
        true
    }

    fn begin_pages(&mut self, _size: u64) -> Result<Self::Pages, Code> {
        Ok(DonatedPages::default())
    }

    fn pin_next(&mut self, pages: &mut Self::Pages, address: u64) -> Result<Page, Code> {
        let piece = self.piece.take().filter(|piece| piece.gpa.0 == address).ok_or(Code::EFAULT)?;
        Ok(pages.add(piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sizes(memory: &LocalMemory, gpa: u64, size: u64) -> Option<Vec<(u64, u64)>> {
        let ranges = memory.resolve(MemoryRun { gpa: Gpa(gpa), size })?;
        Some(ranges.iter().map(|range| (range.offset / MIB, range.size / MIB)).collect())
    }

    #[test]
    fn runs_resolve_to_the_file_behind_them_and_to_nothing_when_it_is_gone() {
        let parent = Arc::new(LocalMemory::default());
        let memory = Memory::allocate(&parent, 10 * MIB, 4 * MIB).unwrap();
        assert_eq!((memory.pieces.len(), memory.size(), parent.size()), (3, 10 * MIB, 10 * MIB));
        let second = memory.pieces[1].gpa().0;
        assert_eq!(sizes(&parent, second, 4 * MIB), Some(vec![(4, 4)]));
        assert_eq!(sizes(&parent, second + 2 * MIB, 2 * MIB), Some(vec![(6, 2)]));
        assert_eq!(sizes(&parent, second + 2 * MIB, 4 * MIB), None);
        assert_eq!(sizes(&parent, 0, 2 * MIB), None);
        drop(memory);
        assert_eq!((sizes(&parent, second, 2 * MIB), parent.size()), (None, 0));
    }

    #[test]
    fn addresses_are_aligned_apart_and_never_given_twice() {
        let parent = Arc::new(LocalMemory::default());
        let first = Memory::allocate(&parent, 4 * MIB, 2 * MIB).unwrap();
        let gpas: Vec<u64> = first.pieces.iter().map(|piece| piece.gpa().0).collect();
        assert!(gpas.iter().all(|gpa| gpa % GRANULE == 0));
        assert!(gpas[1] > gpas[0] + 2 * MIB);
        drop(first);
        let second = Memory::allocate(&parent, 2 * MIB, u64::MAX).unwrap();
        assert!(second.pieces[0].gpa().0 > gpas[1]);
    }

    #[test]
    fn memory_file_cannot_be_resized() {
        let parent = Arc::new(LocalMemory::default());
        let memory = Memory::allocate(&parent, 2 * MIB, u64::MAX).unwrap();
        let file = &memory.pieces[0].range.file;
        assert_eq!(rustix::fs::ftruncate(file, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(file, 4 * MIB), Err(Errno::PERM));
    }

    #[test]
    fn writes_go_across_pieces() {
        let parent = Arc::new(LocalMemory::default());
        let mut memory = Memory::allocate(&parent, 4 * MIB, 2 * MIB).unwrap();
        memory.write_at(2 * MIB - 2, b"abcd").unwrap();
        let mut read = [0; 4];
        rustix::io::pread(&memory.pieces[1].range.file, &mut read, 2 * MIB - 2).unwrap();
        assert_eq!(&read, b"abcd");
        assert!(memory.write_at(4 * MIB - 1, b"ab").is_err());
    }
}
