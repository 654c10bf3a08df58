//! AF_VSOCK as a program of the parent sees it: every call and its answer, written down as the cases of the driver are ([`run`]).
//!
//! All of it is between sockets of this program, over the parent's own CID. The record of Linux' own AF_VSOCK with its loopback transport is what an
//! emulation is compared with. docs/conformance.md, "AF_VSOCK".

mod teller;

use std::os::fd::{AsRawFd, OwnedFd};

use libc::c_int;

use crate::sockets::{self as sys, Name};
use crate::sys::in_child;
use teller::{Teller, error, events, said, shown};

/// AF_VSOCK.
const FAMILY: c_int = 40;
/// The parent's CID.
const PARENT: u32 = 3;
const ANY: u32 = u32::MAX;
/// Ports from here on are nobody's.
const PORT: u32 = 7000;
/// Bytes of `struct sockaddr_vm`.
const ADDRESS: usize = 16;
/// Everything that poll can tell.
const ALL: i16 = libc::POLLIN | libc::POLLOUT | libc::POLLPRI | libc::POLLRDHUP;
/// How long something that must come may take; it only ends hangs.
const PATIENCE_MS: c_int = 10_000;
/// How long nothing comes where nothing must.
const QUIET_MS: c_int = 100;

/// `struct sockaddr_vm` (linux/vm_sockets.h).
fn address(cid: u32, port: u32) -> [u8; ADDRESS] {
    address_of(FAMILY, cid, port)
}

fn address_of(family: c_int, cid: u32, port: u32) -> [u8; ADDRESS] {
    let mut bytes = [0; ADDRESS];
    let family = u16::try_from(family).unwrap_or(0).to_le_bytes();
    for (target, source) in bytes.iter_mut().zip(family.into_iter().chain([0, 0]).chain(port.to_le_bytes()).chain(cid.to_le_bytes())) {
        *target = source;
    }
    bytes
}

fn stream() -> Result<OwnedFd, i32> {
    sys::socket(FAMILY, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)
}

/// Performs one case; ends early if what it needs fails.
type Act = fn(&mut Teller) -> Result<(), i32>;

