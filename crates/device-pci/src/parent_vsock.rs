//! The parent VM's vsock: CID 3, joined with the sockets of a world.
//!
//! Its guest reaches enclaves by their CIDs and consoles at CID 0; enclaves, and programs of the host, reach the guest through
//! [`Endpoint::ParentVm`]. Addressing: docs/vsock.md; the sockets: docs/world.md.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig, VsockServer};
use nitroxide_world::rendezvous::CONSOLE_PORT_OFFSET;
use nitroxide_world::{Endpoint, SocketFile, VsockAddress, World, peer_address};

use crate::socket::{self, BindError};

/// The CID of a parent, and those that a parent cannot connect to.
const PARENT_CID: u32 = 3;
const HYPERVISOR_CID: u32 = 0;
const FIRST_ENCLAVE_CID: u32 = 4;

/// The vsock device of a parent VM at a vhost-user socket. Dropping it closes every connection and removes the socket's file.
#[derive(Debug)]
pub struct ParentVsock {
    // Dropped in this order: nobody comes any more, then what there is ends.
    _entrance: SocketFile,
    _socket: socket::SocketFile,
    _server: VsockServer,
}

/// Why there is no vsock for the parent.
#[derive(Debug, displaydoc::Display, thiserror::Error)]
#[non_exhaustive]
pub enum ParentVsockError {
    /// The vsock socket cannot be had.
    Socket(#[source] BindError),
    /// The world's entrance to the parent cannot be had; another device may serve this world.
    Entrance(#[source] nitroxide_world::BindError),
    /// The vsock device cannot be started.
    Start(#[source] io::Error),
}

impl ParentVsock {
    /// Listens at `path` for one QEMU after the other (`-chardev socket,id=v,path=PATH -device vhost-user-vsock-pci,chardev=v`).
    ///
    /// # Errors
    ///
    /// Each says what is in the way; nothing is left then.
    pub fn listen(path: &Path, world: &World) -> Result<Self, ParentVsockError> {
        let (listener, entrance) = world.bind(Endpoint::ParentVm).map_err(ParentVsockError::Entrance)?.into_parts();
        let (frontends, socket) = socket::listen_at(path).map_err(ParentVsockError::Socket)?;
        let server = serve(frontends, listener, world).map_err(ParentVsockError::Start)?;
        Ok(Self { _entrance: entrance, _socket: socket, _server: server })
    }
}

fn serve(frontends: UnixListener, listener: UnixListener, world: &World) -> io::Result<VsockServer> {
    let router = ParentRouter { world: world.clone() };
    let config = VsockConfig { listener: Some(listener), peer: Some(Arc::new(source)), ..VsockConfig::new(PARENT_CID, Arc::new(router)) };
    VsockServer::start(frontends, config)
}

/// Who the guest sees: an enclave by its address; everybody else is its host.
fn source(stream: &UnixStream) -> Option<(u32, u32)> {
    let peer = peer_address(stream).ok().flatten()?;
    (peer.cid >= FIRST_ENCLAVE_CID).then_some((peer.cid, peer.port))
}

/// Where connections of the parent's guest go.
#[derive(Debug)]
struct ParentRouter {
    world: World,
}

impl Router for ParentRouter {
    fn connect(&self, request: ConnectRequest) -> io::Result<Route> {
        let from = Some(VsockAddress { cid: PARENT_CID, port: request.source_port });
        match request.cid {
            HYPERVISOR_CID => {
                let cid = request.port.wrapping_sub(CONSOLE_PORT_OFFSET);
                self.world.connect(Endpoint::Console(cid), from).map(Route::Connected)
            }
            cid if cid >= FIRST_ENCLAVE_CID => self.world.ask(Endpoint::Enclave(cid), from, request.port).map(Route::Asking),
            // Its host offers nothing, as on EC2.
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn world() -> (tempfile::TempDir, World) {
        let folder = tempfile::tempdir().unwrap();
        let world = World::open(&folder.path().join("world")).unwrap();
        (folder, world)
    }

    fn request(cid: u32, port: u32) -> ConnectRequest {
        ConnectRequest { source_port: 1234, cid, port }
    }

    #[test]
    fn an_enclave_is_asked_for_its_port_and_sees_who_asks() {
        let (_folder, world) = world();
        let router = ParentRouter { world: world.clone() };
        assert_eq!(router.connect(request(16, 5000)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let enclave = world.bind(Endpoint::Enclave(16)).unwrap();
        let Ok(Route::Asking(_stream)) = router.connect(request(16, 5000)) else { panic!("not asked") };
        let (mut stream, peer) = enclave.accept().unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).unwrap();
        assert_eq!((&line[..], peer), (&b"CONNECT 5000\n"[..], Some(VsockAddress { cid: 3, port: 1234 })));
    }

    #[test]
    fn a_console_is_at_cid_0_and_nothing_at_the_hosts() {
        let (_folder, world) = world();
        let router = ParentRouter { world: world.clone() };
        assert_eq!(router.connect(request(0, 10_016)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let _console = world.bind(Endpoint::Console(16)).unwrap();
        assert!(matches!(router.connect(request(0, 10_016)), Ok(Route::Connected(_))));
        for cid in [1, 2, 3] {
            assert!(router.connect(request(cid, 10_016)).is_err(), "{cid}");
        }
    }

    #[test]
    fn enclaves_are_seen_by_their_address_and_others_as_the_host() {
        let (_folder, world) = world();
        let vm = world.bind(Endpoint::ParentVm).unwrap();
        for (from, seen) in
            [(Some(VsockAddress { cid: 16, port: 7 }), Some((16, 7))), (Some(VsockAddress { cid: 3, port: 7 }), None), (None, None)]
        {
            let _stream = world.connect(Endpoint::ParentVm, from).unwrap();
            assert_eq!(source(&vm.accept().unwrap().0), seen);
        }
    }

    #[test]
    fn one_world_has_one_parent() {
        let (folder, world) = world();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        let first = ParentVsock::listen(&one, &world).unwrap();
        assert!(matches!(ParentVsock::listen(&two, &world), Err(ParentVsockError::Entrance(_))));
        assert!(!two.exists());
        drop(first);
        assert!(!one.exists());
        drop(ParentVsock::listen(&two, &world).unwrap());
    }
}
