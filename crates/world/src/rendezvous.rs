//! Where sockets of a world meet: AF_VSOCK listeners of the parent and of enclaves, consoles, control sockets.
//!
//! Every listener is a socket file in the world's directory, so only who may enter that can connect. A file whose socket is gone is
//! rubbish and replaced. Whether it is gone is found out without disturbing the listener: connecting a *datagram* socket to it gives
//! ECONNREFUSED if nothing is bound to the file and EPROTOTYPE if a stream socket is (unix_find_bsd() in net/unix/af_unix.c), and in
//! neither case does accept() see anything. Paths go through /proc/self/fd, so a world's own path may be of any length.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, OFlags, fcntl_getfl, fcntl_setfl, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen,
    sendmsg, socket_with,
};

use crate::dir::{Room, World};
use crate::id::enclave_id;
use crate::lock::DirLock;
use crate::peer::{VsockAddress, bind_source, peer_address};

/// The port of the boot heartbeat on the parent (nitro-cli's `ENCLAVE_READY_VSOCK_PORT`).
pub const HEARTBEAT_PORT: u32 = 9000;

/// What nitro-cli adds to an enclave's CID to get its console's port on CID 0.
pub const CONSOLE_PORT_OFFSET: u32 = 10_000;

/// How many connections wait for accept(): more are refused.
const BACKLOG: i32 = 128;

/// The longest answer to `CONNECT`, `OK 4294967295` and a line feed.
const LONGEST_ANSWER: usize = 14;

/// A place to listen at or to connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// A port of the parent, CID 3: `vsock/3/<port>.sock`.
    ParentPort(u32),
    /// Port 9000 of the parent as bound by one process, by its process id: `vsock/3/9000.<pid>.sock`.
    Heartbeat(u32),
    /// The parent, where it is a virtual machine; a client sends `CONNECT <port>` first: `vsock/3.sock`.
    ParentVm,
    /// An enclave, by its CID; a client sends `CONNECT <port>` first: `vsock/<cid>.sock`.
    Enclave(u32),
    /// An enclave's console, by its CID: `vsock/0/<10000 + cid>.sock`.
    Console(u32),
    /// The control socket of an enclave, by its slot uid: `enclaves/<enclave id>.sock`.
    Control(u64),
}

impl Endpoint {
    /// The directory and the file's name in it.
    pub(crate) fn place(self) -> (Room, String) {
        match self {
            Self::ParentPort(port) => (Room::ParentPorts, format!("{port}.sock")),
            Self::Heartbeat(pid) => (Room::ParentPorts, format!("{HEARTBEAT_PORT}.{pid}.sock")),
            Self::ParentVm => (Room::Vsock, "3.sock".to_owned()),
            Self::Enclave(cid) => (Room::Vsock, format!("{cid}.sock")),
            // Wrapping, as nitro-cli's addition of two u32 does in a release build.
            Self::Console(cid) => (Room::HypervisorPorts, format!("{}.sock", cid.wrapping_add(CONSOLE_PORT_OFFSET))),
            Self::Control(slot_uid) => (Room::Enclaves, format!("{}.sock", enclave_id(slot_uid))),
        }
    }
}

/// Why a socket could not be bound.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum BindError {
    /// `{0}` is bound by a running process.
    InUse(PathBuf),
    /// `{0}` is not a socket; remove it.
    Foreign(PathBuf),
    /// No space is left for `{0}`; free some, or set NITROXIDE_RUNTIME_DIR to a directory elsewhere.
    NoSpace(PathBuf),
    /// `{0}` cannot be written; set NITROXIDE_RUNTIME_DIR to a directory on a writable file system.
    NotWritable(PathBuf, #[source] io::Error),
    /// `{0}` cannot be bound.
    Io(PathBuf, #[source] io::Error),
}

impl BindError {
    /// The errno that `bind` on AF_VSOCK answers with.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::InUse(_) | Self::Foreign(_) => Errno::ADDRINUSE,
            Self::NoSpace(_) => Errno::NOSPC,
            Self::NotWritable(_, error) | Self::Io(_, error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
        };
        errno.raw_os_error()
    }

    fn from_errno(path: PathBuf, errno: Errno) -> Self {
        match errno {
            Errno::ADDRINUSE => Self::InUse(path),
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace(path),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => Self::NotWritable(path, errno.into()),
            _ => Self::Io(path, errno.into()),
        }
    }
}