/// Does everything and prints the transcript; cases whose name does not contain `filter` are left out.
pub fn run(filter: &str) {
    let mut teller = Teller { case: "", step: 0 };
    let t = &mut teller;
    let cases: [(&'static str, Act); 18] = [
        ("socket", kinds),
        ("fresh", fresh),
        ("options", options),
        ("bind", binding),
        ("listen", listening),
        ("refused", refused),
        ("connection", connection),
        ("ends", ends),
        ("reset", reset),
        ("accept", accepting),
        ("bound-client", bound_client),
        ("not-blocking", not_blocking),
        ("epoll", watched),
        ("backlog", backlog),
        ("seqpacket", seqpacket),
        ("signals", signals),
        ("shared", shared),
        ("device", device),
    ];
    for (name, case) in cases.into_iter().filter(|(name, _)| name.contains(filter)) {
        t.case(name);
        if let Err(errno) = case(t) {
            t.tell("this case", &format!("stopped: {}", error(errno)));
        }
    }
}

fn kinds(t: &mut Teller) -> Result<(), i32> {
    for (kind, name) in [
        (libc::SOCK_STREAM, "STREAM"),
        (libc::SOCK_SEQPACKET, "SEQPACKET"),
        (libc::SOCK_RAW, "RAW"),
        (libc::SOCK_RDM, "RDM"),
        (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, "STREAM, CLOEXEC and NONBLOCK"),
        (9, "9"),
        (libc::SOCK_STREAM | 0x10, "STREAM and an unknown flag"),
    ] {
        drop(t.made(&format!("socket({name})"), sys::socket(FAMILY, kind, 0)));
    }
    // Linux 7.3 has datagrams only where a transport has them, and none has.
    let datagram = sys::socket(FAMILY, libc::SOCK_DGRAM, 0);
    let answer = match &datagram {
        Err(errno) => error(*errno),
        Ok(fd) => said(sys::bind(fd.as_raw_fd(), &address(ANY, PORT))),
    };
    t.tell("socket(DGRAM) and bind", &answer);
    drop(t.made("socket(STREAM, protocol 1)", sys::socket(FAMILY, libc::SOCK_STREAM, 1)));
    drop(t.made("socket(STREAM, protocol 40)", sys::socket(FAMILY, libc::SOCK_STREAM, 40)));
    Ok(())
}

fn fresh(t: &mut Teller) -> Result<(), i32> {
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    t.names("fresh", fd);
    for room in [0, 4, 15, 32] {
        let mut bytes = vec![0xAA; room];
        let answer = sys::name(fd, Name::Own, &mut bytes).map_or_else(error, |size| format!("length {size}"));
        t.tell(&format!("getsockname(fresh, room {room})"), &answer);
    }
    t.polled("fresh", fd, 0);
    t.outcome("send(fresh)", sys::send(fd, b"x", 0));
    t.outcome("recv(fresh)", sys::receive(fd, &mut [0; 4], 0));
    t.outcome("shutdown(fresh)", sys::shutdown(fd, libc::SHUT_RDWR));
    t.outcome("accept(fresh)", sys::accept_unnamed(fd, 0).map(|_| 0));
    t.outcome("accept(fresh, with room)", sys::accept(fd, &mut [0; ADDRESS], 0).map(|_| 0));
    t.outcome("listen(fresh)", sys::listen(fd, 5));
    Ok(())
}

fn options(t: &mut Teller) -> Result<(), i32> {
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    for (option, name) in [
        (libc::SO_DOMAIN, "SO_DOMAIN"),
        (libc::SO_TYPE, "SO_TYPE"),
        (libc::SO_PROTOCOL, "SO_PROTOCOL"),
        (libc::SO_ERROR, "SO_ERROR"),
        (libc::SO_ACCEPTCONN, "SO_ACCEPTCONN"),
    ] {
        let mut value = [0; 4];
        let answer = sys::option(fd, libc::SOL_SOCKET, option, &mut value)
            .map_or_else(error, |size| format!("{} of {size}", u32::from_le_bytes(value)));
        t.tell(&format!("getsockopt({name})"), &answer);
    }
    for option in 0..=10 {
        let mut value = [0; 32];
        let answer = sys::option(fd, FAMILY, option, &mut value).map_or_else(error, |size| number(&value, size));
        t.tell(&format!("getsockopt(AF_VSOCK, {option})"), &answer);
    }
    for option in [0, 6, 8] {
        for room in [4, 8, 15] {
            let mut value = vec![0; room];
            let answer = sys::option(fd, FAMILY, option, &mut value).map_or_else(error, |size| format!("length {size}"));
            t.tell(&format!("getsockopt(AF_VSOCK, {option}, room {room})"), &answer);
        }
    }
    for (option, value) in [(0, 1000_u64), (1, 500), (2, 4096), (0, 1 << 20), (3, 1), (5, 1), (7, 1), (9, 1)] {
        t.outcome(&format!("setsockopt(AF_VSOCK, {option}, {value})"), sys::set_option(fd, FAMILY, option, &value.to_le_bytes()));
    }
    t.outcome("setsockopt(AF_VSOCK, 0, 4 bytes)", sys::set_option(fd, FAMILY, 0, &[0; 4]));
    for (seconds, us) in [(5_i64, 250_000_i64), (0, 0), (-1, 0), (1, 1_000_000), (1, -1)] {
        let value = [seconds.to_le_bytes(), us.to_le_bytes()].concat();
        for option in [6, 8] {
            t.outcome(&format!("setsockopt(AF_VSOCK, {option}, {seconds} s {us} us)"), sys::set_option(fd, FAMILY, option, &value));
        }
        let mut value = [0; 16];
        let answer = sys::option(fd, FAMILY, 8, &mut value).map_or_else(error, |size| number(&value, size));
        t.tell("getsockopt(AF_VSOCK, 8)", &answer);
    }
    for option in 0..=2 {
        let mut value = [0; 8];
        let answer = sys::option(fd, FAMILY, option, &mut value).map_or_else(error, |size| number(&value, size));
        t.tell(&format!("getsockopt(AF_VSOCK, {option})"), &answer);
    }
    let other = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    t.outcome("getsockopt(AF_VSOCK) of an internet socket", sys::option(other.as_raw_fd(), FAMILY, 0, &mut [0; 8]).map(i64::from));
    Ok(())
}

fn number(value: &[u8], size: u32) -> String {
    let word = |at: usize| value.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if size == 16 { format!("{} s {} us", word(0), word(8)) } else { format!("{} of {size}", word(0)) }
}

fn binding(t: &mut Teller) -> Result<(), i32> {
    for (cid, name) in [(ANY, "any"), (PARENT, "3"), (1, "1"), (2, "2"), (0, "0"), (16, "16")] {
        let socket = stream()?;
        t.outcome(&format!("bind({name}:7000)"), sys::bind(socket.as_raw_fd(), &address(cid, PORT)));
        t.names("it", socket.as_raw_fd());
    }
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    t.outcome("bind(any:any)", sys::bind(fd, &address(ANY, ANY)));
    t.names("it", fd);
    t.outcome("bind again", sys::bind(fd, &address(ANY, PORT)));
    let (first, second) = (stream()?, stream()?);
    t.outcome("bind(3:7001)", sys::bind(first.as_raw_fd(), &address(PARENT, PORT + 1)));
    t.outcome("bind another (3:7001)", sys::bind(second.as_raw_fd(), &address(PARENT, PORT + 1)));
    t.outcome("bind another (any:7001)", sys::bind(second.as_raw_fd(), &address(ANY, PORT + 1)));
    t.polled("bound", first.as_raw_fd(), 0);
    drop(first);
    t.outcome("bind another (3:7001) after close", sys::bind(second.as_raw_fd(), &address(PARENT, PORT + 1)));
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    let whole = address(PARENT, PORT + 2);
    t.outcome("bind(short address)", sys::bind(fd, whole.get(..12).unwrap_or_default()));
    t.outcome("bind(no address)", sys::bind(fd, &[]));
    t.outcome("bind(longer address)", sys::bind(fd, &[&whole[..], &[0; 16]].concat()));
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    t.outcome("bind(family 1)", sys::bind(fd, &address_of(libc::AF_UNIX, PARENT, PORT + 2)));
    t.outcome("bind(family 0)", sys::bind(fd, &address_of(0, PARENT, PORT + 2)));
    let mut reserved = address(PARENT, PORT + 4);
    if let Some(byte) = reserved.get_mut(2) {
        *byte = 1;
    }
    t.outcome("bind(reserved field not 0)", sys::bind(fd, &reserved));
    for (bits, name) in [(1, "TO_HOST"), (2, "unknown")] {
        let mut flags = address(PARENT, PORT + 3);
        if let Some(byte) = flags.get_mut(12) {
            *byte = bits;
        }
        t.outcome(&format!("bind(flag {name})"), sys::bind(stream()?.as_raw_fd(), &flags));
    }
    Ok(())
}

fn listening(t: &mut Teller) -> Result<(), i32> {
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    t.outcome("bind(3:7010)", sys::bind(fd, &address(PARENT, PORT + 10)));
    t.outcome("connect to it before listen", sys::connect(stream()?.as_raw_fd(), &address(PARENT, PORT + 10)));
    t.outcome("listen", sys::listen(fd, 5));
    t.outcome("listen again", sys::listen(fd, 7));
    t.names("listener", fd);
    t.polled("listener", fd, 0);
    let mut value = [0; 4];
    let answer =
        sys::option(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, &mut value).map_or_else(error, |_| u32::from_le_bytes(value).to_string());
    t.tell("getsockopt(SO_ACCEPTCONN)", &answer);
    t.outcome("bind again", sys::bind(fd, &address(PARENT, PORT + 11)));
    t.outcome("connect from it", sys::connect(fd, &address(PARENT, PORT + 10)));
    t.outcome("send", sys::send(fd, b"x", 0));
    t.outcome("recv", sys::receive(fd, &mut [0; 4], 0));
    t.outcome("shutdown", sys::shutdown(fd, libc::SHUT_RDWR));
    sys::set_nonblocking(fd, true)?;
    t.outcome("accept, not blocking", sys::accept_unnamed(fd, 0).map(|_| 0));
    t.outcome("accept with room, not blocking", sys::accept(fd, &mut [0; ADDRESS], 0).map(|_| 0));
    sys::set_nonblocking(fd, false)?;
    // 20 ms, as SO_RCVTIMEO wants it.
    let time = [0_i64.to_le_bytes(), 20_000_i64.to_le_bytes()].concat();
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &time)?;
    t.outcome("accept with a receive timeout", sys::accept_unnamed(fd, 0).map(|_| 0));
    t.outcome("accept with room and a receive timeout", sys::accept(fd, &mut [0; ADDRESS], 0).map(|_| 0));
    Ok(())
}

