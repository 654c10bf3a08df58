//! The vhost-user backend with a test in QEMU's place: messages, memory in many regions, interrupts, and every way to end.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod driver;

use driver::{AVAILABLE, DESCRIBE_NSM, DESCRIPTORS, Driver, GET_RANDOM, USED};
use nitroxide_nsm::{InitialPcrs, NsmBackend, NsmConfig, Pki};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend as _, VhostUserProtocolFeatures};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const EVENT_IDX: u64 = 1 << 29;

const QUEUE_SIZE: u16 = 64;
const DESCRIBE_PCR_0: &[u8] = b"\xa1\x6bDescribePCR\xa1\x65index\x00";

/// Only ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn image() -> InitialPcrs {
    InitialPcrs::of_image([1; 48], [2; 48], [3; 48], Some([8; 48]))
}

fn spawn(debug: bool, pcrs: impl FnOnce() -> InitialPcrs + Send + 'static) -> NsmBackend {
    nitroxide_nsm::spawn(NsmConfig { module_id: "i-0-enc0".into(), pcrs: Box::new(pcrs), debug, pki: None }).unwrap()
}

/// 2 MiB of shared guest memory in that many regions.
fn shared_memory(regions: u64) -> GuestMemoryMmap {
    let size = (2 << 20) / regions;
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(2 << 20).unwrap();
    let regions = (0..regions).map(|index| {
        let offset = FileOffset::new(file.try_clone().unwrap(), index * size);
        (GuestAddress(index * size), usize::try_from(size).unwrap(), Some(offset))
    });
    GuestMemoryMmap::from_ranges_with_files(regions).unwrap()
}

/// QEMU with a guest in it, as far as the NSM can tell.
struct Machine {
    frontend: Frontend,
    driver: Driver,
    kick: EventFd,
    call: EventFd,
}

impl Machine {
    /// Connects and starts the queue with the features given.
    fn start(nsm: &NsmBackend, memory: GuestMemoryMmap, features: u64) -> Self {
        let mut frontend = Frontend::from_stream(UnixStream::from(nsm.take_frontend().unwrap()), 1);
        frontend.set_owner().unwrap();
        assert_eq!(frontend.get_features().unwrap(), VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX);
        let protocol = frontend.get_protocol_features().unwrap();
        assert_eq!(
            protocol,
            VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        );
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 1);
        assert_eq!(frontend.get_max_mem_slots().unwrap(), 509);
        frontend.set_features(features).unwrap();
        for region in memory.iter() {
            frontend.add_mem_region(&VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).unwrap();
        }
        let [kick, call] = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
        let mut machine = Self { frontend, driver: Driver::new(memory, QUEUE_SIZE), kick, call };
        machine.start_queue();
        machine
    }

    fn start_queue(&mut self) {
        self.frontend.set_vring_num(0, QUEUE_SIZE).unwrap();
        self.frontend.set_vring_base(0, 0).unwrap();
        self.frontend.set_vring_addr(0, &self.rings(0)).unwrap();
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
    }

    /// Where the rings are, shifted by so many bytes.
    fn rings(&self, shift: u64) -> VringConfigData {
        let address = |guest: u64| {
            let region = self.driver.memory.find_region(GuestAddress(guest)).unwrap();
            region.as_ptr() as u64 + (guest - region.start_addr().0) + shift
        };
        VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: address(DESCRIPTORS),
            used_ring_addr: address(USED),
            avail_ring_addr: address(AVAILABLE),
            log_addr: None,
        }
    }

    /// Waits for an interrupt; returns how often there was one since the last.
    fn interrupts(&self) -> u64 {
        let start = Instant::now();
        loop {
            match self.call.read() {
                Ok(count) => return count,
                Err(_) => assert!(start.elapsed() < PATIENCE, "no interrupt came"),
            }
            std::thread::yield_now();
        }
    }

    /// One request as Linux sends it; its response.
    fn ask(&mut self, request: &[u8]) -> Vec<u8> {
        self.driver.exchange(0, request);
        self.kick.write(1).unwrap();
        assert_eq!(self.interrupts(), 1);
        let used = self.driver.used();
        assert_eq!((used.len(), used[0], used[1].0), (2, (0, 0), 1), "both come back before the interrupt");
        self.driver.response(used[1])
    }
}

fn until_ended(nsm: &NsmBackend) {
    while nsm.is_serving() {
        std::thread::yield_now();
    }
}

