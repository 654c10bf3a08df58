//! Injected faults as a driver meets them, events, counters, and commands that take long.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nitroxide_abi::SlotUid;
use nitroxide_abi::pci::{self, Command, state};
use nitroxide_device::testing::{Call, NullLauncher};
use nitroxide_device::{Device, Faults, Launcher, Limits, Usage};
use support::*;

/// Long enough for any machine; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(60);

fn count_events(device: &Device) -> Arc<AtomicUsize> {
    let events = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&events);
    device.on_event(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    events
}

fn wait_until(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn refused_command_is_not_carried_out() {
    let (device, launcher) = device(Limits::default(), "start@1=-5000, free@1=-EIO, alloc@2=-ENOSPC");
    let uid = ready(&device, 0, 1);
    assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, -28);
    assert_eq!(start(&device, uid, 0, 0).rc, -5000);
    assert_eq!(launcher.running(), 0);
    assert_eq!(start(&device, uid, 0, 0).rc, 0);
    assert_eq!(free(&device, uid).rc, -5);
    assert_eq!(launcher.running(), 1);
    assert_eq!(free(&device, uid).rc, 0);
}

#[test]
fn lost_reply_is_none_and_does_not_count_but_the_command_is_carried_out() {
    let (device, launcher) = device(Limits::default(), "alloc=lost");
    assert_eq!(device.command(Command::SlotAlloc.number(), &[0]), None);
    assert_eq!((launcher.live_slots(), device.event_counter().replies), (1, 0));
}

#[test]
fn fields_and_positive_codes_are_put_into_the_reply() {
    let (device, _) = device(Limits::default(), "alloc@1=uid:0 alloc@1=regions:4 start=+5 start=cid:9 info=state:0x10002");
    let reply = send(&device, Command::SlotAlloc, &[0]);
    assert_eq!((reply.rc, reply.slot_uid, reply.mem_regions), (0, 0, 4));
    let uid = ready(&device, 0, 1);
    let started = start(&device, uid, 0, 0);
    assert_eq!((started.rc, started.enclave_cid), (5, 9));
    assert_eq!(info(&device, uid).state, 2);
}

#[test]
fn delayed_reply_comes_later() {
    let (device, _) = device(Limits::default(), "info=delay:50ms");
    let uid = alloc(&device);
    let begin = Instant::now();
    assert_eq!(info(&device, uid).rc, 0);
    assert!(begin.elapsed() >= Duration::from_millis(50));
}

#[test]
fn end_of_an_enclave_raises_one_event_and_shows_in_its_state() {
    let (device, launcher) = device(Limits::default(), "");
    let events = count_events(&device);
    let uid = running(&device, 0, 1);
    assert!(launcher.end(SlotUid(uid)));
    assert!(!launcher.end(SlotUid(uid)));
    assert_eq!((events.load(Ordering::SeqCst), info(&device, uid).state), (1, state::STOPPED));
    let counter = device.event_counter();
    assert_eq!((counter.events, counter.replies), (1, 5));
}

#[test]
fn stop_and_free_raise_no_event() {
    let (device, _) = device(Limits::default(), "");
    let events = count_events(&device);
    let uid = running(&device, 0, 1);
    stop(&device, uid);
    free(&device, uid);
    device.reset();
    assert_eq!(events.load(Ordering::SeqCst), 0);
}

#[test]
fn events_can_be_lost_late_and_spurious() {
    let (device, launcher) = device(Limits::default(), "event@1=lost event@2=delay:20ms event@4=spurious");
    let events = count_events(&device);
    let first = running(&device, 0, 1); // the fourth command is its start
    assert_eq!(events.load(Ordering::SeqCst), 1);
    launcher.end(SlotUid(first));
    assert_eq!((events.load(Ordering::SeqCst), info(&device, first).state), (1, state::STOPPED));
    let second = running(&device, 64 * MIB, 2);
    launcher.end(SlotUid(second));
    wait_until(|| events.load(Ordering::SeqCst) == 2);
}

