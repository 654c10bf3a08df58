//! The C driver's weaknesses that are the core's to mend, each by its number (docs/driver.md, "Weaknesses").
//!
//! W3 is in `mailbox.rs`, W5 beside `sanitise`, W18 and W20 also in `pool.rs`. W4, W6, W8, W9 and W17 are the homes'; what the core
//! contributes to W4, W8 and W9 is here.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

mod support;

use nitroxide_abi::extension::{exit_reason, trouble};
use nitroxide_abi::pci::Command::{EnclaveStart, EnclaveStop, SlotAddMem, SlotAddVcpu, SlotAlloc, SlotFree, SlotInfo};
use nitroxide_abi::{pci, Code};
use nitroxide_driver::{DeviceError, EventOutcome, Machine, Pages, PoolError, Region, Slot, State};
use support::client::Mapped;
use support::device::{Fault, Model};
use support::{Fixture, TestEnclave, ARGUMENT, GIB, MIB};

#[test]
fn w1_refused_pages_go_back() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    let good = |gpa| Mapped { gpa, size: 2 * MIB, huge: true, node: 0, readable: true };
    let bad = [
        (Mapped { size: 4096, huge: false, ..good(0) }, Code::MEM_NOT_HUGE_PAGE),
        (Mapped { huge: false, ..good(0) }, Code::MEM_NOT_HUGE_PAGE),
        (Mapped { size: GIB, ..good(0) }, Code::INVALID_PAGE_SIZE),
        (Mapped { node: 1, ..good(0) }, Code::MEM_DIFFERENT_NUMA_NODE),
        (good(0x1000), Code::EINVAL),
    ];
    for (bad, code) in bad {
        let address = f.memory.map(vec![good(f.memory.fresh_gpa(2 * MIB)), bad]);
        for _ in 0..2000 {
            assert_eq!(f.set_memory(&mut e, address, 4 * MIB), Err(code));
        }
        assert_eq!(f.memory.pinned(), 0, "{code}");
    }
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w2_failed_slot_info_changes_nothing() {
    for fault in [Fault::Refuse(-5), Fault::LoseReply, Fault::LoseCommand] {
        let mut f = Fixture::new(200);
        let mut e = f.running();
        f.device.log.clear();
        f.device.fail_next(SlotInfo, fault);
        assert_eq!(e.device_event(&mut f.device), EventOutcome::Unknown);
        assert!(!e.hung_up());
        assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::NOT_IN_INIT_STATE));
        f.close(e).unwrap();
        assert_eq!(f.device.sent(), [SlotInfo, EnclaveStop, SlotFree]);
        f.assert_nothing_held();
    }
}

#[test]
fn w2_failed_slot_info_of_one_enclave_says_nothing_of_another() {
    let mut f = Fixture::new(200);
    let (mut one, mut two) = (f.running(), f.running());
    f.device.end(one.slot_uid(), pci::state::STOPPED);
    f.device.fail_next(SlotInfo, Fault::LoseReply);
    assert_eq!(two.device_event(&mut f.device), EventOutcome::Unknown);
    assert_eq!(one.device_event(&mut f.device), EventOutcome::Ended);
    assert_eq!((one.state(), two.state()), (State::Stopped, State::Running));
}

#[test]
fn w4_every_call_on_a_device_that_is_gone_is_enodev_and_nothing_is_held() {
    let mut f = Fixture::new(200);
    let mut running = f.running();
    let mut init = f.create(ARGUMENT).unwrap();
    f.device.gone = true;
    assert_eq!(running.device_event(&mut f.device), EventOutcome::Ended);
    assert!(running.hung_up());
    assert_eq!(running.summary().exit_reason, exit_reason::DEVICE_GONE);
    init.device_gone(&mut f.device);
    let address = f.memory.map_huge(2 * MIB);
    assert_eq!(f.add_vcpu(&mut init, 0), Err(Code::ENODEV));
    assert_eq!(f.load_info(&mut init, 1), Err(Code::ENODEV));
    assert_eq!(f.set_memory(&mut init, address, 2 * MIB), Err(Code::ENODEV));
    assert_eq!(f.start(&mut init, 0, 0), Err(Code::ENODEV));
    assert_eq!(running.stop(&mut f.device).map_err(Code::from), Err(Code::ENODEV));
    f.close(init).unwrap();
    assert_eq!(f.create(ARGUMENT).map(|_| 0), Err(Code::ENODEV));
    f.close(running).unwrap();
    f.assert_nothing_held();
}

