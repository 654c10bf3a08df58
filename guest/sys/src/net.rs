//! Bringing up the loopback interface (netdevice(7)).
#![expect(unsafe_code, reason = "SIOCSIFFLAGS has no safe wrapper in rustix or std")]

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd,
};

/// Sets `lo` up; its addresses 127.0.0.1 and ::1 come with that.
///
/// # Errors
///
/// What the kernel gives: ENODEV without a loopback device, EPERM without CAP_NET_ADMIN.
pub fn loopback_up() -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: `ifreq` is plain data for which all-zero bytes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // IFF_UP (1) and IFF_RUNNING (64) fit a short.
    request.ifr_ifru.ifru_flags = 1 | 64;
    // SAFETY: the descriptor is open for the duration of the call and `request` is a properly filled `ifreq`, which SIOCSIFFLAGS reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