#[test]
fn new_rules_count_afresh() {
    let (device, _) = device(Limits::default(), "alloc@2=-EIO");
    alloc(&device);
    device.set_faults("alloc@2=-ENOSPC".parse().unwrap());
    alloc(&device);
    assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, -28);
    device.set_faults(Faults::none());
    alloc(&device);
}

#[test]
fn enclave_that_ends_before_its_start_has_answered_is_started_then_stopped() {
    let launcher = Arc::new(EndsAtOnce(NullLauncher::default()));
    let device = Device::new(Limits::default(), Faults::none(), launcher);
    let events = count_events(&device);
    let uid = ready(&device, 0, 1);
    assert_eq!(start(&device, uid, 0, 0).rc, 0);
    assert_eq!((info(&device, uid).state, events.load(Ordering::SeqCst)), (state::STOPPED, 1));
}

#[test]
fn slow_start_and_stop_hold_up_no_other_slot_nor_any_info() {
    let (device, launcher) = device(Limits::default(), "");
    let slow = ready(&device, 0, 1);
    thread::scope(|scope| {
        launcher.close_gate(Call::Start);
        let starting = scope.spawn(|| start(&device, slow, 0, 0).rc);
        launcher.wait_at_gate(Call::Start);
        let other = ready(&device, 64 * MIB, 2);
        assert_eq!((info(&device, slow).state, info(&device, other).rc, free(&device, other).rc), (state::INIT, 0, 0));
        launcher.open_gate(Call::Start);
        assert_eq!(starting.join().unwrap(), 0);

        launcher.close_gate(Call::Stop);
        let stopping = scope.spawn(|| stop(&device, slow).rc);
        launcher.wait_at_gate(Call::Stop);
        let other = running(&device, 64 * MIB, 2);
        assert_eq!((info(&device, slow).state, free(&device, other).rc), (state::RUNNING, 0));
        launcher.open_gate(Call::Stop);
        assert_eq!((stopping.join().unwrap(), info(&device, slow).state), (0, state::STOPPED));
    });
}

#[test]
fn commands_for_one_slot_wait_for_each_other() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = ready(&device, 0, 1);
    thread::scope(|scope| {
        launcher.close_gate(Call::Start);
        let starting = scope.spawn(|| start(&device, uid, 0, 0).rc);
        launcher.wait_at_gate(Call::Start);
        let freeing = scope.spawn(|| free(&device, uid).rc);
        launcher.open_gate(Call::Start);
        assert_eq!((starting.join().unwrap(), freeing.join().unwrap()), (0, 0));
    });
    assert_eq!((launcher.live_slots(), device.usage()), (0, Usage::default()));
}

#[test]
fn memory_of_a_slot_being_freed_cannot_be_given_away_before_it_is_gone() {
    let (device, launcher) = device(Limits::default(), "");
    let (leaving, other) = (ready(&device, 0, 1), alloc(&device));
    thread::scope(|scope| {
        launcher.close_gate(Call::Drop);
        let freeing = scope.spawn(|| free(&device, leaving).rc);
        launcher.wait_at_gate(Call::Drop);
        assert_eq!(add_mem(&device, other, 0, 2 * MIB).rc, -262);
        assert_eq!((info(&device, leaving).rc, free(&device, leaving).rc, count(&device)), (-2, -2, 1));
        launcher.open_gate(Call::Drop);
        assert_eq!(freeing.join().unwrap(), 0);
    });
    assert_eq!(add_mem(&device, other, 0, 2 * MIB).rc, 0);
}

