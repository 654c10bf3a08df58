//! The parent VM's memory: which guest-physical addresses are which bytes of which file.
//!
//! QEMU tells its memory as windows (DMA_MAP) that come and go; [`ParentRam`] finds the file ranges behind what a driver donates. Windows are QEMU's,
//! which is trusted with its own memory; addresses are the guest's, which is not. docs/device-pci.md, "Donated memory".

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use displaydoc::Display;
use nitroxide_device::MemoryRun;
use nitroxide_enclave::ParentMemory;
use nitroxide_engine::FileRange;
use rustix::fs::fstat;

/// A piece of guest-physical memory as QEMU announces it.
#[derive(Debug)]
pub struct Window {
    /// Where it begins in guest-physical memory.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
    /// May it be read?
    pub readable: bool,
    /// May it be written?
    pub writable: bool,
    /// The file; ROM and devices have none.
    pub file: Option<OwnedFd>,
}

/// The windows that there are at the moment.
#[derive(Debug, Default)]
pub struct ParentRam {
    windows: Mutex<BTreeMap<u64, Mapped>>,
}

#[derive(Debug)]
struct Mapped {
    size: u64,
    file_offset: u64,
    /// The file, if memory can be donated from it; one handle for all windows of one file.
    file: Option<Shared>,
}

#[derive(Debug, Clone)]
struct Shared {
    identity: (u64, u64),
    handle: Arc<OwnedFd>,
}

impl ParentRam {
    /// No memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a window. One that begins at the same address replaces the earlier one.
    pub fn map(&self, window: Window) {
        let Window { iova, size, file_offset, readable, writable, file } = window;
        if size == 0 || iova.checked_add(size - 1).is_none() || file_offset.checked_add(size).is_none() {
            tracing::warn!(iova, size, file_offset, "A window of the parent's memory wraps and is ignored.");
            return;
        }
        let mut windows = self.lock();
        let file = file.filter(|_| readable && writable).and_then(|file| {
            let status = fstat(&file).ok()?;
            let identity = (status.st_dev, status.st_ino);
            // The same file comes with every window under another number.
            let known = windows.values().filter_map(|mapped| mapped.file.as_ref()).find(|known| known.identity == identity).cloned();
            Some(known.unwrap_or_else(|| Shared { identity, handle: Arc::new(file) }))
        });
        windows.insert(iova, Mapped { size, file_offset, file });
    }

    /// Removes the window with exactly this address and size; what was donated from it stays donated.
    pub fn unmap(&self, iova: u64, size: u64) {
        let mut windows = self.lock();
        if windows.get(&iova).is_some_and(|mapped| mapped.size == size) {
            windows.remove(&iova);
        }
    }

