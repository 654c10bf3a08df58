//! The sample enclave application: says where it runs, asks `/dev/nsm` for its measurements, and serves a line protocol on vsock.
//!
//! `nitroxide-hello [IDLE-SECONDS]` ends by request (`exit N`), or with status 0 after so long without a connection (default 60).
//! The protocol is in [`protocol`], the NSM requests in [`nsm`]. The demo and the guest tests talk to it on port 5005.

mod nsm;
mod protocol;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    process::ExitCode,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use nitroxide_guest_sys::vsock;
use protocol::Reply;

/// Where it serves.
const PORT: u32 = 5005;
const IDLE: Duration = Duration::from_secs(60);

/// What a connection tells the main thread.
enum Event {
    Activity,
    Exit(u8),
}

fn main() -> ExitCode {
    let idle = std::env::args().nth(1).and_then(|seconds| seconds.parse().ok()).map_or(IDLE, Duration::from_secs);
    greet();
    let listener = match vsock::Listener::bind(PORT) {
        Ok(listener) => listener,
        Err(error) => {
            println!("hello: no vsock here ({error}), nothing more to do");
            return ExitCode::SUCCESS;
        }
    };
    println!("hello: listening on vsock port {PORT}; lines: {}", protocol::HELP);
    let (sender, events) = mpsc::channel();
    thread::spawn(move || {
        while let Ok((stream, cid, port)) = listener.accept() {
            println!("hello: connection from {cid}:{port}");
            let sender = sender.clone();
            thread::spawn(move || serve(&stream, &sender));
        }
    });
    loop {
        match events.recv_timeout(idle) {
            Ok(Event::Activity) => {}
            Ok(Event::Exit(status)) => {
                println!("hello: asked to exit with status {status}");
                return ExitCode::from(status);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                println!("hello: nobody came for {} s, bye", idle.as_secs());
                return ExitCode::SUCCESS;
            }
        }
    }
}

fn greet() {
    let kernel = rustix::system::uname();
    let processors = thread::available_parallelism().map_or(1, usize::from);
    println!("hello: I am an enclave");
    println!("hello: Linux {} on {}", kernel.release().to_string_lossy(), kernel.machine().to_string_lossy());
    println!("hello: {processors} vCPUs, {} MiB of memory", memory_mib());
    match vsock::local_cid() {
        Ok(vsock::ANY_CID) => println!("hello: no CID: no vsock device"),
        Ok(cid) => println!("hello: my CID is {cid}"),
        Err(error) => println!("hello: no CID: {error}"),
    }
    for line in nsm::pcrs() {
        println!("hello: {line}");
    }
}

/// What the kernel manages, in MiB; 0 where /proc is not mounted.
fn memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

/// One connection: lines in, lines out, until the peer closes its side.
fn serve(stream: &File, events: &mpsc::Sender<Event>) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line without an end is bounded, so that a peer cannot fill our memory.
        match std::io::Read::take(&mut reader, 1 << 20).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // The main thread may be gone already: then the enclave is ending.
        let _ = events.send(Event::Activity);
        let reply = protocol::answer(&line);
        let (text, exit) = match reply {
            Reply::Text(text) => (text, None),
            Reply::Exit(status) => (format!("exiting with status {status}\n").into_bytes(), Some(status)),
        };
        let mut writer = stream;
        if writer.write_all(&text).is_err() {
            return;
        }
        if let Some(status) = exit {
            let _ = events.send(Event::Exit(status));
            return;
        }
    }
}