/// A socket's file; removed on drop, unless somebody else's has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    world: World,
    room: Room,
    name: String,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let dir = self.world.room(self.room);
        // Without the lock another process could replace the file between the look and the removal; then rather leave it to the sweep.
        let Ok(_held) = DirLock::take(dir) else { return };
        if let Ok(entry) = statat(dir, &self.name, AtFlags::SYMLINK_NOFOLLOW)
            && (entry.st_dev, entry.st_ino) == (self.device, self.inode)
        {
            let _ = unlinkat(dir, &self.name, AtFlags::empty());
        }
    }
}

/// A listening stream socket of a world.
#[derive(Debug)]
pub struct Listener {
    // Dropped first: the file goes before the socket closes, so no client meets a dead file.
    file: SocketFile,
    socket: UnixListener,
}

impl Listener {
    /// The listening socket itself, for polling and non-blocking use.
    #[must_use]
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Waits for the next connection and tells whose it is, if its other end said so.
    ///
    /// # Errors
    ///
    /// What `accept` gave.
    pub fn accept(&self) -> io::Result<(UnixStream, Option<VsockAddress>)> {
        let (stream, _) = self.socket.accept()?;
        // A peer that is gone already is nobody.
        let peer = peer_address(&stream).unwrap_or(None);
        Ok((stream, peer))
    }

    /// Takes the two halves apart: keep the file for as long as the socket listens.
    #[must_use]
    pub fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.socket, self.file)
    }
}

impl World {
    /// Binds a new stream socket and listens.
    ///
    /// # Errors
    ///
    /// [`BindError::InUse`] (EADDRINUSE) when a running process is bound there.
    pub fn bind(&self, endpoint: Endpoint) -> Result<Listener, BindError> {
        let (room, name) = endpoint.place();
        let failed = |errno| BindError::from_errno(self.display(room, &name), errno);
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
        let file = self.bind_socket(&socket, endpoint)?;
        listen(&socket, BACKLOG).map_err(failed)?;
        Ok(Listener { file, socket: socket.into() })
    }

    /// Binds a socket that somebody else made, without listening; clients are refused until its owner listens.
    ///
    /// # Errors
    ///
    /// As [`World::bind`].
    pub fn bind_socket(&self, socket: impl AsFd, endpoint: Endpoint) -> Result<SocketFile, BindError> {
        let (room, name) = endpoint.place();
        let dir = self.room(room);
        let failed = |errno| BindError::from_errno(self.display(room, &name), errno);
        let held = DirLock::take(dir).map_err(failed)?;
        match bind(&socket, &self.socket_address(room, &name).map_err(failed)?) {
            Err(Errno::ADDRINUSE) => {
                match self.probe(room, &name).map_err(failed)? {
                    Found::Bound => return Err(BindError::InUse(self.display(room, &name))),
                    Found::Foreign => return Err(BindError::Foreign(self.display(room, &name))),
                    Found::Stale => unlinkat(dir, &name, AtFlags::empty()).map_err(failed)?,
                    Found::Nothing => {}
                }
                bind(&socket, &self.socket_address(room, &name).map_err(failed)?).map_err(failed)?;
            }
            other => other.map_err(failed)?,
        }
        let entry = statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        drop(held);
        Ok(SocketFile { world: self.clone(), room, name, device: entry.st_dev, inode: entry.st_ino })
    }

