//! Memory that a client gives away: is it there, is it of huge pages, and a copy of what is in it ([`Region`]).

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;

use nitroxide_abi::Code;
use nitroxide_abi::limits::GRANULE;
use nitroxide_client::{ServedDevice, ServedMemory};
use rustix::fs::{SeekFrom, seek};

use crate::caller::Caller;
use crate::handed::Identity;
use crate::huge::HugePages;
use crate::sys;

const PAGE: u64 = 4096;
/// How much is copied at a time, in bytes.
const PIECE: usize = 1 << 20;
/// In an entry of `/proc/PID/pagemap`: the page is in memory, or in swap.
const THERE: u64 = 0b11 << 62;

/// One mapping of a process, as `/proc/PID/maps` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    is_writable: bool,
    is_private: bool,
    /// Where in its file it begins, in bytes.
    offset: u64,
    /// Its file; major, minor and inode are 0 where there is none.
    file: (u32, u32, u64),
    name: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.splitn(6, ' ');
        let (start, end) = parts.next()?.split_once('-')?;
        let rights = parts.next()?;
        let offset = parts.next()?;
        let (major, minor) = parts.next()?.split_once(':')?;
        let inode = parts.next()?;
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            is_writable: rights.as_bytes().get(1) == Some(&b'w'),
            is_private: rights.as_bytes().get(3) == Some(&b'p'),
            offset: u64::from_str_radix(offset, 16).ok()?,
            file: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?, inode.parse().ok()?),
            name: parts.next().unwrap_or_default().trim_start().to_owned(),
        })
    }

    fn identity(&self) -> Identity {
        (libc::makedev(self.file.0, self.file.1), self.file.2)
    }

    /// What the kernel itself calls huge pages.
    fn is_really_huge(&self) -> bool {
        self.name.starts_with("/anon_hugepage")
    }

    fn is_anonymous(&self) -> bool {
        self.file.2 == 0 || self.name.starts_with("/dev/zero")
    }
}

/// Whose pages they are, so that the same one can be told when it is given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Private memory of a process: addresses, where this file (none is zeros) is mapped.
    Process(i32, Identity),
    /// A file: offsets in it.
    File(Identity),
}

/// Pages in a row, from a place to another in whatever they are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) whose: Whose,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Pages {
    /// Is a page in both?
    pub(crate) fn overlap(&self, other: &Self) -> bool {
        self.whose == other.whose && self.start < other.end && other.start < self.end
    }
}

/// A region that will do, before anything is taken.
#[derive(Debug)]
pub(crate) struct Region {
    start: u64,
    end: u64,
    mappings: Vec<Mapping>,
}

impl Region {
    /// Checks a region page by page, as the driver's pinning does.
    ///
    /// # Errors
    ///
    /// EFAULT if a page is not there or cannot be written, 263 if it is not a huge one.
    pub(crate) fn look(caller: &Caller<'_>, huge: &HugePages, start: u64, size: u64) -> Result<Self, Code> {
        let end = start.checked_add(size).ok_or(Code::EFAULT)?;
        let process = caller.process().map_err(|_| Code::EFAULT)?;
        let mappings = mappings(caller.thread, start, end).map_err(|_| Code::EFAULT)?;
        check(&mappings, start, end, |mapping, start, end| {
            mapping.is_really_huge()
                || (mapping.is_anonymous() && huge.has(process, start, end))
                || (mapping.file.2 != 0 && huge.file(mapping.identity()).is_some())
        })?;
        Ok(Self { start, end, mappings })
    }

    /// Its pages, in memory of this process.
    pub(crate) fn pages(&self, process: i32) -> Vec<Pages> {
        let parts = self.mappings.iter().map(|mapping| {
            let (start, end) = self.part(mapping);
            if mapping.is_private {
                return Pages { whose: Whose::Process(process, mapping.identity()), start, end };
            }
            // Shared memory without a name has a file of the kernel's own.
            let in_file = |address: u64| mapping.offset.saturating_add(address - mapping.start);
            Pages { whose: Whose::File(mapping.identity()), start: in_file(start), end: in_file(end) }
        });
        parts.collect()
    }

    /// Copies it.
    ///
    /// # Errors
    ///
    /// EFAULT if it is no longer there, ENOMEM.
    pub(crate) fn take(&self, caller: &Caller<'_>, huge: &HugePages, device: &ServedDevice) -> Result<ServedMemory, Code> {
        let mut memory = device.memory(self.end - self.start).map_err(|_| Code::ENOMEM)?;
        for mapping in &self.mappings {
            copy(caller, huge, mapping, self.part(mapping), self.start, &mut memory)?;
        }
        if caller.is_waiting() { Ok(memory) } else { Err(Code::EFAULT) }
    }

