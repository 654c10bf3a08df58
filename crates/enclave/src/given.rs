//! Which pages of the parent's files are with enclaves: [`Given`], shared by all slots of one launcher, and [`Held`], one slot's share.
//!
//! The device already refuses addresses that are given twice. But addresses are not pages: a window that goes away and comes back elsewhere
//! shows the same page of a file under another address, and two enclaves (or one, twice) must never run in one page. docs/device-pci.md,
//! "Donated memory".

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nitroxide_engine::FileRange;
use rustix::fs::fstat;

use crate::slot::lock;

/// A file, whatever descriptor it comes with: device and inode.
type Identity = (u64, u64);

/// All ranges that are with enclaves; none overlaps another.
#[derive(Debug, Default)]
pub(crate) struct Given {
    /// Exclusive ends by file and start.
    ranges: Mutex<BTreeMap<(Identity, u64), u64>>,
}

/// What one slot holds of it; dropping gives it back.
#[derive(Debug, Default)]
pub(crate) struct Held {
    given: Arc<Given>,
    starts: Vec<(Identity, u64)>,
}

impl Held {
    /// Nothing yet.
    pub(crate) fn new(given: Arc<Given>) -> Self {
        Self { given, starts: Vec::new() }
    }

    /// Takes ranges, all or none; `None` if part of one is taken already, twice among them, or cannot be named.
    pub(crate) fn take(&mut self, pieces: &[FileRange]) -> Option<Mark> {
        let mark = Mark(self.starts.len());
        for piece in pieces {
            if self.take_one(piece).is_none() {
                self.give_back(mark);
                return None;
            }
        }
        Some(mark)
    }

    fn take_one(&mut self, piece: &FileRange) -> Option<()> {
        let status = fstat(&piece.file).ok()?;
        let identity = (status.st_dev, status.st_ino);
        let end = piece.offset.checked_add(piece.size).filter(|end| *end > piece.offset)?;
        let mut ranges = lock(&self.given.ranges);
        // Ranges do not overlap, so the last one that begins before our end reaches furthest towards us.
        let before = ranges.range((identity, 0)..(identity, end)).next_back();
        if before.is_some_and(|(_, other_end)| *other_end > piece.offset) {
            return None;
        }
        ranges.insert((identity, piece.offset), end);
        drop(ranges);
        self.starts.push((identity, piece.offset));
        Some(())
    }

    /// Gives back what was taken since.
    pub(crate) fn give_back(&mut self, mark: Mark) {
        let mut ranges = lock(&self.given.ranges);
        for start in self.starts.drain(mark.0.min(self.starts.len())..) {
            ranges.remove(&start);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back(Mark(0));
    }
}

/// How much was held at some time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(usize);

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::memory::sealable_memory;

    fn range(file: &OwnedFd, offset: u64, size: u64) -> FileRange {
        FileRange { file: Arc::new(file.try_clone().unwrap()), offset, size }
    }

    #[test]
    fn a_page_is_given_once_whatever_its_descriptor() {
        let given = Arc::<Given>::default();
        let (mut one, mut other) = (Held::new(Arc::clone(&given)), Held::new(Arc::clone(&given)));
        let (a, b) = (sealable_memory("a").unwrap(), sealable_memory("b").unwrap());
        one.take(&[range(&a, 4, 4)]).unwrap();
        for (offset, size) in [(4, 4), (0, 5), (7, 1), (0, 100), (5, 1), (u64::MAX, 1), (20, 0)] {
            assert!(other.take(&[range(&a, offset, size)]).is_none(), "{offset} {size}");
            assert!(one.take(&[range(&a, offset, size)]).is_none(), "{offset} {size}");
        }
        other.take(&[range(&a, 0, 4), range(&a, 8, 4), range(&b, 4, 4)]).unwrap();
        drop(one);
        other.take(&[range(&a, 4, 4)]).unwrap();
        drop(other);
        assert!(given.ranges.lock().unwrap().is_empty());
    }

    #[test]
    fn all_pieces_are_taken_or_none() {
        let given = Arc::<Given>::default();
        let mut held = Held::new(Arc::clone(&given));
        let file = sealable_memory("file").unwrap();
        assert!(held.take(&[range(&file, 0, 4), range(&file, 2, 4)]).is_none());
        let mark = held.take(&[range(&file, 0, 4), range(&file, 4, 4)]).unwrap();
        held.take(&[range(&file, 8, 4)]).unwrap();
        held.give_back(mark);
        assert!(given.ranges.lock().unwrap().is_empty());
    }
}