fn refused(t: &mut Teller) -> Result<(), i32> {
    for (cid, name) in [(PARENT, "3"), (1, "1")] {
        let socket = stream()?;
        let fd = socket.as_raw_fd();
        t.outcome(&format!("connect({name}:7020), where nobody listens"), sys::connect(fd, &address(cid, PORT + 20)));
        t.names("it", fd);
        t.polled("it", fd, 0);
        t.outcome("connect again", sys::connect(fd, &address(cid, PORT + 20)));
    }
    for (cid, name) in [(ANY, "any"), (0, "0"), (7, "7")] {
        let socket = stream()?;
        t.outcome(&format!("connect({name}:7020)"), sys::connect(socket.as_raw_fd(), &address(cid, PORT + 20)));
    }
    let socket = stream()?;
    let fd = socket.as_raw_fd();
    t.outcome("connect(3:any)", sys::connect(fd, &address(PARENT, ANY)));
    t.outcome("connect(short address)", sys::connect(fd, address(PARENT, PORT + 20).get(..12).unwrap_or_default()));
    t.outcome("connect(family 1)", sys::connect(fd, &address_of(libc::AF_UNIX, PARENT, PORT + 20)));
    t.outcome("connect(family 0)", sys::connect(fd, &address_of(0, PARENT, PORT + 20)));
    t.polled("it", fd, 0);
    Ok(())
}