#[test]
fn requests_are_answered_with_one_interrupt_each_through_60_regions() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(64), VERSION_1 | PROTOCOL_FEATURES);
    for _ in 0..100 {
        assert!(machine.ask(DESCRIBE_NSM).starts_with(b"\xa1\x6bDescribeNSM"));
        assert_eq!(machine.ask(GET_RANDOM).len(), 278);
    }
    let response = machine.ask(DESCRIBE_PCR_0);
    assert_eq!(response[response.len() - 48..], [1; 48]);
}

#[test]
fn in_debug_mode_the_guest_sees_zeroes() {
    let nsm = spawn(true, image);
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    let response = machine.ask(DESCRIBE_PCR_0);
    assert_eq!(response[response.len() - 48..], [0; 48]);
}

#[test]
fn with_event_idx_an_interrupt_comes_only_when_the_driver_wants_it() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX);
    let used_event = GuestAddress(AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE));
    // "Interrupt me when the fourth entry is there": the first pair alone is not enough.
    machine.driver.memory.write_obj(3_u16.to_le(), used_event).unwrap();
    machine.driver.exchange(0, DESCRIBE_NSM);
    machine.kick.write(1).unwrap();
    let mut first = Vec::new();
    while first.len() < 2 {
        first.extend(machine.driver.used());
    }
    machine.driver.exchange(2, DESCRIBE_NSM);
    machine.kick.write(1).unwrap();
    assert_eq!(machine.interrupts(), 1);
    assert_eq!(machine.driver.used().len(), 2);
}

#[test]
fn a_request_about_registers_waits_for_the_measurements_and_the_others_do_not() {
    let (measured, measurements) = mpsc::channel();
    let nsm = spawn(false, move || measurements.recv().unwrap());
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    machine.driver.exchange(10, DESCRIBE_PCR_0);
    machine.kick.write(1).unwrap();
    assert_eq!(machine.ask(GET_RANDOM).len(), 278);
    assert!(machine.ask(DESCRIBE_NSM).starts_with(b"\xa1\x6bDescribeNSM"));
    measured.send(image()).unwrap();
    assert_eq!(machine.interrupts(), 1);
    let used = machine.driver.used();
    assert_eq!((used[0], used[1].0), ((10, 0), 11));
    assert!(machine.driver.response(used[1]).ends_with(&[1; 48]));
}

#[test]
fn measurements_that_panic_leave_a_module_without_registers() {
    let nsm = spawn(false, || panic!("this panic is part of the test"));
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    assert_eq!(machine.ask(DESCRIBE_PCR_0), b"\xa1\x65Error\x6dInternalError");
    assert_eq!(machine.ask(GET_RANDOM).len(), 278);
}

#[test]
fn with_a_pki_that_cannot_be_used_only_documents_fail_and_only_until_it_can() {
    const ATTESTATION: &[u8] = b"\xa1\x6bAttestation\xa0";
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::at(folder.path().join("pki"));
    std::fs::write(pki.folder(), "in its place").unwrap();
    let config = NsmConfig { module_id: "i-0-enc0".into(), pcrs: Box::new(image), debug: false, pki: Some(pki.clone()) };
    let nsm = nitroxide_nsm::spawn(config).unwrap();
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    assert!(machine.ask(DESCRIBE_PCR_0).ends_with(&[1; 48]));
    assert_eq!(machine.ask(ATTESTATION), b"\xa1\x65Error\x6dInternalError");
    std::fs::remove_file(pki.folder()).unwrap();
    // A failure is remembered for a second.
    let begun = Instant::now();
    let mut answer = machine.ask(ATTESTATION);
    while !answer.starts_with(b"\xa1\x6bAttestation") {
        assert!(begun.elapsed() < PATIENCE, "no document came");
        std::thread::sleep(Duration::from_millis(50));
        answer = machine.ask(ATTESTATION);
    }
    let root = pki.existing_root().unwrap().unwrap();
    assert!(answer.windows(root.der().len()).any(|part| part == root.der()), "the document hangs from the PKI's root");
}

#[test]
fn a_broken_queue_rests_until_it_is_set_up_anew_and_locks_stay() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    assert_eq!(machine.ask(b"\xa1\x67LockPCR\xa1\x65index\x10"), b"\x67LockPCR");
    machine.driver.set_available(1000);
    machine.kick.write(1).unwrap();
    machine.interrupts();
    // The driver resets the device: empty rings, and everything from the start.
    assert_eq!(machine.frontend.get_vring_base(0).unwrap(), 2);
    machine.driver.memory.write_slice(&[0; 0x1000], GuestAddress(AVAILABLE)).unwrap();
    machine.driver.memory.write_slice(&[0; 0x1000], GuestAddress(USED)).unwrap();
    machine.driver = Driver::new(machine.driver.memory.clone(), QUEUE_SIZE);
    machine.start_queue();
    assert_eq!(machine.ask(b"\xa1\x67LockPCR\xa1\x65index\x10"), b"\xa1\x65Error\x6dReadOnlyIndex");
}

