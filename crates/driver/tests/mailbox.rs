//! Replies that come late, silently, or not at all: W3 and the mailbox (docs/driver.md, "The mailbox").

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

mod support;

use nitroxide_abi::pci::Command::{SlotAddVcpu, SlotAlloc, SlotFree, SlotInfo};
use nitroxide_abi::{pci, Code};
use nitroxide_driver::{Device, Mailbox, SendError};
use support::client::Memory;
use support::device::{Fault, Model};
use support::machine::TestMachine;
use support::wire::{Delivery, Registers};
use support::{Fixture, ARGUMENT};

/// As long as a real driver waits.
const TIMEOUT_MS: u32 = 120_000;

type Wired = Fixture<Mailbox<Registers>>;

fn fixture() -> Wired {
    let machine = TestMachine::with_threads(6, 2);
    machine.write_pool("2-5").unwrap();
    Fixture { machine, device: Mailbox::new(Registers::new(Model::new(200))).with_timeout(TIMEOUT_MS), memory: Memory::new() }
}

fn deliver(f: &mut Wired, delivery: Delivery) {
    f.device.port_mut().deliveries.push_back(delivery);
}

fn late(delay_ms: u32) -> Delivery {
    Delivery { delay_ms, ..Delivery::default() }
}

/// The measured run: a reply 125 s late, and the next command's own reply 8 s late. The C driver took the stale one after 3 s.
#[test]
fn w3_late_reply_is_not_believed() {
    let mut f = fixture();
    let mut e = f.create(ARGUMENT).unwrap();
    deliver(&mut f, late(125_000));
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
    let before = f.device.port_mut().now_ms;
    deliver(&mut f, late(8_000));
    // The device has CPU 2 since the late command, and says so in its own reply to this one.
    assert_eq!(f.add_vcpu(&mut e, 2), Err(Code::EINVAL));
    assert_eq!(f.device.port_mut().now_ms - before, 5_000 + 8_000);
    assert_eq!(f.device.port_mut().overruns, 0);
}

#[test]
fn w3_nothing_is_sent_while_a_reply_is_owed() {
    let mut f = fixture();
    let mut e = f.create(ARGUMENT).unwrap();
    f.device.port_mut().model.fail_next(SlotAddVcpu, Fault::LoseReply);
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
    let sent = f.device.port_mut().model.sent().len();
    assert_eq!(f.add_vcpu(&mut e, 4), Err(Code::ETIMEDOUT));
    // Not sent is certain, so that core is free again; the one in doubt is not.
    assert_eq!(f.machine.free(), [4, 5]);
    assert_eq!(f.device.port_mut().model.sent().len(), sent);
    assert!(f.device.is_stuck());
    f.device.port_mut().reset();
    f.device.was_reset();
    e.device_gone(&mut f.device);
    f.close(e).unwrap();
    f.assert_nothing_held();
    f.create(ARGUMENT).unwrap();
}

#[test]
fn w3_reply_whose_interrupt_was_lost_is_found_by_the_counter() {
    let mut f = fixture();
    deliver(&mut f, Delivery { delay_ms: 10, silent: true, spurious: false });
    f.create(ARGUMENT).unwrap();
    assert_eq!(f.device.port_mut().now_ms, 1_000, "after the first sleep");
    deliver(&mut f, Delivery { delay_ms: TIMEOUT_MS - 1, silent: true, spurious: false });
    f.create(ARGUMENT).unwrap();
    assert_eq!(f.device.port_mut().now_ms, u64::from(1_000 + TIMEOUT_MS), "and when the time is up");
}

#[test]
fn command_reads_the_counter_once_unless_it_moved_in_another_way_than_expected() {
    let mut f = fixture();
    f.create(ARGUMENT).unwrap();
    assert_eq!(f.device.port_mut().counter_reads, 2, "where it stands is not known before the first command");
    let mut e = f.create(ARGUMENT).unwrap();
    f.device.port_mut().stray_counts = 1;
    f.add_vcpu(&mut e, 0).unwrap();
    assert_eq!(f.device.port_mut().counter_reads, 4);
    f.add_vcpu(&mut e, 0).unwrap();
    assert_eq!(f.device.port_mut().counter_reads, 6);
    f.add_vcpu(&mut e, 0).unwrap();
    assert_eq!(f.device.port_mut().counter_reads, 7);
}

/// What was remembered of the counter is not older than the last reply, a late one included.
#[test]
fn w3_stray_interrupt_behind_a_late_reply_is_no_reply() {
    let mut f = fixture();
    let mut e = f.create(ARGUMENT).unwrap();
    deliver(&mut f, late(TIMEOUT_MS + 10));
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
    deliver(&mut f, Delivery { delay_ms: 300, silent: false, spurious: true });
    let before = f.device.port_mut().now_ms;
    assert_eq!(f.add_vcpu(&mut e, 3), Ok(3));
    assert_eq!(f.device.port_mut().now_ms - before, 10 + 300);
}

