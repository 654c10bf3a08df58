//! The eleven commands: checks, accounting, and what is asked of the launcher. The table of codes is in `docs/device.md`, "Commands".
//!
//! Each is `fn(shared, request) -> Result<Reply, DeviceCode>`. The last check that can refuse comes before the launcher is called, and what
//! the launcher refuses is undone. Numbers and structs: kernel file `drivers/virt/nitro_enclaves/ne_pci_dev.h`.

use std::ops::Bound;
use std::sync::Arc;

use nitroxide_abi::limits::{GRANULE, MAX_ENCLAVE_CID, MIN_ENCLAVE_BYTES, MIN_ENCLAVE_CID};
use nitroxide_abi::pci::{self, Command, Reply};
use nitroxide_abi::{Cid, Code, CpuId, Gpa, SlotUid};

use crate::device::Shared;
use crate::slots::{Entry, Phase, Table};
use crate::{DeviceCode, MemoryRun, StartRequest};

/// The one start flag: debug mode. AWS's own driver gives meanings to further bits; they are refused here rather than swallowed, so that
/// nobody takes an enclave for something it is not.
const START_FLAG_DEBUG: u64 = 1;

/// The second generation's "flag not supported", for a SLOT_ALLOC whose version byte says that launch flags follow
/// (`nitroxide_abi::reserved`).
const LAUNCH_FLAGS_REFUSED: DeviceCode = DeviceCode::constant(-286);

/// The second generation's "bad payload version", for a SLOT_ALLOC with any other version byte.
const PAYLOAD_VERSION_REFUSED: DeviceCode = DeviceCode::constant(-295);

/// Carries out one command.
pub(crate) fn carry_out(shared: &Arc<Shared>, number: u32, request: &[u8]) -> Result<Reply, DeviceCode> {
    let command = Command::from_number(number).ok_or(DeviceCode::EINVAL)?;
    match command {
        Command::EnclaveStart => start(shared, read(pci::EnclaveStart::from_prefix(request))?),
        Command::EnclaveGetSlot => get_slot(shared, read(pci::EnclaveGetSlot::from_prefix(request))?),
        Command::EnclaveStop => stop(shared, read(pci::EnclaveStop::from_prefix(request))?),
        Command::SlotAlloc => alloc(shared, read(pci::SlotAlloc::from_prefix(request))?),
        Command::SlotFree => free(shared, read(pci::SlotFree::from_prefix(request))?),
        Command::SlotAddMem => add_mem(shared, read(pci::SlotAddMem::from_prefix(request))?),
        Command::SlotAddVcpu => add_vcpu(shared, read(pci::SlotAddVcpu::from_prefix(request))?),
        Command::SlotCount => count(shared, read(pci::SlotCount::from_prefix(request))?),
        Command::NextSlot => next(shared, read(pci::NextSlot::from_prefix(request))?),
        Command::SlotInfo => info(shared, read(pci::SlotInfo::from_prefix(request))?),
        Command::SlotAddBulkVcpus => add_bulk_vcpus(shared, read(pci::SlotAddBulkVcpus::from_prefix(request))?),
    }
}

/// A request that is too short for its command is refused.
fn read<T>(request: Option<T>) -> Result<T, DeviceCode> {
    request.ok_or(DeviceCode::EINVAL)
}

/// SLOT_ALLOC. The request's first byte is a version; 0 is the only one, and what stands behind it is left over from an earlier request.
fn alloc(shared: &Shared, request: pci::SlotAlloc) -> Result<Reply, DeviceCode> {
    match request.unused {
        0 => {}
        1 => return Err(LAUNCH_FLAGS_REFUSED),
        _ => return Err(PAYLOAD_VERSION_REFUSED),
    }
    let mut table = shared.slots.lock();
    if table.resets > 0 {
        return Err(DeviceCode::ENODEV);
    }
    let reserving = usize::try_from(table.reserving).unwrap_or(usize::MAX);
    let allocated = table.slots.len().saturating_add(reserving);
    if allocated >= usize::try_from(shared.limits.max_slots).unwrap_or(usize::MAX) {
        return Err(DeviceCode::ENOSPC);
    }
    table.reserving = table.reserving.saturating_add(1);
    drop(table);
    // From here on a reset waits for this command, even if the launcher panics.
    let reserving = Reserving(shared);
    let slot = shared.launcher.reserve_slot()?;
    let uid = slot.uid();
    let mut table = shared.slots.lock();
    // Uid 0 means "no slot" to drivers, which would never free it.
    let refusal = if table.resets > 0 {
        Some(DeviceCode::ENODEV)
    } else if uid.0 == 0 || table.slots.contains_key(&uid) {
        tracing::error!(%uid, "the launcher gave a slot uid that is zero or taken");
        Some(DeviceCode::EIO)
    } else {
        None
    };
    if let Some(code) = refusal {
        drop(table);
        drop(slot);
        return Err(code);
    }
    table.slots.insert(uid, Entry::new(slot));
    drop(table);
    drop(reserving);
    Ok(Reply { slot_uid: uid.0, mem_regions: u64::from(shared.max_regions()), ..Reply::default() })
}

