//! The virtio-nsm queue: finding requests and room for their responses in guest memory, and giving both back.
//!
//! Linux `drivers/misc/nsm.c` posts a request and the room for its response as two chains with one kick, and reads both used
//! entries at the first interrupt; so both are returned, the request first, before anybody is interrupted. [`Exchange`] pairs
//! them. It also takes a chain that holds both, several requests in flight, and every broken shape a guest can write: what cannot
//! be used is given back with length 0. Queue rules: virtio 1.2 section 2.7; docs/nsm.md, "The device".

use crate::module::Module;
use crate::request::{self, Request};
use crate::response::{self, ErrorCode};
use std::collections::VecDeque;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// The largest queue (descriptors) that a driver may set up; QEMU's device has 64.
pub const MAX_SIZE: u16 = 256;

/// Why a queue cannot be used any more until the driver sets it up again.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum QueueError {
    /// The guest's queue is broken and rests until the guest resets the device: {0}.
    Broken(virtio_queue::Error),
    /// The guest's queue is broken and rests until the guest resets the device: its available ring cannot be read.
    Unreadable,
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Broken(error)
    }
}

/// What one look at the queue did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Progress {
    /// Was anything put into the used ring, so that the guest wants an interrupt?
    pub used: bool,
    /// Is more waiting in the queue? Look again soon, but do something else first.
    pub more: bool,
}

type Decoded = Result<Request, ErrorCode>;

/// A request whose room has not come yet.
#[derive(Debug)]
struct Asked {
    head: u16,
    request: Decoded,
}

/// Room for a response: where in guest memory, at most [`response::MAX_BYTES`] altogether.
///
/// The addresses are the guest's word and are checked when something is written to them.
#[derive(Debug)]
struct Room {
    head: u16,
    segments: Vec<(GuestAddress, usize)>,
}

/// A request with its room.
#[derive(Debug)]
struct Pair {
    /// The chain of the request, when it is not that of the room.
    request_head: Option<u16>,
    request: Decoded,
    room: Room,
}

/// What a queue still owes the guest. Every list is bounded by the queue's size, whatever the guest does.
#[derive(Debug, Default)]
pub struct Exchange {
    asked: VecDeque<Asked>,
    rooms: VecDeque<Room>,
    /// Pairs that need the module's identity, in the order of the guest.
    waiting: VecDeque<Pair>,
}

impl Exchange {
    /// Forgets everything: the driver set the queue up anew.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Takes what the guest has made available, at most one queue full, and answers what can be answered.
    ///
    /// Call it after a kick, after the queue was started, and after [`Module::identify`]. The caller interrupts the guest.
    ///
    /// # Errors
    ///
    /// [`QueueError`] when the rings themselves are wrong; the queue must not be looked at again before it was set up anew.
    pub fn advance(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap, module: &mut Module) -> Result<Progress, QueueError> {
        let mut work = Work { queue, memory, module, used: false };
        if work.module.is_identified() {
            while let Some(pair) = self.waiting.pop_front() {
                work.complete(pair)?;
            }
        }
        work.queue.disable_notification(memory)?;
        let mut taken = 0;
        while taken < work.queue.size() {
            let Some(chain) = work.queue.iter(memory)?.next() else { break };
            taken += 1;
            let chain = Chain::read(chain.head_index(), chain, memory);
            self.take(chain, &mut work)?;
        }
        let more = work.queue.enable_notification(memory)?;
        if more && taken == 0 {
            return Err(QueueError::Unreadable);
        }
        Ok(Progress { used: work.used, more })
    }

    fn take(&mut self, chain: Chain, work: &mut Work<'_>) -> Result<(), QueueError> {
        let limit = usize::from(work.queue.size());
        let Chain { head, request, room } = chain;
        match (request, room) {
            (Some(request), Some(room)) => return self.pair(Pair { request_head: None, request, room }, work),
            (Some(request), None) if self.asked.len() < limit => self.asked.push_back(Asked { head, request }),
            (None, Some(room)) if self.rooms.len() < limit => self.rooms.push_back(room),
            // Nothing in it, or the guest made the same descriptors available again and again.
            _ => return work.give_back(head, 0),
        }
        while !self.asked.is_empty() && !self.rooms.is_empty() {
            let (Some(Asked { head, request }), Some(room)) = (self.asked.pop_front(), self.rooms.pop_front()) else { break };
            self.pair(Pair { request_head: Some(head), request, room }, work)?;
        }
        Ok(())
    }

