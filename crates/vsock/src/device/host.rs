//! The host's side: streams and what epoll says of them, the listener with its handshake, connections that the host opens, and time.
//!
//! Streams are watched edge by edge: reading is always of interest, writing only while data waits. So a connection whose guest is slow costs
//! no wake-ups but those of its own writer.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{Device, HOST_CID, PARENT_CID};
use crate::connection::{Connection, Key, Phase, Word};
use crate::limits;
use crate::table::{Entry, Token};

/// Names in epoll that are no [`Token`]: a token's low half is below [`limits::CONNECTIONS`].
pub(super) const LISTENER: u64 = u64::MAX;
pub(super) const WAKE: u64 = u64::MAX - 1;
pub(super) const TIMER: u64 = u64::MAX - 2;

/// Host ports for connections that come without one: from here up to [`LAST_PORT`], then from the start again.
pub(super) const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = u32::MAX - 1;

/// Events per look at epoll; more wait for the next look, so that the queues get their turn.
const EVENTS: usize = 256;

const STREAM_EVENTS: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

impl Device {
    /// Takes in everything that epoll has now; [`process`](Self::process) is to follow.
    pub fn host_events(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Err(error) = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&at_once)) {
            if error != rustix::io::Errno::INTR {
                tracing::error!(%error, "Waiting for events failed.");
            }
            return;
        }
        for event in events {
            let (name, flags) = (event.data.u64(), event.flags);
            match name {
                LISTENER => self.accept_programs(),
                WAKE => drain_counter(&self.wake),
                TIMER => {
                    drain_counter(&self.timer);
                    self.timer_at = None;
                    self.expire(Instant::now());
                }
                token => self.stream_event(Token(token), flags),
            }
        }
        self.arm_timer();
    }

    fn stream_event(&mut self, token: Token, flags: EventFlags) {
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        match self.table.entry(token) {
            None => {}
            Some(Entry::Handshake(_)) => self.handshake(token, flags),
            Some(Entry::Connection(connection)) if connection.phase() == Phase::Asking => self.answer(token, flags),
            Some(Entry::Connection(connection)) if connection.awaits_stream() => self.take_stream(token),
            Some(Entry::Connection(connection)) if hung_up && matches!(connection.phase(), Phase::Requested { .. }) => {
                self.withdraw(token); // nobody waits for the guest's answer any more
            }
            Some(Entry::Connection(_)) => self.take_event(token, flags),
        }
    }

    fn take_event(&mut self, token: Token, flags: EventFlags) {
        if let Some(connection) = self.table.connection_mut(token) {
            let readable = flags.intersects(EventFlags::IN | EventFlags::RDHUP);
            let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
            connection.on_host_event(readable, flags.contains(EventFlags::OUT), hung_up);
        }
        self.settle(token);
    }

    /// Reads the line with which the other end answers the router, if it is there by now.
    fn answer(&mut self, token: Token, flags: EventFlags) {
        let Some(stream) = self.table.entry(token).and_then(Entry::stream) else { return };
        match read_line(stream, flags, |line| parse_line(line, "OK ")) {
            Sent::NotYet => {}
            Sent::Whole(_) => {
                self.statistics.accepted += 1;
                self.table.set_deadline(token, None);
                if let Some(connection) = self.table.connection_mut(token) {
                    connection.answered();
                }
                self.take_event(token, flags); // what lies behind the line came with it, and so may the end have
            }
            Sent::Junk => {
                tracing::debug!("The other end of a guest's connection did not answer `OK <number>`; it is reset.");
                self.statistics.refused += 1;
                self.reset(token);
            }
        }
    }

    /// Registers a new entry's stream with epoll.
    pub(super) fn begin_watching(&mut self, token: Token) -> io::Result<()> {
        match self.table.entry(token).and_then(Entry::stream) {
            Some(stream) => Ok(epoll::add(&self.epoll, stream, EventData::new_u64(token.0), STREAM_EVENTS)?),
            None => Ok(()),
        }
    }

    /// Takes a stream out of epoll. Closing it is not enough: epoll keeps it as long as any other process has it open.
    pub(super) fn stop_watching(&self, stream: &UnixStream) {
        let _ = epoll::delete(&self.epoll, stream); // fails only for one that is not there
    }

    /// Tells epoll whether writability is of interest.
    pub(super) fn watch(&mut self, token: Token, writable: bool) {
        let Some(stream) = self.table.entry(token).and_then(Entry::stream) else { return };
        let flags = if writable { STREAM_EVENTS | EventFlags::OUT } else { STREAM_EVENTS };
        if let Err(error) = epoll::modify(&self.epoll, stream, EventData::new_u64(token.0), flags) {
            tracing::warn!(%error, "A connection cannot be watched any more and is reset.");
            self.reset(token);
        }
    }

    fn accept_programs(&mut self) {
        self.accept_again = None;
        loop {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) => self.begin_handshake(stream),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "A program cannot be accepted; trying again shortly. Raise the limit of open files (ulimit -n).");
                    self.accept_again = Some(Instant::now() + limits::ACCEPT_RETRY);
                    return;
                }
            }
        }
    }

    /// Takes in the stream of a program that came to the listener.
    pub fn begin_handshake(&mut self, stream: UnixStream) {
        if !self.running {
            return; // no driver, so nobody to talk to: the program sees the end at once
        }
        let Some(token) = self.table.insert(Entry::Handshake(stream)) else {
            tracing::warn!(
                guest_cid = self.guest_cid,
                limit = limits::CONNECTIONS,
                "Too many connections; a program of the host is turned away."
            );
            return;
        };
        self.table.set_deadline(token, Some(Instant::now() + limits::HANDSHAKE_TIMEOUT));
        if self.begin_watching(token).is_err() {
            self.remove(token);
        }
    }

    /// Reads the line of a program, if it is there by now.
    fn handshake(&mut self, token: Token, flags: EventFlags) {
        let Some(Entry::Handshake(stream)) = self.table.entry(token) else { return };
        match read_line(stream, flags, parse_request) {
            Sent::NotYet => {}
            Sent::Junk => {
                tracing::debug!("A program of the host did not send `CONNECT <port>` or `PREPARE <port>`; its connection is closed.");
                self.remove(token);
            }
            Sent::Whole((word, port)) => {
                let default = (if self.guest_cid == PARENT_CID { HOST_CID } else { PARENT_CID }, 0);
                let source = self.peer.as_ref().and_then(|peer| peer(stream)).unwrap_or(default);
                let Some(Entry::Handshake(stream)) = self.table.remove(token) else { return };
                self.stop_watching(&stream); // it is registered under the old token; the same descriptor cannot be added twice
                if let Err(error) = self.open_to_guest(stream, source, port, Some(word)) {
                    tracing::debug!(?source, port, %error, "A connection to the guest cannot be opened.");
                }
            }
        }
    }

    /// Connects a stream of the host to a port of the guest.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a source CID that the guest may not see; `AddrInUse` for a pair of ports in use; `NotConnected` while the guest's
    /// driver does not run; `QuotaExceeded` at the limit of connections; what epoll says.
    pub fn connect(&mut self, stream: UnixStream, source: (u32, u32), port: u32) -> io::Result<()> {
        self.open_to_guest(stream, source, port, None)?;
        self.ring();
        Ok(())
    }

    /// Begins a connection to the guest; port 0 of the source stands for a free one. `word`: how a program asked that waits for a line.
    fn open_to_guest(&mut self, stream: UnixStream, source: (u32, u32), port: u32, word: Option<Word>) -> io::Result<()> {
        let (cid, host_port) = source;
        let allowed = if self.guest_cid == PARENT_CID {
            cid != 1 && cid != PARENT_CID && cid != u32::MAX
        } else {
            cid == PARENT_CID || cid == HOST_CID
        };
        if !allowed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("CID {cid} cannot be the source of a connection to this guest."),
            ));
        }
        if !self.running {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "The guest's vsock driver does not run (yet)."));
        }
        let host_port = match host_port {
            0 => self.free_port(cid, port).ok_or(io::ErrorKind::AddrInUse)?,
            given => given,
        };
        let key = Key { cid, host_port, guest_port: port };
        if self.table.find(key).is_some() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let connection = Connection::requested(key, self.guest_cid, stream, self.table.buffer_for_next(), word);
        let token = self.table.insert(Entry::Connection(Box::new(connection))).ok_or(io::ErrorKind::QuotaExceeded)?;
        if let Err(error) = self.begin_watching(token) {
            self.remove(token);
            return Err(error);
        }
        self.table.set_deadline(token, Some(Instant::now() + limits::REQUEST_TIMEOUT));
        self.table.queue(token);
        Ok(())
    }

    /// A port of the host that is free towards `guest_port`. Ports are given in turn, so that one is not reused soon.
    fn free_port(&mut self, cid: u32, guest_port: u32) -> Option<u32> {
        // One more candidate than there can be connections: one of them is free.
        for _ in 0..=limits::CONNECTIONS {
            let host_port = self.next_port;
            self.next_port = if host_port >= LAST_PORT { FIRST_PORT } else { host_port + 1 };
            if self.table.find(Key { cid, host_port, guest_port }).is_none() {
                return Some(host_port);
            }
        }
        None
    }

    /// The guest accepted a connection that the host asked for.
    pub(super) fn accepted(&mut self, token: Token, word: Option<Word>) {
        self.statistics.accepted += 1;
        self.table.set_deadline(token, None);
        let Some(word) = word else { return };
        let Some(connection) = self.table.connection(token) else { return };
        let (line, stream) = (format!("OK {}\n", connection.key().host_port), connection.stream());
        let sent = stream.map(|stream| send(stream, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
        if sent != Some(Ok(line.len())) {
            // The stream is new and empty, so only a program that has gone away does not take 15 bytes.
            return self.reset(token);
        }
        if word == Word::Prepare {
            self.table.set_deadline(token, Some(Instant::now() + limits::HANDSHAKE_TIMEOUT));
            self.take_stream(token); // its edge may have come before
        }
    }

    /// Ends what took too long.
    pub fn expire(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept_programs();
        }
        while let Some(token) = self.table.expired(now) {
            match self.table.connection(token).map(Connection::phase) {
                Some(Phase::Requested { .. } | Phase::Asking) => {
                    self.statistics.refused += 1;
                    self.withdraw(token);
                }
                // A guest that does not confirm an end has been told all; it is forgotten without a word, so that a program there can still
                // read what came before.
                Some(Phase::Closing) => {
                    let drains = self.table.connection_mut(token).is_some_and(Connection::drain);
                    self.table.forget_key(token);
                    if !drains {
                        self.remove(token);
                    }
                }
                // Of these only those have a deadline whose host's end is still to come.
                Some(Phase::Open | Phase::Draining) => self.reset(token),
                None => self.remove(token),
            }
        }
    }

    /// Sets the timer to the next deadline, if it is set to another time.
    pub(super) fn arm_timer(&mut self) {
        use rustix::time::{Itimerspec, TimerfdTimerFlags, timerfd_settime};
        let next = [self.table.next_deadline(), self.accept_again].into_iter().flatten().min();
        // A timer that rings too early does no harm: a deadline that went away leaves it as it is.
        if next.is_none() || (self.timer_at.is_some() && self.timer_at <= next) {
            return;
        }
        let Some(next) = next else { return };
        let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = rustix::time::Timespec::try_from(wait).unwrap_or(zero);
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: zero, it_value: value }) {
            Ok(_) => self.timer_at = Some(next),
            Err(error) => tracing::error!(%error, "A timer cannot be set; slow connections are not timed out."),
        }
    }
}

