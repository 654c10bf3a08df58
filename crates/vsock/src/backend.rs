//! The device as its owner sees it.
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use crate::Router;

/// What a vsock device is made of.
pub struct VsockConfig {
    /// The CID of the guest: 4 and up, but not `u32::MAX`; or 3 for the device of a parent VM.
    pub guest_cid: u32,
    /// Where connections of the guest go.
    pub router: Arc<dyn Router>,
    /// Where programs of the host reach the guest: they send `CONNECT <port>\n`, get `OK <source port>\n`, then have a raw stream.
    pub listener: Option<UnixListener>,
}

impl std::fmt::Debug for VsockConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VsockConfig").field("guest_cid", &self.guest_cid).field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// A running vsock device; dropping it ends its threads and closes every connection.
#[derive(Debug)]
pub struct VsockBackend {}

/// Starts a vsock device.
///
/// # Errors
///
/// `InvalidInput` for a CID that no guest can have; else what the system says about threads, sockets and memory.
pub fn spawn(config: VsockConfig) -> io::Result<VsockBackend> {
    drop(config);
    Err(io::ErrorKind::Unsupported.into())
}

impl VsockBackend {
    /// Takes the connected vhost-user socket for QEMU (`-chardev socket,id=v,fd=N -device vhost-user-vsock-device,chardev=v`).
    ///
    /// `Some` once. Close it after QEMU has its copy: the device notices QEMU's death by the end of this socket.
    #[must_use]
    pub fn take_frontend(&self) -> Option<OwnedFd> {
        None
    }

    /// Connects a stream of the host to `port` of the guest; the guest sees `source` as its peer.
    ///
    /// `source` is (CID, port); port 0 takes a free one. The stream is closed if the guest refuses.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a source CID that is not the parent's, `AddrInUse` for a pair of ports in use.
    pub fn connect(&self, stream: UnixStream, source: (u32, u32), port: u32) -> io::Result<()> {
        drop(stream);
        let _ = (source, port);
        Err(io::ErrorKind::Unsupported.into())
    }
}
