//! The vsock device against a hostile guest: the input is queue state, guest memory, and what guest and host do.
//!
//! Bytes of the input first fill the guest's RAM, rings and descriptors included; then they are a program of steps: packets in chains of any
//! shape, buffers, raw writes over rings and descriptors, host streams that read, write, close, connect and hand over others. The device is driven on this thread,
//! so there is no worker that could outlive the verdict. Checked: no panic, no hang, and the promised bounds of memory.
#![no_main]

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use nitroxide_vsock::fuzzing::{Device, Rings};
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const GUEST_CID: u64 = 16;
const ENTRIES: u16 = 16;
/// Rings and descriptors, then data; a second region follows without a gap, a third after a hole.
const RAM: [(GuestAddress, usize); 3] = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000), (GuestAddress(0x10000), 0x4000)];
const RINGS: [u64; 2] = [0x0, 0x800];
const DATA: u64 = 0x1000;

#[derive(Default)]
struct Hosts {
    streams: Mutex<Vec<UnixStream>>,
}

impl Router for Hosts {
    fn connect(&self, request: ConnectRequest) -> io::Result<Route> {
        let mut streams = self.streams.lock().unwrap();
        if request.port % 8 == 7 || streams.len() >= 64 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        streams.push(theirs);
        // An odd port's other end is asked first.
        Ok(if request.port % 2 == 1 { Route::Asking(ours) } else { Route::Connected(ours) })
    }
}

/// The rest of the input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> Option<u32> {
        let (first, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*first))
    }
}

fn ring(base: u64) -> Queue {
    let mut queue = Queue::new(ENTRIES).unwrap();
    queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(base + 0x200)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(base + 0x400)).unwrap();
    queue.set_event_idx(true);
    queue.set_ready(true);
    queue
}

struct Guest<'m> {
    memory: &'m GuestMemoryMmap,
    next: [u16; 2],
    available: [u16; 2],
}

impl Guest<'_> {
    /// Makes a chain available whose pieces have the given lengths and lie one after another from `address` on.
    fn offer(&mut self, which: usize, mut address: u64, lengths: &[u32], flags: u16) {
        let base = RINGS[which];
        let head = self.next[which];
        for (number, length) in lengths.iter().enumerate() {
            let index = self.next[which];
            let next = (index + 1) % ENTRIES;
            let link = u16::from(number + 1 < lengths.len());
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend((flags | link).to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            self.memory.write_slice(&descriptor, GuestAddress(base + 16 * u64::from(index))).unwrap();
            address = address.wrapping_add(u64::from(*length));
            self.next[which] = next;
        }
        let slot = base + 0x204 + 2 * u64::from(self.available[which] % ENTRIES);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available[which] = self.available[which].wrapping_add(1);
        self.memory.write_obj(self.available[which], GuestAddress(base + 0x202)).unwrap();
    }
}

/// A header with likely values, so that the fuzzer need not find the CID by chance.
fn header(input: &mut Input<'_>, length: u32) -> Option<[u8; 44]> {
    let (kind, operation) = (input.byte()?, input.byte()?);
    let mut bytes = Vec::with_capacity(44);
    bytes.extend(if kind & 0x80 == 0 { GUEST_CID } else { u64::from(input.word()?) }.to_le_bytes());
    bytes.extend([3u64, 2, 0, 4][usize::from(kind & 3)].to_le_bytes());
    bytes.extend(u32::from(kind >> 2 & 7).to_le_bytes());
    bytes.extend(u32::from(kind >> 4 & 7).to_le_bytes());
    bytes.extend(if operation & 0x80 == 0 { length } else { input.word()? }.to_le_bytes());
    bytes.extend((1 + u16::from(operation & 0x40 != 0)).to_le_bytes());
    bytes.extend(u16::from(operation & 0x0f).to_le_bytes());
    bytes.extend(u32::from(operation >> 4 & 3).to_le_bytes());
    bytes.extend(input.word()?.to_le_bytes());
    bytes.extend(input.word()?.to_le_bytes());
    bytes.try_into().ok()
}