/// Counts a SLOT_ALLOC under way until it is dropped.
struct Reserving<'a>(&'a Shared);

impl Drop for Reserving<'_> {
    fn drop(&mut self) {
        let mut table = self.0.slots.lock();
        table.reserving = table.reserving.saturating_sub(1);
        drop(table);
        self.0.slots.ring();
    }
}

/// SLOT_FREE: ends a running enclave too, since a driver that has missed a reply may not know that it runs. Never fails for a valid slot.
fn free(shared: &Shared, request: pci::SlotFree) -> Result<Reply, DeviceCode> {
    let table = shared.slots.idle(SlotUid(request.slot_uid))?;
    shared.slots.free(table, SlotUid(request.slot_uid));
    Ok(Reply { slot_uid: request.slot_uid, ..Reply::default() })
}

/// SLOT_ADD_MEM.
fn add_mem(shared: &Shared, request: pci::SlotAddMem) -> Result<Reply, DeviceCode> {
    let uid = SlotUid(request.slot_uid);
    let run = MemoryRun { gpa: Gpa(request.paddr), size: request.size };
    let mut table = shared.slots.idle(uid)?;
    reserve_memory(shared, &mut table, uid, run)?;
    let mut borrowed = shared.slots.borrow(table, uid)?;
    let taken = borrowed.slot().add_memory(run);
    borrowed.put_back(|table, uid| {
        if taken.is_err() {
            give_memory_back(table, uid, run);
        }
        taken.and_then(|()| reply_about(table, uid))
    })
}

/// Checks a run and writes it down as given.
fn reserve_memory(shared: &Shared, table: &mut Table, uid: SlotUid, run: MemoryRun) -> Result<(), DeviceCode> {
    let total = table.memory_bytes.checked_add(run.size).filter(|total| *total <= shared.limits.max_memory_bytes);
    let entry = table.slots.get_mut(&uid).ok_or(DeviceCode::ENOENT)?;
    if entry.phase != Phase::Init {
        return Err(Code::NOT_IN_INIT_STATE.into());
    }
    let aligned = run.gpa.0.is_multiple_of(GRANULE) && run.size.is_multiple_of(GRANULE);
    if run.size == 0 || !aligned || run.gpa.0.checked_add(run.size).is_none() {
        return Err(DeviceCode::EINVAL);
    }
    if entry.runs.len() >= usize::try_from(shared.max_regions()).unwrap_or(usize::MAX) {
        return Err(Code::MEM_MAX_REGIONS.into());
    }
    let total = total.ok_or(DeviceCode::ENOMEM)?;
    if !table.donated.insert(run) {
        return Err(Code::MEM_REGION_ALREADY_USED.into());
    }
    entry.runs.push(run.gpa);
    entry.memory_bytes = entry.memory_bytes.saturating_add(run.size);
    table.memory_bytes = total;
    Ok(())
}

/// Undoes [`reserve_memory`] for the run that the launcher has refused, which is the slot's last one.
fn give_memory_back(table: &mut Table, uid: SlotUid, run: MemoryRun) {
    table.donated.remove(run.gpa);
    table.memory_bytes = table.memory_bytes.saturating_sub(run.size);
    if let Some(entry) = table.slots.get_mut(&uid) {
        entry.runs.pop();
        entry.memory_bytes = entry.memory_bytes.saturating_sub(run.size);
    }
}

/// SLOT_ADD_VCPU.
fn add_vcpu(shared: &Shared, request: pci::SlotAddVcpu) -> Result<Reply, DeviceCode> {
    let (uid, cpu) = (SlotUid(request.slot_uid), CpuId(request.vcpu_id));
    let mut table = shared.slots.idle(uid)?;
    let entry = table.slots.get(&uid).ok_or(DeviceCode::ENOENT)?;
    room_for_vcpus(shared, entry, 1)?;
    if !table.cpus.insert(cpu) {
        return Err(Code::VCPU_ALREADY_USED.into());
    }
    if let Some(entry) = table.slots.get_mut(&uid) {
        entry.cpus.insert(cpu);
    }
    reply_about(&table, uid)
}

