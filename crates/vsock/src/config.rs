//! What a vsock device is made of: [`VsockConfig`], for [`spawn`](crate::spawn) and [`VsockServer`](crate::VsockServer) alike.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use crate::Router;

/// Tells which source (CID, port) a program's connection to the listener has; see [`VsockConfig::peer`].
pub type Peer = dyn Fn(&UnixStream) -> Option<(u32, u32)> + Send + Sync;

/// What a vsock device is made of.
pub struct VsockConfig {
    /// The CID of the guest: 4 and up, but not `u32::MAX`; or 3 for the device of a parent VM.
    pub guest_cid: u32,
    /// Where connections of the guest go.
    pub router: Arc<dyn Router>,
    /// Where programs of the host reach the guest: they send `CONNECT <port>\n`, get `OK <source port>\n`, then have a raw stream. After
    /// `PREPARE <port>\n` and the same answer they hand over another stream for it: one byte with one descriptor (SCM_RIGHTS).
    pub listener: Option<UnixListener>,
    /// Who the guest sees as the source of a connection that came through `listener`.
    ///
    /// `None`, of the function or as its answer: the parent (CID 3; for a parent VM its host, 2) with a port that is free. Port 0 stands for
    /// a free one, too. A source that the guest may not see, or a pair of ports in use, closes the program's stream. Called on the device's
    /// own thread once the program's line is there: it must not block.
    pub peer: Option<Arc<Peer>>,
}

impl VsockConfig {
    /// A device for the guest with CID `guest_cid`; programs of the host do not reach it unless a `listener` is set.
    #[must_use]
    pub fn new(guest_cid: u32, router: Arc<dyn Router>) -> Self {
        Self { guest_cid, router, listener: None, peer: None }
    }
}

impl std::fmt::Debug for VsockConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VsockConfig").field("guest_cid", &self.guest_cid).field("listener", &self.listener).finish_non_exhaustive()
    }
}
