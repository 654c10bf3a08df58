//! Beginnings and ends of connections against a made-up guest: half-closes, closes, refusals, timeouts, connections of the host.

use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::driver_model::{Driver, GUEST_PORT};
use super::tests::{is_at_end, operations, pattern, read_available};
use crate::limits;
use crate::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

#[test]
fn the_guests_half_close_reaches_the_host_after_its_data_and_the_other_way_stays_open() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.post_pages(4);
    driver.send(&Driver::data(b"last words"), b"last words");
    driver.send(&Header { flags: SHUTDOWN_SEND, ..Driver::header(Operation::Shutdown) }, &[]);
    driver.run();
    assert_eq!(read_available(&mut host), b"last words");
    assert!(is_at_end(&mut host));
    assert_eq!(driver.received(), []);

    host.write_all(b"answer").unwrap();
    driver.run();
    assert_eq!(driver.received().remove(0).1, b"answer");

    drop(host);
    driver.run();
    let (header, _) = driver.received().remove(0);
    assert_eq!((header.operation, header.flags), (Operation::Shutdown as u16, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
}

#[test]
fn the_hosts_half_close_reaches_the_guest_after_its_data_and_the_other_way_stays_open() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.post_pages(4);
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    driver.run();
    let received = driver.received();
    assert_eq!(operations(&received), [Operation::ReadWrite as u16, Operation::Shutdown as u16]);
    assert_eq!((received[0].1.as_slice(), received[1].0.flags), (b"question".as_slice(), SHUTDOWN_SEND));

    driver.send(&Driver::data(b"answer"), b"answer");
    driver.send(&Header { flags: SHUTDOWN_SEND | SHUTDOWN_RECEIVE, ..Driver::header(Operation::Shutdown) }, &[]);
    driver.run();
    assert_eq!(read_available(&mut host), b"answer");
    assert!(is_at_end(&mut host));
    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert_eq!(driver.device.statistics().connections, 0);
}

#[test]
fn a_guest_that_receives_no_more_stops_the_hosts_writer() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.post_pages(2);
    driver.send(&Header { flags: SHUTDOWN_RECEIVE, ..Driver::header(Operation::Shutdown) }, &[]);
    driver.run();
    assert_eq!(host.write_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    driver.send(&Driver::data(b"still"), b"still");
    driver.run();
    assert_eq!(read_available(&mut host), b"still");
}

#[test]
fn a_host_that_receives_no_more_is_told_to_the_guest_and_later_data_are_thrown_away() {
    let mut driver = Driver::new();
    let host = driver.open(GUEST_PORT);
    host.shutdown(std::net::Shutdown::Read).unwrap();
    driver.post_pages(4);
    driver.send(&Driver::data(b"x"), b"x");
    driver.run();
    let received = driver.received();
    assert_eq!(operations(&received), [Operation::Shutdown as u16]);
    assert_eq!((received[0].0.flags, received[0].0.forwarded), (SHUTDOWN_RECEIVE, 1));
}

#[test]
fn data_of_a_guest_that_closed_wait_for_a_slow_host_while_its_ports_are_free_again() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    let payload = pattern(32768, 9);
    let mut sent = 0;
    while driver.device.statistics().backlog_bytes < 64 * 1024 {
        driver.send(&Driver::data(&payload), &payload);
        sent += payload.len();
        driver.run();
        driver.sent();
    }
    driver.post_pages(1);
    driver.send(&Header { flags: SHUTDOWN_SEND | SHUTDOWN_RECEIVE, ..Driver::header(Operation::Shutdown) }, &[]);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    let again = driver.open(GUEST_PORT);
    drop(again);

    let mut read = 0;
    for _ in 0..100 {
        read += read_available(&mut host).len();
        driver.run();
    }
    assert_eq!(read, sent);
    assert!(is_at_end(&mut host));
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_forgotten_without_a_word() {
    let mut driver = Driver::new();
    let host = driver.open(GUEST_PORT);
    driver.post_pages(2);
    drop(host);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::Shutdown as u16]);
    assert_eq!(driver.device.statistics().connections, 1);

    driver.device.expire(Instant::now() + limits::CLOSE_TIMEOUT + Duration::from_secs(1));
    driver.run();

    assert_eq!(driver.received(), []);
    assert_eq!(driver.device.statistics().connections, 0);
}

#[test]
fn the_host_connects_and_data_that_were_there_before_the_answer_follow_it() {
    let mut driver = Driver::new();
    let (mut host, ours) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    host.write_all(b"early").unwrap();
    driver.post_pages(3);
    driver.device.connect(ours, (3, 77), 5005).unwrap();
    driver.run();
    let received = driver.received();
    assert_eq!(operations(&received), [Operation::Request as u16]);
    assert_eq!((received[0].0.source_cid, received[0].0.source_port, received[0].0.destination_port), (3, 77, 5005));

    let answer = Header { source_port: 5005, destination_port: 77, ..Driver::header(Operation::Response) };
    driver.send(&answer, &[]);
    driver.run();
    assert_eq!(driver.received().remove(0).1, b"early");
    assert_eq!(read_available(&mut host), b"");
}