    /// Removes all windows.
    pub fn unmap_all(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapped>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why memory cannot be donated.
#[derive(Debug, PartialEq, Eq, Display)]
enum Refusal {
    /// there is no memory at {0:#x}
    Nothing(u64),
    /// the memory at {0:#x} is no file that can be shared: start QEMU with `-object memory-backend-memfd,share=on` and `memory-backend=`
    NoFile(u64),
    /// the file behind the memory at {0:#x} is too short
    ShortFile(u64),
    /// the memory at {0:#x} is also at {1:#x}
    Alias(u64, u64),
    /// QEMU announced two windows for the memory at {0:#x}
    Overlap(u64),
}

/// Finds the ranges behind the addresses from `begin` to `end`.
fn find(windows: &BTreeMap<u64, Mapped>, begin: u64, end: u64) -> Result<Vec<FileRange>, Refusal> {
    let mut at = begin;
    let mut ranges = Vec::new();
    while at < end {
        // Those that begin behind `at` are not in the range.
        let mut here = windows.range(..=at).rev().filter(|(iova, mapped)| at - **iova < mapped.size);
        let (&iova, mapped) = here.next().ok_or(Refusal::Nothing(at))?;
        let within = at - iova;
        let left = mapped.size - within;
        let file = mapped.file.as_ref().ok_or(Refusal::NoFile(at))?;
        let size = left.min(end - at);
        // That the window's end does not wrap was checked when it came.
        let offset = mapped.file_offset.saturating_add(within);
        let length = fstat(&file.handle).ok().and_then(|status| u64::try_from(status.st_size).ok()).unwrap_or(0);
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(Refusal::ShortFile(at));
        }
        if overlapped(windows, iova, at, size) {
            return Err(Refusal::Overlap(at));
        }
        if let Some(other) = alias(windows, iova, file.identity, offset, size) {
            return Err(Refusal::Alias(at, other));
        }
        ranges.push(FileRange { file: Arc::clone(&file.handle), offset, size });
        at = at.saturating_add(size);
    }
    Ok(ranges)
}

/// Is an address of this piece in another window, too? A QEMU in order takes the old one away first.
fn overlapped(windows: &BTreeMap<u64, Mapped>, iova: u64, at: u64, size: u64) -> bool {
    windows.iter().any(|(other, mapped)| *other != iova && *other < at.saturating_add(size) && at < other.saturating_add(mapped.size))
}

/// Where else than in the window at `iova` a piece of a file is seen.
fn alias(windows: &BTreeMap<u64, Mapped>, iova: u64, identity: (u64, u64), offset: u64, size: u64) -> Option<u64> {
    let overlaps = |mapped: &Mapped| {
        mapped.file.as_ref().is_some_and(|file| file.identity == identity)
            && mapped.file_offset < offset.saturating_add(size)
            && offset < mapped.file_offset.saturating_add(mapped.size)
    };
    windows.iter().find(|(other, mapped)| **other != iova && overlaps(mapped)).map(|(other, _)| *other)
}

impl ParentMemory for ParentRam {
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
        let windows = self.lock();
        let end = run.gpa.0.checked_add(run.size)?;
        find(&windows, run.gpa.0, end).inspect_err(|reason| tracing::warn!("Memory cannot be donated: {reason}")).ok()
    }
}

#[cfg(test)]
mod tests {
    use nitroxide_abi::Gpa;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(size: u64) -> OwnedFd {
        let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        file
    }

    fn window(iova: u64, size: u64, file_offset: u64, file: &OwnedFd) -> Window {
        Window { iova, size, file_offset, readable: true, writable: true, file: Some(file.try_clone().unwrap()) }
    }

    fn resolve(ram: &ParentRam, gpa: u64, size: u64) -> Option<Vec<(u64, u64)>> {
        let ranges = ram.resolve(MemoryRun { gpa: Gpa(gpa), size })?;
        Some(ranges.into_iter().map(|range| (range.offset, range.size)).collect())
    }

    /// A q35 machine with 4 GiB: half below, half above 4 GiB, with the windows that firmware makes below 1 MiB.
    fn q35() -> ParentRam {
        let ram = ParentRam::new();
        let file = file(4096 * MIB);
        ram.map(window(0, 0xC_3000, 0, &file));
        ram.map(Window { writable: false, ..window(0xC_3000, 0x1_5000, 0xC_3000, &file) });
        ram.map(window(0xF_0000, 0x1_0000, 0xF_0000, &file));
        ram.map(window(MIB, 2047 * MIB, MIB, &file));
        ram.map(window(4096 * MIB, 2048 * MIB, 2048 * MIB, &file));
        ram.map(Window { file: None, ..window(0xFFFC_0000, 0x4_0000, 0, &file) });
        ram
    }

    #[test]
    fn memory_is_found_in_its_window() {
        let ram = q35();
        assert_eq!(resolve(&ram, 2 * MIB, 4 * MIB), Some(vec![(2 * MIB, 4 * MIB)]));
        assert_eq!(resolve(&ram, 4096 * MIB, 1024 * MIB), Some(vec![(2048 * MIB, 1024 * MIB)]));
        assert_eq!(resolve(&ram, 2046 * MIB, 2 * MIB), Some(vec![(2046 * MIB, 2 * MIB)]));
    }

    #[test]
    fn a_run_across_windows_is_in_pieces() {
        let ram = ParentRam::new();
        let (a, b) = (file(4 * MIB), file(8 * MIB));
        ram.map(window(0, 4 * MIB, 0, &a));
        ram.map(window(4 * MIB, 4 * MIB, 2 * MIB, &b));
        assert_eq!(resolve(&ram, 2 * MIB, 4 * MIB), Some(vec![(2 * MIB, 2 * MIB), (2 * MIB, 2 * MIB)]));
    }