/// The next device may give the same numbers again, and needs CPUs for its own enclaves.
#[test]
fn w4_open_enclave_of_a_device_that_is_gone_gives_back_what_it_had() {
    let mut f = Fixture::new(200);
    let mut old = f.running();
    old.give_back_gone(&f.machine);
    assert_eq!(f.machine.free(), [4, 5], "as long as the device is there nothing goes back");
    f.device.gone = true;
    old.device_gone(&mut f.device);
    old.give_back_gone(&f.machine);
    f.assert_nothing_held();
    f.device = Model::new(200);
    let new = f.running();
    assert_eq!(new.slot_uid(), old.slot_uid());
    assert_eq!(f.add_vcpu(&mut old, 0), Err(Code::ENODEV));
    f.close(old).unwrap();
    assert_eq!(f.machine.free(), [4, 5], "the close of the old one takes nothing from the new one");
    f.close(new).unwrap();
    f.assert_nothing_held();
}

/// A call that waits for its caller's memory learns late that its device is gone: the next one has given the number again by then.
#[test]
fn w4_enclave_that_learns_late_of_its_devices_end_takes_nothing_from_the_next_one_of_its_number() {
    for close in [false, true] {
        let mut f = Fixture::new(200);
        let mut old = f.create(ARGUMENT).unwrap();
        f.device = Model::new(200);
        let mut new = f.ready();
        assert_eq!(new.slot_uid(), old.slot_uid());
        let runs = f.machine.with_ledger(|ledger| ledger.used());
        f.device.gone = true;
        assert_eq!(f.add_vcpu(&mut old, 0), Err(Code::ENODEV));
        let address = f.memory.map_huge(2 * MIB);
        assert_eq!(f.set_memory(&mut old, address, 2 * MIB), Err(Code::ENODEV));
        if close {
            f.close(old).unwrap();
        } else {
            old.give_back_gone(&f.machine);
        }
        f.device.gone = false;
        assert_eq!(f.machine.free(), [4, 5]);
        assert_eq!(f.machine.with_ledger(|ledger| ledger.used()), runs);
        f.start(&mut new, 0, 0).unwrap();
        f.close(new).unwrap();
        f.assert_nothing_held();
    }
}

#[test]
fn w4_device_that_goes_in_the_middle_of_a_call_takes_its_part_back() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    let address = f.memory.map_huge(2 * MIB);
    f.device.gone = true;
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ENODEV));
    assert_eq!(e.state(), State::Gone);
    assert_eq!(f.set_memory(&mut e, address, 2 * MIB), Err(Code::ENODEV));
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w5_odd_return_codes_reach_the_caller_as_eio_and_the_log_as_they_are() {
    for rc in [-5000, -512, -4, -85, i32::MIN] {
        let mut f = Fixture::new(200);
        let mut e = f.ready();
        f.device.fail_next(EnclaveStart, Fault::Refuse(rc));
        assert_eq!(f.start(&mut e, 0, 0), Err(Code::EIO));
        assert_eq!(e.summary().device_rc, rc);
        assert!(f.device.notices[0].contains(&rc.to_string()));
    }
}

#[test]
fn w8_region_without_bookkeeping_is_enomem_and_asks_for_no_page() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    f.memory.set_largest_bookkeeping(GIB);
    assert_eq!(f.set_memory(&mut e, 0x1000_0000_0000, 900 * GIB), Err(Code::ENOMEM));
    assert_eq!(f.memory.pinned(), 0);
}

#[test]
fn w9_event_during_start_is_looked_at_before_start_returns() {
    let mut f = Fixture::new(200);
    let mut e = f.ready();
    f.device.event_during_start = Some(pci::state::STOPPED);
    assert_eq!(f.start(&mut e, 0, 0), Ok(16));
    assert!(e.hung_up());
    assert_eq!(e.state(), State::Stopped);
}