    fn pair(&mut self, mut pair: Pair, work: &mut Work<'_>) -> Result<(), QueueError> {
        if !work.module.is_identified() && pair.request.as_ref().is_ok_and(Request::concerns_registers) {
            if self.waiting.len() < usize::from(work.queue.size()) {
                self.waiting.push_back(pair);
                return Ok(());
            }
            pair.request = Err(ErrorCode::InternalError);
        }
        work.complete(pair)
    }
}

/// One look at the queue, with everything it needs.
struct Work<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemoryMmap,
    module: &'a mut Module,
    used: bool,
}

impl Work<'_> {
    fn complete(&mut self, pair: Pair) -> Result<(), QueueError> {
        let response = self.module.answer_decoded(pair.request);
        let written = pair.room.write(&response, self.memory);
        if let Some(head) = pair.request_head {
            self.give_back(head, 0)?;
        }
        self.give_back(pair.room.head, written)
    }

    fn give_back(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        match self.queue.add_used(self.memory, head, written) {
            Ok(()) => self.used = true,
            // A head beyond the table: there is nothing that could be given back.
            Err(virtio_queue::Error::InvalidDescriptorIndex) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// One chain, read once: what the guest writes into it later has no effect.
struct Chain {
    head: u16,
    /// The readable part, if there is one.
    request: Option<Decoded>,
    /// The writable part, if there is one.
    room: Option<Room>,
}

impl Chain {
    fn read(head: u16, descriptors: impl Iterator<Item = Descriptor>, memory: &GuestMemoryMmap) -> Self {
        let mut bytes: Option<Result<Vec<u8>, ErrorCode>> = None;
        let mut segments: Option<Vec<(GuestAddress, usize)>> = None;
        let mut free = response::MAX_BYTES;
        for descriptor in descriptors {
            let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            if descriptor.is_write_only() {
                let segments = segments.get_or_insert_default();
                let length = length.min(free);
                if length > 0 {
                    free -= length;
                    segments.push((descriptor.addr(), length));
                }
            } else {
                let so_far = bytes.take().unwrap_or_else(|| Ok(Vec::new()));
                bytes = Some(so_far.and_then(|bytes| append(bytes, descriptor.addr(), length, memory)));
            }
        }
        let request = bytes.map(|bytes| bytes.and_then(|bytes| request::decode(&bytes)));
        Self { head, request, room: segments.map(|segments| Room { head, segments }) }
    }
}

/// Reads `length` bytes behind `bytes`, but never more than one byte beyond the longest request.
fn append(mut bytes: Vec<u8>, address: GuestAddress, length: usize, memory: &GuestMemoryMmap) -> Result<Vec<u8>, ErrorCode> {
    let old = bytes.len();
    let wanted = length.min((request::MAX_BYTES + 1).saturating_sub(old));
    bytes.resize(old + wanted, 0);
    let fresh = bytes.get_mut(old..).ok_or(ErrorCode::InternalError)?;
    memory.read_slice(fresh, address).map_err(|_| ErrorCode::InvalidArgument)?;
    Ok(bytes)
}

impl Room {
    /// Writes as much of `response` as there is room for; returns how many bytes, 0 if an address is not guest memory.
    fn write(&self, response: &[u8], memory: &GuestMemoryMmap) -> u32 {
        let mut rest = response;
        for (address, length) in &self.segments {
            let Some((now, later)) = rest.split_at_checked((*length).min(rest.len())) else { break };
            if memory.write_slice(now, *address).is_err() {
                return 0;
            }
            rest = later;
        }
        u32::try_from(response.len() - rest.len()).unwrap_or(0)
    }
}
