//! `PREPARE` against a made-up guest: programs that hand over the host's end once the guest has accepted, and those that do not.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::driver_model::{Driver, GUEST_BUFFER, GUEST_CID};
use super::tests::{is_at_end, operations, pattern, read_available};
use super::tests_routes::program;
use crate::limits;
use crate::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The source of every connection here: the guest's packets go there.
const SOURCE: (u32, u32) = (3, 77); // arbitrary

/// A packet of the guest on the connection.
fn packet(operation: Operation) -> Header {
    Header { source_port: 5005, destination_port: SOURCE.1, ..Driver::header(operation) }
}

fn data(payload: &[u8]) -> Header {
    Header { length: u32::try_from(payload.len()).unwrap(), ..packet(Operation::ReadWrite) }
}

/// A guest that was asked and has not answered, and the stream of the program that asks.
fn requested() -> (Driver, UnixStream) {
    let (mut driver, program) = program(GUEST_CID, Some(SOURCE), b"PREPARE 5005\n");
    let received = driver.received();
    assert_eq!(operations(&received), [Operation::Request as u16]);
    assert_eq!((received[0].0.source_port, received[0].0.destination_port), (SOURCE.1, 5005));
    (driver, program)
}

/// A guest that has accepted, and the stream of the program that is to hand over the host's end.
fn prepared() -> (Driver, UnixStream) {
    let (mut driver, mut program) = requested();
    driver.send(&packet(Operation::Response), &[]);
    driver.run();
    assert_eq!(read_available(&mut program), b"OK 77\n");
    (driver, program)
}

/// Both ends of a new host's end: the client's, and the one to hand over.
fn client() -> (UnixStream, UnixStream) {
    let (client, end) = UnixStream::pair().unwrap();
    client.set_nonblocking(true).unwrap();
    (client, end)
}