/// A listener, a client that is connected to it, and what it has accepted.
fn pair(port: u32) -> Result<(OwnedFd, OwnedFd, OwnedFd), i32> {
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, port))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    let client = stream()?;
    sys::connect(client.as_raw_fd(), &address(PARENT, port))?;
    let accepted = sys::accept_unnamed(listener.as_raw_fd(), libc::SOCK_CLOEXEC)?;
    Ok((listener, client, accepted))
}

fn connection(t: &mut Teller) -> Result<(), i32> {
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(ANY, PORT + 30))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    let client = stream()?;
    let fd = client.as_raw_fd();
    t.outcome("connect(3:7030)", sys::connect(fd, &address(PARENT, PORT + 30)));
    t.polled("listener", listener.as_raw_fd(), libc::POLLIN);
    t.polled("client", fd, libc::POLLOUT);
    let mut room = [0; ADDRESS];
    let (accepted, size) = sys::accept(listener.as_raw_fd(), &mut room, libc::SOCK_CLOEXEC)?;
    t.tell("accept", &format!("{}, length {size}", shown(&room)));
    t.names("client", fd);
    let mut own = [0; ADDRESS];
    sys::name(fd, Name::Own, &mut own)?;
    let is_same = own.get(4..8) == room.get(4..8);
    t.tell("the client's own port is what accept gave", &is_same.to_string());
    t.names("accepted", accepted.as_raw_fd());
    t.polled("accepted", accepted.as_raw_fd(), libc::POLLOUT);
    for (whose, fd) in [("client", fd), ("accepted", accepted.as_raw_fd())] {
        let mut value = [0; 4];
        let answer =
            sys::option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, &mut value).map_or_else(error, |_| u32::from_le_bytes(value).to_string());
        t.tell(&format!("getsockopt({whose}, SO_DOMAIN)"), &answer);
        let answer = sys::option(fd, FAMILY, 2, &mut [0; 8]).map_or_else(error, |size| format!("length {size}"));
        t.tell(&format!("getsockopt({whose}, AF_VSOCK, 2)"), &answer);
    }
    t.outcome("connect again", sys::connect(fd, &address(PARENT, PORT + 30)));
    t.outcome("bind", sys::bind(fd, &address(PARENT, PORT + 31)));
    t.outcome("listen", sys::listen(fd, 5));
    t.outcome("accept", sys::accept_unnamed(fd, 0).map(|_| 0));
    t.outcome("connect of the accepted", sys::connect(accepted.as_raw_fd(), &address(PARENT, PORT + 30)));
    t.outcome("send", sys::send(fd, b"hello", 0));
    t.polled("accepted", accepted.as_raw_fd(), libc::POLLIN);
    t.outcome("ioctl(FIONREAD)", sys::ioctl_number(accepted.as_raw_fd(), libc::FIONREAD));
    let mut bytes = [0; 16];
    t.outcome("recv(MSG_PEEK)", sys::receive(accepted.as_raw_fd(), &mut bytes, libc::MSG_PEEK));
    t.outcome("recv(3 bytes)", sys::receive(accepted.as_raw_fd(), bytes.get_mut(..3).unwrap_or_default(), 0));
    t.outcome("recv", sys::receive(accepted.as_raw_fd(), &mut bytes, 0));
    t.outcome("recv(MSG_DONTWAIT)", sys::receive(accepted.as_raw_fd(), &mut bytes, libc::MSG_DONTWAIT));
    t.outcome("send back", sys::send(accepted.as_raw_fd(), b"there", 0));
    t.outcome("recv", sys::receive(fd, &mut [0; 5], libc::MSG_WAITALL));
    t.outcome("sendto with an address", sys::send_to(fd, b"x", &address(PARENT, PORT + 30)));
    t.outcome("send(nothing)", sys::send(fd, b"", 0));
    t.outcome("send(MSG_OOB)", sys::send(fd, b"x", libc::MSG_OOB));
    // The listener goes, what it has accepted stays.
    drop(listener);
    t.outcome("send after the listener was closed", sys::send(fd, b"more", 0));
    t.polled("accepted", accepted.as_raw_fd(), libc::POLLIN);
    Ok(())
}