/// What the other end is to send, as far as it came.
pub(super) enum Sent<T> {
    NotYet,
    Whole(T),
    Junk,
}

/// Takes a line off the stream that `parse` knows, and not a byte behind it: those are data already. `flags` are what epoll says, since the
/// rest of a line does not come after the end.
fn read_line<T>(stream: &UnixStream, flags: EventFlags, parse: impl FnOnce(&[u8]) -> Option<T>) -> Sent<T> {
    let mut bytes = [0; limits::HANDSHAKE_BYTES];
    let seen = match recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, seen)) => seen,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Sent::NotYet,
        Err(_) => return Sent::Junk,
    };
    let Some(text) = bytes.get(..seen) else { return Sent::Junk };
    let Some(end) = text.iter().position(|byte| *byte == b'\n') else {
        let ended = seen == 0 || flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        return if ended || seen == bytes.len() { Sent::Junk } else { Sent::NotYet };
    };
    let Some(meaning) = text.get(..end).and_then(parse) else { return Sent::Junk };
    let mut line = [0; limits::HANDSHAKE_BYTES];
    match line.get_mut(..=end).map(|line| recv(stream, line, RecvFlags::DONTWAIT)) {
        Some(Ok((_, taken))) if taken == end + 1 => Sent::Whole(meaning),
        _ => Sent::Junk,
    }
}