    #[test]
    fn what_is_no_memory_of_the_parent_is_refused() {
        let ram = q35();
        for (gpa, size) in [
            (0, 2 * MIB),                // a read-only window in it
            (2046 * MIB, 4 * MIB),       // beyond the lower half
            (3072 * MIB, 2 * MIB),       // nothing there
            (0xFFFC_0000, 0x4_0000),     // without a file
            (6144 * MIB - MIB, 2 * MIB), // beyond the upper half
            (u64::MAX - MIB, 2 * MIB),   // wraps
            (u64::MAX - 2 * MIB + 1, 2 * MIB - 1),
        ] {
            assert_eq!(resolve(&ram, gpa, size), None, "{gpa:#x}");
        }
    }

    #[test]
    fn memory_seen_at_two_addresses_is_refused_until_it_is_seen_once() {
        let ram = ParentRam::new();
        let file = file(8 * MIB);
        ram.map(window(0, 8 * MIB, 0, &file));
        ram.map(window(16 * MIB, 2 * MIB, 2 * MIB, &file));
        assert_eq!(resolve(&ram, 2 * MIB, 2 * MIB), None);
        assert_eq!(resolve(&ram, 16 * MIB, 2 * MIB), None);
        assert_eq!(resolve(&ram, 4 * MIB, 2 * MIB), Some(vec![(4 * MIB, 2 * MIB)]));
        ram.unmap(16 * MIB, MIB);
        assert_eq!(resolve(&ram, 2 * MIB, 2 * MIB), None);
        ram.unmap(16 * MIB, 2 * MIB);
        assert_eq!(resolve(&ram, 2 * MIB, 2 * MIB), Some(vec![(2 * MIB, 2 * MIB)]));
        ram.unmap_all();
        assert_eq!(resolve(&ram, 2 * MIB, 2 * MIB), None);
    }

    #[test]
    fn memory_that_two_windows_claim_is_refused() {
        let ram = ParentRam::new();
        ram.map(window(0, 8 * MIB, 0, &file(8 * MIB)));
        ram.map(window(4 * MIB, 2 * MIB, 0, &file(8 * MIB)));
        for (gpa, size, found) in [(0, 4, true), (4, 2, false), (2, 4, false), (6, 2, true)] {
            assert_eq!(resolve(&ram, gpa * MIB, size * MIB).is_some(), found, "{gpa} {size}");
        }
        ram.unmap(4 * MIB, 2 * MIB);
        assert!(resolve(&ram, 0, 8 * MIB).is_some());
    }

    #[test]
    fn what_was_found_outlives_its_window() {
        let ram = ParentRam::new();
        ram.map(window(0, 4 * MIB, 0, &file(4 * MIB)));
        let ranges = ram.resolve(MemoryRun { gpa: Gpa(0), size: 2 * MIB }).unwrap();
        ram.unmap_all();
        assert_eq!(rustix::io::pwrite(&ranges[0].file, b"still there", 0), Ok(11));
    }

    #[test]
    fn a_file_that_is_shorter_than_its_window_is_refused() {
        let ram = ParentRam::new();
        ram.map(window(0, 8 * MIB, 0, &file(4 * MIB)));
        assert_eq!(resolve(&ram, 2 * MIB, 4 * MIB), None);
        assert_eq!(resolve(&ram, 2 * MIB, 2 * MIB), Some(vec![(2 * MIB, 2 * MIB)]));
    }

    #[test]
    fn windows_that_wrap_or_are_empty_are_ignored() {
        let ram = ParentRam::new();
        let file = file(4 * MIB);
        ram.map(window(u64::MAX, 2, 0, &file));
        ram.map(window(0, 2, u64::MAX, &file));
        ram.map(window(0, 0, 0, &file));
        assert!(ram.lock().is_empty());
    }

    #[test]
    fn all_windows_of_one_file_share_one_handle() {
        let ram = ParentRam::new();
        let file = file(8 * MIB);
        ram.map(window(0, 4 * MIB, 0, &file));
        ram.map(window(4 * MIB, 4 * MIB, 4 * MIB, &file));
        let ranges = ram.resolve(MemoryRun { gpa: Gpa(2 * MIB), size: 4 * MIB }).unwrap();
        assert!(Arc::ptr_eq(&ranges[0].file, &ranges[1].file));
    }

