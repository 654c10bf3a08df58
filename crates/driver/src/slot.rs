//! How an enclave begins: [`Slot::allocate`].

use nitroxide_abi::pci::{Command, SlotAlloc, SlotFree};
use nitroxide_abi::SlotUid;

use crate::device::{exchange, DeviceError};
use crate::error::CreateError;
use crate::{Device, Machine, Notice};

/// Who has cores and memory: one enclave, told apart from all others that pool and ledger have known.
///
/// A slot's number alone does not do that: the next device gives it again, while an enclave of the one before may not have learned yet that it is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Holder {
    pub(crate) slot: SlotUid,
    pub(crate) serial: u64,
}

/// A slot that the device has allocated, with what the enclave inherits from the pool at that moment.
///
/// It must become an [`crate::Enclave`] (with no storage, if none can be had), whose release frees it.
#[derive(Debug)]
#[must_use]
pub struct Slot {
    pub(crate) holder: Holder,
    pub(crate) max_regions: u64,
    pub(crate) node: i32,
}

impl Slot {
    /// Makes a slot, if the pool has a free core.
    ///
    /// What mainline checks between the two steps (memory, descriptors) the home checks before, except for what depends on the
    /// reply. While slots exist the pool does not change.
    ///
    /// # Errors
    ///
    /// 272 without a free core; the device's code; EIO if the device chose a number that cannot be used (W20).
    pub fn allocate<M: Machine>(machine: &M, device: &mut impl Device) -> Result<Self, CreateError> {
        // Counted before the device is asked: from here on the pool does not change (W16).
        let (serial, node) = machine.with_pool(|pool, _| {
            if !pool.has_free_core() {
                return Err(CreateError::NoCpus);
            }
            pool.slots = pool.slots.saturating_add(1);
            pool.serial = pool.serial.wrapping_add(1);
            Ok((pool.serial, pool.node()))
        })?;
        let result = Self::ask(machine, device, serial, node);
        if result.is_err() {
            uncount(machine);
        }
        result
    }

    fn ask<M: Machine>(machine: &M, device: &mut impl Device, serial: u64, node: i32) -> Result<Self, CreateError> {
        // One zero byte, never more: the second generation reads this byte as the version of a longer request.
        let reply = exchange(device, Command::SlotAlloc, &SlotAlloc::default().to_bytes())?;
        let uid = SlotUid(reply.slot_uid);
        let in_use = machine.with_pool(|pool, _| pool.holds(uid)) || machine.with_ledger(|ledger| ledger.holds(uid));
        if uid == SlotUid(0) {
            // Nobody could name this slot later; freeing it now is the only chance.
            let _: Result<_, DeviceError> = exchange(device, Command::SlotFree, &SlotFree { slot_uid: uid.0 }.to_bytes());
        }
        if uid == SlotUid(0) || in_use {
            device.notice(&Notice::BadSlotUid { slot: uid });
            return Err(CreateError::BadSlotUid);
        }
        Ok(Self { holder: Holder { slot: uid, serial }, max_regions: reply.mem_regions, node })
    }

    /// The slot's number.
    #[must_use]
    pub fn uid(&self) -> SlotUid {
        self.holder.slot
    }

    /// Most contiguous runs of memory that the device takes for this slot.
    #[must_use]
    pub fn max_regions(&self) -> u64 {
        self.max_regions
    }
}

/// A slot is gone; the pool may change when it was the last.
pub(crate) fn uncount(machine: &impl Machine) {
    machine.with_pool(|pool, _| pool.slots = pool.slots.saturating_sub(1));
}