    /// What of a mapping is in it.
    fn part(&self, mapping: &Mapping) -> (u64, u64) {
        (mapping.start.max(self.start), mapping.end.min(self.end))
    }
}

/// The mappings that touch a range, ascending.
fn mappings(thread: i32, start: u64, end: u64) -> io::Result<Vec<Mapping>> {
    let mut found = Vec::new();
    for line in BufReader::new(File::open(format!("/proc/{thread}/maps"))?).lines() {
        let Some(mapping) = Mapping::parse(&line?) else { continue };
        if mapping.start >= end {
            break;
        }
        if mapping.end > start {
            found.push(mapping);
        }
    }
    Ok(found)
}

/// The first page that will not do decides. `is_huge` is asked for the part of a mapping within the range.
fn check(mappings: &[Mapping], start: u64, end: u64, is_huge: impl Fn(&Mapping, u64, u64) -> bool) -> Result<(), Code> {
    let mut at = start;
    for mapping in mappings {
        if mapping.start > at {
            break;
        }
        if !mapping.is_writable {
            return Err(Code::EFAULT);
        }
        // Down to the page that it ends in: a huge page is judged by its beginning.
        let until = mapping.end.min(end);
        if !is_huge(mapping, at, until) {
            return Err(Code::MEM_NOT_HUGE_PAGE);
        }
        at = until;
    }
    if at >= end { Ok(()) } else { Err(Code::EFAULT) }
}

/// Copies what there is of a part of a mapping.
fn copy(
    caller: &Caller<'_>,
    huge: &HugePages,
    mapping: &Mapping,
    (from, to): (u64, u64),
    start: u64,
    memory: &mut ServedMemory,
) -> Result<(), Code> {
    let kept = if mapping.file.2 == 0 { None } else { huge.file(mapping.identity()) };
    let pieces = match &kept {
        // A page that the client has not looked at may have content all the same.
        Some(file) => pieces_of_file(file.as_fd(), mapping, from, to),
        None if mapping.is_really_huge() || mapping.file.2 != 0 => Ok(vec![(from, to)]),
        None => pieces_of_memory(caller.thread, from, to),
    }
    .map_err(|_| Code::EFAULT)?;
    let mut bytes = vec![0; PIECE];
    for (from, to) in pieces {
        let mut at = from;
        while at < to {
            let wanted = usize::try_from(to - at).unwrap_or(PIECE).min(PIECE);
            let part = bytes.get_mut(..wanted).ok_or(Code::ENOMEM)?;
            let count = sys::read_memory(caller.thread, at, part).map_err(|_| Code::EFAULT)?;
            if count != wanted {
                return Err(Code::EFAULT);
            }
            if part.iter().any(|byte| *byte != 0) {
                memory.write_at(at - start, part).map_err(|_| Code::ENOMEM)?;
            }
            at = at.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
    Ok(())
}

/// The parts of private memory that have ever been touched.
fn pieces_of_memory(thread: i32, from: u64, to: u64) -> io::Result<Vec<(u64, u64)>> {
    let pagemap = File::open(format!("/proc/{thread}/pagemap"))?;
    let mut pieces = Vec::new();
    let mut at = from;
    while at < to {
        // The entries of one huge page at a time.
        let end = to.min(at.saturating_add(GRANULE));
        let count = usize::try_from((end - at) / PAGE).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = vec![0; count.saturating_mul(8)];
        pagemap.read_exact_at(&mut bytes, at / PAGE * 8)?;
        let entries = bytes.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()));
        let mut page = at;
        for entry in entries {
            let next = page.saturating_add(PAGE);
            if entry & THERE != 0 {
                join(&mut pieces, page, next);
            }
            page = next;
        }
        at = end;
    }
    Ok(pieces)
}

