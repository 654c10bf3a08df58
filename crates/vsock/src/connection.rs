//! One stream connection: its two directions, what each end knows, and the packets it owes the guest.
//!
//! A [`Connection`] knows its host stream and the credit of both sides; it does not know the other connections (`table`), the queues
//! (`device`) or time. Half-closes are mapped one to one: the guest's SHUTDOWN flags to `shutdown(2)` of the stream, the end of the
//! stream to SHUTDOWN flags. Source: virtio 1.3, section 5.10.6; `docs/vsock.md`, "Ends of a connection".

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use crate::backlog::Backlog;
use crate::chain::Segments;
use crate::credit::{ReceiveCredit, SendCredit};
use crate::guest_io;
use crate::limits;
use crate::packet::{HEADER_BYTES, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

/// What names a connection of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// The CID under which the guest addresses the host's end: packets to the guest carry it as their source.
    pub cid: u32,
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
}

/// The word with which a program of the host asks for a connection through the listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// `CONNECT`: the stream that asks becomes the host's end.
    Connect,
    /// `PREPARE`: the host's end comes over the stream that asks, once the guest has accepted.
    Prepare,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host asked, the guest has not answered.
    Requested {
        /// How a program asked that came through the listener and waits for the line `OK <port>`.
        word: Option<Word>,
    },
    /// The guest asked, and so did the router: the answer line of the host's end is awaited.
    Asking,
    /// Data may flow.
    Open,
    /// Both directions are over and the guest was told; its reset is awaited.
    Closing,
    /// The guest is done with it and its key is free; the host still gets what the guest sent.
    Draining,
}

/// The guest broke the protocol: its connection is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// An operation that does not fit the connection's phase, or none at all.
    Operation,
    /// More data than it has credit for.
    Overrun,
    /// Data after it said that none would follow.
    AfterShutdown,
}

/// What a packet of the guest meant for the connection as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It goes on.
    Goes,
    /// The guest has accepted it just now.
    Accepted {
        /// How the program asked that waits for a line.
        word: Option<Word>,
    },
    /// The guest has ended it; it awaits a reset as confirmation if `confirm`.
    Ended {
        /// Did the guest ask (shutdown of both directions) rather than tell (reset)?
        confirm: bool,
    },
}

/// What [`Connection::next_packet`] did with the buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Produced {
    /// Nothing to send after all; the buffer is untouched.
    Nothing,
    /// Data is there, but the guest's buffer has no room behind the header.
    BufferTooSmall,
    /// A header and so many bytes of payload.
    Packet(Header, usize),
}

/// A connection between the guest and one stream of the host.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    guest_cid: u32,
    phase: Phase,
    /// `None` once nothing can move on it any more, and while it is still to come.
    stream: Option<UnixStream>,
    /// While `stream` is still to come: the program's stream over which it comes. No data move on this one.
    prepared_over: Option<UnixStream>,
    receive: ReceiveCredit,
    send: SendCredit,
    backlog: Backlog,
    /// Will the guest send more data?
    guest_sends: bool,
    /// Does the guest take more data?
    guest_receives: bool,
    /// May more data come from the host's stream?
    host_sends: bool,
    /// Does the host's stream take more data?
    host_receives: bool,
    /// Has the write side of the stream been shut down?
    write_shut: bool,
    /// Is data (or the end) waiting in the host's stream, as far as we know?
    readable: bool,
    owes_request: bool,
    owes_response: bool,
    owes_credit_update: bool,
    owes_credit_request: bool,
    /// Was credit asked for since the guest's last packet?
    credit_requested: bool,
    /// Which shutdown flags was the guest told?
    told_shutdown: u32,
}

impl Connection {
    /// A connection that the guest asked for and the router has opened; it owes the guest a response.
    pub fn accepted(key: Key, guest_cid: u32, stream: UnixStream, buffer_bytes: u32, request: &Header) -> Self {
        let mut connection = Self::new(key, guest_cid, stream, buffer_bytes, Phase::Open);
        connection.send.update(request.buffer_bytes, request.forwarded);
        connection.owes_response = true;
        connection
    }

