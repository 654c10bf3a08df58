//! A guest's driver for tests: two split queues in RAM that consists of many small regions, chains of any shape.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::{Device, Interrupts, Rings};
use crate::config::{Peer, VsockConfig};
use crate::packet::{HEADER_BYTES, Header, Operation, TYPE_STREAM};
use crate::router::{ConnectRequest, Route, Router};

pub const GUEST_CID: u32 = 16; // arbitrary
pub const GUEST_PORT: u32 = 1000; // arbitrary
pub const HOST_PORT: u32 = 5000; // arbitrary
/// What the guest says about its receive buffers unless a test sets it otherwise.
pub const GUEST_BUFFER: u32 = 1 << 30;

const QUEUE_ENTRIES: u16 = 256;
const RX_RING: u64 = 0x0000;
const TX_RING: u64 = 0x8000;
const RINGS_END: usize = 0x1_0000;
const DATA: u64 = 0x10_0000;
/// Small regions side by side, so that buffers cross their borders.
const REGION_BYTES: usize = 0x3000;
const REGIONS: u64 = 200;
/// Buffers for packets to the guest lie below, packets from the guest above; each area is used round and round.
const TX_DATA: u64 = DATA + REGIONS / 2 * REGION_BYTES as u64;
const DATA_END: u64 = DATA + REGIONS * REGION_BYTES as u64;

pub const WRITE: u16 = 2;
pub const NEXT: u16 = 1;
pub const INDIRECT: u16 = 4;

/// From this port on the router's streams are asking ones.
pub const FIRST_ASKING_PORT: u32 = 1 << 20; // arbitrary

/// Hands out one end of a new pair of sockets and keeps the other; refuses port 0.
#[derive(Debug, Default)]
pub struct PairRouter {
    pub opened: Mutex<Vec<(ConnectRequest, UnixStream)>>,
}

impl Router for PairRouter {
    fn connect(&self, request: ConnectRequest) -> io::Result<Route> {
        if request.port == 0 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        self.opened.lock().unwrap().push((request, theirs));
        Ok(if request.port < FIRST_ASKING_PORT { Route::Connected(ours) } else { Route::Asking(ours) })
    }
}

struct Ring {
    base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
    /// Pieces of the chain with each head.
    chains: Vec<Vec<(u64, u32)>>,
}

impl Ring {
    fn new(base: u64) -> Self {
        Self { base, next_descriptor: 0, available: 0, used: 0, chains: vec![Vec::new(); usize::from(QUEUE_ENTRIES)] }
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(QUEUE_ENTRIES).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available_ring())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        queue
    }

    fn available_ring(&self) -> u64 {
        self.base + 16 * u64::from(QUEUE_ENTRIES)
    }

    fn used_ring(&self) -> u64 {
        self.available_ring() + 2 * u64::from(QUEUE_ENTRIES) + 8
    }

    fn descriptor(&self, memory: &GuestMemoryMmap, index: u16, descriptor: Descriptor) {
        memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(self.base).unchecked_add(16 * u64::from(index))).unwrap();
    }

    /// Makes a chain of the pieces available; the table is used round and round, so at most 256 pieces may be under way.
    fn offer(&mut self, memory: &GuestMemoryMmap, pieces: &[(u64, u32)], flags: u16) {
        let head = self.next_descriptor;
        for (number, (address, length)) in pieces.iter().enumerate() {
            let next = (self.next_descriptor + 1) % QUEUE_ENTRIES;
            let link = if number + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(memory, self.next_descriptor, Descriptor::new(*address, *length, flags | link, next));
            self.next_descriptor = next;
        }
        self.chains[usize::from(head)] = pieces.to_vec();
        self.push(memory, head);
    }

    fn push(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % QUEUE_ENTRIES);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(self.available_ring() + 2)).unwrap();
    }

    /// Chains the device has finished since the last look: (pieces, used length).
    fn finished(&mut self, memory: &GuestMemoryMmap) -> Vec<(Vec<(u64, u32)>, u32)> {
        let end: u16 = memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        let mut finished = Vec::new();
        while self.used != end {
            let slot = GuestAddress(self.used_ring() + 4 + 8 * u64::from(self.used % QUEUE_ENTRIES));
            let (head, length): (u32, u32) = (memory.read_obj(slot).unwrap(), memory.read_obj(slot.unchecked_add(4)).unwrap());
            finished.push((self.chains[usize::try_from(head).unwrap()].clone(), length));
            self.used = self.used.wrapping_add(1);
        }
        // The driver wants an interrupt for the next one.
        memory.write_obj(self.used, GuestAddress(self.available_ring() + 4 + 2 * u64::from(QUEUE_ENTRIES))).unwrap();
        finished
    }
}