fn ends(t: &mut Teller) -> Result<(), i32> {
    let (_listener, client, accepted) = pair(PORT + 40)?;
    let (c, a) = (client.as_raw_fd(), accepted.as_raw_fd());
    let mut bytes = [0; 16];
    sys::send(c, b"last", 0)?;
    t.outcome("shutdown(client, writing)", sys::shutdown(c, libc::SHUT_WR));
    t.polled("accepted", a, libc::POLLRDHUP);
    t.polled("client", c, libc::POLLOUT);
    t.outcome("recv", sys::receive(a, &mut bytes, 0));
    t.outcome("recv at the end", sys::receive(a, &mut bytes, 0));
    t.outcome("send by the client", sys::send(c, b"x", 0));
    t.outcome("send the other way", sys::send(a, b"answer", 0));
    t.outcome("recv", sys::receive(c, &mut [0; 6], libc::MSG_WAITALL));
    drop(accepted);
    t.polled("client after the other end's close", c, libc::POLLRDHUP);
    t.outcome("recv", sys::receive(c, &mut bytes, 0));
    t.outcome("shutdown again", sys::shutdown(c, libc::SHUT_RDWR));
    t.names("client", c);

    let (_listener, client, accepted) = pair(PORT + 41)?;
    let c = client.as_raw_fd();
    drop(accepted);
    t.polled("client after close", c, libc::POLLRDHUP);
    t.outcome("recv", sys::receive(c, &mut bytes, 0));
    t.outcome("send", sys::send(c, b"x", 0));
    t.names("client", c);

    let (_listener, client, accepted) = pair(PORT + 42)?;
    let (c, a) = (client.as_raw_fd(), accepted.as_raw_fd());
    t.outcome("shutdown(client, reading)", sys::shutdown(c, libc::SHUT_RD));
    t.outcome("recv", sys::receive(c, &mut bytes, 0));
    t.outcome("shutdown(how 3)", sys::shutdown(c, 3));
    let _ = sys::poll(a, libc::POLLERR, QUIET_MS);
    t.outcome("send to it", sys::send(a, b"x", 0));
    Ok(())
}

fn reset(t: &mut Teller) -> Result<(), i32> {
    let (_listener, client, accepted) = pair(PORT + 50)?;
    let mut bytes = [0; 16];
    sys::send(client.as_raw_fd(), b"never read", 0)?;
    let _ = sys::poll(accepted.as_raw_fd(), libc::POLLIN, PATIENCE_MS);
    drop(accepted);
    t.polled("client, of whose data none was read", client.as_raw_fd(), libc::POLLRDHUP);
    t.outcome("recv", sys::receive(client.as_raw_fd(), &mut bytes, 0));
    t.outcome("recv again", sys::receive(client.as_raw_fd(), &mut bytes, 0));

    // The listener goes before it has accepted.
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 51))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    let client = stream()?;
    sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 51))?;
    drop(listener);
    t.polled("client that was never accepted", client.as_raw_fd(), libc::POLLRDHUP);
    t.outcome("recv", sys::receive(client.as_raw_fd(), &mut bytes, libc::MSG_DONTWAIT));
    t.outcome("send", sys::send(client.as_raw_fd(), b"x", 0));
    Ok(())
}

