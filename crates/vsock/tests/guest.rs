//! The device in a real guest: Linux 7.3's own driver, whose large writes come as chains of many descriptors.
//!
//! Needs `cargo xtask setup` and `cargo xtask guest`. All tests share one guest (a boot costs seconds) and take turns. The longest,
//! [`data_in_both_directions_on_several_streams_is_unchanged`], moves 1 GiB each way: 15 to 25 s with an emulated CPU on two cores.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use support::load::{read_pattern, write_pattern};
use support::{Guest, PATIENCE, SERVICE, words};

const MIB: u64 = 1 << 20;
const ECONNRESET: &str = "error 104";

fn guest() -> MutexGuard<'static, Guest> {
    static GUEST: LazyLock<Mutex<Guest>> = LazyLock::new(|| Mutex::new(Guest::boot()));
    GUEST.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hex(digest: u128) -> String {
    format!("{digest:032x}")
}

fn ends(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// Waits for a state that must come; the patience only ends a hang.
fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Memory of this process that is neither the guest's nor a file's, in bytes.
fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn data_in_both_directions_on_several_streams_is_unchanged() {
    let guest = guest();
    let total = 1024 * MIB;
    let begin = Instant::now();
    // Eight streams at once: two of each kind of opener and direction.
    let each = total / 4;
    thread::scope(|scope| {
        for seed in 0..2u64 {
            let guest = &*guest;
            let port = 100 + u32::try_from(seed).unwrap();
            let (to_us, from_us) = (guest.ports.listen(port), guest.ports.listen(port + 10));
            scope.spawn(move || {
                let answer = guest.ask(&format!("send {port} {each} {seed}"));
                let (_, mut stream) = to_us.recv_timeout(PATIENCE).unwrap();
                let (digest, bytes) = read_pattern(&mut stream, seed).unwrap();
                stream.write_all(hex(digest).as_bytes()).unwrap();
                drop(stream);
                assert_eq!(bytes, each);
                assert_eq!(words(&answer), [hex(digest), hex(digest)]);
            });
            scope.spawn(move || {
                let answer = guest.ask(&format!("receive {} {seed}", port + 10));
                let (_, mut stream) = from_us.recv_timeout(PATIENCE).unwrap();
                let digest = write_pattern(&mut stream, each, seed + 2).unwrap();
                drop(stream);
                assert_eq!(words(&answer), [hex(digest), each.to_string()]);
            });
            scope.spawn(move || {
                let mut stream = guest.service(b's', 0, seed);
                let digest = write_pattern(&mut stream, each, seed + 4).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert_eq!(answer, hex(digest));
            });
            scope.spawn(move || {
                let mut stream = guest.service(b'g', each, seed + 6);
                let (digest, bytes) = read_pattern(&mut stream, seed).unwrap();
                assert_eq!(bytes, each);
                assert_eq!(digest, write_pattern(&mut std::io::sink(), each, seed + 6).unwrap());
            });
        }
    });
    eprintln!("{} MiB each way in {:?}; {:?}", total / MIB, begin.elapsed(), guest.backend.statistics());
    assert_eq!(guest.backend.statistics().malformed, 0);
}

#[test]
fn two_thousand_connections_one_after_another_and_two_thousand_at_once() {
    const COUNT: usize = 2000;
    let guest = guest();
    let port = guest.ports.listen(200);
    let answer = guest.ask(&format!("cycle 200 {COUNT}"));
    for _ in 0..COUNT {
        let (_, mut stream) = port.recv_timeout(PATIENCE).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream.write_all(b"y").unwrap();
        assert!(ends(&mut stream));
    }
    words(&answer);

    let answer = guest.ask(&format!("crowd 200 {COUNT}"));
    let mut streams: Vec<_> = (0..COUNT).map(|_| port.recv_timeout(PATIENCE).unwrap().1).collect();
    assert!(guest.backend.statistics().connections >= COUNT);
    for stream in &mut streams {
        stream.read_exact(&mut [0]).unwrap();
        stream.write_all(b"y").unwrap();
    }
    words(&answer);
    for stream in &mut streams {
        assert!(ends(stream));
    }
    drop(streams);
    until("only the control connection is left", || guest.backend.statistics().connections == 1);
}

#[test]
fn two_thousand_connections_of_the_host() {
    let guest = guest();
    for _ in 0..2000 {
        let mut stream = guest.service(b'x', 0, 0);
        assert!(ends(&mut stream));
    }
    until("only the control connection is left", || guest.backend.statistics().connections == 1);
}

#[test]
fn a_half_close_of_the_host_ends_one_direction_only() {
    let guest = guest();
    let mut stream = guest.service(b'e', 0, 0);
    stream.write_all(b"the last line").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut echo = String::new();
    stream.read_to_string(&mut echo).unwrap();
    assert_eq!(echo, "the last line");
}

#[test]
fn a_half_close_of_the_guest_ends_one_direction_only() {
    let guest = guest();
    let port = guest.ports.listen(300);
    let answer = guest.ask("send 300 10 1");
    let (request, mut stream) = port.recv_timeout(PATIENCE).unwrap();
    assert_eq!((request.cid, request.port), (3, 300));
    let (digest, _) = read_pattern(&mut stream, 1).unwrap(); // to its end
    stream.write_all(b"still-open").unwrap();
    drop(stream);
    assert_eq!(words(&answer), [hex(digest), "still-open".to_owned()]);
}

#[test]
fn what_nobody_serves_is_refused_with_a_reset() {
    let guest = guest();
    for (port, cid) in [(9, 3), (9, 2), (1, 0), (1, 4), (1, 77)] {
        assert_eq!(guest.ask(&format!("connect {port} {cid}")).recv_timeout(PATIENCE).unwrap(), ECONNRESET, "{cid}:{port}");
    }
    assert!(guest.connect(9).is_none());
    let (mut host, ours) = UnixStream::pair().unwrap();
    guest.backend.connect(ours, (3, 77), 9).unwrap();
    assert!(ends(&mut host));
}

#[test]
fn cid_2_and_3_both_reach_the_parent() {
    let guest = guest();
    let port = guest.ports.listen(400);
    for cid in [2, 3] {
        words(&guest.ask(&format!("connect 400 {cid}")));
        assert_eq!(port.recv_timeout(PATIENCE).unwrap().0.cid, 3);
    }
}

#[test]
fn a_stream_of_the_owner_reaches_the_guest_without_a_handshake() {
    let guest = guest();
    let (mut host, ours) = UnixStream::pair().unwrap();
    guest.backend.connect(ours, (3, 0), SERVICE).unwrap();
    let mut ask = vec![b'e'];
    ask.extend([0; 16]);
    host.write_all(&ask).unwrap();
    host.write_all(b"hello").unwrap();
    let mut echo = [0; 5];
    host.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"hello");
}

