//! The device without vhost: queues and host events in, queues and host streams out.
//!
//! [`Device::process`] works on both queues until nothing moves; [`Device::host_events`] takes in what epoll has. Parts: `from_guest` (the
//! TX queue), `to_guest` (the RX queue), `host` (streams, listener, handshake, time), `handed` (streams that programs hand over). The face
//! (`face`) calls both on one thread; unit tests and the fuzz target call them on queues they made up. Nothing here blocks.

mod from_guest;
mod handed;
mod host;
mod to_guest;

#[cfg(test)]
mod driver_model;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_ends;
#[cfg(test)]
mod tests_prepare;
#[cfg(test)]
mod tests_routes;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::epoll;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::Router;
use crate::config::{Peer, VsockConfig};
use crate::connection::{Connection, Phase};
use crate::limits;
use crate::packet::Header;
use crate::table::{Entry, Table, Token};

/// CID of the parent as seen by an enclave.
pub const PARENT_CID: u32 = 3;
/// The well-known CID of "the host", an alias of the parent for an enclave.
pub const HOST_CID: u32 = 2;

/// The guest's memory and its two data queues, for the time of one call.
#[derive(Debug)]
pub struct Rings<'m, 'q> {
    /// The guest's RAM.
    pub memory: &'m GuestMemoryMmap,
    /// Buffers for packets to the guest.
    pub rx: &'q mut Queue,
    /// Packets from the guest.
    pub tx: &'q mut Queue,
}

/// Which queues' interrupts the guest wants now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interrupts {
    /// The queue of buffers for packets to the guest.
    pub rx: bool,
    /// The queue of packets from the guest.
    pub tx: bool,
}

/// Counters of a device, for owners, tests and benchmarks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Entries now: connections of either direction, handshakes, and ends that still drain.
    pub connections: usize,
    /// Bytes of the guest that wait in this process for slow programs of the host, now.
    pub backlog_bytes: u64,
    /// Bytes of receive buffers promised to the guest now: the most that `backlog_bytes` can become without new connections.
    pub promised_bytes: u64,
    /// Connections that came to data, ever.
    pub accepted: u64,
    /// Connections that were refused by either side, ever.
    pub refused: u64,
    /// Resets sent to the guest, ever.
    pub resets: u64,
    /// Chains of the guest that were malformed, ever.
    pub malformed: u64,
    /// Bytes of payload from the guest, ever.
    pub bytes_from_guest: u64,
    /// Bytes of payload to the guest, ever.
    pub bytes_to_guest: u64,
}

/// A vsock device.
pub struct Device {
    guest_cid: u32,
    router: Arc<dyn Router>,
    listener: Option<UnixListener>,
    peer: Option<Arc<Peer>>,
    epoll: OwnedFd,
    /// Rings when there is work that no queue and no stream announces.
    wake: OwnedFd,
    timer: OwnedFd,
    /// What is the timer set to?
    timer_at: Option<Instant>,
    /// When is the listener to be tried again, after the process ran out of descriptors?
    accept_again: Option<Instant>,
    table: Table,
    /// Resets that belong to no connection (any more).
    resets: VecDeque<Header>,
    /// Does the next buffer go to a reset, if one waits?
    reset_has_turn: bool,
    /// Does the guest's driver serve its queues?
    running: bool,
    /// Where does the search for a free host port begin?
    next_port: u32,
    statistics: Statistics,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("guest_cid", &self.guest_cid).field("statistics", &self.statistics()).finish_non_exhaustive()
    }
}