fn accepting(t: &mut Teller) -> Result<(), i32> {
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 60))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    for (room, flags, name) in [
        (0, 0, "room 0"),
        (4, 0, "room 4"),
        (64, libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, "room 64, NONBLOCK and CLOEXEC"),
        (64, 0, "room 64"),
    ] {
        let client = stream()?;
        sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 60))?;
        let mut bytes = vec![0; room];
        match sys::accept(listener.as_raw_fd(), &mut bytes, flags) {
            Ok((accepted, size)) => {
                // A receive without data is EAGAIN only if it does not block.
                let blocks = if flags == 0 { "not asked".to_owned() } else { said(sys::receive(accepted.as_raw_fd(), &mut [0; 4], 0)) };
                t.tell(&format!("accept({name})"), &format!("length {size}, then recv: {blocks}"));
            }
            Err(errno) => t.tell(&format!("accept({name})"), &error(errno)),
        }
    }
    t.outcome("accept(unknown flag)", sys::accept(listener.as_raw_fd(), &mut [0; ADDRESS], 1).map(|_| 0));
    // One that waits until another thread connects.
    let _thread = connect_later(PORT + 60);
    let mut bytes = [0; ADDRESS];
    let accepted = sys::accept(listener.as_raw_fd(), &mut bytes, 0);
    t.tell("accept that waits", &accepted.map_or_else(error, |_| shown(&bytes)));
    let _thread = connect_later(PORT + 60);
    t.outcome("accept that waits and wants no address", sys::accept_unnamed(listener.as_raw_fd(), 0).map(|_| 0));
    Ok(())
}

/// A thread that connects after a moment.
fn connect_later(port: u32) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(150));
        if let Ok(client) = stream() {
            let _ = sys::connect(client.as_raw_fd(), &address(PARENT, port));
        }
    })
}

fn bound_client(t: &mut Teller) -> Result<(), i32> {
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 70))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    // Bound to 3 it would not connect: the loopback transport answers to 1.
    for (cid, port, name) in [(ANY, PORT + 72, "any:7072"), (ANY, ANY, "any:any")] {
        let client = stream()?;
        t.outcome(&format!("bind({name})"), sys::bind(client.as_raw_fd(), &address(cid, port)));
        t.outcome("connect", sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 70)));
        let mut room = [0; ADDRESS];
        let accepted = sys::accept(listener.as_raw_fd(), &mut room, 0)?;
        t.tell("accept", &shown(&room));
        t.names("client", client.as_raw_fd());
        t.names("accepted", accepted.0.as_raw_fd());
        t.outcome("send", sys::send(client.as_raw_fd(), b"x", 0));
        t.outcome("recv", sys::receive(accepted.0.as_raw_fd(), &mut [0; 4], 0));
    }
    Ok(())
}

fn not_blocking(t: &mut Teller) -> Result<(), i32> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 80))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    let client = sys::socket(FAMILY, kind, 0)?;
    let fd = client.as_raw_fd();
    // Done at once or under way: programs must take both.
    let first = sys::connect(fd, &address(PARENT, PORT + 80));
    t.tell("connect", if matches!(first, Ok(0) | Err(libc::EINPROGRESS)) { "0 or EINPROGRESS" } else { "another answer" });
    t.polled("client", fd, libc::POLLOUT);
    let mut value = [0; 4];
    sys::option(fd, libc::SOL_SOCKET, libc::SO_ERROR, &mut value)?;
    t.tell("getsockopt(SO_ERROR)", &u32::from_le_bytes(value).to_string());
    t.names("client", fd);
    let again = sys::connect(fd, &address(PARENT, PORT + 80));
    t.outcome("connect again", again);
    t.outcome("recv", sys::receive(fd, &mut [0; 4], 0));
    t.outcome("send", sys::send(fd, b"x", 0));

    let client = sys::socket(FAMILY, kind, 0)?;
    let fd = client.as_raw_fd();
    t.outcome("connect where nobody listens", sys::connect(fd, &address(PARENT, PORT + 81)));
    t.polled("client", fd, libc::POLLOUT);
    let mut value = [0; 4];
    sys::option(fd, libc::SOL_SOCKET, libc::SO_ERROR, &mut value)?;
    t.tell("getsockopt(SO_ERROR)", &u32::from_le_bytes(value).to_string());
    t.name("getpeername", fd, Name::Peer);
    sys::option(fd, libc::SOL_SOCKET, libc::SO_ERROR, &mut value)?;
    t.tell("getsockopt(SO_ERROR) again", &u32::from_le_bytes(value).to_string());
    t.outcome("send", sys::send(fd, b"x", 0));
    t.outcome("connect where somebody listens", sys::connect(fd, &address(PARENT, PORT + 80)));
    sys::set_nonblocking(fd, false)?;
    t.outcome("connect that blocks", sys::connect(fd, &address(PARENT, PORT + 80)));
    t.outcome("connect that blocks, again", sys::connect(fd, &address(PARENT, PORT + 80)));
    Ok(())
}