#[test]
fn a_refusal_or_silence_of_the_guest_closes_the_hosts_stream() {
    for silent in [false, true] {
        let mut driver = Driver::new();
        let (mut host, ours) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        driver.post_pages(2);
        driver.device.connect(ours, (3, 77), 5005).unwrap();
        driver.run();
        driver.received();
        if silent {
            driver.device.expire(Instant::now() + limits::REQUEST_TIMEOUT + Duration::from_secs(1));
        } else {
            driver.send(&Header { source_port: 5005, destination_port: 77, ..Driver::header(Operation::Reset) }, &[]);
        }
        driver.run();
        assert!(is_at_end(&mut host));
        assert_eq!(operations(&driver.received()), if silent { vec![Operation::Reset as u16] } else { vec![] });
        assert_eq!(driver.device.statistics().refused, 1);
    }
}

#[test]
fn connections_of_the_host_are_refused_for_a_wrong_source_a_pair_in_use_and_a_stopped_driver() {
    let mut driver = Driver::new();
    let connect = |driver: &mut Driver, source| {
        let (_, ours) = UnixStream::pair().unwrap();
        driver.device.connect(ours, source, 5005).map_err(|error| error.kind())
    };
    assert_eq!(connect(&mut driver, (4, 77)), Err(ErrorKind::InvalidInput));
    assert_eq!(connect(&mut driver, (3, 77)), Ok(()));
    assert_eq!(connect(&mut driver, (3, 77)), Err(ErrorKind::AddrInUse));
    assert_eq!(connect(&mut driver, (2, 77)), Ok(()));
    assert_eq!(connect(&mut driver, (3, 0)), Ok(()));
    driver.device.stop();
    assert_eq!(connect(&mut driver, (3, 78)), Err(ErrorKind::NotConnected));
}

#[test]
fn a_parent_vm_reaches_enclaves_and_consoles_by_their_own_cid() {
    let mut driver = Driver::with_cid(3);
    for cid in [0, 2, 16] {
        driver.post_pages(1);
        driver.send(&Header { source_cid: 3, destination_cid: cid, ..Driver::header(Operation::Request) }, &[]);
        driver.run();
        assert_eq!(driver.received()[0].0.source_cid, cid);
        assert_eq!(u64::from(driver.router.opened.lock().unwrap().last().unwrap().0.cid), cid);
    }
    for cid in [1, 3] {
        driver.post_pages(1);
        driver.send(&Header { source_cid: 3, destination_cid: cid, ..Driver::header(Operation::Request) }, &[]);
        driver.run();
        assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    }
}

#[test]
fn stopping_closes_every_stream() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.device.stop();
    assert!(is_at_end(&mut host));
    assert_eq!(driver.device.statistics().connections, 0);
}

#[test]
fn a_stream_that_somebody_else_still_holds_leaves_epoll_with_its_connection() {
    let watched = |driver: &Driver| {
        let information = format!("/proc/self/fdinfo/{}", driver.device.events_fd().as_raw_fd());
        std::fs::read_to_string(information).unwrap().lines().filter(|line| line.starts_with("tfd:")).count()
    };
    let mut driver = Driver::new();
    let before = watched(&driver);
    let ends: [fn(&mut Driver, UnixStream); 3] = [
        |driver, _| driver.device.stop(),
        |driver, _| driver.send(&Header { source_port: 5005, destination_port: 77, ..Driver::header(Operation::Reset) }, &[]),
        |_, host| drop(host), // the guest is told and has not confirmed it yet
    ];
    for end in ends {
        let (host, ours) = UnixStream::pair().unwrap();
        let _held = ours.try_clone().unwrap();
        driver.device.start();
        driver.post_pages(2);
        driver.device.connect(ours, (3, 77), 5005).unwrap();
        driver.run();
        driver.send(&Header { source_port: 5005, destination_port: 77, ..Driver::header(Operation::Response) }, &[]);
        driver.run();
        assert_eq!(watched(&driver), before + 1);

        end(&mut driver, host);
        driver.run();

        assert_eq!(watched(&driver), before);
    }
}

#[test]
fn programs_that_give_up_before_the_guest_was_asked_leave_nothing_behind() {
    let mut driver = Driver::new();
    driver.run();
    // The guest gives no buffers, so it hears of none of them.
    for port in 1..=10 {
        let (host, ours) = UnixStream::pair().unwrap();
        driver.device.connect(ours, (3, 0), port).unwrap();
        driver.run();
        drop(host);
        driver.run();
    }
    let (_host, ours) = UnixStream::pair().unwrap();
    driver.device.connect(ours, (3, 0), 11).unwrap();
    driver.device.expire(Instant::now() + limits::REQUEST_TIMEOUT + Duration::from_secs(1));
    assert_eq!((driver.device.statistics().connections, driver.device.statistics().resets), (0, 0));

    driver.post_pages(16);
    driver.run();
    assert_eq!(driver.received(), []);
}
