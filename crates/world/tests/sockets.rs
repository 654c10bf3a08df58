//! The rendezvous: who is bound, who is gone, who is at the other end.
#![expect(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use common::{Helper, role, say, wait_for_end, world};
use nitroxide_world::{BindError, Endpoint, VsockAddress, World};

const ENCLAVE: VsockAddress = VsockAddress { cid: 16, port: 1_234_567 }; // arbitrary
const PATIENCE: Duration = Duration::from_secs(30); // only ends a hang

#[test]
fn accept_shows_the_address_of_the_true_peer() {
    let (_dir, world) = world();
    let listener = world.bind(Endpoint::ParentPort(5000)).unwrap();
    let mut client = world.connect(Endpoint::ParentPort(5000), Some(ENCLAVE)).unwrap();
    let (mut server, peer) = listener.accept().unwrap();
    assert_eq!(peer, Some(ENCLAVE));

    client.write_all(b"hello").unwrap();
    drop(client);
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");

    let _nameless = world.connect(Endpoint::ParentPort(5000), None).unwrap();
    assert_eq!(listener.accept().unwrap().1, None);
}

#[test]
fn an_address_can_be_used_by_many_connections_at_once() {
    let (_dir, world) = world();
    let _listener = world.bind(Endpoint::ParentPort(5000)).unwrap();
    let clients: Vec<_> = (0..20).map(|_| world.connect(Endpoint::ParentPort(5000), Some(ENCLAVE)).unwrap()).collect();
    assert_eq!(clients.len(), 20);
}

#[test]
fn connecting_without_a_listener_is_refused() {
    let (_dir, world) = world();
    let kind = |endpoint| world.connect(endpoint, None).unwrap_err().kind();
    assert_eq!(kind(Endpoint::ParentPort(1)), std::io::ErrorKind::ConnectionRefused);
    drop(world.bind(Endpoint::Console(16)).unwrap());
    assert_eq!(kind(Endpoint::Console(16)), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_full_queue_never_blocks_the_connecting_end() {
    let (_dir, world) = world();
    let _listener = world.bind(Endpoint::ParentPort(5000)).unwrap();
    let mut clients = Vec::new();
    let error = loop {
        match world.connect(Endpoint::ParentPort(5000), Some(ENCLAVE)) {
            Ok(client) => clients.push(client),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    assert!(clients.len() >= 100);
}

#[test]
fn helper_binds() {
    let Some(world) = role() else { return };
    let port = world.bind(Endpoint::ParentPort(5000)).unwrap();
    let control = world.bind(Endpoint::Control(0xabc)).unwrap();
    let silent = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    let bound_only = world.bind_socket(&silent, Endpoint::ParentPort(5001)).unwrap();
    say("bound");
    wait_for_end();
    drop((port, control, bound_only));
}

#[test]
fn a_running_listener_is_in_use_and_a_killed_one_is_replaced() {
    let (dir, world) = world();
    let mut helper = Helper::start("helper_binds", &dir.path().join("world"));
    assert_eq!(helper.line(), "bound");
    assert!(matches!(world.bind(Endpoint::ParentPort(5000)), Err(BindError::InUse(_))));
    assert!(matches!(world.bind(Endpoint::ParentPort(5001)), Err(BindError::InUse(_))), "bound, though it does not listen yet");
    assert_eq!(world.enclaves().unwrap(), [0xabc]);
    assert_eq!(world.sweep().unwrap().sockets, 0);

    helper.kill();

    assert_eq!(world.enclaves().unwrap(), [] as [u64; 0]);
    let _listener = world.bind(Endpoint::ParentPort(5000)).unwrap();
    let _client = world.connect(Endpoint::ParentPort(5000), None).unwrap();
    assert_eq!(world.sweep().unwrap().sockets, 2);
    assert_eq!(std::fs::read_dir(dir.path().join("world/enclaves")).unwrap().count(), 0);
}

#[test]
fn neither_sweep_nor_a_second_bind_is_seen_by_a_listener() {
    let (_dir, world) = world();
    let listener = world.bind(Endpoint::Heartbeat(77)).unwrap();
    world.sweep().unwrap();
    assert_eq!(world.bind(Endpoint::Heartbeat(77)).unwrap_err().errno(), 98); // EADDRINUSE.
    listener.socket().set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn processes_that_bind_over_a_stale_file_never_both_win() {
    let (dir, world) = world();
    let stale = dir.path().join("world/vsock/3/5000.sock");
    for _ in 0..300 {
        drop(UnixListener::bind(&stale).unwrap());
        let start = std::sync::Barrier::new(4);
        let bind = || {
            start.wait();
            world.bind(Endpoint::ParentPort(5000)).ok()
        };
        let winners: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(winners.len(), 1);
        world.connect(Endpoint::ParentPort(5000), None).unwrap();
    }
}

#[test]
fn an_old_listener_does_not_remove_its_successor() {
    let (dir, world) = world();
    let old = world.bind(Endpoint::ParentPort(5000)).unwrap();
    std::fs::remove_file(dir.path().join("world/vsock/3/5000.sock")).unwrap();
    let _new = world.bind(Endpoint::ParentPort(5000)).unwrap();
    drop(old);
    world.connect(Endpoint::ParentPort(5000), None).unwrap();
}

#[test]
fn a_world_with_a_path_longer_than_a_socket_address_works() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("x".repeat(120)).join("y".repeat(120))).unwrap();
    let listener = world.bind(Endpoint::Enclave(16)).unwrap();
    world.connect(Endpoint::Enclave(16), Some(VsockAddress { cid: 3, port: 1 })).unwrap();
    assert_eq!(listener.accept().unwrap().1, Some(VsockAddress { cid: 3, port: 1 }));
}

#[test]
fn connecting_to_an_enclave_speaks_the_handshake() {
    let (_dir, world) = world();
    let listener = world.bind(Endpoint::Enclave(16)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut server, _) = listener.accept().unwrap();
            let mut request = [0; 13];
            server.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"CONNECT 8000\n");
            server.write_all(b"OK 77\nfirst bytes").unwrap();
            drop(server);
            let _refused = listener.accept().unwrap();
        });
        let from = VsockAddress { cid: 3, port: 77 };
        let (mut stream, source_port) = world.connect_enclave(from, 16, 8000, PATIENCE).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!((source_port, text.as_str()), (77, "first bytes"));
        let error = world.connect_enclave(from, 16, 8000, PATIENCE).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn the_parent_is_a_process_where_one_listens_and_a_virtual_machine_otherwise() {
    let (_dir, world) = world();
    let from = VsockAddress { cid: 3, port: 7 };
    assert_eq!(world.connect_parent(from, 5000, PATIENCE).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);

    let vm = world.bind(Endpoint::ParentVm).unwrap();
    let machine = std::thread::spawn(move || {
        for (question, answer) in [("CONNECT 5000\n", "OK 5000\n"), ("CONNECT 5001\n", "")] {
            let (mut stream, peer) = vm.accept().unwrap();
            let mut line = vec![0; question.len()];
            stream.read_exact(&mut line).unwrap();
            assert_eq!((String::from_utf8(line).unwrap().as_str(), peer), (question, Some(from)));
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    world.connect_parent(from, 5000, PATIENCE).unwrap();
    assert_eq!(world.connect_parent(from, 5001, PATIENCE).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    machine.join().unwrap();

    let process = world.bind(Endpoint::ParentPort(5000)).unwrap();
    let _stream = world.connect_parent(from, 5000, PATIENCE).unwrap();
    assert_eq!(process.accept().unwrap().1, Some(from));
}