#[test]
fn reset_waits_for_commands_under_way_and_refuses_new_ones() {
    let (device, launcher) = device(Limits::default(), "");
    let slow = ready(&device, 0, 1);
    let idle = alloc(&device);
    thread::scope(|scope| {
        launcher.close_gate(Call::Start);
        launcher.close_gate(Call::ReserveSlot);
        let starting = scope.spawn(|| start(&device, slow, 0, 0).rc);
        let allocating = scope.spawn(|| send(&device, Command::SlotAlloc, &[0]).rc);
        launcher.wait_at_gate(Call::Start);
        launcher.wait_at_gate(Call::ReserveSlot);
        let resetting = scope.spawn(|| device.reset());
        wait_until(|| info(&device, idle).rc == -2);
        assert_eq!(send(&device, Command::SlotAlloc, &[0]).rc, -19);
        assert_eq!(add_vcpu(&device, slow, 9).rc, -19);
        launcher.open_gate(Call::ReserveSlot);
        assert_eq!(allocating.join().unwrap(), -19);
        launcher.open_gate(Call::Start);
        assert_eq!(starting.join().unwrap(), 0);
        resetting.join().unwrap();
    });
    assert_eq!((launcher.live_slots(), device.usage()), (0, Usage::default()));
    alloc(&device);
}

#[test]
fn reset_waits_for_an_alloc_under_way_which_then_gets_no_slot() {
    let (device, launcher) = device(Limits::default(), "");
    thread::scope(|scope| {
        launcher.close_gate(Call::ReserveSlot);
        let allocating = scope.spawn(|| send(&device, Command::SlotAlloc, &[0]).rc);
        launcher.wait_at_gate(Call::ReserveSlot);
        let resetting = scope.spawn(|| device.reset());
        // A correct reset cannot end here, however long this is; a wrong one should have the time to.
        thread::sleep(Duration::from_millis(30));
        assert!(!resetting.is_finished());
        launcher.open_gate(Call::ReserveSlot);
        assert_eq!(allocating.join().unwrap(), -19);
        resetting.join().unwrap();
    });
    assert_eq!(launcher.live_slots(), 0);
}

#[test]
fn stop_of_an_enclave_that_has_ended_still_waits_until_all_of_it_is_gone() {
    let (device, launcher) = device(Limits::default(), "");
    let uid = running(&device, 0, 1);
    launcher.end(SlotUid(uid));
    thread::scope(|scope| {
        launcher.close_gate(Call::Stop);
        let stopping = scope.spawn(|| stop(&device, uid).rc);
        launcher.wait_at_gate(Call::Stop);
        launcher.open_gate(Call::Stop);
        assert_eq!(stopping.join().unwrap(), 0);
    });
}

#[test]
fn cid_of_an_enclave_that_is_being_started_is_in_use() {
    let (device, launcher) = device(Limits::default(), "");
    let (first, second) = (ready(&device, 0, 1), ready(&device, 64 * MIB, 2));
    thread::scope(|scope| {
        launcher.close_gate(Call::Start);
        let starting = scope.spawn(|| start(&device, first, 77, 0).rc);
        launcher.wait_at_gate(Call::Start);
        assert_eq!((start(&device, second, 77, 0).rc, get_slot(&device, 77).slot_uid), (-98, first));
        launcher.open_gate(Call::Start);
        assert_eq!(starting.join().unwrap(), 0);
    });
}

#[test]
fn late_notification_of_a_failed_start_does_not_end_the_next_one() {
    let launcher = Arc::new(FailsOnce::default());
    let device = Device::new(Limits::default(), Faults::none(), Arc::clone(&launcher) as Arc<dyn Launcher>);
    let uid = ready(&device, 0, 1);
    assert_eq!(start(&device, uid, 0, 0).rc, -5);
    assert_eq!(start(&device, uid, 0, 0).rc, 0);
    launcher.first_notifier().notify();
    assert_eq!((info(&device, uid).state, device.event_counter().events), (state::RUNNING, 0));
}

