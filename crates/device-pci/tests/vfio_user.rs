//! The server as QEMU meets it: crate `vfio_user`'s own client on a real socket, Linux' driver's accesses, interrupts through real eventfds.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nitroxide_abi::SlotUid;
use nitroxide_abi::pci::{self, Command, Reply};
use nitroxide_device::testing::{Call, NullLauncher};
use nitroxide_device::{Device, Faults, Limits};
use nitroxide_device_pci::{BindError, ParentRam, PciServer, ServerOptions, Stop};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vfio_user::Client;

const CONFIG: u32 = 7;
const BAR3: u32 = 3;
const MSIX: u32 = 2;
/// Eventfd, trigger; and "disable all".
const SET_TRIGGER: u32 = 0x24;
const DISABLE: u32 = 0x21;

/// Long enough for any machine; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    folder: tempfile::TempDir,
    device: Arc<Device>,
    launcher: NullLauncher,
    stop: Arc<Stop>,
    server: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        Self::with(ServerOptions::default(), "")
    }

    fn with(options: ServerOptions, faults: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launcher = NullLauncher::default();
        let faults: Faults = faults.parse().unwrap();
        let device = Arc::new(Device::new(Limits::default(), faults, Arc::new(launcher.clone())));
        let server = PciServer::bind(&folder.path().join("ne.sock"), options, Arc::clone(&device), Arc::new(ParentRam::new())).unwrap();
        let stop = server.stopper();
        let server = Some(std::thread::spawn(move || server.run().unwrap()));
        Self { folder, device, launcher, stop, server }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("ne.sock")
    }

    fn connect(&self) -> Guest {
        Guest::new(&self.path())
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !condition(self) {
            assert!(begin.elapsed() < PATIENCE, "waited in vain for: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn nothing_is_given_away(&self) -> bool {
        self.device.usage() == nitroxide_device::Usage::default() && self.launcher.live_slots() == 0
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(server) = self.server.take() {
            let outcome = server.join();
            if !std::thread::panicking() {
                outcome.unwrap();
                assert!(self.nothing_is_given_away());
                assert!(!self.path().exists());
            }
        }
    }
}

/// A VM with Linux' driver in it, as far as the device sees it.
struct Guest {
    client: Client,
    reply: OwnedFd,
    event: OwnedFd,
}

impl Guest {
    fn new(path: &Path) -> Self {
        let vector = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Self { client: Client::new(path).unwrap(), reply: vector(), event: vector() }
    }

    /// What QEMU 11.1.3 sends while Linux' driver asks for its vectors.
    fn set_up_interrupts(&mut self) {
        let (reply, event) = (self.reply.as_raw_fd(), self.event.as_raw_fd());
        self.client.set_irqs(MSIX, SET_TRIGGER, 0, 1, &[]).unwrap();
        self.client.set_irqs(MSIX, DISABLE, 0, 0, &[]).unwrap();
        self.client.set_irqs(MSIX, SET_TRIGGER, 0, 1, &[reply]).unwrap();
        self.client.set_irqs(MSIX, DISABLE, 0, 0, &[]).unwrap();
        self.client.set_irqs(MSIX, SET_TRIGGER, 0, 1, &[reply]).unwrap();
        self.client.set_irqs(MSIX, SET_TRIGGER, 1, 1, &[event]).unwrap();
    }

    fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.client.region_read(BAR3, offset, &mut data).unwrap();
        data
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.client.region_write(BAR3, offset, data).unwrap();
    }

    /// The accesses of `ne_pci_dev_enable` and its neighbours.
    fn probe(&mut self) {
        self.set_up_interrupts();
        self.disable();
        self.write(pci::VERSION, &1_u16.to_le_bytes());
        assert_eq!(self.read(pci::VERSION), 1_u16.to_le_bytes());
        self.write(pci::ENABLE, &[1]);
        assert_eq!(self.read(pci::ENABLE), [1]);
    }

    fn disable(&mut self) {
        self.write(pci::ENABLE, &[0]);
        let begin = Instant::now();
        while self.read(pci::ENABLE) != [0] {
            assert!(begin.elapsed() < PATIENCE, "the device is not switched off");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn submit(&mut self, command: Command, request: &[u8]) {
        for (piece, at) in request.chunks(4).zip((pci::REQUEST..).step_by(4)) {
            self.write(at, piece);
        }
        self.write(pci::COMMAND, &command.number().to_le_bytes());
    }

    fn take_reply(&mut self) -> Reply {
        assert!(interrupted(&self.reply, PATIENCE), "no reply");
        let mut bytes = [0; 72];
        for (piece, at) in bytes.chunks_mut(4).zip((pci::REPLY..).step_by(4)) {
            self.client.region_read(BAR3, at, piece).unwrap();
        }
        Reply::from_bytes(&bytes)
    }

    fn command(&mut self, command: Command, request: &[u8]) -> Reply {
        self.submit(command, request);
        self.take_reply()
    }

    /// A slot with memory and one vCPU whose enclave runs.
    fn start_enclave(&mut self, paddr: u64) -> u64 {
        let slot_uid = self.command(Command::SlotAlloc, &[0]).slot_uid;
        let memory = pci::SlotAddMem { slot_uid, paddr, size: 64 << 20 };
        assert_eq!(self.command(Command::SlotAddMem, &memory.to_bytes()).rc, 0);
        let vcpu = pci::SlotAddVcpu { slot_uid, vcpu_id: u32::try_from(paddr >> 26).unwrap() + 1, padding: 0 };
        assert_eq!(self.command(Command::SlotAddVcpu, &vcpu.to_bytes()).rc, 0);
        let start = pci::EnclaveStart { slot_uid, enclave_cid: 0, flags: 0 };
        let reply = self.command(Command::EnclaveStart, &start.to_bytes());
        assert_eq!((reply.rc, reply.slot_uid), (0, slot_uid));
        slot_uid
    }

    /// Sends a line to the test control and gives its status.
    fn control(&mut self, line: &str) -> i32 {
        for piece in line.as_bytes().chunks(4) {
            self.client.region_write(CONFIG, 0x64, piece).unwrap();
        }
        self.client.region_write(CONFIG, 0x68, &[1, 0, 0, 0]).unwrap();
        let mut status = [0; 4];
        self.client.region_read(CONFIG, 0x6C, &mut status).unwrap();
        i32::from_le_bytes(status)
    }
}

/// Whether an interrupt comes in time; takes it.
fn interrupted(vector: &OwnedFd, patience: Duration) -> bool {
    let timeout = Timespec { tv_sec: i64::try_from(patience.as_secs()).unwrap(), tv_nsec: i64::from(patience.subsec_nanos()) };
    let mut polled = [PollFd::new(vector, PollFlags::IN)];
    poll(&mut polled, Some(&timeout)).unwrap() == 1 && rustix::io::read(vector, &mut [0; 8]).is_ok()
}

/// Long enough to see an interrupt that should not come, most of the time.
const SHORTLY: Duration = Duration::from_millis(50);

#[test]
fn linux_driver_runs_an_enclave_and_sees_its_end() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    let first = guest.start_enclave(0);
    let second = guest.start_enclave(64 << 20);
    rig.launcher.end(SlotUid(first));
    assert!(interrupted(&guest.event, PATIENCE));
    assert_eq!(guest.command(Command::SlotInfo, &pci::SlotInfo { slot_uid: first }.to_bytes()).state, pci::state::STOPPED);
    assert_eq!(guest.command(Command::SlotInfo, &pci::SlotInfo { slot_uid: second }.to_bytes()).state, pci::state::RUNNING);
    assert_eq!(guest.command(Command::SlotFree, &pci::SlotFree { slot_uid: first }.to_bytes()).rc, 0);
    assert_eq!(guest.command(Command::EnclaveStop, &pci::EnclaveStop { slot_uid: second }.to_bytes()).rc, 0);
    assert_eq!(guest.command(Command::SlotFree, &pci::SlotFree { slot_uid: second }.to_bytes()).rc, 0);
    assert!(rig.nothing_is_given_away());
    let counter = pci::EventCounter::from_register(u32::from_le_bytes(guest.read(pci::EVENT_COUNTER)));
    assert_eq!((counter.replies, counter.events), (13, 1));
}

#[test]
fn no_interrupt_comes_before_the_driver_can_take_it() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.set_up_interrupts();
    rig.device.raise_spurious_event();
    assert!(!interrupted(&guest.event, SHORTLY));
    guest.probe();
    assert!(!interrupted(&guest.event, SHORTLY) && !interrupted(&guest.reply, SHORTLY));
    rig.device.raise_spurious_event();
    assert!(interrupted(&guest.event, PATIENCE));
}

