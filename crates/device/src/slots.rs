//! The table of slots: what each one holds, and the rule that one call at a time uses a slot.
//!
//! The table's lock is held for bookkeeping only. A command that needs the launcher takes the [`Slot`] out of its entry ([`Borrowed`]), works
//! without the lock, and puts it back; commands for the same slot wait for that, commands for others and SLOT_INFO do not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nitroxide_abi::pci::state;
use nitroxide_abi::{Cid, CpuId, Gpa, SlotUid};

use crate::ranges::Ranges;
use crate::{DeviceCode, Slot};

/// How long a reset waits for calls under way before it hurries them again. What changes while it does so is noticed after this time.
const HURRY: Duration = Duration::from_millis(20);

/// Where a slot is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Allocated, takes memory and vCPUs.
    Init,
    /// The launcher is starting it.
    Starting,
    /// The enclave runs.
    Running,
    /// The enclave has ended by itself; the launcher has not been asked whether all of it is gone.
    Ended,
    /// The launcher is stopping it.
    Stopping,
    /// The launcher has confirmed that the enclave is gone.
    Stopped,
    /// The slot is being given back.
    Freeing,
}

impl Phase {
    /// The state that SLOT_INFO tells.
    pub(crate) fn state(self) -> u16 {
        match self {
            Self::Init | Self::Starting => state::INIT,
            Self::Running | Self::Stopping => state::RUNNING,
            Self::Ended | Self::Stopped | Self::Freeing => state::STOPPED,
        }
    }

    /// Whether the slot's CID is one that no other enclave may get.
    pub(crate) fn holds_cid(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Stopping)
    }
}

/// One allocated slot.
pub(crate) struct Entry {
    pub(crate) phase: Phase,
    /// What the launcher gave; `None` while a call uses it.
    pub(crate) slot: Option<Box<dyn Slot>>,
    /// Where the pieces of memory begin, in the order they were added.
    pub(crate) runs: Vec<Gpa>,
    /// Bytes of all pieces.
    pub(crate) memory_bytes: u64,
    /// vCPUs added by number.
    pub(crate) cpus: BTreeSet<CpuId>,
    /// vCPUs added in bulk, without a number.
    pub(crate) bulk_vcpus: u32,
    /// The CID asked for while starting, the actual one from then on.
    pub(crate) cid: Option<Cid>,
    /// The flags of the last start.
    pub(crate) flags: u64,
    /// How often a start was tried: tells notifications of an earlier try from those of this one.
    pub(crate) starts: u64,
    /// Whether the enclave ended by itself before its start returned.
    pub(crate) ended_early: bool,
}

impl Entry {
    pub(crate) fn new(slot: Box<dyn Slot>) -> Self {
        Self {
            phase: Phase::Init,
            slot: Some(slot),
            runs: Vec::new(),
            memory_bytes: 0,
            cpus: BTreeSet::new(),
            bulk_vcpus: 0,
            cid: None,
            flags: 0,
            starts: 0,
            ended_early: false,
        }
    }

    /// Number of vCPUs; the limit on them keeps it within u32.
    pub(crate) fn vcpus(&self) -> u32 {
        u32::try_from(self.cpus.len()).unwrap_or(u32::MAX).saturating_add(self.bulk_vcpus)
    }
}

/// Everything that is given away.
#[derive(Default)]
pub(crate) struct Table {
    pub(crate) slots: BTreeMap<SlotUid, Entry>,
    /// Memory of all slots.
    pub(crate) donated: Ranges,
    /// Bytes of `donated`.
    pub(crate) memory_bytes: u64,
    /// vCPUs with a number, of all slots.
    pub(crate) cpus: BTreeSet<CpuId>,
    /// SLOT_ALLOCs that wait for the launcher.
    pub(crate) reserving: u32,
    /// Resets that are running; while there are any, nothing new is begun.
    pub(crate) resets: u32,
    /// How many resets have begun, wrapping.
    pub(crate) resets_begun: u64,
}

impl Table {
    /// Forgets a slot that is gone, with all it had.
    fn forget(&mut self, uid: SlotUid) {
        if let Some(entry) = self.slots.remove(&uid) {
            for gpa in entry.runs {
                self.donated.remove(gpa);
            }
            self.memory_bytes = self.memory_bytes.saturating_sub(entry.memory_bytes);
            for cpu in entry.cpus {
                self.cpus.remove(&cpu);
            }
        }
    }
}

/// The table with its lock, and the bell that rings when a slot is put back or forgotten.
#[derive(Default)]
pub(crate) struct Slots {
    table: Mutex<Table>,
    changed: Condvar,
}