/// What a program of the host asks for, and the port, by its line without the end.
fn parse_request(line: &[u8]) -> Option<(Word, u32)> {
    [(Word::Connect, "CONNECT "), (Word::Prepare, "PREPARE ")]
        .into_iter()
        .find_map(|(word, text)| parse_line(line, text).map(|port| (word, port)))
}

/// The number of a line without its end.
fn parse_line(line: &[u8], word: &str) -> Option<u32> {
    let digits = line.strip_prefix(word.as_bytes())?;
    let plain = (1..=10).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok())?
}

/// Resets the counter of an eventfd or timerfd.
fn drain_counter(descriptor: &impl std::os::fd::AsFd) {
    let mut count = [0; 8];
    let _ = rustix::io::read(descriptor, &mut count);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_line_is_taken() {
        assert_eq!(parse_request(b"CONNECT 0"), Some((Word::Connect, 0)));
        assert_eq!(parse_request(b"PREPARE 4294967295"), Some((Word::Prepare, u32::MAX)));
        for junk in [
            "CONNECT 4294967296",
            "CONNECT ",
            "CONNECT  1",
            "CONNECT +1",
            "connect 1",
            "CONNECT 1 ",
            "CONNECT 1\r",
            "PREPARE",
            "GET / HTTP/1.1",
            "",
        ] {
            assert_eq!(parse_request(junk.as_bytes()), None, "{junk:?}");
        }
    }

    #[test]
    fn bytes_behind_the_line_stay_in_the_stream() {
        use std::io::{Read, Write};
        let (mut program, mut ours) = UnixStream::pair().unwrap();
        program.write_all(b"CONNECT 17\nhello").unwrap();

        assert!(matches!(read_line(&ours, EventFlags::IN, parse_request), Sent::Whole((Word::Connect, 17))));

        let mut rest = [0; 5];
        ours.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn an_endless_line_is_junk_and_a_short_one_may_still_come() {
        use std::io::Write;
        let (mut program, ours) = UnixStream::pair().unwrap();
        assert!(matches!(read_line(&ours, EventFlags::IN, parse_request), Sent::NotYet));
        program.write_all(b"CONNECT 1").unwrap();
        assert!(matches!(read_line(&ours, EventFlags::IN, parse_request), Sent::NotYet));
        program.write_all(&[b'1'; limits::HANDSHAKE_BYTES]).unwrap();
        assert!(matches!(read_line(&ours, EventFlags::IN, parse_request), Sent::Junk));
    }
}