#[test]
fn a_slow_command_holds_up_no_access() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    let slot_uid = guest.start_enclave(0);
    rig.launcher.close_gate(Call::Stop);
    guest.submit(Command::EnclaveStop, &pci::EnclaveStop { slot_uid }.to_bytes());
    rig.launcher.wait_at_gate(Call::Stop);
    assert_eq!(guest.read(pci::ENABLE), [1]);
    assert!(!interrupted(&guest.reply, SHORTLY));
    rig.launcher.open_gate(Call::Stop);
    assert_eq!(guest.take_reply().rc, 0);
}

#[test]
fn switching_off_ends_everything_and_says_when_that_is_done() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    guest.start_enclave(0);
    rig.launcher.close_gate(Call::Drop);
    guest.write(pci::ENABLE, &[0]);
    rig.launcher.wait_at_gate(Call::Drop);
    assert_eq!(guest.read(pci::ENABLE), [1]);
    rig.launcher.open_gate(Call::Drop);
    guest.disable();
    assert!(rig.nothing_is_given_away());
    guest.probe();
    guest.start_enclave(0);
}

#[test]
fn a_command_under_way_at_switching_off_has_no_reply_afterwards() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    rig.launcher.close_gate(Call::ReserveSlot);
    guest.submit(Command::SlotAlloc, &[0]);
    rig.launcher.wait_at_gate(Call::ReserveSlot);
    guest.write(pci::ENABLE, &[0]);
    rig.launcher.open_gate(Call::ReserveSlot);
    guest.disable();
    assert!(!interrupted(&guest.reply, SHORTLY));
    guest.probe();
    assert_eq!(guest.command(Command::SlotAlloc, &[0]).rc, 0);
}