fn watched(t: &mut Teller) -> Result<(), i32> {
    // What is registered before connect must still be told after it.
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 90))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    let waits = sys::epoll(listener.as_raw_fd(), u32::from(libc::POLLIN.cast_unsigned()))?;
    t.tell("epoll(listener)", &sys::epoll_wait(waits.as_raw_fd(), QUIET_MS).map_or_else(error, events));
    let client = stream()?;
    let watch = sys::epoll(client.as_raw_fd(), u32::from((libc::POLLIN | libc::POLLRDHUP).cast_unsigned()))?;
    sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 90))?;
    t.tell("epoll(listener)", &sys::epoll_wait(waits.as_raw_fd(), PATIENCE_MS).map_or_else(error, events));
    let accepted = sys::accept_unnamed(listener.as_raw_fd(), 0)?;
    t.tell("epoll(client)", &sys::epoll_wait(watch.as_raw_fd(), QUIET_MS).map_or_else(error, events));
    sys::send(accepted.as_raw_fd(), b"x", 0)?;
    t.tell("epoll(client) with data", &sys::epoll_wait(watch.as_raw_fd(), PATIENCE_MS).map_or_else(error, events));
    Ok(())
}

fn backlog(t: &mut Teller) -> Result<(), i32> {
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 100))?;
    sys::listen(listener.as_raw_fd(), 2)?;
    let mut clients = Vec::new();
    for _ in 0..5 {
        let client = stream()?;
        t.outcome("connect", sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 100)));
        clients.push(client);
    }
    let client = sys::socket(FAMILY, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    t.outcome("connect, not blocking", sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 100)));
    let _ = sys::poll(client.as_raw_fd(), libc::POLLOUT, PATIENCE_MS);
    let mut value = [0; 4];
    sys::option(client.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, &mut value)?;
    t.tell("getsockopt(SO_ERROR)", &u32::from_le_bytes(value).to_string());
    drop(sys::accept_unnamed(listener.as_raw_fd(), 0)?);
    let client = stream()?;
    t.outcome("connect when one was accepted", sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 100)));
    Ok(())
}

fn seqpacket(t: &mut Teller) -> Result<(), i32> {
    let new = || sys::socket(FAMILY, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
    let listener = new()?;
    t.outcome("bind", sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 110)));
    t.outcome("bind of a stream", sys::bind(stream()?.as_raw_fd(), &address(PARENT, PORT + 110)));
    t.outcome("listen", sys::listen(listener.as_raw_fd(), 5));
    t.outcome("connect of a stream", sys::connect(stream()?.as_raw_fd(), &address(PARENT, PORT + 110)));
    let client = new()?;
    t.outcome("connect", sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 110)));
    sys::set_nonblocking(listener.as_raw_fd(), true)?;
    let _ = sys::poll(listener.as_raw_fd(), libc::POLLIN, QUIET_MS);
    let Some(accepted) = t.made("accept", sys::accept_unnamed(listener.as_raw_fd(), 0)) else { return Ok(()) };
    t.outcome("send(3 bytes)", sys::send(client.as_raw_fd(), b"abc", 0));
    t.outcome("send(2 bytes)", sys::send(client.as_raw_fd(), b"de", 0));
    let mut bytes = [0; 16];
    let _ = sys::poll(accepted.as_raw_fd(), libc::POLLIN, PATIENCE_MS);
    t.outcome("recv(room 2)", sys::receive(accepted.as_raw_fd(), bytes.get_mut(..2).unwrap_or_default(), 0));
    t.outcome("recv", sys::receive(accepted.as_raw_fd(), &mut bytes, 0));
    t.names("accepted", accepted.as_raw_fd());
    Ok(())
}