#[test]
fn a_queue_in_the_wrong_place_is_refused_and_the_right_one_taken_afterwards() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    machine.frontend.get_vring_base(0).unwrap();
    machine.frontend.set_vring_addr(0, &machine.rings(1 << 40)).unwrap_err(); // not in the guest
    machine.frontend.set_vring_num(0, 512).unwrap_err();
    machine.start_queue();
    assert!(machine.ask(DESCRIBE_NSM).starts_with(b"\xa1\x6bDescribeNSM"));
}

#[test]
fn a_message_that_cannot_be_answered_closes_the_socket() {
    let nsm = spawn(false, image);
    let machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    machine.frontend.set_vring_addr(0, &machine.rings(1)).unwrap_err(); // unaligned: the protocol has no answer to that
    until_ended(&nsm);
}

#[test]
fn requests_that_are_there_when_the_queue_starts_need_no_kick() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    machine.frontend.set_vring_enable(0, false).unwrap();
    machine.driver.exchange(0, DESCRIBE_NSM);
    machine.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(machine.interrupts(), 1);
    assert_eq!(machine.driver.used().len(), 2);
}

#[test]
fn memory_that_is_taken_away_is_not_written_any_more() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(2), VERSION_1 | PROTOCOL_FEATURES);
    let region = machine.driver.memory.find_region(GuestAddress(1 << 20)).unwrap();
    let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    machine.frontend.remove_mem_region(&info).unwrap();
    machine.driver.ask(0, DESCRIBE_NSM);
    let room = driver::Raw { address: 1 << 20, length: 0x3000, flags: driver::WRITE, next: 0 };
    machine.driver.describe(1, room);
    machine.driver.offer(1);
    machine.kick.write(1).unwrap();
    machine.interrupts();
    assert_eq!(machine.driver.used(), [(0, 0), (1, 0)]);
    assert_eq!(machine.driver.read(1 << 20, 0x3000), [0; 0x3000]);
}

#[test]
fn the_nsm_ends_when_qemu_closes_its_socket() {
    let nsm = spawn(false, image);
    let machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    assert!(nsm.is_serving());
    drop(machine);
    until_ended(&nsm);
}

#[test]
fn the_nsm_ends_when_it_is_dropped_whatever_it_waits_for() {
    let (_measured, measurements) = mpsc::channel::<InitialPcrs>();
    let nsm = spawn(false, move || measurements.recv().unwrap_or_else(|_| image()));
    let mut frontend = UnixStream::from(nsm.take_frontend().unwrap());
    frontend.write_all(&[1, 0, 0]).unwrap(); // the beginning of a message, so that it waits for the rest
    drop(nsm);
    let mut rest = Vec::new();
    assert!(matches!(frontend.read_to_end(&mut rest), Ok(0) | Err(_)), "its end of the socket is closed");
}

#[test]
fn an_interrupt_that_nobody_can_take_does_not_hold_up_the_nsm() {
    let nsm = spawn(false, image);
    let mut machine = Machine::start(&nsm, shared_memory(1), VERSION_1 | PROTOCOL_FEATURES);
    let stuck = EventFd::new(0).unwrap();
    stuck.write(u64::MAX - 1).unwrap(); // one more would wait until somebody reads
    machine.frontend.set_vring_call(0, &stuck).unwrap();
    machine.driver.exchange(0, DESCRIBE_NSM);
    machine.kick.write(1).unwrap();
    let start = Instant::now();
    while machine.driver.used().len() < 2 {
        assert!(start.elapsed() < PATIENCE, "no answer came");
        std::thread::yield_now();
    }
    machine.frontend.get_features().unwrap(); // the thread that interrupts is the one that answers
    drop(nsm);
}

#[test]
fn a_stranger_that_speaks_something_else_ends_it() {
    let nsm = spawn(false, image);
    let mut frontend = UnixStream::from(nsm.take_frontend().unwrap());
    frontend.write_all(b"GET / HTTP/1.1\r\nHost: nsm\r\n\r\n").unwrap();
    until_ended(&nsm);
}

#[test]
fn the_socket_is_given_away_once() {
    let nsm = spawn(false, image);
    assert!(nsm.take_frontend().is_some());
    assert!(nsm.take_frontend().is_none());
}