/// A guest: its RAM, its queues, and the device they belong to.
pub struct Driver {
    pub memory: GuestMemoryMmap,
    rx: Ring,
    tx: Ring,
    rx_queue: Queue,
    tx_queue: Queue,
    next_rx_data: u64,
    next_tx_data: u64,
    pub device: Device,
    pub router: Arc<PairRouter>,
    /// Interrupts that were asked for, ever.
    pub interrupts: (usize, usize),
}

impl Driver {
    pub fn new() -> Self {
        Self::with_cid(GUEST_CID)
    }

    pub fn with_cid(cid: u32) -> Self {
        Self::with_listener(cid, None, None)
    }

    /// A guest whose device takes connections of programs.
    pub fn with_listener(cid: u32, listener: Option<UnixListener>, peer: Option<Arc<Peer>>) -> Self {
        let mut ranges = vec![(GuestAddress(0), RINGS_END)];
        ranges.extend((0..REGIONS).map(|region| (GuestAddress(DATA + region * REGION_BYTES as u64), REGION_BYTES)));
        let router = Arc::new(PairRouter::default());
        let config = VsockConfig { listener, peer, ..VsockConfig::new(cid, Arc::clone(&router) as Arc<dyn Router>) };
        let mut device = Device::new(config).unwrap();
        device.start();
        let (rx, tx) = (Ring::new(RX_RING), Ring::new(TX_RING));
        Self {
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            rx_queue: rx.queue(),
            tx_queue: tx.queue(),
            rx,
            tx,
            next_rx_data: DATA,
            next_tx_data: TX_DATA,
            device,
            router,
            interrupts: (0, 0),
        }
    }

