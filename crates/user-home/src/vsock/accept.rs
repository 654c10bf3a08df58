//! accept() that wants the peer's address; without one the kernel makes the call alone.
//!
//! It may wait for long, and a client that waits here is woken by nothing but a deadly signal. So its signals are looked for meanwhile; if there is one, the call is
//! ended as the kernel would end it: restarted, or EINTR, as the signal's handler wants.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nitroxide_world::VsockAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::address::{ANY, PARENT};
use super::connect::peer_of;
use super::{Room, Socket, Sockets, Tracked};
use crate::answer::Answer;
use crate::caller::Caller;
use crate::sys::{self, Seized, Stopped};
use crate::{handed, lock};

/// How long a connection is waited for before the caller is looked at, at first and at most.
const FIRST_SLICE: Duration = Duration::from_millis(5);
const LAST_SLICE: Duration = Duration::from_millis(80);

impl Sockets {
    /// accept4() of one of ours with room for an address.
    pub(super) fn accept_tracked(&self, caller: &Caller<'_>, tracked: &Tracked, copy: &OwnedFd, room: Room, flags: u32) -> Answer {
        let (nonblocking, cloexec) = (libc::SOCK_NONBLOCK.cast_unsigned(), libc::SOCK_CLOEXEC.cast_unsigned());
        if flags & !(nonblocking | cloexec) != 0 || !sockopt::socket_acceptconn(copy).unwrap_or(false) {
            return Answer::Error(libc::EINVAL);
        }
        let limit = sockopt::socket_timeout(copy, Timeout::Recv).ok().flatten();
        let until = if super::is_nonblocking(copy) { Some(Instant::now()) } else { limit.map(|limit| Instant::now() + limit) };
        let taken_flags = if flags & nonblocking != 0 { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
        // Tells at once when the process is gone: until then the port is in use.
        let process = caller.process().ok().and_then(Pid::from_raw).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let mut slice = FIRST_SLICE;
        loop {
            match self.take(tracked, copy, SocketFlags::CLOEXEC | taken_flags) {
                Ok(Some(accepted)) => return self.hand_over(caller, tracked, accepted, room, flags & cloexec != 0),
                Ok(None) => {}
                Err(errno) => return Answer::Error(errno.raw_os_error()),
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Answer::Error(libc::EAGAIN);
            }
            wait_for_either(copy, process.as_ref(), left.map_or(slice, |left| left.min(slice)));
            slice = (slice * 2).min(LAST_SLICE);
            if !caller.is_waiting() {
                return Answer::Done;
            }
            // With a time limit a signal ends it for good.
            match caller.has_signal() || caller.is_stopping() {
                true if limit.is_some() => return Answer::Error(libc::EINTR),
                true => return restart(caller),
                false => {}
            }
        }
    }

    /// Takes a connection if there is one. One thread at a time looks and takes, so that none waits for what another has taken.
    fn take(&self, tracked: &Tracked, copy: &OwnedFd, flags: SocketFlags) -> Result<Option<OwnedFd>, Errno> {
        let turn = Arc::clone(&lock(tracked).turn);
        let _turn = lock(&turn);
        if !is_there(copy) {
            return Ok(None);
        }
        match accept_with(copy, flags) {
            Ok(accepted) => Ok(Some(accepted)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn hand_over(&self, caller: &Caller<'_>, tracked: &Tracked, accepted: OwnedFd, room: Room, close_on_exec: bool) -> Answer {
        let (kind, own) = {
            let listener = lock(tracked);
            (listener.kind, listener.own)
        };
        let own = own.map(|own| VsockAddress { cid: if own.cid == ANY { PARENT } else { own.cid }, port: own.port });
        let peer = peer_of(&accepted);
        let identity = match handed::identity(accepted.as_fd()) {
            Ok(identity) => identity,
            Err(error) => return error.into(),
        };
        if let Err(errno) = room.write_address(caller, peer) {
            return Answer::Error(errno);
        }
        self.track(identity, Socket { own, peer: Some(peer), is_named: true, ..Socket::new(kind) });
        Answer::Descriptor(accepted, close_on_exec)
    }
}

/// Is a connection there?
fn is_there(listener: &OwnedFd) -> bool {
    matches!(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(count) if count > 0)
}

/// Waits for a connection or the end of a process, for so long.
fn wait_for_either(listener: &OwnedFd, process: Option<&OwnedFd>, time: Duration) {
    let time = Timespec::try_from(time).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    let mut fds: Vec<_> = [Some(listener), process].into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let _ = poll(&mut fds, Some(&time));
}

/// Ends the call so that the kernel deals with the signal that waits, and with the call as the signal's handler wants.
fn restart(caller: &Caller<'_>) -> Answer {
    // The answer is one for the kernel alone: without a stop on the way out the program would see it.
    let Ok(mut seized) = Seized::interrupt(caller.thread) else { return Answer::Error(libc::EINTR) };
    caller.answer(Err(sys::RESTART_BY_HANDLER));
    let signal = match seized.wait() {
        Ok(Stopped::Signal(signal)) => Some(signal),
        _ => None,
    };
    seized.let_go(signal);
    Answer::Done
}
