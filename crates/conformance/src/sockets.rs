//! The system calls of sockets, with addresses and lengths as wrong as one likes. As [`crate::sys`], one of the two modules that need `unsafe`.

#![expect(unsafe_code, reason = "socket calls with addresses, lengths and options that are wrong on purpose have no safe form")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_long, socklen_t};

/// A value, or the errno.
pub(crate) type Outcome = Result<i64, i32>;

fn checked(value: c_long) -> Outcome {
    if value == -1 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(value) }
}

fn owned(value: c_long) -> Result<OwnedFd, i32> {
    let number = RawFd::try_from(checked(value)?).unwrap_or(-1);
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn length(bytes: &[u8]) -> socklen_t {
    socklen_t::try_from(bytes.len()).unwrap_or(socklen_t::MAX)
}

pub(crate) fn socket(domain: c_int, kind: c_int, protocol: c_int) -> Result<OwnedFd, i32> {
    // SAFETY: no pointers.
    owned(unsafe { libc::socket(domain, kind, protocol) }.into())
}

pub(crate) fn bind(fd: RawFd, address: &[u8]) -> Outcome {
    // SAFETY: the address is as long as is said, and lives for the call.
    checked(unsafe { libc::bind(fd, address.as_ptr().cast(), length(address)) }.into())
}

pub(crate) fn connect(fd: RawFd, address: &[u8]) -> Outcome {
    // SAFETY: as for `bind`.
    checked(unsafe { libc::connect(fd, address.as_ptr().cast(), length(address)) }.into())
}

pub(crate) fn listen(fd: RawFd, backlog: c_int) -> Outcome {
    // SAFETY: no pointers.
    checked(unsafe { libc::listen(fd, backlog) }.into())
}

/// accept4 with room for an address of `room` bytes; also the address's length as it was given.
pub(crate) fn accept(fd: RawFd, room: &mut [u8], flags: c_int) -> Result<(OwnedFd, u32), i32> {
    let mut size = length(room);
    // SAFETY: the room is as long as is said; both live for the call.
    let value = unsafe { libc::accept4(fd, room.as_mut_ptr().cast(), &raw mut size, flags) };
    Ok((owned(value.into())?, size))
}

/// accept4 that asks for no address.
pub(crate) fn accept_unnamed(fd: RawFd, flags: c_int) -> Result<OwnedFd, i32> {
    // SAFETY: null pointers, which the kernel takes for "not wanted".
    owned(unsafe { libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), flags) }.into())
}

/// Which name of a socket.
#[derive(Clone, Copy)]
pub(crate) enum Name {
    Own,
    Peer,
}

/// getsockname or getpeername; the length as it was given.
pub(crate) fn name(fd: RawFd, which: Name, room: &mut [u8]) -> Result<u32, i32> {
    let mut size = length(room);
    // SAFETY: as for `accept`.
    let value = unsafe {
        match which {
            Name::Own => libc::getsockname(fd, room.as_mut_ptr().cast(), &raw mut size),
            Name::Peer => libc::getpeername(fd, room.as_mut_ptr().cast(), &raw mut size),
        }
    };
    checked(value.into()).map(|_| size)
}

pub(crate) fn option(fd: RawFd, level: c_int, option: c_int, room: &mut [u8]) -> Result<u32, i32> {
    let mut size = length(room);
    // SAFETY: as for `accept`.
    checked(unsafe { libc::getsockopt(fd, level, option, room.as_mut_ptr().cast(), &raw mut size) }.into()).map(|_| size)
}

pub(crate) fn set_option(fd: RawFd, level: c_int, option: c_int, value: &[u8]) -> Outcome {
    // SAFETY: the value is as long as is said, and lives for the call.
    checked(unsafe { libc::setsockopt(fd, level, option, value.as_ptr().cast(), length(value)) }.into())
}

pub(crate) fn send(fd: RawFd, bytes: &[u8], flags: c_int) -> Outcome {
    // SAFETY: the bytes live for the call.
    checked(c_long::try_from(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags | libc::MSG_NOSIGNAL) }).unwrap_or(-1))
}

