//! Each command with what it accepts and each of its refusals, as listed in `docs/device.md`, "Commands".

mod support;

use nitroxide_abi::Code;
use nitroxide_abi::pci::{Command, state};
use nitroxide_device::testing::Call;
use nitroxide_device::{DeviceCode, Limits, Usage};
use support::*;

const ENOENT: i32 = -2;
const EIO: i32 = -5;
const ENOMEM: i32 = -12;
const EINVAL: i32 = -22;
const ENOSPC: i32 = -28;
const EADDRINUSE: i32 = -98;
const UNKNOWN_SLOT: u64 = 4711; // arbitrary

fn ne(code: Code) -> i32 {
    code.negative()
}

#[test]
fn alloc_gives_a_uid_that_is_not_zero_and_the_most_regions() {
    let (device, _) = device(Limits { max_regions: 7, ..Limits::default() }, "");
    let reply = send(&device, Command::SlotAlloc, &[0]);
    assert_eq!((reply.rc, reply.mem_regions, reply.state), (0, 7, 0));
    assert_ne!(reply.slot_uid, 0);
}

#[test]
fn alloc_reads_its_version_byte_only() {
    let (device, _) = device(Limits::default(), "");
    let mut window = [0xA5; 240];
    window[0] = 0;
    assert_eq!(send(&device, Command::SlotAlloc, &window).rc, 0);
    assert_eq!(send(&device, Command::SlotAlloc, &[0; 8]).rc, 0);
    assert_eq!(send(&device, Command::SlotAlloc, &[1, 0, 0, 0, 1, 0, 0, 0]).rc, -286);
    assert_eq!(send(&device, Command::SlotAlloc, &[2]).rc, -295);
    assert_eq!(send(&device, Command::SlotAlloc, &[]).rc, EINVAL);
    assert_eq!(count(&device), 2);
}

#[test]
fn alloc_beyond_the_limit_is_enospc_until_a_slot_is_freed() {
    let (device, _) = device(Limits { max_slots: 2, ..Limits::default() }, "");
    let first = alloc(&device);
    alloc(&device);
    assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, ENOSPC);
    free(&device, first);
    assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, 0);
}

#[test]
fn unknown_slot_is_enoent_in_every_command() {
    let (device, _) = device(Limits::default(), "");
    alloc(&device);
    let replies = [
        add_mem(&device, UNKNOWN_SLOT, 0, 2 * MIB),
        add_vcpu(&device, UNKNOWN_SLOT, 1),
        add_bulk_vcpus(&device, UNKNOWN_SLOT, 1),
        start(&device, UNKNOWN_SLOT, 0, 0),
        stop(&device, UNKNOWN_SLOT),
        free(&device, UNKNOWN_SLOT),
        info(&device, UNKNOWN_SLOT),
        get_slot(&device, UNKNOWN_SLOT),
        next(&device, UNKNOWN_SLOT),
    ];
    assert_eq!(replies.map(|reply| reply.rc), [ENOENT; 9]);
}

#[test]
fn freed_slot_is_unknown_and_its_double_free_is_enoent() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = alloc(&device);
    assert_eq!(free(&device, uid).rc, 0);
    assert_eq!(free(&device, uid).rc, ENOENT);
    assert_eq!(launcher.live_slots(), 0);
}

#[test]
fn unknown_command_and_short_request_are_einval() {
    let (device, _) = device(Limits::default(), "");
    for number in [0, 12, 27, u32::MAX] {
        assert_eq!(device.command(number, &[0; 240]).map(|reply| reply.rc), Some(EINVAL));
    }
    for command in Command::ALL {
        let short = vec![0; command.request_bytes() - 1];
        assert_eq!(send(&device, command, &short).rc, EINVAL, "{}", command.name());
    }
}