/// The parts of a mapped file that are no holes.
fn pieces_of_file(file: std::os::fd::BorrowedFd<'_>, mapping: &Mapping, from: u64, to: u64) -> io::Result<Vec<(u64, u64)>> {
    let in_file = |address: u64| mapping.offset.saturating_add(address - mapping.start);
    let in_memory = |offset: u64| mapping.start.saturating_add(offset.saturating_sub(mapping.offset));
    let mut pieces = Vec::new();
    let mut at = from;
    while at < to {
        let data = match seek(file, SeekFrom::Data(in_file(at))) {
            Ok(offset) => in_memory(offset),
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if data >= to {
            break;
        }
        let hole = in_memory(seek(file, SeekFrom::Hole(in_file(data)))?).min(to);
        join(&mut pieces, data, hole);
        at = hole.max(data.saturating_add(PAGE));
    }
    Ok(pieces)
}

fn join(pieces: &mut Vec<(u64, u64)>, from: u64, to: u64) {
    match pieces.last_mut() {
        Some((_, end)) if *end == from => *end = to,
        _ => pieces.push((from, to)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn mapping(start: u64, end: u64, rights: &str) -> Mapping {
        Mapping::parse(&format!("{:x}-{:x} {rights} 00000000 00:00 0", start * MIB, end * MIB)).unwrap()
    }

    fn judge(mappings: &[Mapping], start: u64, end: u64) -> Result<(), Code> {
        check(mappings, start * MIB, end * MIB, |mapping, _, _| mapping.start < 100 * MIB)
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let line = "200000000000-200010000000 rw-s 00200000 00:01 4711                           /memfd:memory-backend memfd (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.start, mapping.end, mapping.offset), (0x2000_0000_0000, 0x2000_1000_0000, 2 * MIB));
        assert_eq!((mapping.is_writable, mapping.identity()), (true, (libc::makedev(0, 1), 4711)));
        assert_eq!(mapping.name, "/memfd:memory-backend memfd (deleted)");
        assert_eq!(Mapping::parse("7f0000000000-7f0000001000 r--p 00000000 00:00 0 ").unwrap().name, "");
        assert_eq!(Mapping::parse("no mapping"), None);
    }

    #[test]
    fn first_page_that_will_not_do_decides() {
        let (good, other, read_only) = (mapping(2, 10, "rw-p"), mapping(10, 200, "rw-p"), mapping(10, 12, "r--p"));
        let foreign = mapping(100, 200, "rw-p");
        assert_eq!(judge(std::slice::from_ref(&good), 2, 10), Ok(()));
        assert_eq!(judge(&[good.clone(), other], 2, 20), Ok(()));
        assert_eq!(judge(std::slice::from_ref(&good), 2, 12), Err(Code::EFAULT), "a gap at the end");
        assert_eq!(judge(&[], 2, 4), Err(Code::EFAULT), "nothing");
        assert_eq!(judge(&[good.clone(), read_only], 2, 12), Err(Code::EFAULT), "not writable");
        assert_eq!(judge(&[good, foreign.clone()], 2, 102), Err(Code::EFAULT), "a gap before what is not huge");
        assert_eq!(judge(&[foreign], 100, 102), Err(Code::MEM_NOT_HUGE_PAGE));
    }

    #[test]
    fn pages_are_the_same_where_their_file_or_their_process_is() {
        let shared = |start: u64, offset: u64, inode: u64| {
            Mapping::parse(&format!("{:x}-{:x} rw-s {:x} 00:01 {inode} /memfd:x", start * MIB, (start + 8) * MIB, offset * MIB)).unwrap()
        };
        let of = |mapping: Mapping, start: u64, end: u64, process: i32| {
            let region = Region { start: start * MIB, end: end * MIB, mappings: vec![mapping] };
            region.pages(process)[0]
        };
        let first = of(shared(100, 0, 7), 102, 104, 1);
        assert_eq!((first.start, first.end), (2 * MIB, 4 * MIB));
        // Under another address, and in another process.
        assert!(first.overlap(&of(shared(200, 2, 7), 200, 202, 2)));
        assert!(!first.overlap(&of(shared(200, 2, 7), 202, 204, 1)), "the next page");
        assert!(!first.overlap(&of(shared(100, 0, 8), 102, 104, 1)), "another file");
        let private = of(mapping(100, 108, "rw-p"), 102, 104, 1);
        assert!(private.overlap(&of(mapping(100, 108, "rw-p"), 100, 108, 1)));
        assert!(!private.overlap(&of(mapping(100, 108, "rw-p"), 102, 104, 2)), "another process");
        assert!(!private.overlap(&first));
    }

    #[test]
    fn only_touched_pages_of_our_own_memory_are_pieces() {
        // Of whatever this process has at the stack, the page of a local is there.
        let local = 7_u8;
        let address = std::ptr::from_ref(&local).expose_provenance() as u64 / PAGE * PAGE;
        let thread = i32::try_from(std::process::id()).unwrap();
        assert_eq!(pieces_of_memory(thread, address, address + PAGE).unwrap(), [(address, address + PAGE)]);
    }
}