pub(crate) fn send_to(fd: RawFd, bytes: &[u8], address: &[u8]) -> Outcome {
    // SAFETY: bytes and address live for the call.
    let value =
        unsafe { libc::sendto(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL, address.as_ptr().cast(), length(address)) };
    checked(c_long::try_from(value).unwrap_or(-1))
}

pub(crate) fn receive(fd: RawFd, room: &mut [u8], flags: c_int) -> Outcome {
    // SAFETY: the room lives for the call.
    checked(c_long::try_from(unsafe { libc::recv(fd, room.as_mut_ptr().cast(), room.len(), flags) }).unwrap_or(-1))
}

pub(crate) fn shutdown(fd: RawFd, how: c_int) -> Outcome {
    // SAFETY: no pointers.
    checked(unsafe { libc::shutdown(fd, how) }.into())
}

/// poll for these events: what is there within the time.
pub(crate) fn poll(fd: RawFd, events: i16, timeout_ms: c_int) -> Outcome {
    let mut entry = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one entry that lives through the call.
    checked(unsafe { libc::poll(&raw mut entry, 1, timeout_ms) }.into())?;
    Ok(entry.revents.into())
}

/// ioctl that writes a number of 32 bits.
pub(crate) fn ioctl_number(fd: RawFd, word: u64) -> Outcome {
    let mut value = [0_u32; 4];
    // SAFETY: the commands that are tried write four bytes at most.
    checked(unsafe { libc::syscall(libc::SYS_ioctl, fd, word, value.as_mut_ptr()) })?;
    Ok(value.first().copied().unwrap_or(0).into())
}

pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, i32> {
    // SAFETY: no pointers.
    owned(unsafe { libc::dup(fd) }.into())
}

pub(crate) fn set_nonblocking(fd: RawFd, on: bool) -> Outcome {
    // SAFETY: no pointers.
    checked(unsafe { libc::fcntl(fd, libc::F_SETFL, if on { libc::O_NONBLOCK } else { 0 }) }.into())
}

/// An epoll with one descriptor in it.
pub(crate) fn epoll(watched: RawFd, events: u32) -> Result<OwnedFd, i32> {
    // SAFETY: no pointers.
    let fd = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }.into())?;
    let mut event = libc::epoll_event { events, u64: 0 };
    // SAFETY: the event lives for the call.
    checked(unsafe { libc::epoll_ctl(fd.as_raw_fd(), libc::EPOLL_CTL_ADD, watched, &raw mut event) }.into())?;
    Ok(fd)
}

/// The events that come within the time, of one descriptor.
pub(crate) fn epoll_wait(fd: RawFd, timeout_ms: c_int) -> Outcome {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: one entry that lives through the call.
    let count = checked(unsafe { libc::epoll_wait(fd, &raw mut event, 1, timeout_ms) }.into())?;
    Ok(if count == 0 { 0 } else { event.events.into() })
}

static ALARMS: AtomicU32 = AtomicU32::new(0);

/// SIGALRM comes after so many milliseconds, and again as often; 0 ends it. `restarts`: with SA_RESTART.
pub(crate) fn alarm(ms: i64, restarts: bool) {
    extern "C" fn count(_signal: c_int) {
        ALARMS.fetch_add(1, Ordering::Relaxed);
    }
    ALARMS.store(0, Ordering::Relaxed);
    let time = libc::timeval { tv_sec: 0, tv_usec: ms.saturating_mul(1000) };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    let handler: extern "C" fn(c_int) = count;
    // SAFETY: the handler touches one atomic number; an all-zero action is a valid one; both structs live for the calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = if restarts { libc::SA_RESTART } else { 0 };
        libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
    }
}

/// How often SIGALRM has come since [`alarm`].
pub(crate) fn alarms() -> u32 {
    ALARMS.load(Ordering::Relaxed)
}