#[test]
fn memory_must_be_aligned_not_empty_and_not_wrap() {
    let (device, _) = device(Limits::default(), "");
    let uid = alloc(&device);
    for (paddr, size) in [(0, 0), (MIB, 2 * MIB), (0, 3 * MIB), (0x1000, 0x1000), (0u64.wrapping_sub(2 * MIB), 4 * MIB), (0, u64::MAX)] {
        assert_eq!(add_mem(&device, uid, paddr, size).rc, EINVAL, "{paddr:#x}+{size:#x}");
    }
    assert_eq!(device.usage().memory_bytes, 0);
}

#[test]
fn memory_given_twice_is_262_in_one_slot_and_in_two() {
    let (device, launcher) = device(Limits::default(), "");
    let (first, second) = (alloc(&device), alloc(&device));
    assert_eq!(add_mem(&device, first, 16 * MIB, 8 * MIB).rc, 0);
    assert_eq!(add_mem(&device, first, 22 * MIB, 4 * MIB).rc, ne(Code::MEM_REGION_ALREADY_USED));
    assert_eq!(add_mem(&device, second, 14 * MIB, 4 * MIB).rc, ne(Code::MEM_REGION_ALREADY_USED));
    assert_eq!(launcher.memory(second.into_slot()), []);
    free(&device, first);
    assert_eq!(add_mem(&device, second, 14 * MIB, 4 * MIB).rc, 0);
}

#[test]
fn memory_beyond_the_limits_is_265_and_enomem() {
    let (device, _) = device(Limits { max_regions: 2, max_memory_bytes: 10 * MIB, ..Limits::default() }, "");
    let (first, second) = (alloc(&device), alloc(&device));
    assert_eq!(add_mem(&device, first, 0, 2 * MIB).rc, 0);
    assert_eq!(add_mem(&device, first, 10 * MIB, 4 * MIB).rc, 0);
    assert_eq!(add_mem(&device, first, 20 * MIB, 2 * MIB).rc, ne(Code::MEM_MAX_REGIONS));
    assert_eq!(add_mem(&device, second, 20 * MIB, 6 * MIB).rc, ENOMEM);
    assert_eq!(add_mem(&device, second, 20 * MIB, 4 * MIB).rc, 0);
}

#[test]
fn memory_the_launcher_refuses_is_not_counted_and_can_be_given_again() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = alloc(&device);
    add_mem(&device, uid, 0, 2 * MIB);
    launcher.refuse(Call::AddMemory, Some(DeviceCode::EFAULT));
    assert_eq!(add_mem(&device, uid, 4 * MIB, 2 * MIB).rc, -14);
    assert_eq!((info(&device, uid).mem_regions, info(&device, uid).mem_size), (1, 2 * MIB));
    launcher.refuse(Call::AddMemory, None);
    assert_eq!(add_mem(&device, uid, 4 * MIB, 2 * MIB).rc, 0);
}

#[test]
fn order_of_add_mem_is_the_order_the_launcher_sees() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = alloc(&device);
    for paddr in [40, 2, 20, 6] {
        add_mem(&device, uid, paddr * MIB, 2 * MIB);
    }
    let order: Vec<u64> = launcher.memory(uid.into_slot()).iter().map(|run| run.gpa.0 / MIB).collect();
    assert_eq!(order, [40, 2, 20, 6]);
}

#[test]
fn vcpu_given_twice_is_256_in_one_slot_and_in_two() {
    let (device, _) = device(Limits::default(), "");
    let (first, second) = (alloc(&device), alloc(&device));
    assert_eq!(add_vcpu(&device, first, 3).nr_vcpus, 1);
    assert_eq!(add_vcpu(&device, first, 3).rc, ne(Code::VCPU_ALREADY_USED));
    assert_eq!(add_vcpu(&device, second, 3).rc, ne(Code::VCPU_ALREADY_USED));
    free(&device, first);
    assert_eq!(add_vcpu(&device, second, 3).rc, 0);
}

