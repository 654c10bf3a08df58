//! How fast the device itself is, without a guest that computes: `cargo bench -p nitroxide-vsock --bench device`.
//!
//! A driver of a few lines on this thread gives it packets of 64 KiB in 17 descriptors, as Linux since 6.17 does, and buffers of one page, as Linux
//! does; a thread at the other end of the UNIX stream reads or writes 256 KiB at a time. Driver and device share one core here, so this is a lower
//! bound of what the device's thread does alone. Results: docs/vsock.md.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use nitroxide_vsock::fuzzing::{Device, Rings};
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 4096 * MIB;
const PACKET: u32 = 65536;
const PIECES: u16 = 17;
const ENTRIES: u16 = 1024;
const CHAINS: u16 = 7; // as many as Linux gets into its 128 entries
const PAGES: u16 = 128;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

const TX: u64 = 0x1_0000;
const RX: u64 = 0x4_0000;
const TX_DATA: u64 = 0x10_0000;
const RX_DATA: u64 = 0x80_0000;

#[derive(Default)]
struct Pair(Mutex<Option<UnixStream>>);

impl Router for Pair {
    fn connect(&self, _request: ConnectRequest) -> io::Result<Route> {
        let (ours, theirs) = UnixStream::pair()?;
        *self.0.lock().unwrap() = Some(theirs);
        Ok(ours.into())
    }
}

struct Driver {
    memory: GuestMemoryMmap,
    device: Device,
    router: Arc<Pair>,
    tx: Queue,
    rx: Queue,
    tx_available: u16,
    rx_available: u16,
    rx_used: u16,
    forwarded: u32,
    received: u64,
}

fn queue(base: u64) -> Queue {
    let mut queue = Queue::new(ENTRIES).unwrap();
    queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(base + 0x8000)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(base + 0xa000)).unwrap();
    queue.set_event_idx(true);
    queue.set_ready(true);
    queue
}

/// A header from the guest's port 1 to the parent's port 1.
fn header(operation: u16, length: u32, forwarded: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(16u64.to_le_bytes());
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((1u32 << 30).to_le_bytes());
    bytes.extend(forwarded.to_le_bytes());
    bytes
}

impl Driver {
    fn new() -> (Self, UnixStream) {
        let router = Arc::new(Pair::default());
        let mut device = Device::new(VsockConfig::new(16, Arc::clone(&router) as Arc<dyn Router>)).unwrap();
        device.start();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let mut driver = Self {
            memory,
            device,
            router,
            tx: queue(TX),
            rx: queue(RX),
            tx_available: 0,
            rx_available: 0,
            rx_used: 0,
            forwarded: 0,
            received: 0,
        };
        for chain in 0..CHAINS {
            let data = TX_DATA + u64::from(chain) * 0x2_0000;
            for piece in 0..PIECES {
                let index = chain * PIECES + piece;
                let (at, length) = if piece == 0 { (data, 44) } else { (data + 4096 * u64::from(piece), 4096) };
                driver.descriptor(TX, index, Descriptor::new(at, length, if piece + 1 < PIECES { NEXT } else { 0 }, index + 1));
            }
        }
        for page in 0..PAGES {
            driver.descriptor(RX, page, Descriptor::new(RX_DATA + 4096 * u64::from(page), 3776, WRITE, 0));
            driver.offer_page(page);
        }
        driver.send(1, 0);
        driver.work();
        let host = driver.router.0.lock().unwrap().take().unwrap();
        (driver, host)
    }

    fn descriptor(&self, ring: u64, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(ring + 16 * u64::from(index))).unwrap();
    }

    fn offer_page(&mut self, page: u16) {
        self.memory.write_obj(page, GuestAddress(RX + 0x8004 + 2 * u64::from(self.rx_available % ENTRIES))).unwrap();
        self.rx_available = self.rx_available.wrapping_add(1);
        self.memory.write_obj(self.rx_available, GuestAddress(RX + 0x8002)).unwrap();
    }

    /// Sends a packet in the next chain.
    fn send(&mut self, operation: u16, length: u32) {
        let chain = self.tx_available % CHAINS;
        let received = u32::try_from(self.received % (1 << 32)).unwrap();
        self.memory.write_slice(&header(operation, length, received), GuestAddress(TX_DATA + u64::from(chain) * 0x2_0000)).unwrap();
        self.memory.write_obj(chain * PIECES, GuestAddress(TX + 0x8004 + 2 * u64::from(self.tx_available % ENTRIES))).unwrap();
        self.tx_available = self.tx_available.wrapping_add(1);
        self.memory.write_obj(self.tx_available, GuestAddress(TX + 0x8002)).unwrap();
    }

    /// Lets the device work once, then takes what it sent and offers the buffers again; returns how many buffers that were.
    fn work(&mut self) -> u16 {
        self.device.host_events();
        let _ = self.device.process(&mut Rings { memory: &self.memory, rx: &mut self.rx, tx: &mut self.tx });
        let end: u16 = self.memory.read_obj(GuestAddress(RX + 0xa002)).unwrap();
        let mut count = 0;
        while self.rx_used != end {
            let slot = RX + 0xa004 + 8 * u64::from(self.rx_used % ENTRIES);
            let (page, used): (u32, u32) =
                (self.memory.read_obj(GuestAddress(slot)).unwrap(), self.memory.read_obj(GuestAddress(slot + 4)).unwrap());
            self.forwarded = self.memory.read_obj(GuestAddress(RX_DATA + 4096 * u64::from(page) + 40)).unwrap();
            self.received += u64::from(used - 44);
            self.offer_page(u16::try_from(page).unwrap());
            self.rx_used = self.rx_used.wrapping_add(1);
            count += 1;
        }
        count
    }
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!("vsock device without a guest, {} MiB per direction", BYTES / MIB);
    println!("from the guest, 64 KiB in 17 descriptors: {:.0} MiB/s", rate(from_guest()));
    println!("to the guest, one page per buffer:        {:.0} MiB/s", rate(to_guest()));
}

fn rate(seconds: f64) -> f64 {
    (BYTES / MIB) as f64 / seconds
}

fn from_guest() -> f64 {
    let (mut driver, mut host) = Driver::new();
    let reader = thread::spawn(move || {
        let (mut buffer, mut left) = (vec![0; 256 << 10], BYTES);
        while left > 0 {
            left -= host.read(&mut buffer).unwrap() as u64;
        }
        host
    });
    let begin = Instant::now();
    let mut sent = 0u64;
    while sent < BYTES {
        let mut chains = 0;
        let under_way = |driver: &Driver| u32::try_from(sent % (1 << 32)).unwrap().wrapping_sub(driver.forwarded);
        let room = (256 << 10) - under_way(&driver);
        while chains < CHAINS && (u32::from(chains) + 1) * PACKET <= room {
            driver.send(5, PACKET);
            chains += 1;
        }
        sent += u64::from(chains) * u64::from(PACKET);
        driver.work();
    }
    let _host = reader.join().unwrap();
    begin.elapsed().as_secs_f64()
}

fn to_guest() -> f64 {
    let (mut driver, mut host) = Driver::new();
    let writer = thread::spawn(move || {
        let buffer = vec![0; 256 << 10];
        for _ in 0..BYTES / buffer.len() as u64 {
            host.write_all(&buffer).unwrap();
        }
        host
    });
    let begin = Instant::now();
    let mut told = 0;
    while driver.received < BYTES {
        driver.work();
        if driver.received - told > 256 * MIB {
            told = driver.received;
            driver.send(6, 0);
        }
    }
    let _host = writer.join().unwrap();
    begin.elapsed().as_secs_f64()
}
