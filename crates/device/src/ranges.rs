//! Which parts of the parent's memory are given away: a set of ranges that do not overlap.

use std::collections::BTreeMap;

use nitroxide_abi::Gpa;

use crate::MemoryRun;

/// Ranges of guest-physical addresses, none overlapping another.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    /// Exclusive end by start.
    by_start: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds a range; `false` and no change if any part of it is in the set already.
    ///
    /// `run` must not be empty, and its end must not wrap.
    pub(crate) fn insert(&mut self, run: MemoryRun) -> bool {
        let start = run.gpa.0;
        let end = start.saturating_add(run.size);
        // Ranges do not overlap, so the last one that begins before our end is the one that reaches furthest towards us.
        let overlaps = self.by_start.range(..end).next_back().is_some_and(|(_, &other_end)| other_end > start);
        if !overlaps {
            self.by_start.insert(start, end);
        }
        !overlaps
    }

    /// Takes out a range that [`insert`](Self::insert) added.
    pub(crate) fn remove(&mut self, gpa: Gpa) {
        self.by_start.remove(&gpa.0);
    }

    /// How many ranges there are.
    pub(crate) fn len(&self) -> usize {
        self.by_start.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn run(gpa_mib: u64, size_mib: u64) -> MemoryRun {
        MemoryRun { gpa: Gpa(gpa_mib * MIB), size: size_mib * MIB }
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let mut ranges = Ranges::default();
        assert!(ranges.insert(run(4, 4)));
        assert!(ranges.insert(run(8, 2)));
        assert!(ranges.insert(run(2, 2)));
        assert_eq!(ranges.len(), 3);
    }

    #[test]
    fn every_kind_of_overlap_is_refused() {
        let mut ranges = Ranges::default();
        assert!(ranges.insert(run(10, 10)));
        for (gpa, size) in [(10, 10), (10, 2), (18, 2), (12, 4), (8, 4), (18, 4), (8, 14)] {
            assert!(!ranges.insert(run(gpa, size)), "{gpa}+{size}");
        }
        assert_eq!(ranges.len(), 1);
    }

    #[test]
    fn removed_range_can_be_given_again() {
        let mut ranges = Ranges::default();
        assert!(ranges.insert(run(0, 2)));
        ranges.remove(Gpa(0));
        assert!(ranges.insert(run(0, 4)));
    }
}
