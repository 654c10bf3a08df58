//! Who is at the other end: the name that a connecting socket carries.
//!
//! AF_VSOCK's accept() tells the peer's CID and port; a UNIX socket's would tell nothing. So the connecting end binds an abstract name that says
//! both. Names are only ever bound to connect *from*, never to listen on, and carry a random part, so that another user who takes one
//! prevents nothing; who may connect at all is decided by the world's directory.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, bind};
use rustix::rand::{GetRandomFlags, getrandom};

/// The CID of the parent (`VMADDR_CID` of an instance with enclaves).
const PARENT: u32 = 3;

/// What every such name begins with.
const PREFIX: &str = "nitroxide/";

/// One end of a vsock connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VsockAddress {
    /// The context id: an enclave's, or 3 for the parent.
    pub cid: u32,
    /// The port.
    pub port: u32,
}

impl VsockAddress {
    /// Reads an abstract name (without its leading zero byte). `None` for any name that this module did not make.
    #[must_use]
    pub fn from_abstract_name(name: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(name).ok()?.strip_prefix(PREFIX)?;
        let (address, nonce) = text.split_once('/')?;
        let (cid, port) = address.split_once(':')?;
        let is_nonce = nonce.len() == 16 && nonce.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_nonce.then_some(Self { cid: number(cid)?, port: number(port)? })
    }

    /// Reads the name of a socket: an abstract one as above, or the path under which [`World::bind_socket`](crate::World::bind_socket) bound it to a port of the
    /// parent.
    #[must_use]
    pub fn from_socket_name(name: &SocketAddrUnix) -> Option<Self> {
        match name.abstract_name() {
            Some(name) => Self::from_abstract_name(name),
            None => Self::from_path(name.path_bytes()?),
        }
    }

    /// `/proc/self/fd/<directory>/<port>.sock`, or with `.<pid>` behind the port.
    fn from_path(path: &[u8]) -> Option<Self> {
        let (directory, name) = std::str::from_utf8(path).ok()?.strip_prefix("/proc/self/fd/")?.split_once('/')?;
        number(directory)?;
        let name = name.strip_suffix(".sock")?;
        let (port, pid) = name.split_once('.').map_or((name, None), |(port, pid)| (port, Some(pid)));
        pid.is_none_or(|pid| number(pid).is_some()).then_some(Self { cid: PARENT, port: number(port)? })
    }

    /// The abstract name of this address with a random part, without the leading zero byte.
    fn abstract_name(self, nonce: u64) -> String {
        format!("{PREFIX}{}:{}/{nonce:016x}", self.cid, self.port)
    }
}

/// The address that the peer of a connected socket bound, or `None` when it bound none of ours.
///
/// # Errors
///
/// What `getpeername` gave, for example when the socket is not connected.
pub fn peer_address(socket: impl AsFd) -> std::io::Result<Option<VsockAddress>> {
    let Some(address) = rustix::net::getpeername(socket)? else { return Ok(None) };
    let address = SocketAddrUnix::try_from(address)?;
    Ok(VsockAddress::from_socket_name(&address))
}

/// Gives a socket that is about to connect the name of `address`.
///
/// # Errors
///
/// EINVAL if it has a name already.
pub fn bind_source(socket: impl AsFd, address: VsockAddress) -> rustix::io::Result<()> {
    loop {
        let mut nonce = [0; 8];
        getrandom(&mut nonce, GetRandomFlags::empty())?;
        let name = address.abstract_name(u64::from_ne_bytes(nonce));
        match bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?) {
            Err(Errno::ADDRINUSE) => {}
            other => return other,
        }
    }
}

/// A decimal number as it is written by `{}`: no sign, no leading zero.
fn number(text: &str) -> Option<u32> {
    let value: u32 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_reads_back_at_the_edges() {
        for (cid, port) in [(0, 0), (3, 9000), (u32::MAX, u32::MAX)] {
            let address = VsockAddress { cid, port };
            assert_eq!(VsockAddress::from_abstract_name(address.abstract_name(u64::MAX).as_bytes()), Some(address));
        }
    }

    #[test]
    fn bound_ports_are_read_from_their_paths() {
        let read = |path: &str| VsockAddress::from_path(path.as_bytes()).map(|address| (address.cid, address.port));
        assert_eq!(read("/proc/self/fd/7/5000.sock"), Some((3, 5000)));
        assert_eq!(read("/proc/self/fd/7/9000.4711.sock"), Some((3, 9000)));
        for path in [
            "",
            "/run/5000.sock",
            "/proc/self/fd/7/5000",
            "/proc/self/fd/x/5000.sock",
            "/proc/self/fd/7/05.sock",
            "/proc/self/fd/7/9000.x.sock",
            "/proc/self/fd/7/a/5.sock",
        ] {
            assert_eq!(read(path), None, "{path}");
        }
    }

    #[test]
    fn foreign_names_are_nobody() {
        let foreign: [&[u8]; 8] = [
            b"",
            b"nitroxide/",
            b"nitroxide/3:9000",
            b"nitroxide/3:9000/12",
            b"nitroxide/+3:9000/0123456789abcdef",
            b"nitroxide/03:9000/0123456789abcdef",
            b"nitroxide/3:4294967296/0123456789abcdef",
            b"nitroxide/3:9000/0123456789abcdeg",
        ];
        for name in foreign {
            assert_eq!(VsockAddress::from_abstract_name(name), None, "{}", String::from_utf8_lossy(name));
        }
    }
}