fn signals(t: &mut Teller) -> Result<(), i32> {
    let listener = stream()?;
    sys::bind(listener.as_raw_fd(), &address(PARENT, PORT + 120))?;
    sys::listen(listener.as_raw_fd(), 5)?;
    let fd = listener.as_raw_fd();
    sys::alarm(200, false);
    t.outcome("accept, a signal without SA_RESTART", sys::accept_unnamed(fd, 0).map(|_| 0));
    t.outcome("accept with room, a signal without SA_RESTART", sys::accept(fd, &mut [0; ADDRESS], 0).map(|_| 0));
    t.tell("the handler has run", &(sys::alarms() > 0).to_string());
    sys::alarm(40, true);
    let _thread = connect_later(PORT + 120);
    t.outcome("accept, signals with SA_RESTART", sys::accept_unnamed(fd, 0).map(|_| 0));
    let _thread = connect_later(PORT + 120);
    t.outcome("accept with room, signals with SA_RESTART", sys::accept(fd, &mut [0; ADDRESS], 0).map(|_| 0));
    t.tell("the handler has run", &(sys::alarms() > 0).to_string());
    sys::alarm(0, false);
    Ok(())
}

fn shared(t: &mut Teller) -> Result<(), i32> {
    let listener = stream()?;
    let copy = sys::duplicate(listener.as_raw_fd())?;
    t.outcome("bind of a copy", sys::bind(copy.as_raw_fd(), &address(PARENT, PORT + 130)));
    t.name("getsockname(the other)", listener.as_raw_fd(), Name::Own);
    drop(copy);
    sys::listen(listener.as_raw_fd(), 5)?;
    let fd = listener.as_raw_fd();
    let child =
        || in_child(move || i64::from(stream().and_then(|client| sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 130))).is_ok()));
    t.tell("a child connects", &child().map_or_else(|error| error.to_string(), |value| value.to_string()));
    let named = in_child(move || {
        let mut room = [0; ADDRESS];
        let Ok((accepted, _)) = sys::accept(fd, &mut room, 0) else { return 0 };
        i64::from(sys::name(accepted.as_raw_fd(), Name::Own, &mut room).is_ok() && room.get(4..8) == Some(&(PORT + 130).to_le_bytes()[..]))
    });
    t.tell("another child accepts and knows its port", &named.map_or_else(|error| error.to_string(), |value| value.to_string()));
    let client = stream()?;
    t.outcome("connect", sys::connect(client.as_raw_fd(), &address(PARENT, PORT + 130)));
    let own = client.as_raw_fd();
    let same = in_child(move || i64::from(sys::name(own, Name::Peer, &mut [0; ADDRESS]).is_ok()));
    t.tell("getpeername in a child", &same.map_or_else(|error| error.to_string(), |value| value.to_string()));
    Ok(())
}

fn device(t: &mut Teller) -> Result<(), i32> {
    /// `IOCTL_VM_SOCKETS_GET_LOCAL_CID` (linux/vm_sockets.h).
    const LOCAL_CID: u64 = 0x7B9;
    use std::os::unix::fs::FileTypeExt as _;
    let kind = std::fs::metadata("/dev/vsock").map(|metadata| metadata.file_type().is_char_device());
    t.tell("/dev/vsock is a character device", &kind.map_or_else(|error| error.to_string(), |yes| yes.to_string()));
    for (name, write) in [("for reading", false), ("for both", true)] {
        match std::fs::File::options().read(true).write(write).open("/dev/vsock") {
            Ok(file) => {
                t.outcome(&format!("open {name}, then ioctl(GET_LOCAL_CID)"), sys::ioctl_number(file.as_raw_fd(), LOCAL_CID));
                t.outcome("ioctl(another)", sys::ioctl_number(file.as_raw_fd(), 0x7BA));
            }
            Err(error) => t.tell(&format!("open {name}"), &error.to_string()),
        }
    }
    t.outcome("ioctl(GET_LOCAL_CID) of a socket", sys::ioctl_number(stream()?.as_raw_fd(), LOCAL_CID));
    Ok(())
}