    /// A connection that the guest asked for and whose other end has been asked by the router.
    pub fn asking(key: Key, guest_cid: u32, stream: UnixStream, buffer_bytes: u32, request: &Header) -> Self {
        let mut connection = Self::new(key, guest_cid, stream, buffer_bytes, Phase::Asking);
        connection.send.update(request.buffer_bytes, request.forwarded);
        connection
    }

    /// The other end of an asking connection has said yes; it owes the guest a response.
    pub fn answered(&mut self) {
        self.phase = Phase::Open;
        self.owes_response = true;
    }

    /// A connection that the host asks for; it owes the guest a request.
    pub fn requested(key: Key, guest_cid: u32, stream: UnixStream, buffer_bytes: u32, word: Option<Word>) -> Self {
        let mut connection = Self::new(key, guest_cid, stream, buffer_bytes, Phase::Requested { word });
        connection.owes_request = true;
        connection
    }

    fn new(key: Key, guest_cid: u32, stream: UnixStream, buffer_bytes: u32, phase: Phase) -> Self {
        Self {
            key,
            guest_cid,
            phase,
            stream: Some(stream),
            prepared_over: None,
            receive: ReceiveCredit::new(buffer_bytes),
            send: SendCredit::default(),
            backlog: Backlog::default(),
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            host_receives: true,
            write_shut: false,
            readable: false,
            owes_request: false,
            owes_response: false,
            owes_credit_update: false,
            owes_credit_request: false,
            credit_requested: false,
            told_shutdown: 0,
        }
    }

    /// What names it.
    pub fn key(&self) -> Key {
        self.key
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest asked for it or has been asked.
    pub fn is_known_to_guest(&self) -> bool {
        !self.owes_request
    }

    /// The host's stream, while anything may still move on it; the one over which it comes, while it is still to come.
    pub fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref().or(self.prepared_over.as_ref())
    }

    /// Whether the guest has accepted it and the host's end is still to come.
    pub fn awaits_stream(&self) -> bool {
        self.prepared_over.is_some()
    }

    /// The host's end has come: it gets everything that the guest did meanwhile.
    pub fn hand(&mut self, stream: UnixStream) {
        self.prepared_over = None;
        self.stream = Some(stream);
        if !self.guest_receives {
            self.shut(Shutdown::Read);
        }
        self.flush();
    }

    /// What was promised to the guest, in bytes.
    pub fn buffer_bytes(&self) -> u32 {
        self.receive.buffer_bytes()
    }

    /// Bytes of the guest that wait for the host.
    pub fn backlog_bytes(&self) -> usize {
        self.backlog.len()
    }

    /// A reset of this connection for the guest.
    pub fn reset_header(&self) -> Header {
        Header { socket_type: TYPE_STREAM, ..self.header(Operation::Reset) }
    }

    fn header(&self, operation: Operation) -> Header {
        Header {
            source_cid: u64::from(self.key.cid),
            destination_cid: u64::from(self.guest_cid),
            source_port: self.key.host_port,
            destination_port: self.key.guest_port,
            socket_type: TYPE_STREAM,
            operation: operation as u16,
            ..Header::default()
        }
    }

    /// Takes in a packet of the guest whose payload (checked to be there) lies in `segments` behind the header.
    ///
    /// # Errors
    ///
    /// [`Violation`]: the caller resets the connection.
    pub fn on_packet(&mut self, header: &Header, segments: &Segments<'_>) -> Result<Progress, Violation> {
        let operation = Operation::from_wire(header.operation).ok_or(Violation::Operation)?;
        if operation == Operation::Reset {
            return Ok(Progress::Ended { confirm: false });
        }
        self.send.update(header.buffer_bytes, header.forwarded);
        self.credit_requested = false;
        match (operation, self.phase) {
            (Operation::Response, Phase::Requested { word }) if !self.owes_request => {
                self.phase = Phase::Open;
                self.readable = true; // its edge may have come while nobody was to read
                if word == Some(Word::Prepare) {
                    self.prepared_over = self.stream.take();
                }
                Ok(Progress::Accepted { word })
            }
            (_, Phase::Requested { .. } | Phase::Asking) | (Operation::Request | Operation::Response, _) => Err(Violation::Operation),
            (Operation::Shutdown, _) => Ok(self.on_shutdown(header.flags)),
            (Operation::ReadWrite, _) => self.on_data(header.length, segments).map(|()| Progress::Goes),
            (Operation::CreditRequest, _) => {
                self.owes_credit_update = true;
                Ok(Progress::Goes)
            }
            (Operation::CreditUpdate | Operation::Reset, _) => Ok(Progress::Goes),
        }
    }

