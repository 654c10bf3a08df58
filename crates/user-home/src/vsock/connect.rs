//! connect(): to a program of the parent, to an enclave, to a console.
//!
//! What is connected is the client's own socket: a copy of its descriptor is used here, so that what the client has registered for it stays. A UNIX stream cannot
//! be connected a second time, so a guest is asked first, over another stream ([`nitroxide_world::Prepared`]), and the client's socket is touched only once it
//! has accepted.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nitroxide_world::rendezvous::CONSOLE_PORT_OFFSET;
use nitroxide_world::{Endpoint, VsockAddress, bind_source};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, getsockname, listen, socket_with};
use rustix::process::getpid;

use super::address::{ANY, HOST, HYPERVISOR, LOCAL, PARENT};
use super::{Kind, Sockets, Tracked};
use crate::answer::Answer;
use crate::caller::Caller;
use crate::lock;

/// How long a guest's answer is waited for before the caller is looked at.
const SLICE: Duration = Duration::from_millis(20);
/// How long a listener with a full queue is waited for: as short as can be, since AF_VSOCK refuses at once.
const NO_TIME: Duration = Duration::from_micros(1);
/// Connections of strangers that are turned away while our own is waited for.
const MOST_STRANGERS: usize = 16;

impl Sockets {
    /// connect() of one of ours to a valid address.
    pub(super) fn connect_tracked(&self, caller: &Caller<'_>, tracked: &Tracked, copy: &OwnedFd, to: VsockAddress) -> Answer {
        let turn = Arc::clone(&lock(tracked).turn);
        let _turn = lock(&turn);
        let (is_spent, is_connected) = {
            let socket = lock(tracked);
            (socket.is_spent, socket.peer.is_some())
        };
        if is_spent {
            // As Linux says at first.
            return Answer::Error(if super::is_nonblocking(copy) { libc::EALREADY } else { libc::ETIMEDOUT });
        }
        if is_connected {
            return Answer::Error(libc::EISCONN);
        }
        if sockopt::socket_acceptconn(copy).unwrap_or(false) {
            return Answer::Error(libc::EINVAL);
        }
        match self.reach(caller, tracked, copy, to) {
            Ok(()) => {
                lock(tracked).peer = Some(to);
                Answer::Value(0)
            }
            // Programs that do not wait look for the error later, and some for none now.
            Err(_) if super::is_nonblocking(copy) && refuse_later(copy).is_ok() => {
                lock(tracked).is_spent = true;
                Answer::Error(libc::EINPROGRESS)
            }
            Err(errno) => Answer::Error(errno),
        }
    }

    fn reach(&self, caller: &Caller<'_>, tracked: &Tracked, copy: &OwnedFd, to: VsockAddress) -> Result<(), i32> {
        let is_here = [PARENT, LOCAL, HOST].contains(&to.cid);
        let from = self.name(tracked, copy, if is_here { LOCAL } else { PARENT })?;
        match to.cid {
            _ if is_here => self.reach_parent(caller, copy, to.port),
            HYPERVISOR => self.reach_at_once(copy, Endpoint::Console(to.port.wrapping_sub(CONSOLE_PORT_OFFSET))),
            ANY => Err(libc::ECONNRESET),
            // Enclaves have streams only.
            _ if lock(tracked).kind == Kind::Packets => Err(libc::ESOCKTNOSUPPORT),
            _ => self.reach_guest(caller, tracked, copy, from, to),
        }
    }

    /// Gives a socket the name by which its peer knows it, unless it has one; its port is chosen if it was not bound.
    fn name(&self, tracked: &Tracked, copy: &OwnedFd, cid: u32) -> Result<VsockAddress, i32> {
        let mut socket = lock(tracked);
        let port = match socket.own {
            Some(own) => own.port,
            None => self.free_port().map_err(|error| error.raw_os_error().unwrap_or(libc::EADDRNOTAVAIL))?,
        };
        let from = VsockAddress { cid, port };
        if !socket.is_named {
            bind_source(copy, from).map_err(rustix::io::Errno::raw_os_error)?;
            socket.is_named = true;
        }
        socket.own.get_or_insert(VsockAddress { cid: ANY, port });
        Ok(from)
    }

    fn reach_parent(&self, caller: &Caller<'_>, copy: &OwnedFd, port: u32) -> Result<(), i32> {
        let heartbeats = self.heartbeat_endpoints(caller, port);
        heartbeats
            .map_or(Err(libc::ECONNRESET), |endpoint| self.reach_at_once(copy, endpoint))
            .or_else(|_| self.reach_at_once(copy, Endpoint::ParentPort(port)))
    }