/// SLOT_ADD_BULK_VCPUS: a number of vCPUs without a number each.
fn add_bulk_vcpus(shared: &Shared, request: pci::SlotAddBulkVcpus) -> Result<Reply, DeviceCode> {
    let uid = SlotUid(request.slot_uid);
    let count = u32::try_from(request.nr_vcpus).ok().filter(|count| *count > 0).ok_or(DeviceCode::EINVAL)?;
    let mut table = shared.slots.idle(uid)?;
    let entry = table.slots.get_mut(&uid).ok_or(DeviceCode::ENOENT)?;
    room_for_vcpus(shared, entry, count)?;
    entry.bulk_vcpus = entry.bulk_vcpus.saturating_add(count);
    reply_about(&table, uid)
}

fn room_for_vcpus(shared: &Shared, entry: &Entry, more: u32) -> Result<(), DeviceCode> {
    if entry.phase != Phase::Init {
        return Err(Code::NOT_IN_INIT_STATE.into());
    }
    let total = entry.vcpus().checked_add(more).filter(|total| *total <= shared.limits.max_vcpus);
    total.map(|_| ()).ok_or(DeviceCode::ENOSPC)
}

/// ENCLAVE_START.
fn start(shared: &Arc<Shared>, request: pci::EnclaveStart) -> Result<Reply, DeviceCode> {
    let uid = SlotUid(request.slot_uid);
    let mut table = shared.slots.idle(uid)?;
    let wanted = check_start(&table, &request)?;
    let entry = table.slots.get_mut(&uid).ok_or(DeviceCode::ENOENT)?;
    entry.phase = Phase::Starting;
    entry.cid = wanted;
    entry.flags = request.flags;
    entry.starts = entry.starts.saturating_add(1);
    entry.ended_early = false;
    let notifier = shared.notifier(uid, entry.starts);
    let debug = request.flags & START_FLAG_DEBUG != 0;
    let start = StartRequest { cid: wanted, debug, vcpus: entry.vcpus(), cpus: entry.cpus.iter().copied().collect() };
    let mut borrowed = shared.slots.borrow(table, uid)?;
    let started = borrowed.slot().start(&start, notifier);
    let (reply, ended_early) = borrowed.put_back(|table, uid| finish_start(table, uid, started));
    if ended_early {
        shared.raise_event();
    }
    reply
}

/// Checks a start in the order of Linux' driver, and says which CID is wanted.
fn check_start(table: &Table, request: &pci::EnclaveStart) -> Result<Option<Cid>, DeviceCode> {
    if request.flags & !START_FLAG_DEBUG != 0 {
        return Err(Code::INVALID_FLAG_VALUE.into());
    }
    let wanted = match request.enclave_cid {
        0 => None,
        cid => Some(
            u32::try_from(cid)
                .ok()
                .map(Cid)
                .filter(|cid| (MIN_ENCLAVE_CID..=MAX_ENCLAVE_CID).contains(cid))
                .ok_or(Code::INVALID_ENCLAVE_CID)?,
        ),
    };
    let entry = table.slots.get(&SlotUid(request.slot_uid)).ok_or(DeviceCode::ENOENT)?;
    if entry.phase != Phase::Init {
        return Err(Code::NOT_IN_INIT_STATE.into());
    }
    if entry.runs.is_empty() {
        return Err(Code::NO_MEM_REGIONS_ADDED.into());
    }
    if entry.memory_bytes < MIN_ENCLAVE_BYTES {
        return Err(Code::ENCLAVE_MEM_MIN_SIZE.into());
    }
    if entry.vcpus() == 0 {
        return Err(Code::NO_VCPUS_ADDED.into());
    }
    if wanted.is_some_and(|cid| holder_of(table, cid).is_some()) {
        return Err(DeviceCode::EADDRINUSE);
    }
    Ok(wanted)
}

