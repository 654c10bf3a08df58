//! The TX queue: what the guest sends.
//!
//! Order of checks per chain: shape, header, source, socket type, destination, connection. Each has its own answer, listed in
//! `docs/vsock.md`, "What is refused".

use std::time::Instant;

use virtio_queue::QueueT;

use super::{Device, HOST_CID, PARENT_CID, Rings, has_more, publish};
use crate::chain::{Direction, Segments};
use crate::connection::{Connection, Key, Phase, Progress};
use crate::limits;
use crate::packet::{HEADER_BYTES, Header, Operation, TYPE_STREAM};
use crate::router::{ConnectRequest, Route};
use crate::table::{Entry, Token};

impl Device {
    /// Takes a batch of packets; `true` if there may be more.
    pub(super) fn take_packets(&mut self, rings: &mut Rings<'_, '_>, interrupt: &mut bool) -> bool {
        let memory = rings.memory;
        let mut segments = Segments::new();
        let mut finished = Vec::with_capacity(limits::BATCH);
        // Failing to write a wish into the guest's ring costs kicks that are not needed, or none where the ring is not in RAM: nothing is lost.
        let _ = rings.tx.disable_notification(memory);
        let mut more = true;
        while finished.len() < limits::BATCH {
            if self.resets.len() >= limits::RESETS_QUEUED {
                // Answers find no room: the guest has to take some before it may send on (virtio 1.3, 5.10.6.1.1). Its RX kick resumes this.
                more = false;
                break;
            }
            let Some(chain) = rings.tx.pop_descriptor_chain(memory) else {
                more = has_more(memory, rings.tx);
                break;
            };
            let head = chain.head_index();
            let shape = segments.fill(memory, chain, Direction::FromGuest);
            if shape.is_err() {
                self.statistics.malformed += 1;
            }
            self.take_packet(&segments, shape.is_ok());
            finished.push((head, 0));
        }
        *interrupt |= publish(memory, rings.tx, &mut finished);
        more
    }

    /// Takes one packet; `well_formed` says whether its chain kept the rules.
    fn take_packet(&mut self, segments: &Segments<'_>, well_formed: bool) {
        let Some(header) = segments.read_header().map(|bytes| Header::from_bytes(&bytes)) else { return };
        if header.source_cid != u64::from(self.guest_cid) {
            tracing::debug!(cid = header.source_cid, "A packet with a foreign source CID is dropped.");
            return;
        }
        let Some(key) = self.key_of(&header) else { return self.refuse(&header) };
        let data = header.operation == Operation::ReadWrite as u16;
        let payload_is_there = usize::try_from(header.length).is_ok_and(|length| length <= segments.bytes() - HEADER_BYTES);
        let acceptable = well_formed && (payload_is_there || !data);
        if !acceptable {
            tracing::debug!(?key, "A malformed packet resets its connection.");
        }
        match self.table.find(key) {
            None if acceptable && header.operation == Operation::Request as u16 => self.open(key, &header),
            None => self.refuse(&header),
            Some(token) if !acceptable => self.reset(token),
            Some(token) => {
                if data {
                    self.statistics.bytes_from_guest += u64::from(header.length);
                }
                let Some(connection) = self.table.connection_mut(token) else { return };
                match connection.on_packet(&header, segments) {
                    Ok(Progress::Goes) => {}
                    Ok(Progress::Accepted { word }) => self.accepted(token, word),
                    Ok(Progress::Ended { confirm }) => self.ended(token, confirm),
                    Err(violation) => {
                        tracing::debug!(?key, ?violation, "The guest broke the protocol; its connection is reset.");
                        return self.reset(token);
                    }
                }
                self.settle(token);
            }
        }
    }

    /// The name of the connection that a packet means, if this device serves its socket type and destination.
    fn key_of(&self, header: &Header) -> Option<Key> {
        let cid = u32::try_from(header.destination_cid).ok()?;
        let served = if self.guest_cid == PARENT_CID {
            // A parent VM reaches its enclaves, their consoles (CID 0) and its own host (2); not itself and not the loopback.
            cid != 1 && cid != PARENT_CID && cid != u32::MAX
        } else {
            cid == PARENT_CID || cid == HOST_CID
        };
        (served && header.socket_type == TYPE_STREAM).then_some(Key {
            cid,
            host_port: header.destination_port,
            guest_port: header.source_port,
        })
    }

    /// Answers with a reset, unless the packet is one itself.
    fn refuse(&mut self, header: &Header) {
        if header.operation == Operation::Reset as u16 {
            return;
        }
        if header.operation == Operation::Request as u16 {
            self.statistics.refused += 1;
        }
        self.push_reset(header.reset());
    }

    /// Asks the router for the host's end of a new connection.
    fn open(&mut self, key: Key, header: &Header) {
        if !self.table.has_room() {
            tracing::warn!(guest_cid = self.guest_cid, limit = limits::CONNECTIONS, "Too many connections; a new one is refused.");
            return self.refuse(header);
        }
        let cid = if self.guest_cid != PARENT_CID && key.cid == HOST_CID { PARENT_CID } else { key.cid };
        let route = match self.router.connect(ConnectRequest { source_port: key.guest_port, cid, port: key.host_port }) {
            Ok(route) => route,
            Err(error) => {
                tracing::debug!(?key, %error, "The host refuses a connection of the guest.");
                return self.refuse(header);
            }
        };
        let buffer_bytes = self.table.buffer_for_next();
        let (connection, deadline) = match route {
            Route::Connected(stream) => (Connection::accepted(key, self.guest_cid, stream, buffer_bytes, header), None),
            Route::Asking(stream) => {
                let deadline = Instant::now() + limits::ASKING_TIMEOUT;
                (Connection::asking(key, self.guest_cid, stream, buffer_bytes, header), Some(deadline))
            }
        };
        let Some(token) = self.table.insert(Entry::Connection(Box::new(connection))) else { return self.refuse(header) };
        if let Err(error) = self.begin_watching(token) {
            tracing::warn!(?key, %error, "A connection cannot be watched and is reset.");
            return self.reset(token);
        }
        self.table.set_deadline(token, deadline);
        self.statistics.accepted += u64::from(deadline.is_none()); // one that asks is counted when it is answered
        self.settle(token);
    }

    /// The guest ended a connection; the host still gets what the guest sent before.
    fn ended(&mut self, token: Token, confirm: bool) {
        let Some(connection) = self.table.connection_mut(token) else { return };
        let header = connection.reset_header();
        if matches!(connection.phase(), Phase::Requested { .. } | Phase::Asking) {
            self.statistics.refused += 1;
        }
        let (drains, awaits_stream) = (connection.drain(), connection.awaits_stream());
        self.table.forget_key(token);
        if !awaits_stream {
            self.table.set_deadline(token, None);
        }
        if confirm {
            self.push_reset(header);
        }
        if !drains {
            self.remove(token);
        }
    }
}