#[test]
fn w3_interrupt_without_a_reply_is_no_reply() {
    let mut f = fixture();
    let mut e = f.create(ARGUMENT).unwrap();
    deliver(&mut f, Delivery { delay_ms: 50, silent: false, spurious: true });
    assert_eq!(f.add_vcpu(&mut e, 0), Ok(2));
    assert_eq!(f.device.port_mut().now_ms, 50);
}

/// Between two interrupts of a storm no time passes that a home could measure; the wait ends all the same.
#[test]
fn w3_storm_of_interrupts_does_not_make_a_wait_endless() {
    let mut f = fixture();
    let mut e = f.create(ARGUMENT).unwrap();
    f.device.port_mut().model.fail_next(SlotAddVcpu, Fault::LoseReply);
    f.device.port_mut().storm = true;
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
}

#[test]
fn w3_slot_in_a_late_reply_is_freed() {
    let mut f = fixture();
    f.create(ARGUMENT).unwrap();
    deliver(&mut f, late(TIMEOUT_MS + 1));
    assert_eq!(f.create(ARGUMENT).map(|_| 0), Err(Code::ETIMEDOUT));
    assert_eq!(f.device.port_mut().model.slots.len(), 2);
    f.create(ARGUMENT).unwrap();
    assert_eq!(f.device.port_mut().model.slots.len(), 2);
    assert_eq!(f.device.port_mut().model.sent(), [SlotAlloc, SlotAlloc, SlotFree, SlotAlloc]);
}

/// Found by the stress: a process that is killed while it creates, and a device that refuses to free what nobody got.
#[test]
fn w3_slot_in_a_late_reply_that_the_device_does_not_free_is_tried_again() {
    let mut f = fixture();
    deliver(&mut f, late(TIMEOUT_MS + 1));
    assert_eq!(f.create(ARGUMENT).map(|_| 0), Err(Code::ETIMEDOUT));
    f.device.port_mut().model.fail_next(SlotFree, Fault::Refuse(-16));
    let e = f.create(ARGUMENT).unwrap();
    assert_eq!(f.device.port_mut().model.slots.len(), 2);
    f.close(e).unwrap();
    assert_eq!(f.device.port_mut().model.sent(), [SlotAlloc, SlotFree, SlotAlloc, SlotFree, SlotFree]);
    f.assert_nothing_held();
}

#[test]
fn w3_counter_wraps() {
    let mut f = fixture();
    for _ in 0..10 {
        let e = f.create(ARGUMENT).unwrap();
        f.close(e).unwrap();
    }
    f.assert_nothing_held();
}

#[test]
fn w3_first_reply_may_follow_its_interrupt() {
    let mut f = fixture();
    f.device.port_mut().spurious_from_the_start = true;
    deliver(&mut f, Delivery { delay_ms: 900, silent: true, spurious: true });
    f.create(ARGUMENT).unwrap();
    assert!(f.device.port_mut().model.notices.is_empty());
}

/// Hardware whose counter is not what we think it is: interrupts have to do, and the log says so once.
#[test]
fn w3_counter_that_stands_still_falls_back_to_interrupts() {
    let mut f = fixture();
    f.device.port_mut().counter_stands_still = true;
    let mut e = f.create(ARGUMENT).unwrap();
    assert_eq!(f.add_vcpu(&mut e, 0), Ok(2));
    deliver(&mut f, late(125_000));
    assert_eq!(f.add_vcpu(&mut e, 0), Err(Code::ETIMEDOUT));
    let before = f.device.port_mut().now_ms;
    deliver(&mut f, late(8_000));
    assert_eq!(f.add_vcpu(&mut e, 3), Err(Code::EINVAL));
    assert_eq!(f.device.port_mut().now_ms - before, 13_000, "the interrupt of the late reply was not taken for this one's");
    let notices = &f.device.port_mut().model.notices;
    assert_eq!(notices.iter().filter(|notice| notice.contains("does not count")).count(), 1);
}

#[test]
fn device_that_is_gone_is_told_apart_from_one_that_is_slow() {
    let mut f = fixture();
    f.device.port_mut().model.gone = true;
    let request = pci::SlotInfo { slot_uid: 1 }.to_bytes();
    assert_eq!(f.device.send(SlotInfo, &request), Err(SendError::Gone));
    // Also while it owes a reply: what a missing device's registers read as is no late reply.
    f.device.port_mut().model.gone = false;
    f.device.port_mut().model.fail_next(SlotInfo, Fault::LoseReply);
    assert_eq!(f.device.send(SlotInfo, &request), Err(SendError::NoReply));
    f.device.port_mut().model.gone = true;
    f.device.port_mut().model.notices.clear();
    assert_eq!(f.device.send(SlotInfo, &request), Err(SendError::Gone));
    assert!(f.device.port_mut().model.notices.is_empty());
}