#[test]
fn w9_start_without_an_event_asks_nothing_more() {
    let mut f = Fixture::new(200);
    let mut e = f.ready();
    f.device.log.clear();
    f.start(&mut e, 0, 0).unwrap();
    assert_eq!(f.device.sent(), [EnclaveStart]);
}

#[test]
fn w10_failed_stop_keeps_everything_and_a_retry_gives_it_back() {
    for fault in [Fault::Refuse(-5), Fault::LoseCommand, Fault::LoseReply] {
        let mut f = Fixture::new(200);
        let e = f.running();
        let pinned = f.memory.pinned();
        f.device.fail_next(EnclaveStop, fault);
        let mut e = f.close(e).unwrap_err();
        assert_eq!(e.summary().trouble, trouble::CLOSED | trouble::STOP_FAILED);
        assert!(f.device.notices.last().unwrap().contains("not stopped"));
        assert_eq!(f.memory.pinned(), pinned);
        assert_eq!(f.machine.free(), [4, 5]);
        assert_eq!(f.machine.write_pool("2-3"), Err(PoolError::EnclavesExist));
        e.release(&f.machine, &mut f.device).unwrap();
        assert_eq!(e.summary().trouble, trouble::CLOSED);
        assert!(f.device.slots.is_empty());
        f.assert_nothing_held();
        f.machine.write_pool("2-3").unwrap();
    }
}

#[test]
fn w10_failed_free_keeps_everything_and_a_retry_gives_it_back() {
    for fault in [Fault::Refuse(-5), Fault::LoseCommand, Fault::LoseReply] {
        let mut f = Fixture::new(200);
        let e = f.running();
        f.device.fail_next(SlotFree, fault);
        let mut e = f.close(e).unwrap_err();
        assert_eq!(e.summary().trouble, trouble::CLOSED | trouble::FREE_FAILED);
        assert!(f.memory.pinned() > 0);
        assert_eq!(f.machine.write_pool("2-3"), Err(PoolError::EnclavesExist));
        e.release(&f.machine, &mut f.device).unwrap();
        e.release(&f.machine, &mut f.device).unwrap();
        assert_eq!(e.summary().trouble, trouble::CLOSED);
        assert!(f.device.slots.is_empty());
        f.assert_nothing_held();
    }
}

#[test]
fn w10_refusal_alone_is_no_confirmation() {
    let mut f = Fixture::new(200);
    let e = f.running();
    f.device.fail_next(SlotFree, Fault::Refuse(-22));
    let e = f.close(e).unwrap_err();
    f.device.fail_next(SlotFree, Fault::Refuse(-22));
    let e = f.close(e).unwrap_err();
    assert!(f.memory.pinned() > 0);
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w10_slot_that_the_device_denies_is_gone_only_after_a_free_without_a_reply() {
    let mut f = Fixture::new(200);
    let e = f.running();
    f.device.fail_next(SlotFree, Fault::Refuse(-22));
    f.device.fail_next(SlotInfo, Fault::Refuse(-22));
    let e = f.close(e).unwrap_err();
    assert!(f.memory.pinned() > 0);
    f.device.faults.clear();
    f.close(e).unwrap();
}

#[test]
fn w10_enclave_that_ended_unnoticed_can_be_closed() {
    let mut f = Fixture::new(200);
    let e = f.running();
    f.device.slots.get_mut(&e.slot_uid().0).unwrap().state = pci::state::STOPPED;
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w10_reset_of_the_device_ends_the_trouble() {
    let mut f = Fixture::new(200);
    let e = f.running();
    f.device.fail_next(EnclaveStop, Fault::Refuse(-5));
    let mut e = f.close(e).unwrap_err();
    f.device.slots.clear();
    e.device_gone(&mut f.device);
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w11_foreign_add_vcpu_keeps_core_in_pool() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    f.device.log.clear();
    for cpu in [0, 4] {
        let mut child = f.memory.stranger();
        assert_eq!(f.add_vcpu_as(&mut e, &mut child, cpu), Err(Code::EIO));
    }
    assert_eq!(f.machine.free(), [2, 3, 4, 5]);
    assert_eq!(f.device.sent(), []);
}

#[test]
fn w11_foreign_caller_gets_the_code_of_the_pool_first() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    for (cpu, code) in [(1, Code::VCPU_NOT_IN_CPU_POOL), (6, Code::INVALID_VCPU)] {
        let mut child = f.memory.stranger();
        assert_eq!(f.add_vcpu_as(&mut e, &mut child, cpu), Err(code));
    }
}

#[test]
fn w11_refused_vcpu_gives_its_core_back_but_not_one_with_other_vcpus() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    f.device.fail_next(SlotAddVcpu, Fault::Refuse(-22));
    assert_eq!(f.add_vcpu(&mut e, 5), Err(Code::EINVAL));
    assert_eq!(f.machine.free(), [2, 3, 4, 5]);
    assert_eq!(f.add_vcpu(&mut e, 0), Ok(2));
    f.device.fail_next(SlotAddVcpu, Fault::Refuse(-22));
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::EINVAL));
    assert_eq!(f.machine.free(), [4, 5]);
    assert_eq!(f.add_vcpu(&mut e, 0), Ok(3));
}