    fn on_shutdown(&mut self, flags: u32) -> Progress {
        if flags & SHUTDOWN_RECEIVE != 0 && self.guest_receives {
            self.guest_receives = false;
            self.shut(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
            self.settle();
        }
        if self.guest_sends || self.guest_receives { Progress::Goes } else { Progress::Ended { confirm: true } }
    }

    fn on_data(&mut self, length: u32, segments: &Segments<'_>) -> Result<(), Violation> {
        if !self.guest_sends {
            return Err(Violation::AfterShutdown);
        }
        self.receive.receive(length).map_err(|_| Violation::Overrun)?;
        let bytes = usize::try_from(length).map_err(|_| Violation::Overrun)?;
        let mut sent = 0;
        let direct = self.stream.as_ref().filter(|_| self.backlog.is_empty() && self.host_receives && bytes > 0);
        if let Some(stream) = direct {
            match guest_io::send(stream.as_fd(), segments, HEADER_BYTES, bytes) {
                Ok(count) => sent = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.host_stopped_receiving(),
            }
        }
        self.forwarded(sent);
        if !self.host_receives || self.stream().is_none() {
            self.forwarded(bytes - sent); // nobody takes it: thrown away, as a kernel does with data for a closed socket
        } else if sent < bytes {
            let limit = usize::try_from(self.receive.buffer_bytes()).unwrap_or(usize::MAX);
            self.backlog.append(segments, HEADER_BYTES + sent, bytes - sent, limit);
        }
        Ok(())
    }

    /// Notes that `bytes` left our buffer, and whether the guest is to hear of it.
    fn forwarded(&mut self, bytes: usize) {
        self.receive.forward(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.owes_credit_update |= self.guest_sends && self.phase == Phase::Open && self.receive.news_due();
    }

    fn host_stopped_receiving(&mut self) {
        self.host_receives = false;
        let bytes = self.backlog.len();
        self.backlog.clear();
        self.forwarded(bytes);
    }

    /// Takes in what epoll says about the stream.
    pub fn on_host_event(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        if hung_up {
            self.host_stopped_receiving();
        } else if writable {
            self.flush();
        }
    }

    /// Moves waiting data of the guest to the host.
    fn flush(&mut self) {
        let Some(stream) = &self.stream else { return };
        match self.backlog.flush(stream.as_fd()) {
            Ok(sent) => self.forwarded(sent),
            Err(_) => self.host_stopped_receiving(),
        }
        self.settle();
    }

    /// Ends the write side of the stream once the guest's last byte went.
    fn settle(&mut self) {
        if !self.guest_sends && self.backlog.is_empty() && !self.write_shut && self.stream.is_some() {
            self.write_shut = true;
            self.shut(Shutdown::Write);
        }
    }

    fn shut(&self, how: Shutdown) {
        if let Some(stream) = &self.stream {
            // The only failure is that the other end is gone already, which is what was to be achieved.
            let _ = stream.shutdown(how);
        }
    }

    /// Whether epoll should tell when the stream takes data again.
    pub fn wants_writable(&self) -> bool {
        !self.backlog.is_empty() && self.stream.is_some()
    }

    /// Whether a packet for the guest is due now.
    pub fn wants_guest(&self) -> bool {
        match self.phase {
            Phase::Requested { .. } => self.owes_request,
            Phase::Asking | Phase::Draining => false,
            Phase::Open | Phase::Closing => {
                self.owes_response || self.owes_credit_update || self.owes_credit_request || self.owed_shutdown() != 0 || self.may_read()
            }
        }
    }

    /// Whether the stream is to be read: data or its end may be there, and the guest may take it. The end needs no credit, but it cannot be
    /// told from data without reading.
    fn may_read(&self) -> bool {
        self.readable && self.host_sends && self.stream.is_some() && (self.send.available() > 0 || !self.credit_requested)
    }

    fn owed_shutdown(&self) -> u32 {
        let mut flags = 0;
        if !self.host_sends {
            flags |= SHUTDOWN_SEND;
        }
        // With both senders silent the connection is over: tell the guest both, so that it lets go.
        if !self.host_receives || (!self.host_sends && !self.guest_sends) {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.told_shutdown
    }

    /// Produces the next packet for the guest; data goes straight into `segments` behind the place of the header.
    ///
    /// `segments` has room for a header at least.
    pub fn next_packet(&mut self, segments: &Segments<'_>) -> Produced {
        if std::mem::take(&mut self.owes_request) {
            return self.packet(Operation::Request, 0, 0);
        }
        if matches!(self.phase, Phase::Requested { .. } | Phase::Asking | Phase::Draining) {
            return Produced::Nothing;
        }
        if std::mem::take(&mut self.owes_response) {
            return self.packet(Operation::Response, 0, 0);
        }
        if self.may_read() {
            match self.read(segments) {
                Produced::Nothing => {}
                produced => return produced,
            }
        }
        let flags = self.owed_shutdown();
        if flags != 0 {
            self.told_shutdown |= flags;
            if self.told_shutdown == SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
                self.phase = Phase::Closing;
            }
            return self.packet(Operation::Shutdown, self.told_shutdown, 0);
        }
        if self.owes_credit_update {
            return self.packet(Operation::CreditUpdate, 0, 0);
        }
        if std::mem::take(&mut self.owes_credit_request) {
            return self.packet(Operation::CreditRequest, 0, 0);
        }
        Produced::Nothing
    }

    /// Reads the stream into the guest's buffer.
    fn read(&mut self, segments: &Segments<'_>) -> Produced {
        let Some(stream) = &self.stream else { return Produced::Nothing };
        let credit = usize::try_from(self.send.available()).unwrap_or(usize::MAX);
        if credit == 0 {
            self.credit_requested = true;
            self.owes_credit_request = true;
            return Produced::Nothing;
        }
        let room = segments.bytes().saturating_sub(HEADER_BYTES).min(limits::PACKET_BYTES);
        if room == 0 {
            return Produced::BufferTooSmall;
        }
        match guest_io::receive(stream.as_fd(), segments, HEADER_BYTES, room.min(credit)) {
            Ok(0) => self.host_sends = false,
            Ok(bytes) => {
                self.send.send(u32::try_from(bytes).unwrap_or(u32::MAX));
                return self.packet(Operation::ReadWrite, 0, bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.host_sends = false;
                self.host_stopped_receiving();
            }
        }
        Produced::Nothing
    }

    fn packet(&mut self, operation: Operation, flags: u32, payload: usize) -> Produced {
        self.owes_credit_update = false; // every packet carries the news
        let header = Header {
            length: u32::try_from(payload).unwrap_or(u32::MAX),
            flags,
            buffer_bytes: self.receive.buffer_bytes(),
            forwarded: self.receive.tell(),
            ..self.header(operation)
        };
        Produced::Packet(header, payload)
    }

    /// The guest lets go: from now on only the host is served, with what waits for it. `false` if nothing does.
    pub fn drain(&mut self) -> bool {
        self.guest_sends = false;
        self.guest_receives = false;
        self.phase = Phase::Draining;
        self.settle();
        self.is_of_use()
    }

    /// Whether a draining connection still has something to deliver, if only the end to a stream that is still to come.
    pub fn is_of_use(&self) -> bool {
        self.phase != Phase::Draining || self.prepared_over.is_some() || (!self.backlog.is_empty() && self.host_receives)
    }

    /// The stream of a closing connection that has delivered everything: it is to be closed.
    pub fn release_stream(&mut self) -> Option<UnixStream> {
        self.stream.take_if(|_| self.phase == Phase::Closing && self.backlog.is_empty())
    }
}