#[test]
fn vcpus_beyond_the_limit_are_enospc_one_by_one_and_in_bulk() {
    let (device, _) = device(Limits { max_vcpus: 4, ..Limits::default() }, "");
    let uid = alloc(&device);
    assert_eq!(add_bulk_vcpus(&device, uid, 0).rc, EINVAL);
    assert_eq!(add_bulk_vcpus(&device, uid, 1 << 40).rc, EINVAL);
    assert_eq!(add_bulk_vcpus(&device, uid, 5).rc, ENOSPC);
    assert_eq!(add_bulk_vcpus(&device, uid, 3).nr_vcpus, 3);
    assert_eq!(add_vcpu(&device, uid, 9).nr_vcpus, 4);
    assert_eq!(add_vcpu(&device, uid, 8).rc, ENOSPC);
    assert_eq!(add_bulk_vcpus(&device, uid, u64::from(u32::MAX)).rc, ENOSPC);
}

#[test]
fn start_refuses_in_the_order_of_linux_driver() {
    let (device, _) = device(Limits::default(), "");
    let uid = alloc(&device);
    assert_eq!(start(&device, uid, 1, 2).rc, ne(Code::INVALID_FLAG_VALUE));
    for cid in [1, 2, 3, 0xFFFF_FFFF, 1 << 32, u64::MAX] {
        assert_eq!(start(&device, uid, cid, 1).rc, ne(Code::INVALID_ENCLAVE_CID), "{cid}");
    }
    assert_eq!(start(&device, uid, 4, 1).rc, ne(Code::NO_MEM_REGIONS_ADDED));
    add_mem(&device, uid, 0, 62 * MIB);
    assert_eq!(start(&device, uid, 4, 1).rc, ne(Code::ENCLAVE_MEM_MIN_SIZE));
    add_mem(&device, uid, 62 * MIB, 2 * MIB);
    assert_eq!(start(&device, uid, 4, 1).rc, ne(Code::NO_VCPUS_ADDED));
    add_vcpu(&device, uid, 1);
    assert_eq!(start(&device, uid, 4, 1).enclave_cid, 4);
    assert_eq!(start(&device, uid, 4, 1).rc, ne(Code::NOT_IN_INIT_STATE));
}

#[test]
fn start_passes_on_cid_debug_and_vcpus() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = ready(&device, 0, 5);
    add_vcpu(&device, uid, 2);
    add_bulk_vcpus(&device, uid, 2);
    assert_eq!(start(&device, uid, 77, 1).enclave_cid, 77);
    let request = launcher.start_request(uid.into_slot()).unwrap();
    let cpus: Vec<u32> = request.cpus.iter().map(|cpu| cpu.0).collect();
    assert_eq!((request.cid.map(|cid| cid.0), request.debug, request.vcpus, cpus), (Some(77), true, 4, vec![2, 5]));
    assert_eq!((info(&device, uid).flags, info(&device, uid).state), (1, state::RUNNING));
}

#[test]
fn started_slot_takes_no_more_memory_or_vcpus() {
    let (device, _) = device(Limits::default(), "");
    let uid = running(&device, 0, 1);
    let replies = [add_mem(&device, uid, 512 * MIB, 2 * MIB), add_vcpu(&device, uid, 2), add_bulk_vcpus(&device, uid, 1)];
    assert_eq!(replies.map(|reply| reply.rc), [ne(Code::NOT_IN_INIT_STATE); 3]);
}

#[test]
fn cid_in_use_is_eaddrinuse_until_its_enclave_ends() {
    let (device, launcher) = device(Limits::default(), "");
    let (first, second) = (ready(&device, 0, 1), ready(&device, 64 * MIB, 2));
    assert_eq!(start(&device, first, 77, 0).rc, 0);
    assert_eq!(start(&device, second, 77, 0).rc, EADDRINUSE);
    assert_eq!(info(&device, second).state, state::INIT);
    assert!(launcher.end(first.into_slot()));
    assert_eq!(start(&device, second, 77, 0).rc, 0);
}