fn step(input: &mut Input<'_>, guest: &mut Guest<'_>, device: &mut Device, hosts: &Hosts) -> Option<()> {
    let pick = |streams: &mut Vec<UnixStream>, choice: u8| (!streams.is_empty()).then(|| usize::from(choice) % streams.len());
    match input.byte()? % 13 {
        // A packet of the guest in pieces.
        0..=2 => {
            let cuts = [u32::from(input.byte()?), u32::from(input.byte()?) * 16, u32::from(input.byte()?) * 64];
            let header = header(input, cuts.iter().sum::<u32>().saturating_sub(44))?;
            guest.memory.write_slice(&header, GuestAddress(DATA + 0x2f00)).unwrap();
            let pieces = &cuts[..1 + usize::from(input.byte()?) % 3];
            guest.offer(1, DATA + 0x2f00, pieces, 0);
        }
        // Buffers for the guest.
        3 => {
            for _ in 0..input.byte()? % 16 {
                guest.offer(0, DATA, &[u32::from(input.byte()?), 64, 0, 1000], 2);
            }
        }
        // Anything over rings, descriptors and data.
        4 => {
            let at = u64::from(input.word()?) % 0x1000;
            let length = usize::from(input.byte()?).min(input.0.len());
            let (bytes, rest) = input.0.split_at(length);
            input.0 = rest;
            guest.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        }
        5 => {
            let (choice, length) = (input.byte()?, usize::from(input.byte()?) * 256);
            let mut streams = hosts.streams.lock().unwrap();
            let index = pick(&mut streams, choice)?;
            let _ = match input.byte()? {
                0 => streams[index].write(b"OK 1\n"),
                1 => streams[index].write(b"OK "),
                _ => streams[index].write(&vec![7; length]),
            };
        }
        6 => {
            let (choice, length) = (input.byte()?, usize::from(input.byte()?) * 256);
            let mut streams = hosts.streams.lock().unwrap();
            let index = pick(&mut streams, choice)?;
            let _ = streams[index].read(&mut vec![0; length]);
        }
        7 => {
            let choice = input.byte()?;
            let mut streams = hosts.streams.lock().unwrap();
            let index = pick(&mut streams, choice)?;
            match choice >> 6 {
                0 => drop(streams.swap_remove(index)),
                1 => drop(streams[index].shutdown(std::net::Shutdown::Write)),
                2 => drop(streams[index].shutdown(std::net::Shutdown::Read)),
                _ => drop(streams[index].shutdown(std::net::Shutdown::Both)),
            }
        }
        8 => {
            let (ours, theirs) = UnixStream::pair().ok()?;
            theirs.set_nonblocking(true).ok()?;
            let ports = input.byte()?;
            if device.connect(ours, (2 + u32::from(ports & 1), u32::from(ports >> 1 & 7)), u32::from(ports >> 4 & 7)).is_ok() {
                hosts.streams.lock().unwrap().push(theirs);
            }
        }
        // A program comes to the listener.
        9 => {
            let (ours, mut theirs) = UnixStream::pair().ok()?;
            theirs.set_nonblocking(true).ok()?;
            let (word, port) = (["CONNECT", "PREPARE"][usize::from(input.byte()? & 1)], input.byte()? & 7);
            let _ = theirs.write(format!("{word} {port}\n").as_bytes());
            device.begin_handshake(ours);
            hosts.streams.lock().unwrap().push(theirs);
        }
        // Descriptors go over a stream: new ones, of which a copy stays here, or the stream itself.
        10 => {
            let (choice, what) = (input.byte()?, input.byte()?);
            let mut streams = hosts.streams.lock().unwrap();
            let index = pick(&mut streams, choice)?;
            let (first, second) = UnixStream::pair().ok()?;
            second.set_nonblocking(true).ok()?;
            let files = [first.as_fd(), second.as_fd(), streams[index].as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(match what & 7 {
                0 => &files,
                1 => &files[2..],
                _ => &files[..1],
            }));
            let _ = sendmsg(
                &streams[index],
                &[IoSlice::new(b"xx".split_at(1 + usize::from(what & 8 != 0)).0)],
                &mut control,
                SendFlags::NOSIGNAL,
            );
            streams.push(second);
        }
        // The guest accepts, which chance would hardly find.
        11 => {
            let header = header(&mut Input(&[input.byte()?, 2, 0, 0, 4, 0, 0, 0, 0, 0]), 0)?;
            guest.memory.write_slice(&header, GuestAddress(DATA + 0x2f00)).unwrap();
            guest.offer(1, DATA + 0x2f00, &[44], 0);
        }
        _ => match input.byte()? % 8 {
            0 => {
                device.stop();
                device.start();
            }
            1 => device.expire(Instant::now() + Duration::from_secs(60)),
            _ => {}
        },
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    // One mapping for all runs, zeroed for each: mapping costs more than running.
    static MEMORY: OnceLock<GuestMemoryMmap> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| GuestMemoryMmap::from_ranges(&RAM).unwrap());
    for (start, length) in RAM {
        memory.write_slice(&vec![0; length], start).unwrap();
    }
    let mut input = Input(data);
    let Some(filling) = input.byte() else { return };
    let length = (usize::from(filling) * 32).min(input.0.len());
    let (bytes, rest) = input.0.split_at(length);
    memory.write_slice(bytes, GuestAddress(0)).unwrap();
    input.0 = rest;

    let hosts = Arc::new(Hosts::default());
    let mut config = VsockConfig::new(16, Arc::clone(&hosts) as Arc<dyn Router>);
    // Ports that the guest's packets can have.
    let port = AtomicU32::new(0);
    config.peer = Some(Arc::new(move |_| Some((3, 1 + port.fetch_add(1, Ordering::Relaxed) % 7))));
    let mut device = Device::new(config).unwrap();
    device.start();
    let (mut rx, mut tx) = (ring(RINGS[0]), ring(RINGS[1]));
    let mut guest = Guest { memory, next: [0; 2], available: [0; 2] };
    for _ in 0..256 {
        if input.0.is_empty() {
            break;
        }
        let _ = step(&mut input, &mut guest, &mut device, &hosts);
        device.host_events();
        let _ = device.process(&mut Rings { memory, rx: &mut rx, tx: &mut tx });
        let statistics = device.statistics();
        assert!(statistics.backlog_bytes <= statistics.promised_bytes);
        assert!(statistics.connections <= 4096);
    }
    device.stop();
    assert_eq!(device.statistics().connections, 0);
    assert_eq!(device.statistics().promised_bytes, 0);
});