/// Whether it is held already or still waits for its turn.
#[test]
fn a_held_command_does_not_keep_the_device_on() {
    let rig = Rig::with(ServerOptions::default(), "alloc=hold");
    let mut guest = rig.connect();
    guest.probe();
    guest.submit(Command::SlotAlloc, &[0]);
    guest.disable();
    assert!(!interrupted(&guest.reply, SHORTLY));
    rig.device.set_faults(Faults::none());
    guest.probe();
    assert_eq!(guest.command(Command::SlotAlloc, &[0]).rc, 0);
}

#[test]
fn a_command_to_a_device_that_is_off_is_refused() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.set_up_interrupts();
    assert_eq!(guest.command(Command::SlotAlloc, &[0]).rc, -19);
}

#[test]
fn reset_and_a_closed_connection_each_end_everything() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    guest.start_enclave(0);
    guest.client.reset().unwrap();
    rig.wait_until("the reset", Rig::nothing_is_given_away);
    guest.probe();
    guest.start_enclave(0);
    drop(guest);
    rig.wait_until("the end of the connection", Rig::nothing_is_given_away);
    let mut next = rig.connect();
    next.probe();
    next.start_enclave(0);
}

#[test]
fn stopping_the_server_ends_a_connection_that_is_in_use() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    guest.start_enclave(0);
    drop(rig);
    assert!(guest.client.region_read(BAR3, 0, &mut [0]).is_err());
}

