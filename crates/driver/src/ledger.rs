//! Which physical memory enclaves have: the [`Ledger`], so that no page is given away twice (W13).

use nitroxide_abi::{Gpa, SlotUid};

use crate::error::SetMemoryError;
use crate::runs::Run;
use crate::slot::Holder;

/// One contiguous run of memory and the enclave that has it; `size` 0 marks an unused entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LedgerEntry {
    start: Gpa,
    size: u64,
    holder: Holder,
}

/// All memory that enclaves of one parent have, as physical runs in ascending order.
///
/// # Invariants
///
/// The first `used` entries of the table are sorted by address and do not overlap.
#[derive(Clone, Debug)]
pub struct Ledger<T> {
    table: T,
    used: usize,
}

impl<T: AsRef<[LedgerEntry]> + AsMut<[LedgerEntry]>> Ledger<T> {
    /// An empty ledger over `table`; its length is how many runs all enclaves together can have.
    pub fn new(table: T) -> Self {
        Self { table, used: 0 }
    }

    /// Runs that enclaves have now.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes that enclaves have now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries().iter().fold(0, |sum, entry| sum.saturating_add(entry.size))
    }

    /// Enters a run for an enclave.
    pub(crate) fn claim(&mut self, holder: Holder, run: Run) -> Result<(), SetMemoryError> {
        let end = run.gpa.0.checked_add(run.size).ok_or(SetMemoryError::UnalignedPage)?;
        let place = self.entries().partition_point(|entry| entry.start < run.gpa);
        let before = place.checked_sub(1).and_then(|index| self.entries().get(index));
        let overlaps_before = before.is_some_and(|entry| entry.start.0.saturating_add(entry.size) > run.gpa.0);
        let overlaps_after = self.entries().get(place).is_some_and(|entry| entry.start.0 < end);
        if overlaps_before || overlaps_after {
            return Err(SetMemoryError::AlreadyUsed);
        }
        let used = self.used;
        let room = self.table.as_mut().get_mut(place..=used).ok_or(SetMemoryError::LedgerFull)?;
        room.rotate_right(1);
        if let Some(entry) = room.first_mut() {
            *entry = LedgerEntry { start: run.gpa, size: run.size, holder };
        }
        self.used = used.saturating_add(1);
        Ok(())
    }

    /// Strikes out one run of an enclave, if it has it.
    pub(crate) fn release(&mut self, holder: Holder, run: Run) {
        self.retain(|entry| entry.holder != holder || entry.start != run.gpa);
    }

    /// Strikes out everything that an enclave has.
    pub(crate) fn release_all(&mut self, holder: Holder) {
        self.retain(|entry| entry.holder != holder);
    }

    /// Does an enclave of this number have memory?
    pub(crate) fn holds(&self, slot: SlotUid) -> bool {
        self.entries().iter().any(|entry| entry.holder.slot == slot)
    }

    fn retain(&mut self, keep: impl Fn(&LedgerEntry) -> bool) {
        let used = self.used;
        let Some(entries) = self.table.as_mut().get_mut(..used) else { return };
        let mut kept = 0_usize;
        for index in 0..used {
            if entries.get(index).is_some_and(&keep) {
                entries.swap(kept, index);
                kept = kept.saturating_add(1);
            }
        }
        self.used = kept;
    }

    fn entries(&self) -> &[LedgerEntry] {
        self.table.as_ref().get(..self.used).unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Holder = Holder { slot: SlotUid(1), serial: 1 };
    const TWO: Holder = Holder { slot: SlotUid(1), serial: 2 };

    fn run(gpa: u64, size: u64) -> Run {
        Run { gpa: Gpa(gpa), size, pages: 1 }
    }

    #[test]
    fn overlaps_are_refused_on_both_sides_and_neighbours_are_not() {
        let mut ledger = Ledger::new([LedgerEntry::default(); 8]);
        ledger.claim(ONE, run(10, 10)).unwrap();
        for (gpa, size) in [(10, 10), (5, 6), (19, 1), (12, 2), (0, 100)] {
            assert_eq!(ledger.claim(TWO, run(gpa, size)), Err(SetMemoryError::AlreadyUsed));
        }
        ledger.claim(TWO, run(20, 5)).unwrap();
        ledger.claim(TWO, run(0, 10)).unwrap();
        assert_eq!((ledger.used(), ledger.bytes()), (3, 25));
    }

    #[test]
    fn released_runs_can_be_claimed_again() {
        let mut ledger = Ledger::new([LedgerEntry::default(); 2]);
        ledger.claim(ONE, run(10, 10)).unwrap();
        ledger.claim(TWO, run(30, 10)).unwrap();
        assert_eq!(ledger.claim(TWO, run(50, 1)), Err(SetMemoryError::LedgerFull));
        ledger.release(TWO, run(10, 10));
        assert!(ledger.holds(ONE.slot));
        ledger.release(ONE, run(10, 10));
        ledger.claim(TWO, run(10, 10)).unwrap();
        ledger.release_all(TWO);
        assert_eq!(ledger.used(), 0);
    }
}
