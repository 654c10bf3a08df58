//! The heartbeat: the byte by which an enclave says that it has booted (CID 3, port 9000, 0xB7 both ways).
//!
//! Whoever starts an enclave listens before it starts. For local enclaves the listener belongs to our process alone (docs/world.md), so that several
//! can start at once; on a real device there is one port for all.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nitroxide_client::DeviceKind;
use nitroxide_guest_sys::vsock;
use nitroxide_world::{Endpoint, Listener, rendezvous::HEARTBEAT_PORT};

use crate::{codes::ErrorCode, failure::Failure, world};

const BEAT: u8 = 0xB7;
/// How long the enclave may take from its connection to its byte.
const PATIENCE: Duration = Duration::from_secs(20);

/// Listens for heartbeats.
#[derive(Debug)]
pub enum Heartbeat {
    /// Of enclaves that this process starts.
    Local(Listener),
    /// Of all enclaves of the instance.
    Host(vsock::Listener),
}

impl Heartbeat {
    /// Listens. Call it before the enclave starts.
    pub fn bind(device: DeviceKind) -> Result<Self, Failure> {
        let failure = |error: Box<dyn std::error::Error + Send + Sync>| {
            Failure::new(ErrorCode::BOOT, "Cannot listen for the enclave's heartbeat")
                .because(error)
                .help("Another enclave may be starting; try again when it has booted.")
        };
        match device {
            DeviceKind::Local => {
                world::open()?.bind(Endpoint::Heartbeat(std::process::id())).map(Self::Local).map_err(|error| failure(error.into()))
            }
            DeviceKind::Host => vsock::Listener::bind(HEARTBEAT_PORT).map(Self::Host).map_err(|error| failure(error.into())),
        }
    }

    /// Takes one connection, which must be there (see [`AsFd`]), and answers it. `true` if it was the heartbeat of the enclave with `cid`.
    pub fn answer(&self, cid: u32) -> io::Result<bool> {
        let (stream, peer) = match self {
            Self::Local(listener) => listener.accept().map(|(stream, peer)| (stream, peer.map(|peer| peer.cid)))?,
            Self::Host(listener) => listener.accept().map(|(stream, peer, _)| (UnixStream::from(OwnedFd::from(stream)), Some(peer)))?,
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut stream = stream;
        let mut beat = [0];
        stream.read_exact(&mut beat)?;
        if beat != [BEAT] {
            return Ok(false);
        }
        stream.write_all(&beat)?;
        // A concurrent start on a real device may reach our listener: its enclave is answered, ours is still waited for.
        Ok(peer == Some(cid))
    }
}

impl AsFd for Heartbeat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Local(listener) => listener.socket().as_fd(),
            Self::Host(listener) => listener.as_fd(),
        }
    }
}

/// How long an enclave may take to boot: nitro-cli's rule, 90 s per started 6 GiB of image and 90 s per started 100 GiB of memory.
pub fn patience(image_bytes: u64, memory_mib: u64) -> Duration {
    let steps = image_bytes.div_ceil(6 << 30).max(1).saturating_add(memory_mib.div_ceil(100 << 10).max(1));
    Duration::from_secs(steps.saturating_mul(90))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_image_and_memory_and_is_never_less_than_three_minutes() {
        assert_eq!(patience(1, 64), Duration::from_secs(180));
        assert_eq!(patience(6 << 30, 100 << 10), Duration::from_secs(180));
        assert_eq!(patience((6 << 30) + 1, (100 << 10) + 1), Duration::from_secs(360));
    }
}
