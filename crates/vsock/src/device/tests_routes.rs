//! Connections between two devices: routes that are asked first, and the source of what comes through the listener.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::driver_model::{Driver, FIRST_ASKING_PORT, GUEST_CID, GUEST_PORT};
use super::tests::{is_at_end, operations, read_available};
use crate::limits;
use crate::packet::{Header, Operation};

/// A packet of the guest's usual port to one whose route is asked.
fn to_asked(operation: Operation) -> Header {
    Header { destination_port: FIRST_ASKING_PORT, ..Driver::header(operation) }
}

/// A guest that has asked for such a connection, and the end that its device asks.
fn asking() -> (Driver, UnixStream) {
    let mut driver = Driver::new();
    driver.post_pages(4);
    driver.send(&to_asked(Operation::Request), &[]);
    driver.run();
    let other = driver.router.opened.lock().unwrap().pop().unwrap().1;
    other.set_nonblocking(true).unwrap();
    (driver, other)
}

#[test]
fn a_connection_that_is_asked_first_stands_only_with_the_line_and_what_lies_behind_it_is_data() {
    let (mut driver, mut other) = asking();
    assert_eq!(driver.received(), []);
    for part in [&b"O"[..], b"K 12", b"34"] {
        other.write_all(part).unwrap();
        driver.run();
        assert_eq!(driver.received(), []);
    }
    assert_eq!(driver.device.statistics().accepted, 0);

    other.write_all(b"5\nhello").unwrap();
    driver.run();

    let received = driver.received();
    assert_eq!(operations(&received), [Operation::Response as u16, Operation::ReadWrite as u16]);
    assert_eq!((received[0].0.source_port, received[1].1.as_slice()), (FIRST_ASKING_PORT, &b"hello"[..]));
    assert_eq!(driver.device.statistics().accepted, 1);
    driver.send(&Header { length: 5, ..to_asked(Operation::ReadWrite) }, b"world");
    driver.run();
    assert_eq!(read_available(&mut other), b"world");
    driver.device.expire(Instant::now() + limits::ASKING_TIMEOUT + Duration::from_secs(1));
    driver.run();
    assert_eq!((driver.received(), driver.device.statistics().connections), (vec![], 1));
}

#[test]
fn the_line_may_be_there_before_and_so_may_the_end() {
    for end in [None, Some(Shutdown::Write), Some(Shutdown::Both)] {
        let (mut driver, mut other) = asking();
        other.write_all(b"OK 7\nall there is").unwrap();
        match end {
            None => drop(other),
            Some(how) => other.shutdown(how).unwrap(),
        }
        driver.run();

        let received = driver.received();
        let expected = [Operation::Response as u16, Operation::ReadWrite as u16, Operation::Shutdown as u16];
        assert_eq!(operations(&received), expected, "{end:?}");
        assert_eq!(received[1].1, b"all there is");
    }
}

#[test]
fn anything_but_the_line_resets_the_guest_and_leaves_nothing() {
    let garbage: [&[u8]; 7] = [b"NO\n", b"OK\n", b"OK x\n", b"OK 4294967296\n", b"CONNECT 5\n", b"OK 1", &[b'0'; limits::HANDSHAKE_BYTES]];
    for (bytes, is_end) in garbage.into_iter().map(|bytes| (bytes, bytes == b"OK 1")).chain([(&b""[..], true)]) {
        let (mut driver, mut other) = asking();
        other.write_all(bytes).unwrap();
        if is_end {
            other.shutdown(Shutdown::Write).unwrap();
        }
        driver.run();

        assert_eq!(operations(&driver.received()), [Operation::Reset as u16], "{bytes:?}");
        assert!(is_at_end(&mut other));
        let statistics = driver.device.statistics();
        assert_eq!((statistics.connections, statistics.promised_bytes, statistics.refused, statistics.accepted), (0, 0, 1, 0));
    }
}

#[test]
fn silence_of_the_other_end_resets_the_guest_in_the_end() {
    let (mut driver, mut other) = asking();
    driver.device.expire(Instant::now() + limits::ASKING_TIMEOUT - Duration::from_secs(1));
    driver.run();
    assert_eq!(driver.received(), []);

    driver.device.expire(Instant::now() + limits::ASKING_TIMEOUT + Duration::from_secs(1));
    driver.run();

    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert!(is_at_end(&mut other));
    assert_eq!((driver.device.statistics().connections, driver.device.statistics().refused), (0, 1));
}