    /// Puts a packet into a chain whose descriptors have the lengths `cuts`, the last one taking the rest.
    pub fn send_cut(&mut self, header: &Header, payload: &[u8], cuts: &[usize]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(payload);
        let mut rest = bytes.as_slice();
        let mut pieces = Vec::new();
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            if now.is_empty() && !later.is_empty() {
                pieces.push((DATA, 0));
                continue;
            }
            if now.is_empty() {
                break;
            }
            let length = u32::try_from(now.len()).unwrap();
            let address = allocate(&mut self.next_tx_data, length, TX_DATA, DATA_END);
            self.memory.write_slice(now, GuestAddress(address)).unwrap();
            pieces.push((address, length));
            rest = later;
        }
        self.tx.offer(&self.memory, &pieces, 0);
    }

    /// Puts a packet into a chain of one descriptor.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        self.send_cut(header, payload, &[]);
    }

    /// Makes a chain of raw descriptors available in the TX queue.
    pub fn send_raw(&mut self, pieces: &[(u64, u32)], flags: u16) {
        self.tx.offer(&self.memory, pieces, flags);
    }

    /// Makes a chain whose one descriptor is written as given.
    pub fn send_descriptor(&mut self, descriptor: Descriptor) {
        let head = self.tx.next_descriptor;
        self.tx.descriptor(&self.memory, head, descriptor);
        self.tx.next_descriptor = (head + 1) % QUEUE_ENTRIES;
        self.tx.push(&self.memory, head);
    }

    /// Writes an index into the TX queue that means more chains than it has entries.
    pub fn corrupt_tx_index(&mut self) {
        let index = self.tx.available.wrapping_add(QUEUE_ENTRIES + 1);
        self.memory.write_obj(index, GuestAddress(self.tx.available_ring() + 2)).unwrap();
    }

    /// Offers a buffer whose descriptors have the lengths `cuts`.
    pub fn post(&mut self, cuts: &[u32]) {
        let pieces: Vec<_> = cuts.iter().map(|length| (allocate(&mut self.next_rx_data, *length, DATA, TX_DATA), *length)).collect();
        self.rx.offer(&self.memory, &pieces, WRITE);
    }

    /// Offers `count` buffers as Linux does: one descriptor of almost a page each.
    pub fn post_pages(&mut self, count: usize) {
        for _ in 0..count {
            self.post(&[3776]);
        }
    }

    /// Lets the device work until nothing moves and its events descriptor is silent.
    pub fn run(&mut self) {
        for _ in 0..1000 {
            self.device.host_events();
            let (before, turns) = (self.device.statistics(), self.device.table.has_turns());
            let mut rings = Rings { memory: &self.memory, rx: &mut self.rx_queue, tx: &mut self.tx_queue };
            let Interrupts { rx, tx } = self.device.process(&mut rings);
            self.interrupts.0 += usize::from(rx);
            self.interrupts.1 += usize::from(tx);
            let moved = self.device.statistics() != before || self.device.table.has_turns() != turns;
            if !moved && !self.has_events() {
                return;
            }
        }
        panic!("the device never comes to rest");
    }

    fn has_events(&self) -> bool {
        let events = self.device.events_fd();
        let mut polled = [PollFd::new(&events, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
    }

    /// Packets that the device has sent since the last look.
    pub fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        for (pieces, used) in self.rx.finished(&self.memory) {
            let mut bytes = Vec::new();
            for (address, length) in pieces {
                let mut piece = vec![0; usize::try_from(length).unwrap()];
                self.memory.read_slice(&mut piece, GuestAddress(address)).unwrap();
                bytes.extend(piece);
            }
            bytes.truncate(usize::try_from(used).unwrap());
            let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else { continue };
            let header = Header::from_bytes(header);
            assert_eq!(usize::try_from(header.length).unwrap(), payload.len(), "the length says what is there");
            packets.push((header, payload.to_vec()));
        }
        packets
    }

    /// How many TX chains the device has given back since the last look.
    pub fn sent(&mut self) -> usize {
        self.tx.finished(&self.memory).len()
    }

    /// A packet from the guest's usual port to the host's usual port.
    pub fn header(operation: Operation) -> Header {
        Header {
            source_cid: u64::from(GUEST_CID),
            destination_cid: 3,
            source_port: GUEST_PORT,
            destination_port: HOST_PORT,
            socket_type: TYPE_STREAM,
            operation: operation as u16,
            buffer_bytes: GUEST_BUFFER,
            ..Header::default()
        }
    }

    /// A data packet from the guest's usual port.
    pub fn data(payload: &[u8]) -> Header {
        Header { length: u32::try_from(payload.len()).unwrap(), ..Self::header(Operation::ReadWrite) }
    }

    /// Opens a connection from the guest's port `guest_port` and returns the host's end.
    pub fn open(&mut self, guest_port: u32) -> UnixStream {
        self.post_pages(1);
        self.send(&Header { source_port: guest_port, ..Self::header(Operation::Request) }, &[]);
        self.run();
        let received = self.received();
        assert_eq!(received.len(), 1);
        assert_eq!(received[0].0.operation, Operation::Response as u16);
        let stream = self.router.opened.lock().unwrap().pop().unwrap().1;
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

/// Takes `length` bytes of an area that is used round and round: what is under way must be less than all of it.
fn allocate(next: &mut u64, length: u32, start: u64, end: u64) -> u64 {
    if *next + u64::from(length) > end {
        *next = start;
    }
    let address = *next;
    *next += u64::from(length) + 1; // an odd gap: nothing is aligned
    address
}