#[test]
fn launcher_that_panics_loses_no_slot_and_blocks_no_reset() {
    let device = Device::new(Limits::default(), Faults::none(), Arc::new(Panics(NullLauncher::default())));
    let uid = ready(&device, 0, 1);
    let request = pci::EnclaveStart { slot_uid: uid, enclave_cid: 0, flags: 0 }.to_bytes();
    let attempt = std::panic::AssertUnwindSafe(|| device.command(Command::EnclaveStart.number(), &request));
    assert!(std::panic::catch_unwind(attempt).is_err());
    assert_eq!(free(&device, uid).rc, 0);
    device.reset();
    assert_eq!(device.usage(), Usage::default());
}

mod odd_launchers {
    use std::sync::{Arc, OnceLock};

    use nitroxide_abi::{Cid, SlotUid};
    use nitroxide_device::testing::NullLauncher;
    use nitroxide_device::{DeviceCode, EndedNotifier, Launcher, MemoryRun, Slot, StartRequest};

    /// Its enclaves end while their start is still under way.
    pub struct EndsAtOnce(pub NullLauncher);
    /// Its starts panic.
    pub struct Panics(pub NullLauncher);

    /// Its first start fails.
    #[derive(Default)]
    pub struct FailsOnce {
        launcher: NullLauncher,
        first: Arc<OnceLock<EndedNotifier>>,
    }

    impl FailsOnce {
        pub fn first_notifier(&self) -> EndedNotifier {
            self.first.get().expect("a start was tried").clone()
        }
    }

    struct FailsOnceSlot(Box<dyn Slot>, Arc<OnceLock<EndedNotifier>>);

    impl Launcher for FailsOnce {
        fn reserve_slot(&self) -> Result<Box<dyn Slot>, DeviceCode> {
            Ok(Box::new(FailsOnceSlot(self.launcher.reserve_slot()?, Arc::clone(&self.first))))
        }
    }

    impl Slot for FailsOnceSlot {
        fn uid(&self) -> SlotUid {
            self.0.uid()
        }
        fn add_memory(&mut self, run: MemoryRun) -> Result<(), DeviceCode> {
            self.0.add_memory(run)
        }
        fn start(&mut self, request: &StartRequest, ended: EndedNotifier) -> Result<Cid, DeviceCode> {
            match self.1.set(ended.clone()) {
                Ok(()) => Err(DeviceCode::EIO),
                Err(_) => self.0.start(request, ended),
            }
        }
        fn stop(&mut self) {
            self.0.stop();
        }
    }

    struct Odd {
        slot: Box<dyn Slot>,
        panics: bool,
    }

    impl Launcher for EndsAtOnce {
        fn reserve_slot(&self) -> Result<Box<dyn Slot>, DeviceCode> {
            Ok(Box::new(Odd { slot: self.0.reserve_slot()?, panics: false }))
        }
    }

    impl Launcher for Panics {
        fn reserve_slot(&self) -> Result<Box<dyn Slot>, DeviceCode> {
            Ok(Box::new(Odd { slot: self.0.reserve_slot()?, panics: true }))
        }
    }

    impl Slot for Odd {
        fn uid(&self) -> SlotUid {
            self.slot.uid()
        }
        fn add_memory(&mut self, run: MemoryRun) -> Result<(), DeviceCode> {
            self.slot.add_memory(run)
        }
        fn start(&mut self, request: &StartRequest, ended: EndedNotifier) -> Result<Cid, DeviceCode> {
            assert!(!self.panics, "this launcher panics, as the test wants it");
            ended.notify();
            ended.notify();
            self.slot.start(request, ended)
        }
        fn stop(&mut self) {
            self.slot.stop();
        }
    }
}

use odd_launchers::{EndsAtOnce, FailsOnce, Panics};

