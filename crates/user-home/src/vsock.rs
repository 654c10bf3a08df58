//! AF_VSOCK of clients: [`Sockets`].
//!
//! A client's AF_VSOCK socket is a UNIX socket that meets others in the world ([`nitroxide_world::rendezvous`]). Data flow natively; only the calls that have addresses in
//! them are answered here. What a UNIX socket does not know of itself is remembered by its inode ([`Socket`]); a socket that the kernel has accepted without us is
//! known by its names.

mod accept;
mod address;
mod connect;
mod options;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nitroxide_abi::Code;
use nitroxide_world::rendezvous::HEARTBEAT_PORT;
use nitroxide_world::{Endpoint, SocketFile, VsockAddress, World};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::answer::Answer;
use crate::caller::Caller;
use crate::handed::{Identity, identity};
use crate::lock;
use crate::paths::{low, low_signed};
use crate::sys::Notification;
pub(crate) use address::PARENT;
use address::{ANY, FAMILY, HOST, LOCAL};
use options::Options;

/// The family, as a filter compares it.
pub(crate) const AF_VSOCK: u32 = FAMILY as u32;
/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID` (linux/vm_sockets.h), of `/dev/vsock`.
pub(crate) const GET_LOCAL_CID: u32 = 0x7B9;

/// `LAST_RESERVED_PORT` (net/vmw_vsock/af_vsock.c): chosen ports are above it.
const LAST_RESERVED_PORT: u32 = 1023;
/// The highest number of a socket type, `SOCK_PACKET`.
const LAST_KIND: u32 = 10;
/// Ports that are remembered of listeners that are gone.
const MOST_BOUND: usize = 1 << 16;
/// Looks at the list of sockets before one that is not in it counts as gone.
const LOOKS: usize = 3;
/// How long a port may be in use by nothing but copies of descriptors of ours.
const LAST_COPIES: Duration = Duration::from_millis(150);
/// Sockets that are remembered before the first look at which are still there.
const FIRST_SWEEP: usize = 128;

/// What type it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Stream,
    Packets,
}

/// What its client sees of a socket and the UNIX socket does not know.
#[derive(Debug)]
struct Socket {
    kind: Kind,
    /// As getsockname() gives it.
    own: Option<VsockAddress>,
    /// As getpeername() gives it.
    peer: Option<VsockAddress>,
    /// Has the UNIX socket a name? It can have one only.
    is_named: bool,
    options: Options,
    /// Where it is bound.
    file: Option<SocketFile>,
    /// The process that has bound it, where it is the port of heartbeats.
    heartbeats_of: Option<i32>,
    /// Whose turn it is to bind, to connect or to accept. Who has it may wait.
    turn: Arc<Mutex<()>>,
    /// Is the UNIX socket connected to nobody, after a connect() that was refused and did not block? It cannot be connected any more.
    is_spent: bool,
}

impl Socket {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            own: None,
            peer: None,
            is_named: false,
            options: Options::default(),
            file: None,
            heartbeats_of: None,
            turn: Arc::default(),
            is_spent: false,
        }
    }
}

type Tracked = Mutex<Socket>;

/// The sockets of all clients.
///
/// Locks: a socket's turn, the world's, a socket, the table, each with only later ones inside. The thread that takes notifications takes the last two.
#[derive(Debug)]
pub(crate) struct Sockets {
    world: World,
    table: Mutex<Table>,
    /// Can descriptors of clients be copied? Without that no socket can be bound or connected for them.
    has_copies: bool,
    /// Rings when [`Sockets::settle`] has something to do.
    bell: OwnedFd,
}

#[derive(Debug)]
struct Table {
    sockets: HashMap<Identity, Arc<Tracked>>,
    /// Ports that clients have bound, now or before: whoever was accepted from one is ours. Programs of ours have UNIX sockets of the same shape.
    bound: HashSet<u32>,
    sweep_at: usize,
}

/// Room for an address or an option in a client's memory, and where its length is.
#[derive(Clone, Copy, Debug)]
struct Room {
    address: u64,
    length_at: u64,
    length: usize,
}

impl Room {
    fn of(caller: &Caller<'_>, address: u64, length_at: u64) -> Result<Self, i32> {
        let mut length = [0; 4];
        caller.read(length_at, &mut length).map_err(Code::number)?;
        let length = usize::try_from(i32::from_le_bytes(length)).map_err(|_| libc::EINVAL)?;
        Ok(Self { address, length_at, length })
    }

    /// As much of an address as there is room for, and its whole length.
    fn write_address(self, caller: &Caller<'_>, address: VsockAddress) -> Result<(), i32> {
        self.write(caller, &address::write(address), address::BYTES)
    }

    fn write(self, caller: &Caller<'_>, bytes: &[u8], length: usize) -> Result<(), i32> {
        let shown = bytes.get(..self.length).unwrap_or(bytes);
        if !shown.is_empty() {
            caller.write(self.address, shown).map_err(Code::number)?;
        }
        let length = i32::try_from(length).unwrap_or(i32::MAX);
        caller.write(self.length_at, &length.to_le_bytes()).map_err(Code::number)
    }
}

impl Sockets {
    /// # Errors
    ///
    /// EMFILE.
    pub(crate) fn new(world: World, has_copies: bool) -> io::Result<Self> {
        let table = Mutex::new(Table { sockets: HashMap::new(), bound: HashSet::new(), sweep_at: FIRST_SWEEP });
        Ok(Self { world, table, has_copies, bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Readable when it is time for [`Sockets::settle`].
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn ring(&self) {
        // Full is as good as rung.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// socket(AF_VSOCK).
    pub(crate) fn create(&self, notification: &Notification) -> Answer {
        if !self.has_copies {
            tracing::warn!("a client gets no AF_VSOCK: pidfd_getfd is forbidden here; in a container, allow it in the seccomp profile");
            return Answer::Error(libc::EPERM);
        }
        let [_, kind, protocol, ..] = notification.arguments;
        let (kind, protocol) = (low(kind), low(protocol));
        let flags = kind & !0xF;
        let (nonblocking, cloexec) = (libc::SOCK_NONBLOCK.cast_unsigned(), libc::SOCK_CLOEXEC.cast_unsigned());
        if flags & !(nonblocking | cloexec) != 0 || kind & 0xF > LAST_KIND {
            return Answer::Error(libc::EINVAL);
        }
        if protocol != 0 && protocol != u32::from(FAMILY) {
            return Answer::Error(libc::EPROTONOSUPPORT);
        }
        let (kind, socket_type) = match (kind & 0xF).cast_signed() {
            libc::SOCK_STREAM => (Kind::Stream, SocketType::STREAM),
            libc::SOCK_SEQPACKET => (Kind::Packets, SocketType::SEQPACKET),
            // No transport of a parent has datagrams.
            libc::SOCK_DGRAM => return Answer::Error(libc::ENODEV),
            _ => return Answer::Error(libc::ESOCKTNOSUPPORT),
        };
        let own_flags = if flags & nonblocking != 0 { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
        let made = socket_with(AddressFamily::UNIX, socket_type, SocketFlags::CLOEXEC | own_flags, None).map_err(io::Error::from);
        match made.and_then(|socket| Ok((identity(socket.as_fd())?, socket))) {
            Ok((identity, socket)) => {
                self.track(identity, Socket::new(kind));
                Answer::Descriptor(socket, flags & cloexec != 0)
            }
            Err(error) => error.into(),
        }
    }

    /// bind().
    pub(crate) fn bind(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, address, length, ..] = notification.arguments;
        let Some((tracked, copy)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        let address = match read_address(caller, address, length) {
            Ok(address) => address,
            Err(errno) => return Answer::Error(errno),
        };
        let turn = Arc::clone(&lock(&tracked).turn);
        let _turn = lock(&turn);
        if lock(&tracked).own.is_some() {
            return Answer::Error(libc::EINVAL);
        }
        if ![ANY, PARENT, LOCAL, HOST].contains(&address.cid) {
            return Answer::Error(libc::EADDRNOTAVAIL);
        }
        let until = Instant::now() + LAST_COPIES;
        loop {
            let port = if address.port == ANY { self.free_port() } else { Ok(address.port) };
            let (port, process) = match port.and_then(|port| Ok((port, caller.process()?))) {
                Ok(both) => both,
                Err(error) => return error.into(),
            };
            let is_heartbeats = port == HEARTBEAT_PORT;
            let endpoint = if is_heartbeats { Endpoint::Heartbeat(process.cast_unsigned()) } else { Endpoint::ParentPort(port) };
            match self.world.bind_socket(&copy, endpoint) {
                Ok(file) => {
                    lock(&self.table).bound.insert(port);
                    let mut socket = lock(&tracked);
                    socket.file = Some(file);
                    socket.heartbeats_of = is_heartbeats.then_some(process);
                    socket.own = Some(VsockAddress { port, ..address });
                    socket.is_named = true;
                    drop(socket);
                    self.ring();
                    return Answer::Value(0);
                }
                Err(error) if error.errno() == libc::EADDRINUSE && address.port == ANY => {}
                // Whoever was killed in accept() has it a moment longer, by the copy that is used here.
                Err(error) if error.errno() == libc::EADDRINUSE && Instant::now() < until && caller.is_waiting() => {
                    std::thread::sleep(LAST_COPIES / 20);
                }
                Err(error) => {
                    tracing::info!(port, %error, "a client's port cannot be bound");
                    return Answer::Error(error.errno());
                }
            }
        }
    }

    /// connect().
    pub(crate) fn connect(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, address, length, ..] = notification.arguments;
        let Some((tracked, copy)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        match read_address(caller, address, length) {
            Ok(address) => self.connect_tracked(caller, &tracked, &copy, address),
            Err(errno) => Answer::Error(errno),
        }
    }

    /// accept() and accept4() with room for an address.
    pub(crate) fn accept(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, address, length, flags, ..] = notification.arguments;
        let Some((tracked, copy)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        let flags = if notification.call == libc::SYS_accept { 0 } else { low(flags) };
        match Room::of(caller, address, length) {
            Ok(room) => self.accept_tracked(caller, &tracked, &copy, room, flags),
            Err(errno) => Answer::Error(errno),
        }
    }

    /// shutdown(), of one that is connected made by the kernel.
    pub(crate) fn shutdown(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, how, ..] = notification.arguments;
        let Some((tracked, _)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        let is_connected = lock(&tracked).peer.is_some();
        if is_connected || low(how) > 2 { Answer::GoesOn } else { Answer::Error(libc::ENOTCONN) }
    }

    /// getsockname() and getpeername().
    pub(crate) fn name_of(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, address, length, ..] = notification.arguments;
        let Some((tracked, _)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        let name = {
            let socket = lock(&tracked);
            if notification.call == libc::SYS_getpeername { socket.peer } else { Some(socket.own.unwrap_or(address::NONE)) }
        };
        let Some(name) = name else { return Answer::Error(libc::ENOTCONN) };
        match Room::of(caller, address, length).and_then(|room| room.write_address(caller, name)) {
            Ok(()) => Answer::Value(0),
            Err(errno) => Answer::Error(errno),
        }
    }

    /// getsockopt() of level AF_VSOCK, and of SO_DOMAIN.
    pub(crate) fn option(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, level, option, value, length, _] = notification.arguments;
        let (level, option) = (low(level), low(option));
        let is_domain = level == libc::SOL_SOCKET.cast_unsigned() && option == libc::SO_DOMAIN.cast_unsigned();
        if !is_domain && level != u32::from(FAMILY) {
            return Answer::GoesOn;
        }
        let Some((tracked, _)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        let written = Room::of(caller, value, length).and_then(|room| {
            if is_domain {
                return room.write(caller, &u32::from(FAMILY).to_le_bytes(), room.length.min(4));
            }
            let value = lock(&tracked).options.get(option, room.length)?;
            room.write(caller, &value, value.len())
        });
        written.map_or_else(Answer::Error, |()| Answer::Value(0))
    }

    /// setsockopt() of level AF_VSOCK.
    pub(crate) fn set_option(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, _, option, value, length, _] = notification.arguments;
        let Some((tracked, _)) = self.find(caller, low_signed(descriptor)) else { return Answer::GoesOn };
        let (option, length) = (low(option), usize::try_from(low_signed(length)).unwrap_or(0));
        let set = Options::bytes_of(option, length).and_then(|bytes| {
            let mut whole = [0; 16];
            let bytes = whole.get_mut(..bytes).unwrap_or_default();
            caller.read(value, bytes).map_err(Code::number)?;
            lock(&tracked).options.set(option, bytes)
        });
        set.map_or_else(Answer::Error, |()| Answer::Value(0))
    }

    /// Whose listener gets the heartbeat of an enclave that this process has made: its own, or another client's if that one alone listens.
    pub(crate) fn heartbeat_listener(&self, process: i32) -> i32 {
        self.sweep();
        let listeners: Vec<i32> = self.all().iter().filter_map(|socket| lock(socket).heartbeats_of).collect();
        match listeners.as_slice() {
            [one] => *one,
            _ => process,
        }
    }

    fn heartbeat_endpoints(&self, caller: &Caller<'_>, port: u32) -> Option<Endpoint> {
        let process = caller.process().ok().filter(|_| port == HEARTBEAT_PORT)?;
        Some(Endpoint::Heartbeat(self.heartbeat_listener(process).cast_unsigned()))
    }

    /// Forgets sockets that nobody has any more; says whether some are left whose end should be noticed.
    pub(crate) fn settle(&self) -> bool {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        let is_one_bound = || self.all().iter().any(|socket| lock(socket).file.is_some());
        let is_full = || {
            let table = lock(&self.table);
            table.sockets.len() >= table.sweep_at
        };
        if is_full() || is_one_bound() {
            self.sweep();
        }
        is_one_bound()
    }

    /// Forgets all: no client is left. Whoever still works on a socket keeps no file of it.
    pub(crate) fn clear(&self) {
        for socket in self.all() {
            let file = lock(&socket).file.take();
            drop(file);
        }
        lock(&self.table).sockets.clear();
    }

    /// A socket of ours behind a client's descriptor, and a copy of that.
    ///
    /// None for others, and where the client's descriptors cannot be had. Of what is no socket nothing is copied or looked at: that could wait for a file system
    /// of the client's.
    fn find(&self, caller: &Caller<'_>, descriptor: i32) -> Option<(Arc<Tracked>, OwnedFd)> {
        let link = std::fs::read_link(format!("/proc/{}/fd/{descriptor}", caller.thread)).ok()?;
        if !link.as_os_str().as_bytes().starts_with(b"socket:[") {
            return None;
        }
        let copy = caller.copy_of(descriptor).ok()?;
        let identity = identity(copy.as_fd()).ok()?;
        let known = lock(&self.table).sockets.get(&identity).cloned();
        let tracked = match known {
            Some(tracked) => tracked,
            None => self.adopt(identity, &copy)?,
        };
        Some((tracked, copy))
    }

    /// Takes up a socket that the kernel has accepted without us.
    fn adopt(&self, identity: Identity, copy: &OwnedFd) -> Option<Arc<Tracked>> {
        if sockopt::socket_domain(copy).ok()? != AddressFamily::UNIX {
            return None;
        }
        let own = connect::own_of(copy).filter(|own| lock(&self.table).bound.contains(&own.port))?;
        let kind = if sockopt::socket_type(copy).ok()? == SocketType::STREAM { Kind::Stream } else { Kind::Packets };
        let peer = rustix::net::getpeername(copy).is_ok().then(|| connect::peer_of(copy));
        Some(self.track(identity, Socket { own: Some(own), peer, is_named: true, ..Socket::new(kind) }))
    }

    /// All of them; with the table locked none of them may be waited for.
    fn all(&self) -> Vec<Arc<Tracked>> {
        lock(&self.table).sockets.values().cloned().collect()
    }

    fn track(&self, identity: Identity, socket: Socket) -> Arc<Tracked> {
        let tracked = Arc::new(Mutex::new(socket));
        let is_time = {
            let mut table = lock(&self.table);
            table.sockets.insert(identity, Arc::clone(&tracked));
            table.sockets.len() >= table.sweep_at
        };
        if is_time {
            self.ring();
        }
        tracked
    }

    /// Forgets what is no socket any more. One that was made after the look is not known to be gone.
    fn sweep(&self) {
        let mut gone: HashSet<Identity> = lock(&self.table).sockets.keys().copied().collect();
        for _ in 0..LOOKS {
            let living = living();
            gone.retain(|identity| living.as_ref().is_some_and(|living| !living.contains(&identity.1)));
        }
        let mut table = lock(&self.table);
        let gone: Vec<_> = table.sockets.extract_if(|identity, _| gone.contains(identity)).collect();
        table.sweep_at = table.sockets.len().saturating_mul(2).max(FIRST_SWEEP);
        if table.bound.len() > MOST_BOUND {
            table.bound = table.sockets.values().filter_map(|socket| Some(socket.try_lock().ok()?.own?.port)).collect();
        }
        drop(table);
        // Their files go, which waits for the world's lock.
        drop(gone);
    }

    /// A port that no client of this `exec` has.
    fn free_port(&self) -> io::Result<u32> {
        let taken: HashSet<u32> = {
            // One that is being worked on by this very call has none yet.
            self.all().iter().filter_map(|socket| Some(socket.try_lock().ok()?.own?.port)).collect()
        };
        loop {
            let mut bytes = [0; 4];
            getrandom(&mut bytes, GetRandomFlags::empty())?;
            let port = u32::from_le_bytes(bytes);
            if port > LAST_RESERVED_PORT && port != ANY && !taken.contains(&port) {
                return Ok(port);
            }
        }
    }
}

/// The inodes of all UNIX sockets of this network namespace. Names in the list can be any bytes.
///
/// It is no snapshot: while it is read, a socket that gets a name moves from one part of it to another, once in its life, and one whose neighbour goes can be passed
/// over.
fn living() -> Option<HashSet<u64>> {
    let list = std::fs::read("/proc/net/unix").ok()?;
    let inode = |line: &[u8]| {
        let field = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).nth(6)?;
        std::str::from_utf8(field).ok()?.parse().ok()
    };
    Some(list.split(|byte| *byte == b'\n').filter_map(inode).collect())
}

/// An address in a client's memory; EINVAL for another family or too few bytes, as AF_VSOCK has it.
fn read_address(caller: &Caller<'_>, address: u64, length: u64) -> Result<VsockAddress, i32> {
    let mut bytes = [0; address::BYTES];
    if usize::try_from(low_signed(length)).is_ok_and(|length| (address::BYTES..=128).contains(&length)) {
        caller.read(address, &mut bytes).map_err(Code::number)?;
        return address::read(&bytes).ok_or(libc::EINVAL);
    }
    Err(libc::EINVAL)
}

fn is_nonblocking(socket: &OwnedFd) -> bool {
    fcntl_getfl(socket).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK))
}