fn hand_over(program: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
    sendmsg(program, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// Nothing is left of a connection, and it was not the program's stream that got the guest's data.
fn assert_over(driver: &Driver, program: &mut UnixStream) {
    assert_eq!(read_available(program), b"");
    assert!(is_at_end(program));
    assert_eq!((driver.device.statistics().connections, driver.device.statistics().promised_bytes), (0, 0));
}

#[test]
fn the_stream_that_is_handed_over_is_the_connection_with_all_that_came_before() {
    let (mut driver, mut program) = prepared();
    let (mut client, end) = client();
    client.write_all(b"from the client").unwrap();
    driver.send(&data(b"from the guest"), b"from the guest");
    driver.run();
    assert_eq!((driver.received(), read_available(&mut program)), (vec![], vec![]));
    assert_eq!(driver.device.statistics().backlog_bytes, 14);

    hand_over(&program, b"x", &[end.as_fd()]);
    driver.run();

    assert!(is_at_end(&mut program));
    assert_eq!(read_available(&mut client), b"from the guest");
    assert_eq!(driver.received().remove(0).1, b"from the client");
    driver.send(&data(b"more"), b"more");
    client.write_all(b"and more").unwrap();
    driver.run();
    assert_eq!(read_available(&mut client), b"more");
    assert_eq!(driver.received().remove(0).1, b"and more");
    let statistics = driver.device.statistics();
    assert_eq!((statistics.connections, statistics.accepted, statistics.backlog_bytes), (1, 1, 0));
    assert!(!rustix::fs::fcntl_getfl(&end).unwrap().contains(rustix::fs::OFlags::NONBLOCK), "the program's copy would share it");
    let ours = driver.device.table.connections().next().unwrap().stream().unwrap();
    assert!(rustix::io::fcntl_getfd(ours).unwrap().contains(rustix::io::FdFlags::CLOEXEC));

    // No deadline is left, and the end of the connection is an end like others.
    driver.device.expire(Instant::now() + Duration::from_secs(60));
    driver.send(&packet(Operation::Reset), &[]);
    driver.run();
    drop(end);
    assert!(is_at_end(&mut client));
    assert_eq!((driver.received(), driver.device.statistics().connections), (vec![], 0));
}

#[test]
fn a_stream_that_is_handed_over_before_the_guest_answers_waits_for_the_answer() {
    let (mut driver, mut program) = requested();
    let (mut client, end) = client();
    client.write_all(b"early").unwrap();
    hand_over(&program, b"x", &[end.as_fd()]);
    driver.run();
    assert_eq!((driver.received(), read_available(&mut program)), (vec![], vec![]));

    driver.send(&packet(Operation::Response), &[]);
    driver.run();

    assert_eq!(driver.received().remove(0).1, b"early");
    assert_eq!(read_available(&mut program), b"OK 77\n");
    assert!(is_at_end(&mut program));
}

#[test]
fn a_program_that_is_gone_after_it_handed_over_has_handed_over() {
    let (mut driver, program) = prepared();
    let (mut client, end) = client();
    hand_over(&program, b"x", &[end.as_fd()]);
    drop((program, end));
    driver.send(&data(b"hello"), b"hello");
    driver.run();
    assert_eq!((driver.received(), read_available(&mut client)), (vec![], b"hello".to_vec()));
}

#[test]
fn a_refusal_or_silence_of_the_guest_closes_the_asking_stream_without_a_line() {
    for silent in [false, true] {
        let (mut driver, mut program) = requested();
        if silent {
            driver.device.expire(Instant::now() + limits::REQUEST_TIMEOUT + Duration::from_secs(1));
        } else {
            driver.send(&packet(Operation::Reset), &[]);
        }
        driver.run();
        assert_eq!(operations(&driver.received()), if silent { vec![Operation::Reset as u16] } else { vec![] });
        assert_over(&driver, &mut program);
        assert_eq!((driver.device.statistics().refused, driver.device.statistics().accepted), (1, 0));
    }
}

#[test]
fn a_program_that_gives_up_before_the_answer_resets_the_guest() {
    let (mut driver, program) = requested();
    drop(program);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert_eq!(driver.device.statistics().connections, 0);
}

#[test]
fn anything_but_one_byte_with_one_unix_stream_resets_the_guest_and_is_closed() {
    // Whoever reads an end sees its close, if nobody else has it.
    let (mut pipe, pipe_end) = std::io::pipe().unwrap();
    let (mut first, first_end) = client();
    let (mut second, second_end) = client();
    let (datagrams, datagram_end) = UnixDatagram::pair().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut internet = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (internet_end, _) = listener.accept().unwrap();
    let (first_fd, second_fd) = (first_end.as_fd(), second_end.as_fd());
    let cases: [(&[u8], &[BorrowedFd<'_>]); 9] = [
        (b"x", &[]),
        (b"xx", &[]),
        (b"xx", &[first_fd]),
        (b"x", &[first_fd, second_fd]),
        (b"x", &[first_fd, second_fd, first_fd, second_fd, first_fd, second_fd, first_fd, second_fd]),
        (b"x", &[pipe_end.as_fd()]),
        (b"x", &[datagram_end.as_fd()]),
        (b"x", &[internet_end.as_fd()]),
        (b"x", &[listener.as_fd()]),
    ];
    for (number, (bytes, files)) in cases.into_iter().enumerate() {
        let (mut driver, mut program) = prepared();
        hand_over(&program, bytes, files);
        driver.run();
        assert_eq!(operations(&driver.received()), [Operation::Reset as u16], "case {number}");
        assert_over(&driver, &mut program);
    }
    drop((pipe_end, first_end, second_end, datagram_end, internet_end));
    assert!(is_at_end(&mut first) && is_at_end(&mut second));
    assert_eq!((pipe.read(&mut [0]).unwrap(), internet.read(&mut [0]).unwrap()), (0, 0));
    assert_eq!(datagrams.send(b"x").unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_byte_behind_the_line_is_no_stream() {
    let (mut driver, mut program) = program(GUEST_CID, Some(SOURCE), b"PREPARE 5005\nearly");
    driver.received();
    driver.send(&packet(Operation::Response), &[]);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    let mut line = [0; 32];
    let length = program.read(&mut line).unwrap();
    assert_eq!(&line[..length], b"OK 77\n");
    assert!(is_at_end(&mut program));
    assert_eq!(driver.device.statistics().connections, 0);
}

#[test]
fn an_asking_stream_that_ends_resets_the_guest() {
    for how in [Some(Shutdown::Write), None] {
        let (mut driver, program) = prepared();
        match how {
            Some(how) => program.shutdown(how).unwrap(),
            None => drop(program),
        }
        driver.run();
        assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
        assert_eq!(driver.device.statistics().connections, 0);
    }
}

#[test]
fn silence_instead_of_a_stream_resets_the_guest_in_the_end() {
    let (mut driver, mut program) = prepared();
    driver.device.expire(Instant::now() + limits::HANDSHAKE_TIMEOUT - Duration::from_secs(1));
    driver.run();
    assert_eq!(driver.received(), []);

    driver.device.expire(Instant::now() + limits::HANDSHAKE_TIMEOUT + Duration::from_secs(1));
    driver.run();

    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert_over(&driver, &mut program);
}

#[test]
fn shutdowns_of_the_guest_meanwhile_reach_the_stream_after_the_data() {
    // A stream that was shut down for reading is at its end, and the guest hears so.
    let shutdowns = [(SHUTDOWN_SEND, Operation::ReadWrite), (SHUTDOWN_RECEIVE, Operation::Shutdown)];
    for (payload, (flags, answer)) in [b"last words".as_slice(), b""].into_iter().flat_map(|payload| shutdowns.map(|how| (payload, how))) {
        let (mut driver, program) = prepared();
        let (mut client, end) = client();
        driver.send(&data(payload), payload);
        driver.send(&Header { flags, ..packet(Operation::Shutdown) }, &[]);
        driver.run();

        hand_over(&program, b"x", &[end.as_fd()]);
        driver.run();

        assert_eq!(read_available(&mut client), payload);
        assert_eq!(is_at_end(&mut client), flags == SHUTDOWN_SEND);
        assert_eq!(client.write(b"x").is_err(), flags == SHUTDOWN_RECEIVE);
        driver.run();
        assert_eq!(operations(&driver.received()), [answer as u16]);
        assert_eq!(driver.device.statistics().connections, 1);
    }
}

/// The ends that a guest can make of a connection at once, and how often it is answered with a reset.
fn ends() -> [(Header, usize); 2] {
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    [(Header { flags: both, ..packet(Operation::Shutdown) }, 1), (packet(Operation::Reset), 0)]
}

#[test]
fn a_guest_that_is_done_meanwhile_leaves_its_data_and_the_end_to_the_stream() {
    for (payload, (last, resets)) in [b"all".as_slice(), b""].into_iter().flat_map(|payload| ends().map(|end| (payload, end))) {
        let (mut driver, mut program) = prepared();
        let (mut client, end) = client();
        driver.send(&data(payload), payload);
        driver.send(&last, &[]);
        driver.run();
        assert_eq!(operations(&driver.received()), vec![Operation::Reset as u16; resets]);
        assert_eq!(driver.device.statistics().connections, 1);

        hand_over(&program, b"x", &[end.as_fd()]);
        drop(end);
        driver.run();

        assert_eq!(read_available(&mut client), payload);
        assert!(is_at_end(&mut client));
        assert_eq!(driver.received(), []);
        assert_over(&driver, &mut program);
    }
}

#[test]
fn a_program_that_hands_over_nothing_does_not_reset_a_guest_that_is_done() {
    for (junk, (last, resets)) in [true, false].into_iter().flat_map(|junk| ends().map(|end| (junk, end))) {
        let (mut driver, mut program) = prepared();
        driver.send(&last, &[]);
        driver.run();
        driver.received();
        if junk {
            program.write_all(b"x").unwrap();
        } else {
            driver.device.expire(Instant::now() + limits::HANDSHAKE_TIMEOUT + Duration::from_secs(1));
        }
        driver.run();
        assert_eq!((driver.received(), driver.device.statistics().resets), (vec![], resets as u64)); // its ports may be in use again
        assert_over(&driver, &mut program);
    }
}

#[test]
fn the_guests_credit_bounds_what_waits_for_a_stream() {
    let (mut driver, mut program) = prepared();
    let (mut client, end) = client();
    driver.send(&packet(Operation::CreditRequest), &[]);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::CreditUpdate as u16]);
    let payload = pattern(usize::try_from(limits::BUFFER_BYTES).unwrap() / 8, 1);
    for sent in 1..=8 {
        driver.send(&data(&payload), &payload);
        driver.run();
        driver.sent();
        assert_eq!(driver.device.statistics().backlog_bytes, sent * payload.len() as u64);
    }

    hand_over(&program, b"x", &[end.as_fd()]);
    let mut read = Vec::new();
    for _ in 0..100 {
        driver.run();
        read.extend(read_available(&mut client));
    }
    assert!(read == payload.repeat(8));
    let told = driver.received().pop().unwrap().0;
    assert_eq!(told.operation, Operation::CreditUpdate as u16);
    assert!(is_at_end(&mut program));

    // One byte more than the credit ends it.
    let (mut driver, mut program) = prepared();
    for _ in 0..8 {
        driver.send(&data(&payload), &payload);
    }
    driver.send(&data(b"x"), b"x");
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert_over(&driver, &mut program);
}

#[test]
fn a_guest_without_credit_is_asked_for_it_when_the_stream_is_there() {
    let (mut driver, mut program) = requested();
    driver.send(&Header { buffer_bytes: 0, ..packet(Operation::Response) }, &[]);
    driver.run();
    assert_eq!(read_available(&mut program), b"OK 77\n");
    assert_eq!(driver.received(), []);
    let (mut client, end) = client();
    client.write_all(b"hello").unwrap();
    hand_over(&program, b"x", &[end.as_fd()]);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::CreditRequest as u16]);
    driver.send(&Header { buffer_bytes: GUEST_BUFFER, ..packet(Operation::CreditUpdate) }, &[]);
    driver.run();
    assert_eq!(driver.received().remove(0).1, b"hello");
}

#[test]
fn stopping_closes_a_stream_that_is_to_hand_over() {
    let (mut driver, mut program) = prepared();
    driver.device.stop();
    assert_over(&driver, &mut program);
}
