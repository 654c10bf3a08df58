//! Beginning and end of a device without a guest: nothing is left in the file system, no thread stays.
//!
//! The threads are looked at by one test only, since they are those of the whole process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod threads;

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig, spawn};
use threads::until;

#[derive(Debug)]
struct Nobody;

impl Router for Nobody {
    fn connect(&self, _request: ConnectRequest) -> io::Result<Route> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

fn config(listener: Option<UnixListener>) -> VsockConfig {
    VsockConfig { listener, ..VsockConfig::new(16, Arc::new(Nobody)) }
}

#[test]
fn a_device_leaves_no_thread_and_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.sock");
    // Other programs may be making devices, and may have been killed while they did: what counts is what is new and stays.
    let folders = || -> BTreeSet<_> {
        let entries = std::fs::read_dir(std::env::temp_dir()).unwrap().filter_map(|entry| Some(entry.ok()?.file_name()));
        entries.filter(|name| name.to_string_lossy().starts_with("nitroxide-vsock-")).collect()
    };
    let before = folders();
    let nothing_is_left = || until("no folder is left", || folders().is_subset(&before));

    // Dropped with its frontend inside.
    let backend = spawn(config(Some(UnixListener::bind(&path).unwrap()))).unwrap();
    nothing_is_left();
    // A thread gives itself its name, when it first runs.
    until("the threads run", || threads::of_devices().len() >= 2);
    // No driver runs: a program is turned away at once.
    let mut program = UnixStream::connect(&path).unwrap();
    let _ = program.write_all(b"CONNECT 5\n");
    assert!(matches!(program.read(&mut [0]), Ok(0) | Err(_)));
    drop(backend);
    assert_eq!(threads::of_devices(), Vec::<String>::new());

    // Dropped while QEMU holds the frontend: QEMU sees the end.
    let backend = spawn(config(None)).unwrap();
    let mut frontend = UnixStream::from(backend.take_frontend().unwrap());
    assert!(backend.take_frontend().is_none());
    drop(backend);
    assert_eq!(threads::of_devices(), Vec::<String>::new());
    assert!(matches!(frontend.read(&mut [0]), Ok(0) | Err(_)));

    // QEMU ends first, with and without a last message that is none.
    for farewell in [&b""[..], b"no vhost-user message", &[0xff; 4096]] {
        let backend = spawn(config(None)).unwrap();
        let mut frontend = UnixStream::from(backend.take_frontend().unwrap());
        frontend.write_all(farewell).unwrap();
        drop(frontend);
        until("the threads are gone", || threads::of_devices().is_empty());
        drop(backend);
    }
    nothing_is_left();
}

#[test]
fn reserved_cids_are_no_guests() {
    for guest_cid in [0, 1, 2, u32::MAX] {
        let error = spawn(VsockConfig { guest_cid, ..config(None) }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_backend_can_be_shared_between_threads() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<nitroxide_vsock::VsockBackend>();
}