#[test]
fn a_socket_in_use_is_refused_and_one_left_behind_is_replaced() {
    let rig = Rig::new();
    let bind = |path: &Path| PciServer::bind(path, ServerOptions::default(), Arc::clone(&rig.device), Arc::default()).map(drop);
    assert!(matches!(bind(&rig.path()), Err(BindError::InUse(_))));
    let left = rig.folder.path().join("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    bind(&left).unwrap();
    let file = rig.folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(bind(&file), Err(BindError::NotSocket(_))));
    assert!(matches!(bind(&rig.folder.path().join("x".repeat(120))), Err(BindError::TooLong(_))));
    assert!(matches!(bind(Path::new("/nowhere/ne.sock")), Err(BindError::Io(..))));
    // The look at the socket in use was a connection without a word; the next one is served all the same.
    rig.connect().probe();
}

#[test]
fn nonsense_at_the_socket_costs_its_connection_only() {
    let rig = Rig::new();
    for nonsense in [&[0xFF_u8; 64][..], &[0; 64], &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = UnixStream::connect(rig.path()).unwrap();
        let _ = stream.write_all(nonsense);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let mut guest = rig.connect();
    guest.probe();
    guest.start_enclave(0);
}

/// QEMU posts its writes: they have no reply, and the next read comes behind them. By hand, since the library's client always waits.
#[test]
fn posted_writes_are_carried_out_in_order_and_not_answered() {
    const VERSION_MESSAGE: u16 = 1;
    const REGION_READ: u16 = 9;
    const REGION_WRITE: u16 = 10;
    const NO_REPLY: u32 = 0x10;

    fn message(command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(16 + payload.len()).unwrap();
        [&[7, 0][..], &command.to_le_bytes(), &size.to_le_bytes(), &flags.to_le_bytes(), &[0; 4], payload].concat()
    }
    fn access(offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
        [&offset.to_le_bytes()[..], &BAR3.to_le_bytes(), &count.to_le_bytes(), data].concat()
    }
    fn answer(stream: &mut UnixStream) -> (u16, Vec<u8>) {
        let mut header = [0; 16];
        stream.read_exact(&mut header).unwrap();
        let size = u32::from_le_bytes(header[4..8].try_into().unwrap());
        let mut payload = vec![0; usize::try_from(size).unwrap() - 16];
        stream.read_exact(&mut payload).unwrap();
        (u16::from_le_bytes([header[2], header[3]]), payload)
    }

    let rig = Rig::new();
    let mut stream = UnixStream::connect(rig.path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&message(VERSION_MESSAGE, 0, b"\0\0\0\0{}\0")).unwrap();
    assert_eq!(answer(&mut stream).0, VERSION_MESSAGE);
    for byte in 0..100 {
        stream.write_all(&message(REGION_WRITE, NO_REPLY, &access(pci::REQUEST, 1, &[byte]))).unwrap();
    }
    stream.write_all(&message(REGION_READ, 0, &access(pci::REQUEST, 1, &[]))).unwrap();
    let (command, payload) = answer(&mut stream);
    assert_eq!((command, payload.last()), (REGION_READ, Some(&99)));
}

#[test]
fn commands_are_understood_with_what_earlier_ones_left_in_the_window() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    guest.write(pci::REQUEST, &[0xFF; 8]);
    guest.write(pci::REQUEST + 8, &[0xFF; 8]);
    // One byte, as Linux writes it; the 23 behind it are stale.
    assert_eq!(guest.command(Command::SlotAlloc, &[0]).rc, 0);
}

