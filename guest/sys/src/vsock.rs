//! AF_VSOCK streams (vsock(7), Linux `include/uapi/linux/vm_sockets.h`).
#![expect(unsafe_code, reason = "sockaddr_vm has no safe wrapper in rustix or std")]

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

/// The parent's CID as an enclave sees it.
pub const PARENT_CID: u32 = 3;
/// Any of our own CIDs (`VMADDR_CID_ANY`).
pub const ANY_CID: u32 = u32::MAX;

/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID`: `_IO(7, 0xb9)`.
const GET_LOCAL_CID: libc::c_ulong = 0x7b9;

/// Connects to `cid`:`port` and returns the stream, whose reads end with EAGAIN after `timeout`.
///
/// # Errors
///
/// ECONNRESET when nobody listens, ENODEV or EAFNOSUPPORT without a vsock transport, ETIMEDOUT after `timeout`.
pub fn connect(cid: u32, port: u32, timeout: Duration) -> io::Result<File> {
    let socket = stream_socket()?;
    let limit = libc::timeval {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: libc::suseconds_t::from(timeout.subsec_micros().cast_signed()),
    };
    // SAFETY: the option value is a live `timeval` of the stated size (SO_VM_SOCKETS_CONNECT_TIMEOUT, option 6 at level AF_VSOCK).
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::AF_VSOCK, 6, (&raw const limit).cast(), size_of_u32(&limit)) })?;
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(timeout))?;
    let address = address(cid, port);
    // SAFETY: `address` is a complete sockaddr_vm that lives for the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size_of_u32(&address)) })?;
    Ok(File::from(socket))
}

/// A listening stream socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens on `port` on all of our CIDs.
    ///
    /// # Errors
    ///
    /// EADDRINUSE for a taken port; EAFNOSUPPORT without AF_VSOCK.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = stream_socket()?;
        let address = address(ANY_CID, port);
        // SAFETY: `address` is a complete sockaddr_vm that lives for the call.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_u32(&address)) })?;
        rustix::net::listen(&socket, 16)?;
        Ok(Self { socket })
    }

    /// Waits for the next connection: the stream, and the peer's CID and port.
    ///
    /// # Errors
    ///
    /// What accept(2) gives.
    pub fn accept(&self) -> io::Result<(File, u32, u32)> {
        let mut peer = address(0, 0);
        let mut length = size_of_u32(&peer);
        // SAFETY: `peer` and `length` are live and the kernel writes at most `length` bytes of address.
        let fd = check(unsafe { libc::accept4(self.socket.as_raw_fd(), (&raw mut peer).cast(), &raw mut length, libc::SOCK_CLOEXEC) })?;
        // SAFETY: accept4 returned a new descriptor that nothing else owns.
        Ok((File::from(unsafe { OwnedFd::from_raw_fd(fd) }), peer.svm_cid, peer.svm_port))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The CID of this machine as its vsock transport knows it.
///
/// # Errors
///
/// ENOENT without `/dev/vsock`; what the ioctl gives otherwise.
pub fn local_cid() -> io::Result<u32> {
    let device = File::open("/dev/vsock")?;
    let mut cid = 0_u32;
    // SAFETY: the ioctl writes one u32 to the given address, which is live and exclusively ours.
    check(unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) })?;
    Ok(cid)
}

fn stream_socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        rustix::net::AddressFamily::VSOCK,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: `sockaddr_vm` is plain data for which all-zero bytes are a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    // AF_VSOCK is 40.
    address.svm_family = 40;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn size_of_u32<T>(value: &T) -> u32 {
    u32::try_from(size_of_val(value)).unwrap_or(0)
}

fn check(result: RawFd) -> io::Result<RawFd> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