/// Writes down what the launcher has answered to a start, and says whether the enclave has ended meanwhile.
fn finish_start(table: &mut Table, uid: SlotUid, started: Result<Cid, DeviceCode>) -> (Result<Reply, DeviceCode>, bool) {
    let Some(entry) = table.slots.get_mut(&uid) else { return (Err(DeviceCode::ENOENT), false) };
    match started {
        Ok(cid) => {
            entry.cid = Some(cid);
            entry.phase = if entry.ended_early { Phase::Ended } else { Phase::Running };
            let ended_early = entry.ended_early;
            (reply_about(table, uid), ended_early)
        }
        Err(code) => {
            entry.cid = None;
            entry.flags = 0;
            entry.phase = Phase::Init;
            (Err(code), false)
        }
    }
}

/// ENCLAVE_STOP: answers when the enclave is really gone. A slot that does not run is stopped already. Never fails for a valid slot.
fn stop(shared: &Shared, request: pci::EnclaveStop) -> Result<Reply, DeviceCode> {
    let uid = SlotUid(request.slot_uid);
    let mut table = shared.slots.idle(uid)?;
    let entry = table.slots.get_mut(&uid).ok_or(DeviceCode::ENOENT)?;
    if !matches!(entry.phase, Phase::Running | Phase::Ended) {
        return reply_about(&table, uid);
    }
    entry.phase = Phase::Stopping;
    let mut borrowed = shared.slots.borrow(table, uid)?;
    borrowed.slot().stop();
    borrowed.put_back(|table, uid| {
        if let Some(entry) = table.slots.get_mut(&uid) {
            entry.phase = Phase::Stopped;
        }
        reply_about(table, uid)
    })
}

/// SLOT_INFO: never waits for another command.
fn info(shared: &Shared, request: pci::SlotInfo) -> Result<Reply, DeviceCode> {
    let uid = SlotUid(request.slot_uid);
    let table = shared.slots.lock();
    let entry = allocated(&table, uid).ok_or(DeviceCode::ENOENT)?;
    let state = entry.phase.state();
    reply_about(&table, uid).map(|reply| Reply { state, ..reply })
}

/// ENCLAVE_GET_SLOT: which slot has the running enclave with this CID.
fn get_slot(shared: &Shared, request: pci::EnclaveGetSlot) -> Result<Reply, DeviceCode> {
    let table = shared.slots.lock();
    let cid = u32::try_from(request.enclave_cid).map_err(|_| DeviceCode::ENOENT)?;
    let uid = holder_of(&table, Cid(cid)).ok_or(DeviceCode::ENOENT)?;
    reply_about(&table, uid)
}

/// SLOT_COUNT: how many slots are allocated.
fn count(shared: &Shared, _request: pci::SlotCount) -> Result<Reply, DeviceCode> {
    let table = shared.slots.lock();
    let allocated = table.slots.values().filter(|entry| entry.phase != Phase::Freeing).count();
    Ok(Reply { slot_count: u64::try_from(allocated).unwrap_or(u64::MAX), ..Reply::default() })
}

/// NEXT_SLOT: the slot with the next greater uid; 0 asks for the first, and the given slot need not be there any more.
fn next(shared: &Shared, request: pci::NextSlot) -> Result<Reply, DeviceCode> {
    let table = shared.slots.lock();
    let after = table.slots.range((Bound::Excluded(SlotUid(request.slot_uid)), Bound::Unbounded));
    let (uid, _) = after.into_iter().find(|(_, entry)| entry.phase != Phase::Freeing).ok_or(DeviceCode::ENOENT)?;
    reply_about(&table, *uid)
}

/// The slot, unless it is being given back.
fn allocated(table: &Table, uid: SlotUid) -> Option<&Entry> {
    table.slots.get(&uid).filter(|entry| entry.phase != Phase::Freeing)
}

/// The slot whose enclave has this CID or is about to get it.
fn holder_of(table: &Table, cid: Cid) -> Option<SlotUid> {
    table.slots.iter().find(|(_, entry)| entry.phase.holds_cid() && entry.cid == Some(cid)).map(|(uid, _)| *uid)
}

/// A successful reply with what there is to say about a slot. The state is in the reply to SLOT_INFO only.
fn reply_about(table: &Table, uid: SlotUid) -> Result<Reply, DeviceCode> {
    let entry = allocated(table, uid).ok_or(DeviceCode::ENOENT)?;
    Ok(Reply {
        slot_uid: uid.0,
        enclave_cid: entry.cid.map_or(0, |cid| u64::from(cid.0)),
        mem_regions: u64::try_from(entry.runs.len()).unwrap_or(u64::MAX),
        mem_size: entry.memory_bytes,
        nr_vcpus: u64::from(entry.vcpus()),
        flags: entry.flags,
        ..Reply::default()
    })
}