#[test]
fn w11_vcpu_without_a_reply_keeps_its_core_until_the_slot_is_freed() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    f.device.fail_next(SlotAddVcpu, Fault::LoseReply);
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
    assert_eq!(f.machine.free(), [4, 5]);
    // The device has it: it refuses a second time, and the core stays.
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::EINVAL));
    assert_eq!(f.machine.free(), [4, 5]);
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w12_refusal_of_the_first_run_undoes_the_call() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    let address = f.memory.map_huge(4 * MIB);
    f.device.fail_next(SlotAddMem, Fault::Refuse(-12));
    assert_eq!(f.set_memory(&mut e, address, 4 * MIB), Err(Code::ENOMEM));
    assert_eq!(f.memory.pinned(), 0);
    assert_eq!((e.summary().runs, e.summary().memory_bytes), (0, 0));
    assert_eq!(f.set_memory(&mut e, address, 4 * MIB), Ok(()));
}

#[test]
fn w12_refusal_of_a_later_run_keeps_the_accepted_ones_and_no_others() {
    let mut f = Fixture::new(3);
    let mut e = f.create(ARGUMENT).unwrap();
    let gpa = f.memory.fresh_gpa(20 * MIB);
    let address = f.memory.map_pages([gpa, gpa + 2 * MIB, gpa + 8 * MIB, gpa + 12 * MIB]);
    f.device.fail_later(SlotAddMem, 1, Fault::Refuse(-12));
    assert_eq!(f.set_memory(&mut e, address, 8 * MIB), Err(Code::ENOMEM));
    assert_eq!(f.memory.pinned(), 2);
    assert_eq!((e.summary().runs, e.summary().memory_bytes), (1, 4 * MIB));
    assert_eq!(f.set_memory(&mut e, address, 8 * MIB), Err(Code::MEM_REGION_ALREADY_USED));
    // What the device did not take is free for another enclave.
    let mut other = f.create(ARGUMENT).unwrap();
    let rest = f.memory.map_pages([gpa + 8 * MIB, gpa + 12 * MIB]);
    assert_eq!(f.set_memory(&mut other, rest, 4 * MIB), Ok(()));
    f.close(e).unwrap();
    f.close(other).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w12_run_without_a_reply_stays_but_is_no_memory_to_start_with() {
    let mut f = Fixture::new(2);
    let mut e = f.create(ARGUMENT).unwrap();
    let address = f.memory.map_huge(64 * MIB);
    f.device.fail_next(SlotAddMem, Fault::LoseReply);
    assert_eq!(f.set_memory(&mut e, address, 64 * MIB), Err(Code::ETIMEDOUT));
    assert_eq!(f.memory.pinned(), 32);
    assert_eq!((e.summary().runs, e.summary().memory_bytes), (1, 0));
    assert_eq!(f.start(&mut e, 0, 0), Err(Code::ENCLAVE_MEM_MIN_SIZE));
    assert_eq!(f.set_memory(&mut e, address, 64 * MIB), Err(Code::MEM_REGION_ALREADY_USED));
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w13_page_twice_in_one_call_or_enclave_or_in_two_is_262() {
    let mut f = Fixture::new(200);
    let mut one = f.create(ARGUMENT).unwrap();
    let gpa = f.memory.fresh_gpa(8 * MIB);
    let twice = f.memory.map_pages([gpa, gpa + 4 * MIB, gpa]);
    assert_eq!(f.set_memory(&mut one, twice, 6 * MIB), Err(Code::MEM_REGION_ALREADY_USED));
    assert_eq!(f.memory.pinned(), 0);
    f.machine.with_ledger(|ledger| assert_eq!(ledger.used(), 0));
    assert_eq!(f.set_memory(&mut one, twice, 4 * MIB), Ok(()));
    let alias = f.memory.map_pages([gpa + 4 * MIB]);
    assert_eq!(f.set_memory(&mut one, alias, 2 * MIB), Err(Code::MEM_REGION_ALREADY_USED));
    let mut two = f.create(ARGUMENT).unwrap();
    assert_eq!(f.set_memory(&mut two, alias, 2 * MIB), Err(Code::MEM_REGION_ALREADY_USED));
    f.close(one).unwrap();
    assert_eq!(f.set_memory(&mut two, alias, 2 * MIB), Ok(()));
}

#[test]
fn w14_two_mib_of_a_gigantic_page_is_273_and_gives_nothing() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    let page = |gpa, size| Mapped { gpa, size, huge: true, node: 0, readable: true };
    let giant = f.memory.map(vec![page(f.memory.fresh_gpa(GIB), GIB), page(f.memory.fresh_gpa(2 * MIB), 2 * MIB)]);
    assert_eq!(f.set_memory(&mut e, giant, 2 * MIB), Err(Code::INVALID_PAGE_SIZE));
    assert_eq!(f.set_memory(&mut e, giant, GIB - 2 * MIB), Err(Code::INVALID_PAGE_SIZE));
    assert_eq!((f.memory.pinned(), e.summary().memory_bytes), (0, 0));
    assert_eq!(f.set_memory(&mut e, giant, GIB + 2 * MIB), Ok(()));
    assert_eq!(e.summary().memory_bytes, GIB + 2 * MIB);
}

#[test]
fn w15_cid_in_use_is_eaddrinuse_and_any_holder_may_start() {
    let mut f = Fixture::new(200);
    let (mut one, mut two) = (f.ready(), f.ready());
    // `start` of the fixture calls as another process.
    assert_eq!(f.start(&mut one, 0, 77), Ok(77));
    assert_eq!(f.start(&mut two, 0, 77), Err(Code::EADDRINUSE));
    assert_eq!(f.start(&mut two, 0, 78), Ok(78));
}

#[test]
fn w16_pool_does_not_change_while_a_slot_is_being_made_or_left_over() {
    let mut f = Fixture::new(200);
    let e = f.create(ARGUMENT).unwrap();
    assert_eq!(f.machine.write_pool("2-3"), Err(PoolError::EnclavesExist));
    f.device.fail_next(SlotAlloc, Fault::Refuse(-28));
    assert_eq!(f.create(ARGUMENT).map(|_| 0), Err(Code::ENOSPC));
    f.machine.with_pool(|pool, _| assert_eq!(pool.slots(), 1));
    f.close(e).unwrap();
    f.machine.write_pool("2-3").unwrap();
}

#[test]
fn w18_cpu_that_the_parent_runs_on_again_is_not_given_away() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    f.machine.with_pool(|_, cpus| cpus.withheld.insert(3));
    assert_eq!(f.add_vcpu(&mut e, 2), Err(Code::VCPU_NOT_IN_CPU_POOL));
    assert_eq!(f.add_vcpu(&mut e, 0), Ok(4));
    assert_eq!(f.add_vcpu(&mut e, 0), Ok(5));
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::NO_CPUS_AVAIL_IN_POOL));
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn w19_stop_ends_without_closing_and_says_why() {
    let mut f = Fixture::new(200);
    let mut e = f.ready();
    assert_eq!(e.stop(&mut f.device).map_err(Code::from), Err(Code::NOT_IN_RUNNING_STATE));
    f.start(&mut e, 0, 0).unwrap();
    f.device.fail_next(EnclaveStop, Fault::Refuse(-16));
    assert_eq!(e.stop(&mut f.device).map_err(Code::from), Err(Code::EBUSY));
    assert!(!e.hung_up());
    e.stop(&mut f.device).unwrap();
    assert!(e.hung_up());
    assert_eq!((e.state(), e.summary().exit_reason), (State::Stopped, exit_reason::STOPPED));
    assert_eq!(e.stop(&mut f.device).map_err(Code::from), Err(Code::NOT_IN_RUNNING_STATE));
    f.device.log.clear();
    f.close(e).unwrap();
    assert_eq!(f.device.sent(), [SlotFree]);
}

