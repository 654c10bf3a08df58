//! Short names for the commands, for the tests of this directory.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::sync::Arc;

use nitroxide_abi::pci::{self, Command, Reply};
use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Device, Faults, Limits};

pub const MIB: u64 = 1 << 20;

pub fn device(limits: Limits, faults: &str) -> (Device, NullLauncher) {
    let launcher = NullLauncher::default();
    let faults: Faults = faults.parse().expect("tests write valid rules");
    (Device::new(limits, faults, Arc::new(launcher.clone())), launcher)
}

pub fn send(device: &Device, command: Command, request: &[u8]) -> Reply {
    device.command(command.number(), request).expect("no fault loses this reply")
}

pub fn alloc(device: &Device) -> u64 {
    let reply = send(device, Command::SlotAlloc, &[0]);
    assert_eq!(reply.rc, 0);
    reply.slot_uid
}

pub fn add_mem(device: &Device, slot_uid: u64, paddr: u64, size: u64) -> Reply {
    send(device, Command::SlotAddMem, &pci::SlotAddMem { slot_uid, paddr, size }.to_bytes())
}

pub fn add_vcpu(device: &Device, slot_uid: u64, vcpu_id: u32) -> Reply {
    send(device, Command::SlotAddVcpu, &pci::SlotAddVcpu { slot_uid, vcpu_id, padding: 0 }.to_bytes())
}

pub fn add_bulk_vcpus(device: &Device, slot_uid: u64, nr_vcpus: u64) -> Reply {
    send(device, Command::SlotAddBulkVcpus, &pci::SlotAddBulkVcpus { slot_uid, nr_vcpus }.to_bytes())
}

pub fn start(device: &Device, slot_uid: u64, enclave_cid: u64, flags: u64) -> Reply {
    send(device, Command::EnclaveStart, &pci::EnclaveStart { slot_uid, enclave_cid, flags }.to_bytes())
}

pub fn stop(device: &Device, slot_uid: u64) -> Reply {
    send(device, Command::EnclaveStop, &pci::EnclaveStop { slot_uid }.to_bytes())
}

pub fn free(device: &Device, slot_uid: u64) -> Reply {
    send(device, Command::SlotFree, &pci::SlotFree { slot_uid }.to_bytes())
}

pub fn info(device: &Device, slot_uid: u64) -> Reply {
    send(device, Command::SlotInfo, &pci::SlotInfo { slot_uid }.to_bytes())
}

pub fn next(device: &Device, slot_uid: u64) -> Reply {
    send(device, Command::NextSlot, &pci::NextSlot { slot_uid }.to_bytes())
}

pub fn get_slot(device: &Device, enclave_cid: u64) -> Reply {
    send(device, Command::EnclaveGetSlot, &pci::EnclaveGetSlot { enclave_cid }.to_bytes())
}

pub fn count(device: &Device) -> u64 {
    send(device, Command::SlotCount, &[0]).slot_count
}

/// A slot with 64 MiB at `paddr` and one vCPU: enough for a start.
pub fn ready(device: &Device, paddr: u64, vcpu: u32) -> u64 {
    let uid = alloc(device);
    assert_eq!(add_mem(device, uid, paddr, 64 * MIB).rc, 0);
    assert_eq!(add_vcpu(device, uid, vcpu).rc, 0);
    uid
}

pub fn running(device: &Device, paddr: u64, vcpu: u32) -> u64 {
    let uid = ready(device, paddr, vcpu);
    assert_eq!(start(device, uid, 0, 0).rc, 0);
    uid
}