impl Slots {
    /// The table. A panic under the lock leaves bookkeeping that is still whole, since each change is one step.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something in the table has changed.
    fn wait<'a>(&'a self, table: MutexGuard<'a, Table>) -> MutexGuard<'a, Table> {
        self.changed.wait(table).unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that something in the table has changed.
    pub(crate) fn ring(&self) {
        self.changed.notify_all();
    }

    /// Waits until no call uses the slot.
    ///
    /// # Errors
    ///
    /// ENOENT for a slot that is not there or is being given back, ENODEV during a reset.
    pub(crate) fn idle(&self, uid: SlotUid) -> Result<MutexGuard<'_, Table>, DeviceCode> {
        let mut table = self.lock();
        loop {
            let entry = table.slots.get(&uid).filter(|entry| entry.phase != Phase::Freeing).ok_or(DeviceCode::ENOENT)?;
            if table.resets > 0 {
                return Err(DeviceCode::ENODEV);
            }
            if entry.slot.is_some() {
                return Ok(table);
            }
            table = self.wait(table);
        }
    }

    /// Takes the slot out of its entry and unlocks the table. The slot must be idle; its entry stays while it is borrowed.
    pub(crate) fn borrow<'a>(&'a self, mut table: MutexGuard<'a, Table>, uid: SlotUid) -> Result<Borrowed<'a>, DeviceCode> {
        let slot = table.slots.get_mut(&uid).and_then(|entry| entry.slot.take()).ok_or(DeviceCode::ENOENT)?;
        Ok(Borrowed { slots: self, uid, slot: Some(slot) })
    }

    /// Gives an idle slot back: first the launcher drops it, then its memory and vCPUs count as free.
    pub(crate) fn free(&self, mut table: MutexGuard<'_, Table>, uid: SlotUid) {
        /// Forgets the slot even if the launcher panics.
        struct Forget<'a>(&'a Slots, SlotUid);
        impl Drop for Forget<'_> {
            fn drop(&mut self) {
                self.0.lock().forget(self.1);
                self.0.ring();
            }
        }
        let Some(entry) = table.slots.get_mut(&uid) else { return };
        entry.phase = Phase::Freeing;
        let slot = entry.slot.take();
        drop(table);
        let _forget = Forget(self, uid);
        drop(slot);
    }

    /// Waits until a reset begins or is under way, at most for `patience`.
    pub(crate) fn await_reset(&self, patience: Duration) {
        let table = self.lock();
        let before = table.resets_begun;
        let goes_on = |table: &mut Table| table.resets == 0 && table.resets_begun == before;
        drop(self.changed.wait_timeout_while(table, patience, goes_on));
    }

    /// Gives every slot back, waiting for calls under way. New calls are refused meanwhile; `interrupt` hurries those under way.
    pub(crate) fn free_all(&self, interrupt: impl Fn()) {
        let mut table = self.lock();
        table.resets = table.resets.saturating_add(1);
        table.resets_begun = table.resets_begun.wrapping_add(1);
        self.ring();
        loop {
            let idle = table.slots.iter().find(|(_, entry)| entry.slot.is_some()).map(|(uid, _)| *uid);
            if let Some(uid) = idle {
                self.free(table, uid);
                table = self.lock();
            } else if table.slots.is_empty() && table.reserving == 0 {
                break;
            } else {
                // Again and again: a call may have begun just before and not be interruptible yet.
                drop(table);
                interrupt();
                table = self.lock();
                table = self.changed.wait_timeout(table, HURRY).map_or_else(|poisoned| poisoned.into_inner().0, |(table, _)| table);
            }
        }
        table.resets = table.resets.saturating_sub(1);
    }
}

/// A slot taken out of its entry for a call to the launcher. Dropped, it goes back, and waiting commands go on.
pub(crate) struct Borrowed<'a> {
    slots: &'a Slots,
    uid: SlotUid,
    slot: Option<Box<dyn Slot>>,
}

impl<'a> Borrowed<'a> {
    /// The slot, for the call.
    pub(crate) fn slot(&mut self) -> &mut dyn Slot {
        self.slot.as_deref_mut().expect("only `put_back` takes it out, and that consumes self or is the drop")
    }

    /// Puts the slot back and writes down, in the same step, what the call has changed.
    pub(crate) fn put_back<T>(mut self, commit: impl FnOnce(&mut Table, SlotUid) -> T) -> T {
        let mut table = self.slots.lock();
        let outcome = commit(&mut table, self.uid);
        self.restore(&mut table);
        outcome
    }

    fn restore(&mut self, table: &mut Table) {
        // Only `free` removes entries, and it waits for borrowed slots: the entry is there.
        if let (Some(slot), Some(entry)) = (self.slot.take(), table.slots.get_mut(&self.uid)) {
            entry.slot = Some(slot);
        }
        self.slots.ring();
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if self.slot.is_some() {
            let mut table = self.slots.lock();
            self.restore(&mut table);
        }
    }
}