#[test]
fn a_held_command_is_refused_when_the_device_is_reset() {
    let device = std::sync::Arc::new(Device::new(Limits::default(), "alloc=hold".parse().unwrap(), Arc::new(NullLauncher::default())));
    let held = {
        let device = std::sync::Arc::clone(&device);
        std::thread::spawn(move || device.command(Command::SlotAlloc.number(), &[0]))
    };
    // A reset before the command came holds nothing up either; so it is repeated until the command is back.
    while !held.is_finished() {
        device.reset();
        std::thread::yield_now();
    }
    assert_eq!(held.join().unwrap().unwrap().rc, -19);
    assert_eq!(device.usage().slots, 0);
}

#[test]
fn most_regions_change_for_slots_from_now_on() {
    let device = Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default()));
    device.set_max_regions(1);
    let reply = device.command(Command::SlotAlloc.number(), &[0]).unwrap();
    assert_eq!((reply.rc, reply.mem_regions, device.limits().max_regions), (0, 1, 1));
}

#[test]
fn a_reported_end_is_an_event_once_and_only_for_a_running_enclave() {
    let device = Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default()));
    assert!(!device.report_end(SlotUid(1)));
    let allocated = send(&device, Command::SlotAlloc, &[0]).slot_uid;
    assert!(!device.report_end(SlotUid(allocated)));
    let slot = running(&device, 0, 1);
    assert!(device.report_end(SlotUid(slot)));
    assert!(!device.report_end(SlotUid(slot)));
    assert_eq!(device.event_counter().events, 1);
    assert_eq!(info(&device, slot).state, state::STOPPED);
}

#[test]
fn a_reset_hurries_calls_under_way_until_they_are_back() {
    /// A launcher whose starts come back, refused, only when they are hurried for the second time.
    struct Slow(NullLauncher, Arc<AtomicUsize>);
    struct SlowSlot(Box<dyn nitroxide_device::Slot>, Arc<AtomicUsize>);
    impl Launcher for Slow {
        fn reserve_slot(&self) -> Result<Box<dyn nitroxide_device::Slot>, nitroxide_device::DeviceCode> {
            Ok(Box::new(SlowSlot(self.0.reserve_slot()?, Arc::clone(&self.1))))
        }
        fn interrupt(&self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }
    impl nitroxide_device::Slot for SlowSlot {
        fn uid(&self) -> SlotUid {
            self.0.uid()
        }
        fn add_memory(&mut self, run: nitroxide_device::MemoryRun) -> Result<(), nitroxide_device::DeviceCode> {
            self.0.add_memory(run)
        }
        fn start(
            &mut self,
            _: &nitroxide_device::StartRequest,
            _: nitroxide_device::EndedNotifier,
        ) -> Result<nitroxide_abi::Cid, nitroxide_device::DeviceCode> {
            wait_until(|| self.1.load(Ordering::SeqCst) >= 2);
            Err(nitroxide_device::DeviceCode::EIO)
        }
        fn stop(&mut self) {}
    }
    let hurried = Arc::new(AtomicUsize::new(0));
    let launcher = Slow(NullLauncher::default(), Arc::clone(&hurried));
    let device = Device::new(Limits::default(), Faults::none(), Arc::new(launcher));
    let uid = ready(&device, 0, 1);
    thread::scope(|scope| {
        let started = scope.spawn(|| start(&device, uid, 0, 0).rc);
        while !started.is_finished() {
            device.reset();
        }
        assert!(matches!(started.join().unwrap(), -5 | -2));
    });
    assert_eq!(device.usage(), Usage::default());
}

#[test]
fn a_reset_does_not_wait_for_delayed_replies() {
    let (device, _launcher) = device(Limits::default(), "alloc=delay:60min");
    thread::scope(|scope| {
        let delayed = scope.spawn(|| send(&device, Command::SlotAlloc, &[0]).rc);
        wait_until(|| device.usage().slots == 1);
        while !delayed.is_finished() {
            device.reset();
        }
        assert_eq!(delayed.join().unwrap(), 0);
    });
    assert_eq!(device.usage(), Usage::default());
}