#[test]
fn start_the_launcher_refuses_can_be_tried_again() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = ready(&device, 0, 1);
    launcher.refuse(Call::Start, Some(DeviceCode::EINVAL));
    assert_eq!(start(&device, uid, 0, 1).rc, EINVAL);
    let after = info(&device, uid);
    assert_eq!((after.state, after.flags, after.enclave_cid), (state::INIT, 0, 0));
    launcher.refuse(Call::Start, None);
    assert_eq!(start(&device, uid, 0, 0).rc, 0);
}

#[test]
fn stop_of_a_slot_that_does_not_run_succeeds_and_changes_nothing() {
    let (device, _) = device(Limits::default(), "");
    let uid = ready(&device, 0, 1);
    assert_eq!(stop(&device, uid).rc, 0);
    assert_eq!(start(&device, uid, 0, 0).rc, 0);
}

#[test]
fn stopped_enclave_keeps_its_slot_and_memory_until_it_is_freed() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = running(&device, 0, 1);
    assert_eq!(stop(&device, uid).rc, 0);
    assert_eq!(stop(&device, uid).rc, 0);
    assert_eq!(launcher.running(), 0);
    assert_eq!((info(&device, uid).state, device.usage().memory_bytes), (state::STOPPED, 64 * MIB));
    assert_eq!(start(&device, uid, 0, 0).rc, ne(Code::NOT_IN_INIT_STATE));
    assert_eq!(free(&device, uid).rc, 0);
    assert_eq!(device.usage(), Usage::default());
}

#[test]
fn free_of_a_running_slot_ends_it() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = running(&device, 0, 1);
    assert_eq!(free(&device, uid).rc, 0);
    assert_eq!((launcher.live_slots(), device.usage()), (0, Usage::default()));
}

#[test]
fn next_slot_walks_all_slots_in_order_even_from_one_that_is_gone() {
    let (device, _) = device(Limits::default(), "");
    let uids = [alloc(&device), alloc(&device), alloc(&device)];
    free(&device, uids[1]);
    assert_eq!(next(&device, 0).slot_uid, uids[0]);
    assert_eq!(next(&device, uids[0]).slot_uid, uids[2]);
    assert_eq!(next(&device, uids[1]).slot_uid, uids[2]);
    assert_eq!(next(&device, uids[2]).rc, ENOENT);
    assert_eq!(next(&device, u64::MAX).rc, ENOENT);
}

#[test]
fn get_slot_finds_running_enclaves_by_cid() {
    let (device, _) = device(Limits::default(), "");
    let uid = ready(&device, 0, 1);
    start(&device, uid, 99, 0);
    assert_eq!(get_slot(&device, 99).slot_uid, uid);
    assert_eq!(get_slot(&device, 98).rc, ENOENT);
    assert_eq!(get_slot(&device, 1 << 32 | 99).rc, ENOENT);
    stop(&device, uid);
    assert_eq!(get_slot(&device, 99).rc, ENOENT);
}

#[test]
fn launcher_that_gives_no_slot_leaves_nothing_reserved() {
    let (device, launcher) = device(Limits { max_slots: 1, ..Limits::default() }, "");
    launcher.refuse(Call::ReserveSlot, Some(DeviceCode::EIO));
    assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, EIO);
    launcher.refuse(Call::ReserveSlot, None);
    assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, 0);
}

#[test]
fn reset_frees_every_slot_and_the_device_works_on() {
    let (device, launcher) = device(Limits::default(), "");
    running(&device, 0, 1);
    ready(&device, 64 * MIB, 2);
    alloc(&device);
    device.reset();
    assert_eq!((launcher.live_slots(), device.usage(), count(&device)), (0, Usage::default(), 0));
    running(&device, 0, 1);
    drop(device);
    assert_eq!(launcher.live_slots(), 0);
}

/// For readable assertions.
trait IntoSlot {
    fn into_slot(self) -> nitroxide_abi::SlotUid;
}

impl IntoSlot for u64 {
    fn into_slot(self) -> nitroxide_abi::SlotUid {
        nitroxide_abi::SlotUid(self)
    }
}
