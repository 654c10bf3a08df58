//! How a transcript of AF_VSOCK is written: [`Teller`].

use std::os::fd::{OwnedFd, RawFd};

use super::{ADDRESS, ALL, ANY, PATIENCE_MS, PORT, QUIET_MS};
use crate::real::code;
use crate::sockets::{self as sys, Name, Outcome};

/// Writes down what happens.
pub(super) struct Teller {
    pub(super) case: &'static str,
    pub(super) step: usize,
}

impl Teller {
    pub(super) fn case(&mut self, case: &'static str) {
        (self.case, self.step) = (case, 0);
    }

    pub(super) fn tell(&mut self, call: &str, answer: &str) {
        // At once: who hangs in a call has said all that came before.
        println!("{}/{}: {call} -> {answer}", self.case, self.step);
        self.step += 1;
    }

    pub(super) fn outcome(&mut self, call: &str, outcome: Outcome) {
        self.tell(call, &said(outcome));
    }

    pub(super) fn made(&mut self, call: &str, outcome: Result<OwnedFd, i32>) -> Option<OwnedFd> {
        match outcome {
            Ok(fd) => {
                self.tell(call, "descriptor");
                Some(fd)
            }
            Err(errno) => {
                self.tell(call, &error(errno));
                None
            }
        }
    }

    pub(super) fn name(&mut self, call: &str, fd: RawFd, which: Name) {
        let mut room = [0; ADDRESS];
        let answer = sys::name(fd, which, &mut room).map_or_else(error, |size| format!("{}, length {size}", shown(&room)));
        self.tell(call, &answer);
    }

    pub(super) fn names(&mut self, whose: &str, fd: RawFd) {
        self.name(&format!("getsockname({whose})"), fd, Name::Own);
        self.name(&format!("getpeername({whose})"), fd, Name::Peer);
    }

    /// What poll says once it says one of these; or after a while, if it does not.
    pub(super) fn polled(&mut self, whose: &str, fd: RawFd, until: i16) {
        let _ = sys::poll(fd, until, if until == 0 { QUIET_MS } else { PATIENCE_MS });
        let answer = sys::poll(fd, ALL, 0).map_or_else(error, events);
        self.tell(&format!("poll({whose})"), &answer);
    }
}

pub(super) fn said(outcome: Outcome) -> String {
    outcome.map_or_else(error, |value| value.to_string())
}

/// An errno by name: those of sockets, and those that the driver knows.
pub(super) fn error(errno: i32) -> String {
    let name = match errno {
        libc::EPIPE => "EPIPE",
        libc::EPROTOTYPE => "EPROTOTYPE",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::EPROTONOSUPPORT => "EPROTONOSUPPORT",
        libc::ESOCKTNOSUPPORT => "ESOCKTNOSUPPORT",
        libc::EAFNOSUPPORT => "EAFNOSUPPORT",
        libc::EADDRNOTAVAIL => "EADDRNOTAVAIL",
        libc::ECONNRESET => "ECONNRESET",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::EISCONN => "EISCONN",
        libc::ENOTCONN => "ENOTCONN",
        libc::EALREADY => "EALREADY",
        libc::EINPROGRESS => "EINPROGRESS",
        _ => return code(errno.into()),
    };
    name.to_owned()
}

/// An address as it is written down: what the kernel has chosen differs each time.
pub(super) fn shown(room: &[u8; ADDRESS]) -> String {
    let number = |at: usize| room.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let (family, port, cid) = (number(0) & 0xFFFF, number(4), number(8));
    let cid = if cid == ANY { "any".to_owned() } else { cid.to_string() };
    let port = match port {
        ANY => "any".to_owned(),
        port if (PORT..PORT + 1000).contains(&port) || port < 1024 => port.to_string(),
        _ => "chosen".to_owned(),
    };
    format!("{cid}:{port}{}", if family == 40 { String::new() } else { format!(" family {family}") })
}

pub(super) fn events(events: i64) -> String {
    let names = [
        (libc::POLLIN, "IN"),
        (libc::POLLPRI, "PRI"),
        (libc::POLLOUT, "OUT"),
        (libc::POLLERR, "ERR"),
        (libc::POLLHUP, "HUP"),
        (libc::POLLRDHUP, "RDHUP"),
    ];
    let there: Vec<&str> = names.iter().filter(|(bit, _)| events & i64::from(*bit) != 0).map(|(_, name)| *name).collect();
    if there.is_empty() { "nothing".to_owned() } else { there.join("|") }
}