#[test]
fn w20_slot_uid_zero_is_refused_and_freed() {
    let mut f = Fixture::new(200);
    f.device.next_uid = 0;
    assert_eq!(f.create(ARGUMENT).map(|_| 0), Err(Code::EIO));
    assert_eq!(f.device.sent(), [SlotAlloc, SlotFree]);
    f.assert_nothing_held();
}

#[test]
fn w20_slot_uid_in_use_is_refused_and_its_owner_left_alone() {
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    f.add_vcpu(&mut e, 0).unwrap();
    f.device.next_uid = e.slot_uid().0;
    assert_eq!(f.create(ARGUMENT).map(|_| 0), Err(Code::EIO));
    assert_eq!(f.machine.free(), [4, 5]);
}

#[test]
fn start_without_a_reply_can_be_repeated_and_is_stopped_at_close() {
    for fault in [Fault::LoseReply, Fault::LoseCommand] {
        let mut f = Fixture::new(200);
        let mut e = f.ready();
        f.device.fail_next(EnclaveStart, fault);
        assert_eq!(f.start(&mut e, 0, 0), Err(Code::ETIMEDOUT));
        assert_eq!(e.state(), State::Init);
        f.close(e).unwrap();
        f.assert_nothing_held();
        assert!(f.device.slots.is_empty());
    }
}

