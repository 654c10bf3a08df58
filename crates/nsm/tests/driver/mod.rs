//! A small virtio driver for tests: it can also do what no sane driver does.
//!
//! Descriptor table, rings and buffers lie at fixed places in guest memory; nothing is checked and nothing is remembered but how
//! far the rings are.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x3000;
pub const USED: u64 = 0x4000;
/// From here on memory is free for buffers.
pub const BUFFERS: u64 = 0x10000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const DESCRIBE_NSM: &[u8] = b"\x6bDescribeNSM";
pub const GET_RANDOM: &[u8] = b"\x69GetRandom";
pub const INVALID_OPERATION: &[u8] = b"\xa1\x65Error\x70InvalidOperation";

/// One descriptor as it stands in the table.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

pub struct Driver {
    pub memory: GuestMemoryMmap,
    size: u16,
    available: u16,
    used: u16,
}

impl Driver {
    pub fn new(memory: GuestMemoryMmap, size: u16) -> Self {
        Self { memory, size, available: 0, used: 0 }
    }

    /// A driver with 2 MiB of memory in one region and a queue of 64.
    pub fn simple() -> Self {
        Self::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap(), 64)
    }

    /// The device's side of the queue.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(self.size);
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    pub fn describe(&self, index: u16, raw: Raw) {
        self.describe_at(DESCRIPTORS, index, raw);
    }

    pub fn describe_at(&self, table: u64, index: u16, Raw { address, length, flags, next }: Raw) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Writes the available ring's index, whatever is behind it.
    pub fn set_available(&self, index: u16) {
        fence(Ordering::SeqCst);
        self.memory.store(index.to_le(), GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
    }

    /// Where descriptor `index` has a buffer of its own of 0x4000 bytes.
    pub fn buffer(&self, index: u16) -> u64 {
        BUFFERS + u64::from(index) * 0x4000
    }

    /// Offers a request in a chain of its own.
    pub fn ask(&mut self, index: u16, request: &[u8]) {
        self.memory.write_slice(request, GuestAddress(self.buffer(index))).unwrap();
        let length = u32::try_from(request.len()).unwrap();
        self.describe(index, Raw { address: self.buffer(index), length, flags: 0, next: 0 });
        self.offer(index);
    }

    /// Offers room in a chain of its own.
    pub fn make_room(&mut self, index: u16, length: u32) {
        self.describe(index, Raw { address: self.buffer(index), length, flags: WRITE, next: 0 });
        self.offer(index);
    }

    /// As Linux does it: a request at `index`, 0x3000 bytes of room behind it.
    pub fn exchange(&mut self, index: u16, request: &[u8]) {
        self.ask(index, request);
        self.make_room(index + 1, 0x3000);
    }

    /// What has come back since the last call: head and length.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let end: u16 = self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        let mut entries = Vec::new();
        while self.used != u16::from_le(end) {
            let slot = GuestAddress(USED + 4 + 8 * u64::from(self.used % self.size));
            let [head, length]: [u32; 2] = self.memory.read_obj(slot).unwrap();
            entries.push((u16::try_from(head).unwrap(), length));
            self.used = self.used.wrapping_add(1);
        }
        entries
    }

    pub fn read(&self, address: u64, length: u32) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// The response in the buffer of `(index, length)` as [`Self::used`] gave it.
    pub fn response(&self, (index, length): (u16, u32)) -> Vec<u8> {
        self.read(self.buffer(index), length)
    }

    /// The last entry that has come back.
    pub fn last_used(&mut self) -> (u16, u32) {
        *self.used().last().unwrap()
    }

    /// The response in the last entry that has come back.
    pub fn last_response(&mut self) -> Vec<u8> {
        let entry = self.last_used();
        self.response(entry)
    }
}
