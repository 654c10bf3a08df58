//! How fast data goes through the device to and from a real guest: `cargo bench -p nitroxide-vsock`.
//!
//! Needs `cargo xtask setup` and `cargo xtask guest`. No framework: one run costs a boot, and the figures of a guest scatter more than a
//! statistic over thousands of iterations would show. Each figure is the median of [`RUNS`] runs. Results and comparison: docs/vsock.md.
//! The host's end of every connection reads 256 KiB at a time and throws the data away, or writes zeros.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use support::{Guest, PATIENCE, words};

const RUNS: usize = 3;
const MIB: u64 = 1 << 20;
const BYTES: u64 = 64 * MIB;
const LENGTHS: [u64; 5] = [4 << 10, 16 << 10, 32 << 10, 64 << 10, 1 << 20];
const PINGS: u64 = 1000;

fn main() {
    // `cargo test --benches` only asks whether it builds.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let guest = Guest::boot();
    println!("vsock throughput: one guest, 1 vCPU, {:?}, {} cores", guest.vm.choice().unwrap(), thread::available_parallelism().unwrap());
    println!("{} MiB per run, median of {RUNS} runs; MiB/s", BYTES / MIB);
    println!("{:>22} {:>10} {:>10} {:>10}", "length of a write", "g2h", "h2g", "g2h x 4");
    for length in LENGTHS {
        let to_host = median(|| blast(&guest, length, 1));
        let to_guest = median(|| drain(&guest, length));
        let four = median(|| blast(&guest, length, 4));
        println!("{length:>22} {to_host:>10.0} {to_guest:>10.0} {four:>10.0}");
    }
    for length in [1, 4096] {
        let answer = guest.ask(&format!("ping {} {PINGS} {length}", listen_echo(&guest, 2)));
        let [middle, best, worst]: [f64; 3] = numbers(&words(&answer)).try_into().unwrap();
        println!("round trip, {length} bytes: median {:.0} us, best {:.0} us, 99 % {:.0} us", middle / 1e3, best / 1e3, worst / 1e3);
    }
    let begin = Instant::now();
    let answer = guest.ask(&format!("cycle {} {PINGS}", listen_echo(&guest, 3)));
    words(&answer);
    println!("connect, one byte each way, close: {:.0} us", begin.elapsed().as_secs_f64() * 1e6 / PINGS as f64);
}

fn numbers(words: &[String]) -> Vec<f64> {
    words.iter().map(|word| word.parse().unwrap()).collect()
}

fn median(mut run: impl FnMut() -> f64) -> f64 {
    let mut results: Vec<f64> = (0..RUNS).map(|_| run()).collect();
    results.sort_by(f64::total_cmp);
    results[RUNS / 2]
}

fn rate(bytes: u64, micros: f64) -> f64 {
    bytes as f64 / MIB as f64 / (micros / 1e6)
}

/// The guest writes on `streams` streams at once; timed by the guest, from its first write until the host has read all.
fn blast(guest: &Guest, length: u64, streams: u64) -> f64 {
    let port = guest.ports.listen(10);
    let bytes = BYTES / streams;
    let answers: Vec<_> = (0..streams).map(|_| guest.ask(&format!("blast 10 {bytes} {length}"))).collect();
    let readers: Vec<_> =
        answers.iter().map(|_| port.recv_timeout(PATIENCE).unwrap().1).map(|stream| thread::spawn(|| read_all(stream))).collect();
    for reader in readers {
        assert_eq!(reader.join().unwrap(), bytes);
    }
    let slowest = answers.iter().map(|answer| numbers(&words(answer))[0]).fold(0.0, f64::max);
    rate(BYTES, slowest)
}

fn read_all(mut stream: UnixStream) -> u64 {
    let mut buffer = vec![0; 256 << 10];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return bytes,
            count => bytes += count as u64,
        }
    }
}

/// The host writes; timed by the guest from its first read to the end.
fn drain(guest: &Guest, length: u64) -> f64 {
    let port = guest.ports.listen(11);
    let answer = guest.ask("drain 11");
    let (_, mut stream) = port.recv_timeout(PATIENCE).unwrap();
    let buffer = vec![0; usize::try_from(length).unwrap()];
    for _ in 0..BYTES / length {
        stream.write_all(&buffer).unwrap();
    }
    drop(stream);
    let results = numbers(&words(&answer));
    assert_eq!(results[1], BYTES as f64);
    rate(BYTES, results[0])
}

/// A port of the host that gives back what it gets, connection after connection.
fn listen_echo(guest: &Guest, port: u32) -> u32 {
    let connections = guest.ports.listen(port);
    thread::spawn(move || {
        for (_, mut stream) in connections {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                stream.write_all(&buffer[..count]).unwrap();
            }
        }
    });
    port
}