/// What AWS's newer driver does on a device that does not know its registers: docs/device-pci.md, "Newer drivers".
#[test]
fn a_newer_driver_finds_an_old_device() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    for offset in (0x008..0x00C).chain(0x1F0..0x218) {
        assert_eq!(guest.read(offset), [0], "{offset:#x}");
    }
    guest.write(0x1F8, &[0xFF; 8]);
    assert_eq!(guest.read(0x1F8), [0; 8]);
    let slot_uid = guest.command(Command::SlotAlloc, &[0; 8]).slot_uid;
    assert_ne!(slot_uid, 0);
    assert_eq!(guest.command(Command::EnclaveStop, &pci::EnclaveStop { slot_uid }.to_bytes()).rc, 0);
    assert_eq!(guest.command(Command::SlotAlloc, &[1, 0, 0, 0, 0, 0, 0, 0]).rc, -286);
}

#[test]
fn the_test_control_steers_the_device() {
    let rig = Rig::with(ServerOptions { test_control: true }, "");
    let mut guest = rig.connect();
    guest.probe();
    assert_eq!(guest.control("faults alloc@1=-ENOSPC"), 0);
    assert_eq!(guest.command(Command::SlotAlloc, &[0]).rc, -28);
    assert_eq!(guest.control("max-regions 3"), 0);
    let reply = guest.command(Command::SlotAlloc, &[0]);
    assert_eq!((reply.rc, reply.mem_regions), (0, 3));
    assert_eq!(guest.control("event"), 0);
    assert!(interrupted(&guest.event, PATIENCE));
    let uid = guest.start_enclave(0);
    assert_eq!(guest.control(&format!("end {uid:#x}")), 0);
    assert!(interrupted(&guest.event, PATIENCE));
    assert_eq!(guest.control(&format!("end {uid:#x}")), -2);
    assert_eq!(guest.control("nonsense"), -22);
    let mut figures = [0; 16];
    guest.client.region_read(CONFIG, 0x70, &mut figures).unwrap();
    assert_eq!(figures[..4], 6_u32.to_le_bytes());
    assert_eq!(figures[8..], (64_u64 << 20).to_le_bytes());
}

#[test]
fn early_interrupts_come_within_one_handshake() {
    let rig = Rig::with(ServerOptions { test_control: true }, "");
    let mut guest = rig.connect();
    guest.set_up_interrupts();
    assert_eq!(guest.control("early-interrupts"), 0);
    guest.write(pci::ENABLE, &[0]);
    assert_eq!(guest.read(pci::ENABLE), [1]);
    assert!(interrupted(&guest.reply, PATIENCE) && interrupted(&guest.event, PATIENCE));
    guest.probe();
    guest.start_enclave(0);
    guest.disable();
    guest.disable();
    assert!(!interrupted(&guest.event, SHORTLY) && !interrupted(&guest.reply, SHORTLY));
}

#[test]
fn without_the_option_there_is_no_test_control() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    assert_eq!(guest.control("event"), 0);
    let mut capability = [0; 32];
    guest.client.region_read(CONFIG, 0x60, &mut capability).unwrap();
    assert_eq!(capability, [0; 32]);
}

#[test]
fn random_accesses_neither_crash_nor_hang_it() {
    let rig = Rig::new();
    let mut guest = rig.connect();
    guest.probe();
    let mut random = 0x9E37_79B9_7F4A_7C15_u64; // arbitrary
    for _ in 0..4000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let [a, b, c, d, e, ..] = random.to_be_bytes();
        let offset = u64::from(u16::from_le_bytes([a, b]) % 0x220);
        let width = [1, 2, 4, 8][usize::from(c % 4)];
        let region = [BAR3, BAR3, BAR3, CONFIG, 0][usize::from(d % 5)];
        let mut data = vec![e; width];
        if c & 0x80 == 0 {
            let _ = guest.client.region_write(region, offset, &data);
        } else {
            let _ = guest.client.region_read(region, offset, &mut data);
        }
    }
    drop(guest);
    rig.wait_until("the end of the connection", Rig::nothing_is_given_away);
    rig.connect().probe();
}