#[test]
fn other_states_of_the_device_are_an_end_that_is_still_stopped() {
    let mut f = Fixture::new(200);
    let mut e = f.running();
    f.device.end(e.slot_uid(), 5);
    assert_eq!(e.device_event(&mut f.device), EventOutcome::Ended);
    assert_eq!((e.state(), e.hung_up()), (State::Other(5), true));
    assert_eq!(f.start(&mut e, 0, 0), Err(Code::NOT_IN_INIT_STATE));
    f.device.slots.get_mut(&e.slot_uid().0).unwrap().state = pci::state::RUNNING;
    f.device.log.clear();
    f.close(e).unwrap();
    assert_eq!(f.device.sent(), [EnclaveStop, SlotFree]);
}

#[test]
fn table_of_regions_that_is_full_is_265() {
    let mut f = Fixture::new(200);
    let slot = Slot::allocate(&f.machine, &mut f.device).unwrap();
    let mut e = TestEnclave::new(&slot, vec![Region::default()], &mut f.device);
    let address = f.memory.map_huge(4 * MIB);
    assert_eq!(f.set_memory(&mut e, address, 2 * MIB), Ok(()));
    assert_eq!(f.set_memory(&mut e, address + 2 * MIB, 2 * MIB), Err(Code::MEM_MAX_REGIONS));
    assert_eq!(f.memory.pinned(), 1);
    assert_eq!(e.regions()[0].range(), (address, 2 * MIB));
    assert_eq!(e.regions()[0].pages().map(Pages::count), Some(1));
}

#[test]
fn first_end_is_the_one_that_is_told() {
    let mut f = Fixture::new(200);
    let mut e = f.running();
    e.stop(&mut f.device).unwrap();
    let ended = e.summary().ended_ns;
    f.device.now_ns += 5;
    e.device_gone(&mut f.device);
    assert_eq!((e.state(), e.summary().exit_reason, e.summary().ended_ns), (State::Gone, exit_reason::STOPPED, ended));
}

#[test]
fn errors_say_whether_the_device_did_nothing_for_certain() {
    assert!(DeviceError::NotSent.is_definite());
    assert!(!DeviceError::NoReply.is_definite());
    assert_eq!(DeviceError::Gone.code(), Code::ENODEV);
}