impl Device {
    /// A device as `config` describes it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a CID that no guest can have; what the system says about epoll, eventfd and timerfd.
    pub fn new(config: VsockConfig) -> io::Result<Self> {
        let VsockConfig { guest_cid, router, listener, peer } = config;
        if guest_cid < PARENT_CID || guest_cid == u32::MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("CID {guest_cid} is reserved; give a guest 4 or more.")));
        }
        use rustix::event::{EventfdFlags, eventfd};
        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(host::WAKE), epoll::EventFlags::IN)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(host::TIMER), epoll::EventFlags::IN)?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            epoll::add(&epoll, listener, epoll::EventData::new_u64(host::LISTENER), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        }
        Ok(Self {
            guest_cid,
            router,
            listener,
            peer,
            epoll,
            wake,
            timer,
            timer_at: None,
            accept_again: None,
            table: Table::default(),
            resets: VecDeque::new(),
            reset_has_turn: false,
            running: false,
            next_port: host::FIRST_PORT,
            statistics: Statistics::default(),
        })
    }

    /// The descriptor that is readable when [`host_events`](Self::host_events) and then [`process`](Self::process) are to be called.
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The CID of the guest.
    pub fn guest_cid(&self) -> u32 {
        self.guest_cid
    }

    /// The counters now.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            connections: self.table.len(),
            backlog_bytes: self.table.connections().map(|connection| connection.backlog_bytes() as u64).sum(),
            promised_bytes: self.table.promised_bytes(),
            ..self.statistics
        }
    }

    /// The driver serves its queues from now on: the host may connect.
    pub fn start(&mut self) {
        self.running = true;
    }

    /// The driver stopped (or QEMU is gone): every connection is over, its stream is closed.
    pub fn stop(&mut self) {
        self.running = false;
        self.resets.clear();
        for stream in self.table.clear().iter().filter_map(Entry::stream) {
            self.stop_watching(stream);
        }
        self.arm_timer();
    }

    /// Works on both queues until nothing moves or it is the turn of others; then the events descriptor rings.
    pub fn process(&mut self, rings: &mut Rings<'_, '_>) -> Interrupts {
        let mut interrupts = Interrupts::default();
        for _ in 0..limits::ROUNDS {
            let from_guest = self.take_packets(rings, &mut interrupts.tx);
            let to_guest = self.give_packets(rings, &mut interrupts.rx);
            if !from_guest && !to_guest {
                self.arm_timer();
                return interrupts;
            }
        }
        self.ring();
        self.arm_timer();
        interrupts
    }

    /// Makes the events descriptor readable.
    pub fn ring(&self) {
        // The counter cannot overflow: it is read with every event. A failure would only delay work until the next event.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Resets a connection: the guest hears of it unless it is done with it, the host's stream is closed.
    fn reset(&mut self, token: Token) {
        if let Some(connection) = self.table.connection(token).filter(|connection| connection.phase() != Phase::Draining) {
            self.push_reset(connection.reset_header());
        }
        self.remove(token);
    }

    /// Ends a connection of the host that the guest has not accepted. A guest that was not even asked hears nothing: it could refuse to take
    /// buffers, and each program that tries and gives up would leave a reset behind.
    fn withdraw(&mut self, token: Token) {
        if self.table.connection(token).is_some_and(Connection::is_known_to_guest) {
            self.reset(token);
        } else {
            self.remove(token);
        }
    }

    /// Takes an entry out and closes its stream.
    fn remove(&mut self, token: Token) {
        if let Some(stream) = self.table.remove(token).as_ref().and_then(Entry::stream) {
            self.stop_watching(stream);
        }
    }

    fn push_reset(&mut self, header: Header) {
        self.statistics.resets += 1;
        self.resets.push_back(header);
    }

    /// After anything happened to a connection: its turn, epoll's interest, its end.
    fn settle(&mut self, token: Token) {
        let Some(connection) = self.table.connection_mut(token) else { return };
        let released = connection.release_stream();
        if !connection.is_of_use() {
            self.remove(token);
            return;
        }
        let (wants_guest, wants_writable, phase) = (connection.wants_guest(), connection.wants_writable(), connection.phase());
        if let Some(stream) = released {
            self.stop_watching(&stream);
        }
        if wants_guest {
            self.table.queue(token);
        }
        if self.table.writable_changes(token, wants_writable) {
            self.watch(token, wants_writable);
        }
        if phase == Phase::Closing && !self.table.has_deadline(token) {
            self.table.set_deadline(token, Some(Instant::now() + limits::CLOSE_TIMEOUT));
        }
    }
}

/// Writes the used ring for the finished chains of a batch and says whether the guest wants an interrupt for them.
///
/// Errors mean that the guest's ring lies outside its RAM: nothing can be told to it then, so they are passed over.
fn publish(memory: &GuestMemoryMmap, queue: &mut Queue, finished: &mut Vec<(u16, u32)>) -> bool {
    if finished.is_empty() {
        return false;
    }
    for (head, bytes) in finished.drain(..) {
        if queue.add_used(memory, head, bytes).is_err() {
            return false;
        }
    }
    queue.needs_notification(memory).unwrap_or(false)
}

/// Asks the guest for a kick at its next chain and says whether chains are there already.
///
/// A ring whose index makes no sense looks full and yields nothing: it has nothing more, or the device would ask for ever.
fn has_more(memory: &GuestMemoryMmap, queue: &mut Queue) -> bool {
    if !queue.enable_notification(memory).unwrap_or(false) {
        return false;
    }
    let waiting = queue.avail_idx(memory, Ordering::Acquire).map_or(0, |index| index.0.wrapping_sub(queue.next_avail()));
    waiting > 0 && waiting <= queue.size()
}