    fn reach_at_once(&self, copy: &OwnedFd, endpoint: Endpoint) -> Result<(), i32> {
        without_waiting(copy, || self.world.connect_socket(copy, endpoint)).map_err(|error| refusal(&error))
    }

    fn reach_guest(&self, caller: &Caller<'_>, tracked: &Tracked, copy: &OwnedFd, from: VsockAddress, to: VsockAddress) -> Result<(), i32> {
        let until = Instant::now() + lock(tracked).options.connect_timeout;
        let goes_on = || goes_on(caller, until, super::is_nonblocking(copy));
        let refused = |error: io::Error| refusal(&error);
        let mut prepared = loop {
            match self.world.prepare(Endpoint::Enclave(to.cid), Some(from), to.port) {
                // Many connect at this moment; the device takes them one by one.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    goes_on()?;
                    std::thread::sleep(SLICE / 4);
                }
                other => break other.map_err(refused)?,
            }
        };
        while !prepared.is_accepted(SLICE).map_err(refused)? {
            goes_on()?;
        }
        let stream = join(copy).map_err(refused)?;
        prepared.give(stream.as_fd()).map_err(|error| {
            lock(tracked).is_spent = true;
            refusal(&error)
        })
    }
}

/// Is there still somebody who waits, and time to wait? connect() of AF_VSOCK that blocks always ends with EINTR at a signal: it has a time limit. One that does
/// not block never does.
fn goes_on(caller: &Caller<'_>, until: Instant, is_nonblocking: bool) -> Result<(), i32> {
    match () {
        () if !caller.is_waiting() => Err(libc::EINTR),
        () if !is_nonblocking && caller.has_signal() => Err(libc::EINTR),
        () if Instant::now() >= until => Err(libc::ETIMEDOUT),
        () => Ok(()),
    }
}

/// What AF_VSOCK says where UNIX sockets say this: nobody listens, the queue is full, or the listener is of another type.
fn refusal(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED | libc::EAGAIN | libc::EPROTOTYPE | libc::EPIPE) | None => libc::ECONNRESET,
        Some(errno) => errno,
    }
}

/// Does something with a socket that must not wait in it. Its flags are the client's and stay; a time limit is set back.
fn without_waiting(copy: &OwnedFd, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    if super::is_nonblocking(copy) {
        return act();
    }
    let before = sockopt::socket_timeout(copy, Timeout::Send)?;
    sockopt::set_socket_timeout(copy, Timeout::Send, Some(NO_TIME))?;
    let result = act();
    sockopt::set_socket_timeout(copy, Timeout::Send, before)?;
    result
}

/// Connects a client's socket with a new one, which is returned.
///
/// The name in between is open to everybody, so who comes is asked for: it is this process that connects.
fn join(copy: &OwnedFd) -> io::Result<OwnedFd> {
    let listener = private_listener()?;
    without_waiting(copy, || Ok(connect(copy, &SocketAddrUnix::try_from(getsockname(&listener)?)?)?))?;
    for _ in 0..MOST_STRANGERS {
        let stream = accept_with(&listener, SocketFlags::CLOEXEC)?;
        if sockopt::socket_peercred(&stream)?.pid == getpid() {
            return Ok(stream);
        }
    }
    Err(io::ErrorKind::ConnectionReset.into())
}

/// Lets a client's socket end as one does whose connection was refused: poll tells, and SO_ERROR is ECONNRESET.
fn refuse_later(copy: &OwnedFd) -> io::Result<()> {
    let listener = private_listener()?;
    connect(copy, &SocketAddrUnix::try_from(getsockname(&listener)?)?)?;
    // Closed with a connection that was not accepted.
    drop(listener);
    Ok(())
}

/// A listener under a name that the kernel chooses.
fn private_listener() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    listen(&listener, i32::try_from(MOST_STRANGERS).unwrap_or(1))?;
    Ok(listener)
}

/// Who a socket that was accepted is connected to. Programs of the parent are seen under the loopback's CID, those without a name among them.
pub(super) fn peer_of(accepted: &OwnedFd) -> VsockAddress {
    match nitroxide_world::peer_address(accepted).ok().flatten() {
        Some(VsockAddress { cid: PARENT, port }) => VsockAddress { cid: LOCAL, port },
        Some(peer) => peer,
        None => VsockAddress { cid: LOCAL, port: ANY },
    }
}

/// The address of a socket that was accepted from a listener of the parent, if it was: that one's, which is a path.
pub(super) fn own_of(accepted: &OwnedFd) -> Option<VsockAddress> {
    let name = SocketAddrUnix::try_from(getsockname(accepted).ok()?).ok()?;
    if name.abstract_name().is_some() { None } else { VsockAddress::from_socket_name(&name) }
}
