//! Where a connection that the guest opens goes: the [`Router`] decides by a [`Route`], the device does the rest.
//!
//! Neighbours: `device` asks the router when the guest sends a connection request; `crates/enclave` implements it over the
//! rendezvous of `crates/world`.

use std::io;
use std::os::unix::net::UnixStream;

/// What the guest asks for: a connection to `port` of the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The guest's own port, any 32-bit number.
    pub source_port: u32,
    /// The CID that the guest wants, with the alias resolved: 3 for an enclave's device, whether the guest wrote 3 or 2.
    pub cid: u32,
    /// The port that the guest wants, any 32-bit number.
    pub port: u32,
}

/// The host's end of a connection, as a [`Router`] opened it.
#[derive(Debug)]
pub enum Route {
    /// The other end is there: the guest is told at once that its connection stands.
    Connected(UnixStream),
    /// The other end is a listener of another device (or a proxy with the same manners): the router has sent it `CONNECT <port>\n`. The
    /// guest's connection stands once it answers `OK <number>\n`; anything else, its end, or 10 s of silence resets it.
    Asking(UnixStream),
}

impl From<UnixStream> for Route {
    fn from(stream: UnixStream) -> Self {
        Self::Connected(stream)
    }
}

/// Decides what stands behind a port of the parent.
pub trait Router: Send + Sync + 'static {
    /// Opens the host's end of a connection that the guest asks for.
    ///
    /// Called on the device's own thread while all other connections of this guest wait: it must not block, and it must not call
    /// back into the [`VsockBackend`](crate::VsockBackend) it belongs to. Connecting to a UNIX socket path does not block as long as
    /// the stream is non-blocking before `connect`.
    ///
    /// # Errors
    ///
    /// Any error refuses the connection: the guest sees a reset (`ECONNRESET`). The error is logged and goes no further.
    fn connect(&self, request: ConnectRequest) -> io::Result<Route>;
}