#[test]
fn a_guest_that_gives_up_or_talks_too_early_ends_the_asking() {
    let early = [
        (Operation::Reset, vec![]),
        (Operation::ReadWrite, vec![Operation::Reset as u16]),
        (Operation::Request, vec![Operation::Reset as u16]),
        (Operation::Response, vec![Operation::Reset as u16]),
        (Operation::Shutdown, vec![Operation::Reset as u16]),
        (Operation::CreditRequest, vec![Operation::Reset as u16]),
    ];
    for (operation, answer) in early {
        let (mut driver, mut other) = asking();
        driver.send(&to_asked(operation), &[]);
        driver.run();
        assert_eq!(operations(&driver.received()), answer, "{operation:?}");
        assert!(is_at_end(&mut other), "{operation:?}");
        assert_eq!(driver.device.statistics().connections, 0);

        // A line that comes too late finds nobody.
        let _ = other.write_all(b"OK 1\n");
        driver.run();
        assert_eq!(driver.received(), []);
    }
}

#[test]
fn stopping_ends_those_that_ask() {
    let (mut driver, mut other) = asking();
    driver.device.stop();
    assert!(is_at_end(&mut other));
    assert_eq!((driver.device.statistics().connections, driver.device.statistics().promised_bytes), (0, 0));
}

/// A guest with CID `cid` and the stream of a program that has sent `line`.
pub(super) fn program(cid: u32, peer: Option<(u32, u32)>, line: &[u8]) -> (Driver, UnixStream) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest");
    let listener = UnixListener::bind(&path).unwrap();
    let mut driver = Driver::with_listener(cid, Some(listener), Some(Arc::new(move |_| peer)));
    let mut program = UnixStream::connect(&path).unwrap();
    program.set_nonblocking(true).unwrap();
    program.write_all(line).unwrap();
    driver.post_pages(4);
    driver.run();
    (driver, program)
}

#[test]
fn the_peer_function_says_what_the_guest_sees_as_the_source() {
    for (cid, peer, expected) in [
        (GUEST_CID, Some((3, 77)), (3, Some(77))),
        (GUEST_CID, Some((3, 0)), (3, None)),
        (GUEST_CID, None, (3, None)),
        (3, Some((16, 1024)), (16, Some(1024))),
        (3, None, (2, None)),
    ] {
        let (mut driver, mut program) = program(cid, peer, b"CONNECT 5005\nearly");
        let received = driver.received();
        assert_eq!(operations(&received), [Operation::Request as u16]);
        let request = received[0].0;
        assert_eq!((request.source_cid, request.destination_port), (expected.0, 5005));
        assert!(expected.1.is_none_or(|port| port == request.source_port));

        let answer = Header {
            source_cid: u64::from(cid),
            destination_cid: request.source_cid,
            source_port: 5005,
            destination_port: request.source_port,
            ..Driver::header(Operation::Response)
        };
        driver.send(&answer, &[]);
        driver.run();
        assert_eq!(read_available(&mut program), format!("OK {}\n", request.source_port).as_bytes());
        assert_eq!(driver.received()[0].1, b"early");
    }
}

#[test]
fn a_source_that_the_guest_may_not_see_closes_the_programs_stream() {
    for (cid, source) in [(GUEST_CID, 16), (GUEST_CID, 1), (3, 3), (3, 1)] {
        let (mut driver, mut program) = program(cid, Some((source, 5)), b"CONNECT 5005\n");
        assert_eq!(driver.received(), []);
        assert!(is_at_end(&mut program));
        assert_eq!(driver.device.statistics().connections, 0);
    }
}

#[test]
fn a_line_that_ends_without_its_end_closes_the_programs_stream_at_once() {
    let (mut driver, mut program) = program(GUEST_CID, None, b"CONNECT 50");
    assert_eq!(driver.device.statistics().connections, 1);
    program.shutdown(Shutdown::Write).unwrap();
    driver.run();
    assert!(is_at_end(&mut program));
    assert_eq!(driver.device.statistics().connections, 0);
}

#[test]
fn two_devices_meet() {
    // The guest of one connects to the guest of the other: its router asks the other's listener.
    let (mut near, mut asked) = asking();
    let (mut far, mut program) = program(3, Some((GUEST_CID, GUEST_PORT)), format!("CONNECT {FIRST_ASKING_PORT}\n").as_bytes());
    let request = far.received()[0].0;
    assert_eq!((request.source_cid, request.source_port, request.destination_port), (u64::from(GUEST_CID), GUEST_PORT, FIRST_ASKING_PORT));
    let answer = Header {
        source_cid: 3,
        destination_cid: u64::from(GUEST_CID),
        source_port: FIRST_ASKING_PORT,
        destination_port: GUEST_PORT,
        ..Driver::header(Operation::Response)
    };
    far.send(&answer, &[]);
    far.run();
    asked.write_all(&read_available(&mut program)).unwrap();
    near.run();
    assert_eq!(operations(&near.received()), [Operation::Response as u16]);
}