#[test]
fn a_host_that_closes_stops_the_guests_writer() {
    let guest = guest();
    let port = guest.ports.listen(500);
    let answer = guest.ask("until-error 500");
    let (_, mut stream) = port.recv_timeout(PATIENCE).unwrap();
    stream.read_exact(&mut [0; 10000]).unwrap();
    drop(stream);
    let answer = answer.recv_timeout(PATIENCE).unwrap();
    assert!(["error 32", ECONNRESET].contains(&answer.as_str()), "{answer}"); // EPIPE
}

#[test]
fn slow_readers_cost_bounded_memory_and_lose_nothing() {
    const STREAMS: u64 = 40;
    const EACH: u64 = 4 * MIB;
    const BUFFER: u64 = 256 * 1024;
    let guest = guest();
    let port = guest.ports.listen(600);
    let before = own_memory();
    let answers: Vec<_> = (0..STREAMS).map(|seed| guest.ask(&format!("send 600 {EACH} {seed}"))).collect();
    let mut streams: Vec<_> = (0..STREAMS).map(|_| port.recv_timeout(PATIENCE).unwrap().1).collect();

    // Nobody reads: every stream fills its host socket, then its buffer here, then the guest waits.
    until("every stream waits for the host", || guest.backend.statistics().backlog_bytes == STREAMS * BUFFER);
    let grown = own_memory().saturating_sub(before);
    eprintln!("{STREAMS} slow readers: {} KiB more of own memory; {:?}", grown / 1024, guest.backend.statistics());
    assert!(grown < STREAMS * BUFFER * 2 + 4 * MIB, "{grown}");

    let mut digests: Vec<_> = streams
        .iter_mut()
        .map(|stream| {
            let (digest, bytes) = read_pattern(stream, 1).unwrap();
            assert_eq!(bytes, EACH);
            hex(digest)
        })
        .collect();
    drop(streams);
    let mut expected: Vec<_> = answers.iter().map(|answer| words(answer).remove(0)).collect();
    digests.sort();
    expected.sort();
    assert_eq!(digests, expected);
    assert_eq!(guest.backend.statistics().backlog_bytes, 0);
}

#[test]
fn a_slow_guest_stops_the_hosts_writer_and_loses_nothing() {
    let guest = guest();
    let mut stream = guest.service(b'w', 300, 5);
    let digest = write_pattern(&mut stream, 8 * MIB, 5).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, hex(digest));
}

#[test]
fn a_reload_of_the_driver_closes_every_stream_and_so_does_the_end_of_the_vm() {
    let _turn = guest(); // one guest works at a time
    let second = Guest::boot();
    for _ in 0..3 {
        second.reload_driver();
        until("only the control connection is left", || second.backend.statistics().connections == 1);
        let mut echo = second.service(b'e', 0, 0);
        echo.write_all(b"again").unwrap();
        echo.read_exact(&mut [0; 5]).unwrap();
        drop(echo);
    }

    let mut stream = second.service(b'e', 0, 0);
    let port = second.ports.listen(700);
    let _answer = second.ask("until-error 700");
    let (_, mut incoming) = port.recv_timeout(PATIENCE).unwrap();
    incoming.read_exact(&mut [0]).unwrap();

    second.vm.stopper().stop();
    second.vm.wait();

    assert!(ends(&mut stream));
    let mut rest = Vec::new();
    incoming.read_to_end(&mut rest).unwrap();
    until("no connection is left", || second.backend.statistics().connections == 0);
}
