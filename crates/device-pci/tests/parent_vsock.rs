//! The parent VM's vsock with a guest at its end that speaks vhost-user by hand, an enclave's device beside it, and the sockets of a world.
#![expect(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nitroxide_device_pci::ParentVsock;
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig};
use nitroxide_world::{Endpoint, VsockAddress, World, peer_address};

#[expect(dead_code, reason = "the vsock crate's own tests use the rest")]
#[path = "../../vsock/tests/frontend/mod.rs"]
mod frontend;

use frontend::{Machine, REQUEST, RESPONSE};

/// `VIRTIO_VSOCK_OP_RST`
const RESET: u16 = 3;

struct Parent {
    folder: tempfile::TempDir,
    world: World,
    vsock: ParentVsock,
    guest: Machine,
}

fn parent() -> Parent {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(&folder.path().join("world")).unwrap();
    let path = folder.path().join("vsock");
    let vsock = ParentVsock::listen(&path, &world).unwrap();
    let guest = Machine::start(UnixStream::connect(path).unwrap());
    Parent { folder, world, vsock, guest }
}

fn line(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while bytes.last() != Some(&b'\n') && stream.read(&mut byte).unwrap() == 1 {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

#[test]
fn the_guest_is_accepted_when_the_enclave_says_so_and_reset_when_it_does_not() {
    let Parent { world, mut guest, vsock: _vsock, folder: _folder } = parent();
    let enclave = world.bind(Endpoint::Enclave(16)).unwrap();

    guest.request(3, 16, 1234, 5000);
    let (mut stream, peer) = enclave.accept().unwrap();
    assert_eq!((line(&mut stream).as_str(), peer), ("CONNECT 5000\n", Some(VsockAddress { cid: 3, port: 1234 })));
    stream.write_all(b"OK 1234\n").unwrap();
    assert_eq!(guest.packet(), (16, RESPONSE, 5000));

    guest.request(3, 16, 1235, 5001);
    drop(enclave.accept().unwrap());
    assert_eq!(guest.packet(), (16, RESET, 5001));
}

#[test]
fn what_is_not_there_is_reset_and_a_console_is_at_cid_0() {
    let Parent { world, mut guest, vsock: _vsock, folder: _folder } = parent();
    for (port, cid) in (2000..).zip([0, 2, 16]) {
        guest.request(3, cid, port, 10_016);
        assert_eq!(guest.packet(), (cid, RESET, 10_016), "CID {cid}");
    }
    let console = world.bind(Endpoint::Console(16)).unwrap();
    guest.request(3, 0, 3000, 10_016);
    assert_eq!(guest.packet(), (0, RESPONSE, 10_016));
    assert_eq!(console.accept().unwrap().1, Some(VsockAddress { cid: 3, port: 3000 }));
}

#[test]
fn enclaves_and_the_host_reach_the_guest_under_their_own_addresses() {
    let Parent { world, mut guest, vsock: _vsock, folder: _folder } = parent();
    let _enclave = world.ask(Endpoint::ParentVm, Some(VsockAddress { cid: 16, port: 7 }), 5000).unwrap();
    assert_eq!(guest.packet(), (16, REQUEST, 7));
    let _host = world.ask(Endpoint::ParentVm, None, 5000).unwrap();
    let (cid, operation, _) = guest.packet();
    assert_eq!((cid, operation), (2, REQUEST));
}

#[test]
fn nobody_is_kept_waiting_while_no_machine_is_there() {
    let Parent { world, guest, vsock: _vsock, folder } = parent();
    drop(guest);
    // Whoever is turned away notices when it asks, or when it waits for the answer.
    match world.ask(Endpoint::ParentVm, None, 5000) {
        Ok(mut stream) => assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_))),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    // The next machine finds everything as the first did.
    let mut guest = Machine::start(UnixStream::connect(folder.path().join("vsock")).unwrap());
    guest.request(3, 16, 1, 1);
    assert_eq!(guest.packet(), (16, RESET, 1));
}

/// An enclave that connects to nobody.
struct Nowhere;

impl Router for Nowhere {
    fn connect(&self, _: ConnectRequest) -> std::io::Result<Route> {
        Err(std::io::ErrorKind::ConnectionRefused.into())
    }
}

#[test]
fn two_guests_see_each_other_by_cid_and_port() {
    let Parent { world, mut guest, vsock: _vsock, folder: _folder } = parent();
    let (listener, _file) = world.bind(Endpoint::Enclave(16)).unwrap().into_parts();
    let peer = |stream: &UnixStream| peer_address(stream).ok().flatten().map(|peer| (peer.cid, peer.port));
    let config = VsockConfig { listener: Some(listener), peer: Some(Arc::new(peer)), ..VsockConfig::new(16, Arc::new(Nowhere)) };
    let device = nitroxide_vsock::spawn(config).unwrap();
    let mut enclave = Machine::start(UnixStream::from(device.take_frontend().unwrap()));

    guest.request(3, 16, 1234, 5000);
    assert_eq!(enclave.packet(), (3, REQUEST, 1234));
    // The enclave's device goes away before its guest has answered.
    drop(device);
    assert_eq!(guest.packet(), (16, RESET, 5000));
}