    /// Connects to a listener of this world without ever waiting; the new socket is in blocking mode.
    ///
    /// `from` is what the listener will see as its peer.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` when nobody listens; `WouldBlock` when the listener's queue is full.
    pub fn connect(&self, endpoint: Endpoint, from: Option<VsockAddress>) -> io::Result<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        if let Some(from) = from {
            bind_source(&socket, from)?;
        }
        self.connect_socket(&socket, endpoint)?;
        set_blocking(&socket)?;
        Ok(socket.into())
    }

    /// Connects a socket that somebody else made; it waits as long as that socket does while the listener's queue is full.
    ///
    /// # Errors
    ///
    /// As [`World::connect`], and what else `connect` gives.
    pub fn connect_socket(&self, socket: impl AsFd, endpoint: Endpoint) -> io::Result<()> {
        let (room, name) = endpoint.place();
        let entry = statat(self.room(room), &name, AtFlags::SYMLINK_NOFOLLOW);
        match entry.map(|entry| FileType::from_raw_mode(entry.st_mode)) {
            Ok(FileType::Socket) => {}
            // Never through a symbolic link to who knows where.
            Ok(_) | Err(Errno::NOENT) => return Err(Errno::CONNREFUSED.into()),
            Err(errno) => return Err(errno.into()),
        }
        match connect(socket, &self.socket_address(room, &name)?) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(Errno::CONNREFUSED.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// As [`World::connect`], but waits up to `patience` while the listener's queue is full.
    ///
    /// # Errors
    ///
    /// As [`World::connect`].
    pub fn connect_patiently(&self, endpoint: Endpoint, from: Option<VsockAddress>, patience: Duration) -> io::Result<UnixStream> {
        let begin = Instant::now();
        loop {
            match self.connect(endpoint, from) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && begin.elapsed() < patience => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    /// Connects to a listener that stands for a whole guest and asks it for `port`, without ever waiting; the answer is `OK <port>` and a line
    /// feed, or the end of the stream.
    ///
    /// # Errors
    ///
    /// As [`World::connect`]; `ConnectionReset` when the listener hangs up at once.
    pub fn ask(&self, endpoint: Endpoint, from: Option<VsockAddress>, port: u32) -> io::Result<UnixStream> {
        let mut stream = self.connect(endpoint, from)?;
        // An empty send buffer takes these few bytes at once.
        send_question(&mut stream, "CONNECT", port)?;
        Ok(stream)
    }

    /// Asks a listener that stands for a whole guest whether it takes a connection to `port`, without ever waiting. The connection's stream is given when it does.
    ///
    /// # Errors
    ///
    /// As [`World::ask`].
    pub fn prepare(&self, endpoint: Endpoint, from: Option<VsockAddress>, port: u32) -> io::Result<Prepared> {
        let mut stream = self.connect(endpoint, from)?;
        send_question(&mut stream, "PREPARE", port)?;
        Ok(Prepared { stream, line: Vec::with_capacity(LONGEST_ANSWER) })
    }

    /// Connects to `port` of the parent, be it a process's listener or a virtual machine, as the address `from`.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` when nobody listens there, `ConnectionReset` when the virtual machine refuses, `TimedOut` when it says nothing for
    /// `timeout`.
    pub fn connect_parent(&self, from: VsockAddress, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        match self.connect_patiently(Endpoint::ParentPort(port), Some(from), timeout) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.connect_guest(Endpoint::ParentVm, from, port, timeout).map(|(stream, _)| stream)
            }
            other => other,
        }
    }

    /// Connects to `port` of the enclave with `cid`, as the address `from`; returns the stream and the port that the enclave sees as its peer's.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` when there is no such enclave, `ConnectionReset` when it does not listen there, `TimedOut` when it says
    /// nothing for `timeout`.
    pub fn connect_enclave(&self, from: VsockAddress, cid: u32, port: u32, timeout: Duration) -> io::Result<(UnixStream, u32)> {
        self.connect_guest(Endpoint::Enclave(cid), from, port, timeout)
    }

    fn connect_guest(&self, guest: Endpoint, from: VsockAddress, port: u32, timeout: Duration) -> io::Result<(UnixStream, u32)> {
        let mut stream = self.connect_patiently(guest, Some(from), timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        send_question(&mut stream, "CONNECT", port)?;
        let source_port = read_answer(&mut stream)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok((stream, source_port))
    }

    /// The address of a file in one of the world's directories; short whatever the world's path is.
    fn socket_address(&self, room: Room, name: &str) -> rustix::io::Result<SocketAddrUnix> {
        SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", self.room(room).as_raw_fd()))
    }

    /// Finds out what lies at a socket's place, without the listener noticing.
    pub(crate) fn probe(&self, room: Room, name: &str) -> rustix::io::Result<Found> {
        match statat(self.room(room), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(entry) if FileType::from_raw_mode(entry.st_mode) == FileType::Socket => {}
            Ok(_) => return Ok(Found::Foreign),
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            Err(errno) => return Err(errno),
        }
        let probe = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        match connect(&probe, &self.socket_address(room, name)?) {
            Err(Errno::CONNREFUSED) => Ok(Found::Stale),
            Err(Errno::NOENT) => Ok(Found::Nothing),
            // A datagram socket would accept us; it is bound, and that is all we want to know.
            Ok(()) | Err(Errno::PROTOTYPE) => Ok(Found::Bound),
            Err(errno) => Err(errno),
        }
    }
}

/// A guest that was asked for a connection whose stream is not there yet.
#[derive(Debug)]
pub struct Prepared {
    stream: UnixStream,
    /// What has come of the answer.
    line: Vec<u8>,
}

impl Prepared {
    /// Waits for the guest's answer for so long; `false` if there is none yet.
    ///
    /// # Errors
    ///
    /// `ConnectionReset` when the guest refuses.
    pub fn is_accepted(&mut self, wait: Duration) -> io::Result<bool> {
        // No time at all would be no limit.
        self.stream.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
        match read_line(&mut self.stream, &mut self.line) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives the stream of a connection that is accepted. The guest's end keeps a descriptor of its own.
    ///
    /// # Errors
    ///
    /// If the guest is gone.
    pub fn give(self, stream: BorrowedFd<'_>) -> io::Result<()> {
        let files = [stream];
        let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        sendmsg(&self.stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// What lies at a socket's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No entry.
    Nothing,
    /// A socket file with a socket behind it.
    Bound,
    /// A socket file whose socket is gone.
    Stale,
    /// Something that is no socket.
    Foreign,
}

/// Asks a listener that stands for a whole guest for a port, by this word.
fn send_question(stream: &mut UnixStream, word: &str, port: u32) -> io::Result<()> {
    // A listener that hangs up before it has read us shows as a broken pipe; for the caller that is the same refusal.
    stream.write_all(format!("{word} {port}\n").as_bytes()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => io::ErrorKind::ConnectionReset.into(),
        _ => error,
    })
}

/// Reads `OK <port>` and its line feed, not one byte more.
fn read_answer(stream: &mut impl Read) -> io::Result<u32> {
    read_line(stream, &mut Vec::with_capacity(LONGEST_ANSWER))
}

/// Goes on with reading a line of which some may have come before.
fn read_line(stream: &mut impl Read, line: &mut Vec<u8>) -> io::Result<u32> {
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::ConnectionReset.into()),
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) if line.len() < LONGEST_ANSWER => line.push(byte[0]),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A receive timeout on a socket is reported as EAGAIN.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
    }
    let port = line.strip_prefix(b"OK ").and_then(|port| std::str::from_utf8(port).ok()).and_then(|port| port.parse().ok());
    port.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Clears `O_NONBLOCK`.
fn set_blocking(socket: &OwnedFd) -> rustix::io::Result<()> {
    fcntl_setfl(socket, fcntl_getfl(socket)? - OFlags::NONBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_read_to_its_line_feed_and_no_further() {
        let mut input: &[u8] = b"OK 4294967295\nrest";
        assert_eq!(read_answer(&mut input).unwrap(), u32::MAX);
        assert_eq!(input, b"rest");
    }

    #[test]
    fn endless_or_foreign_answers_are_errors() {
        for input in ["OK 42949672950000000\n", "NO 1\n", "OK\n", "OK x\n", "OK 4294967296\n"] {
            assert_eq!(read_answer(&mut input.as_bytes()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{input}");
        }
        assert_eq!(read_answer(&mut "OK 1".as_bytes()).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn places_follow_docs_world() {
        assert_eq!(Endpoint::ParentPort(80).place(), (Room::ParentPorts, "80.sock".to_owned()));
        assert_eq!(Endpoint::Heartbeat(7).place(), (Room::ParentPorts, "9000.7.sock".to_owned()));
        assert_eq!(Endpoint::Enclave(16).place(), (Room::Vsock, "16.sock".to_owned()));
        assert_eq!(Endpoint::Console(16).place(), (Room::HypervisorPorts, "10016.sock".to_owned()));
        assert_eq!(Endpoint::Control(0xa).place(), (Room::Enclaves, "i-0000000000000000-enca.sock".to_owned()));
    }
}