    /// A window of the model: where, how long, which page of which file (`None`: it cannot be donated from).
    #[derive(Clone, Copy, Debug)]
    struct Known {
        at: u64,
        length: u64,
        file: Option<usize>,
        page: u64,
    }

    /// What the model says of one address page: the file and page behind it, if it is in one window only and its page in no other.
    fn modelled(model: &[Known], at: u64) -> Option<(usize, u64)> {
        let within = |known: &&Known| (known.at..known.at + known.length).contains(&at);
        let mut here = model.iter().filter(within);
        let known = here.next().filter(|_| here.next().is_none())?;
        let (file, page) = (known.file?, known.page + (at - known.at));
        let shown = |known: &&Known| known.file == Some(file) && (known.page..known.page + known.length).contains(&page);
        (page < 16 && model.iter().filter(shown).count() == 1).then_some((file, page))
    }

    proptest! {
        /// Windows of any kind in any order, over and beside each other, of two files of 16 pages.
        #[test]
        fn churning_windows_are_found_as_a_map_of_pages_says(
            steps in proptest::collection::vec((0_u64..12, 1_u64..5, 0_usize..2, 0_u64..16, 0_u8..6), 0..24),
            begin in 0_u64..14,
            size in 1_u64..6,
        ) {
            let ram = ParentRam::new();
            let files = [file(16 * MIB), file(16 * MIB)];
            let mut model: Vec<Known> = Vec::new();
            for (at, length, number, page, what) in steps {
                let whole = window(at * MIB, length * MIB, page * MIB, &files[number]);
                let (window, file) = match what {
                    0 | 1 => {
                        ram.unmap(at * MIB, length * MIB);
                        model.retain(|known| (known.at, known.length) != (at, length));
                        continue;
                    }
                    2 => (Window { writable: false, ..whole }, None),
                    3 => (Window { file: None, ..whole }, None),
                    _ => (whole, Some(number)),
                };
                ram.map(window);
                model.retain(|known| known.at != at);
                model.push(Known { at, length, file, page });
            }
            let expected: Option<Vec<_>> = (begin..begin + size).map(|at| modelled(&model, at)).collect();
            let found = ram.resolve(MemoryRun { gpa: Gpa(begin * MIB), size: size * MIB }).map(|ranges| {
                let number = |range: &FileRange| {
                    let inode = |file: &OwnedFd| fstat(file).unwrap().st_ino;
                    files.iter().position(|file| inode(file) == inode(&range.file)).unwrap()
                };
                let pages = |range: &FileRange| range.offset / MIB..(range.offset + range.size) / MIB;
                ranges.iter().flat_map(|range| { let file = number(range); pages(range).map(move |page| (file, page)) }).collect::<Vec<_>>()
            });
            prop_assert_eq!(found, expected);
        }
    }

    proptest! {
        /// Windows in any order, of pages of one file each at its own place: an address is found if and only if its page is mapped, at its page.
        #[test]
        fn found_is_what_is_mapped(steps in proptest::collection::vec((0_u64..12, 1_u64..4, any::<bool>()), 0..24), begin in 0_u64..14, size in 1_u64..6) {
            let ram = ParentRam::new();
            let file = file(32 * MIB);
            let mut model: Vec<(u64, u64)> = Vec::new();
            for (at, length, map) in steps {
                let free = !model.iter().any(|(other, size)| at < other + size && *other < at + length);
                if map && free {
                    ram.map(window(at * MIB, length * MIB, (at + 1) * MIB, &file));
                    model.push((at, length));
                } else if !map {
                    ram.unmap(at * MIB, length * MIB);
                    model.retain(|known| *known != (at, length));
                }
            }
            let mapped = (begin..begin + size).all(|page| model.iter().any(|(at, length)| (*at..at + length).contains(&page)));
            let found = resolve(&ram, begin * MIB, size * MIB);
            prop_assert_eq!(found.is_some(), mapped);
            let mut expected = (begin + 1) * MIB;
            for (offset, size) in found.unwrap_or_default() {
                prop_assert_eq!(offset, expected);
                expected += size;
            }
        }
    }
}
