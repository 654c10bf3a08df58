//! A server whose front-ends come by a path: a test in QEMU's place, again and again.
//!
//! One test only: it looks at the threads of the whole process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod frontend;
mod threads;

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use frontend::Machine;
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig, VsockServer};
use threads::{PATIENCE, until};

const PARENT_CID: u32 = 3;
const ENCLAVE_CID: u32 = 16; // arbitrary

/// Keeps the other ends of what the guest opens.
#[derive(Debug, Default)]
struct Pairs(Mutex<Vec<(ConnectRequest, UnixStream)>>);

impl Router for Pairs {
    fn connect(&self, request: ConnectRequest) -> io::Result<Route> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_read_timeout(Some(PATIENCE))?;
        self.0.lock().unwrap().push((request, theirs));
        Ok(ours.into())
    }
}

fn program(path: &Path) -> UnixStream {
    let mut program = UnixStream::connect(path).unwrap();
    program.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = program.write_all(b"CONNECT 7000\n"); // it may be gone already
    program
}

fn is_turned_away(mut stream: UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn front_ends_come_and_go_and_nothing_of_one_reaches_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let (path, programs) = (directory.path().join("vhost"), directory.path().join("3.sock"));
    let pairs = Arc::new(Pairs::default());
    let config = VsockConfig {
        listener: Some(UnixListener::bind(&programs).unwrap()),
        peer: Some(Arc::new(|_: &UnixStream| Some((ENCLAVE_CID, 1024)))),
        ..VsockConfig::new(PARENT_CID, Arc::clone(&pairs) as Arc<dyn Router>)
    };
    let server = VsockServer::start(UnixListener::bind(&path).unwrap(), config).unwrap();

    let nobody_is_there = || {
        assert!(is_turned_away(program(&programs)));
        let error = server.connect(UnixStream::pair().unwrap().0, (ENCLAVE_CID, 5), 7000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        assert_eq!((server.statistics().connections, server.statistics().promised_bytes), (0, 0));
    };
    nobody_is_there();

    // The second waits while the first is served, and is then served by a device that knows nothing of the first.
    let mut machine = Machine::start(UnixStream::connect(&path).unwrap());
    for round in 0..4 {
        machine.request(PARENT_CID, ENCLAVE_CID, 1000, 5000);
        let (source, operation, port) = machine.packet();
        assert_eq!((source, operation, port), (ENCLAVE_CID, frontend::RESPONSE, 5000), "round {round}");
        let (request, mut host) = pairs.0.lock().unwrap().pop().unwrap();
        assert_eq!(request, ConnectRequest { source_port: 1000, cid: ENCLAVE_CID, port: 5000 });
        let mut asking = program(&programs);
        assert_eq!(machine.packet(), (ENCLAVE_CID, frontend::REQUEST, 1024));

        let next = UnixStream::connect(&path).unwrap();
        drop(machine); // QEMU is killed

        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        assert_eq!(asking.read(&mut [0]).unwrap(), 0);
        machine = Machine::start(next);
    }

    // Some that are no front-end: each costs its own connection.
    drop(machine);
    for junk in [&b""[..], b"no vhost-user message", &[0xff; 4096]] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(junk).unwrap();
        drop(stream);
    }
    until("the device rests", || threads::of_devices() == ["vsock-frontends"]);
    nobody_is_there();

    // A guest that puts a ring outside of its RAM loses the device. Nobody else loses anything.
    machine = Machine::start(UnixStream::connect(&path).unwrap());
    machine.start_queue(0, 1 << 40).unwrap_err();
    assert!(machine.is_cut_off());
    machine = Machine::start(UnixStream::connect(&path).unwrap());
    machine.request(PARENT_CID, ENCLAVE_CID, 1000, 5000);
    assert_eq!(machine.packet().1, frontend::RESPONSE);
    let (_, mut host) = pairs.0.lock().unwrap().pop().unwrap();

    // The end, from another thread too, with a front-end connected and one waiting.
    let mut waiting = UnixStream::connect(&path).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| server.stop());
        }
    });
    assert_eq!(threads::of_devices(), Vec::<String>::new());
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert!(machine.is_cut_off());
    drop(server);
    assert!(matches!(waiting.read(&mut [0]), Ok(0) | Err(_)));
    assert!(UnixStream::connect(&path).is_err());

    // The end of one that nobody came to.
    std::fs::remove_file(&path).unwrap();
    let config = VsockConfig::new(PARENT_CID, Arc::clone(&pairs) as Arc<dyn Router>);
    let server = VsockServer::start(UnixListener::bind(&path).unwrap(), config).unwrap();
    until("the thread runs", || !threads::of_devices().is_empty());
    drop(server);
    assert_eq!(threads::of_devices(), Vec::<String>::new());

    let config = VsockConfig::new(2, pairs as Arc<dyn Router>);
    let error = VsockServer::start(UnixListener::bind(directory.path().join("other")).unwrap(), config).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}
