//! QEMU with a guest in it, as far as a vsock device can tell: vhost-user messages, and two rings written by hand.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const MEMORY_BYTES: usize = 2 << 20;
const ENTRIES: u16 = 16;
const RX: usize = 0;
const TX: usize = 1;
const DATA: u64 = 0x10_000;
const HEADER_BYTES: u32 = 44;
const BUFFER_BYTES: u32 = 256;
const WRITE: u16 = 2;

/// `VIRTIO_VSOCK_OP_REQUEST`
pub const REQUEST: u16 = 1;
/// `VIRTIO_VSOCK_OP_RESPONSE`
pub const RESPONSE: u16 = 2;

/// Only ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A machine whose guest has offered as many buffers as its queue has entries.
pub struct Machine {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    kicks: [EventFd; 2],
    pub calls: [EventFd; 2],
    sent: u16,
    received: u16,
}

fn table(queue: usize) -> u64 {
    0x1000 * u64::try_from(queue).unwrap()
}

fn available(queue: usize) -> u64 {
    table(queue) + 0x400
}

fn used(queue: usize) -> u64 {
    table(queue) + 0x800
}

impl Machine {
    /// Does what QEMU does until the guest's driver runs.
    pub fn start(stream: UnixStream) -> Self {
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY_BYTES as u64).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY_BYTES, Some(FileOffset::new(memory, 0)))]).unwrap();
        let mut frontend = Frontend::from_stream(stream, 3);
        frontend.set_owner().unwrap();
        frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(VERSION_1 | PROTOCOL_FEATURES).unwrap();
        for region in memory.iter() {
            frontend.add_mem_region(&VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).unwrap();
        }
        let eventfds = || [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
        let mut machine = Self { frontend, memory, kicks: eventfds(), calls: eventfds(), sent: 0, received: 0 };
        for entry in 0..ENTRIES {
            let buffer = DATA + u64::from(entry) * u64::from(BUFFER_BYTES);
            machine.offer(RX, entry, buffer, BUFFER_BYTES, WRITE);
        }
        for queue in [RX, TX] {
            machine.start_queue(queue, 0).unwrap();
        }
        machine
    }

    /// Tells the device where a queue is, shifted by so many bytes.
    pub fn start_queue(&mut self, queue: usize, shift: u64) -> vhost::Result<()> {
        let base = self.memory.iter().next().unwrap().as_ptr() as u64 + shift;
        let rings = VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: base + table(queue),
            used_ring_addr: base + used(queue),
            avail_ring_addr: base + available(queue),
            log_addr: None,
        };
        self.frontend.set_vring_num(queue, ENTRIES)?;
        self.frontend.set_vring_base(queue, 0)?;
        self.frontend.set_vring_addr(queue, &rings)?;
        self.frontend.set_vring_call(queue, &self.calls[queue])?;
        self.frontend.set_vring_kick(queue, &self.kicks[queue])?;
        self.frontend.set_vring_enable(queue, true)?;
        Ok(())
    }

    /// Whether the device has let go of this machine.
    pub fn is_cut_off(&mut self) -> bool {
        self.frontend.get_features().is_err()
    }

    fn offer(&self, queue: usize, number: u16, address: u64, length: u32, flags: u16) {
        let index = number % ENTRIES;
        let descriptor = table(queue) + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(descriptor)).unwrap();
        self.memory.write_obj(length, GuestAddress(descriptor + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(descriptor + 12)).unwrap();
        self.memory.write_obj(index, GuestAddress(available(queue) + 4 + 2 * u64::from(index))).unwrap();
        self.memory.write_obj(number.wrapping_add(1), GuestAddress(available(queue) + 2)).unwrap();
    }

    /// The guest asks for a connection.
    pub fn request(&mut self, guest_cid: u32, cid: u32, guest_port: u32, port: u32) {
        let mut packet = Vec::new();
        packet.extend(u64::from(guest_cid).to_le_bytes());
        packet.extend(u64::from(cid).to_le_bytes());
        for word in [guest_port, port, 0, 1 | u32::from(REQUEST) << 16, 0, 1 << 18, 0] {
            packet.extend(word.to_le_bytes());
        }
        let address = DATA + 0x10_000;
        self.memory.write_slice(&packet, GuestAddress(address)).unwrap();
        self.offer(TX, self.sent, address, HEADER_BYTES, 0);
        self.sent += 1;
        self.kicks[TX].write(1).unwrap();
    }

    /// The next packet for the guest: (source CID, operation, source port). Its buffer is not offered again.
    pub fn packet(&mut self) -> (u32, u16, u32) {
        let begin = Instant::now();
        while self.memory.read_obj::<u16>(GuestAddress(used(RX) + 2)).unwrap() == self.received {
            assert!(begin.elapsed() < PATIENCE, "no packet came");
            std::thread::sleep(Duration::from_millis(1));
        }
        let head: u32 = self.memory.read_obj(GuestAddress(used(RX) + 4 + 8 * u64::from(self.received % ENTRIES))).unwrap();
        self.received += 1;
        let at = DATA + u64::from(head) * u64::from(BUFFER_BYTES);
        let word = |offset| self.memory.read_obj::<u32>(GuestAddress(at + offset)).unwrap();
        (word(0), u16::try_from(word(28) >> 16).unwrap(), word(16))
    }
}
