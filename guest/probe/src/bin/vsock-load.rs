//! The guest's end of the vsock tests and benchmarks: a machine of one program that does what the host says.
//!
//! As PID 1 it loads the modules in `/modules`, serves port [`SERVICE`] and connects to port [`CONTROL`] of the parent, where it gets one
//! command per line, `<id> <verb> <arguments>`, and answers `<id> ok <words>` or `<id> error <errno>`; each command runs on a thread of its own.
//! The verbs are in [`obey`]. Used by `crates/vsock/tests/guest.rs` and `crates/vsock/benches/throughput.rs`.

#[path = "../vsock_load.rs"]
mod vsock_load;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nitroxide_guest_sys::vsock::{Listener, PARENT_CID, connect};
use rustix::net::Shutdown;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::{RebootCommand, delete_module, init_module, reboot};
use vsock_load::{LONGEST, read_pattern, write_pattern};

/// The parent's port with the commands.
const CONTROL: u32 = 1;
/// Our port with the services that a connection asks for by its first 17 bytes: a letter, a number of bytes, a seed.
const SERVICE: u32 = 7000;
const MODULES: [&str; 4] = ["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"];
const PATIENCE: Duration = Duration::from_secs(300);

fn main() {
    if let Err(error) = run() {
        println!("vsock-load: {error}");
    }
    let _ = io::stdout().flush();
    if std::process::id() == 1 {
        let _ = reboot(RebootCommand::PowerOff);
    }
}

fn run() -> io::Result<()> {
    load_modules()?;
    let files = Some(16384);
    setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files })?;
    let listener = Listener::bind(SERVICE)?;
    thread::spawn(move || {
        while let Ok((stream, ..)) = listener.accept() {
            thread::spawn(move || serve(stream));
        }
    });
    while let Next::Reload = follow_commands()? {
        // The connections of the old driver are over; a listener has none and stays.
        while delete_module(c"vmw_vsock_virtio_transport", 0).is_err() {
            thread::sleep(Duration::from_millis(10));
        }
        load("vmw_vsock_virtio_transport")?;
    }
    Ok(())
}

fn load_modules() -> io::Result<()> {
    MODULES.iter().try_for_each(|module| load(module))
}

fn load(module: &str) -> io::Result<()> {
    Ok(init_module(&fs::read(format!("/modules/{module}.ko"))?, c"")?)
}

/// What to do when the host gives no more commands.
enum Next {
    PowerOff,
    Reload,
}

/// Obeys commands until the host closes the connection or wants the driver reloaded.
fn follow_commands() -> io::Result<Next> {
    let mut control = connect(PARENT_CID, CONTROL, PATIENCE)?;
    rustix::net::sockopt::set_socket_timeout(&control, rustix::net::sockopt::Timeout::Recv, None)?;
    let answers = Arc::new(Mutex::new(control.try_clone()?));
    writeln!(control, "ready")?;
    for line in BufReader::new(control).lines() {
        let line = line?;
        let Some((id, command)) = line.split_once(' ').map(|(id, command)| (id.to_owned(), command.to_owned())) else { continue };
        if command == "reload" {
            return Ok(Next::Reload);
        }
        let answers = Arc::clone(&answers);
        thread::spawn(move || {
            let answer = match obey(&command) {
                Ok(words) => format!("{id} ok {words}\n"),
                Err(error) => format!("{id} error {}\n", error.raw_os_error().unwrap_or(0)),
            };
            if let Ok(mut answers) = answers.lock() {
                let _ = answers.write_all(answer.as_bytes());
            }
        });
    }
    Ok(Next::PowerOff)
}

/// One command of the host.
fn obey(command: &str) -> io::Result<String> {
    let words: Vec<&str> = command.split(' ').collect();
    let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok()).ok_or(io::ErrorKind::InvalidInput);
    let port = u32::try_from(number(1)?).map_err(io::Error::other)?;
    let open = || connect(PARENT_CID, port, PATIENCE);
    match words[0] {
        // send PORT BYTES SEED: data, half-close, then the host's answer to its end.
        "send" => {
            let mut stream = open()?;
            let digest = write_pattern(&mut stream, number(2)?, number(3)?)?;
            rustix::net::shutdown(&stream, Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(format!("{digest:032x} {answer}"))
        }
        // receive PORT SEED: everything to the end.
        "receive" => {
            let (digest, bytes) = read_pattern(&mut open()?, number(2)?)?;
            Ok(format!("{digest:032x} {bytes}"))
        }
        // connect PORT CID: is it accepted?
        "connect" => {
            connect(u32::try_from(number(2)?).map_err(io::Error::other)?, port, PATIENCE)?;
            Ok(String::new())
        }
        // cycle PORT COUNT: opens, exchanges a byte, closes, one connection after another.
        "cycle" => {
            for _ in 0..number(2)? {
                let mut stream = open()?;
                stream.write_all(b"x")?;
                stream.read_exact(&mut [0])?;
            }
            Ok(String::new())
        }
        // crowd PORT COUNT: opens all at once, exchanges a byte on each, closes all.
        "crowd" => {
            let mut streams = (0..number(2)?).map(|_| open()).collect::<io::Result<Vec<_>>>()?;
            for stream in &mut streams {
                stream.write_all(b"x")?;
            }
            for stream in &mut streams {
                stream.read_exact(&mut [0])?;
            }
            Ok(String::new())
        }
        // until-error PORT: writes until the host does not let it; the error is the answer.
        "until-error" => {
            let mut stream = open()?;
            loop {
                stream.write_all(&[0; 4096])?;
            }
        }
        // blast PORT BYTES LENGTH: writes of one length, then waits for the host's end; microseconds.
        "blast" => {
            let mut stream = open()?;
            let buffer = vec![0x5a; usize::try_from(number(3)?).map_err(io::Error::other)?];
            let begin = Instant::now();
            let mut left = number(2)?;
            while left > 0 {
                stream.write_all(&buffer)?;
                left = left.saturating_sub(buffer.len() as u64);
            }
            rustix::net::shutdown(&stream, Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())?;
            Ok(begin.elapsed().as_micros().to_string())
        }
        // drain PORT: reads to the end; microseconds from the first byte on, and bytes.
        "drain" => {
            let mut stream = open()?;
            let mut buffer = vec![0; LONGEST];
            let mut bytes = stream.read(&mut buffer)?;
            let begin = Instant::now();
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(format!("{} {bytes}", begin.elapsed().as_micros())),
                    count => bytes += count,
                }
            }
        }
        // ping PORT COUNT LENGTH: round trips; median, best, worst of 100 in nanoseconds.
        "ping" => {
            let mut stream = open()?;
            let mut buffer = vec![0; usize::try_from(number(3)?).map_err(io::Error::other)?];
            let mut times = Vec::new();
            for _ in 0..number(2)? {
                let begin = Instant::now();
                stream.write_all(&buffer)?;
                stream.read_exact(&mut buffer)?;
                times.push(begin.elapsed().as_nanos());
            }
            times.sort_unstable();
            let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or(0);
            Ok(format!("{} {} {}", at(50), at(0), at(99)))
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Serves one connection that the host opened; errors end it, as the host then sees.
fn serve(mut stream: File) {
    let mut ask = [0; 17];
    if stream.read_exact(&mut ask).is_err() {
        return;
    }
    let number = |at: usize| ask[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let (bytes, seed) = (number(1), number(9));
    let _ = match ask[0] {
        // Takes everything and answers with the digest.
        b's' => read_pattern(&mut stream, seed).and_then(|(digest, _)| stream.write_all(format!("{digest:032x}").as_bytes())),
        // Gives data, half-closes, waits for the host's end.
        b'g' => write_pattern(&mut stream, bytes, seed)
            .and_then(|_| Ok(rustix::net::shutdown(&stream, Shutdown::Write)?))
            .and_then(|()| stream.read_to_end(&mut Vec::new()).map(drop)),
        // Gives back what it gets, to the end.
        b'e' => io::copy(&mut stream.try_clone().expect("a descriptor is free"), &mut stream).map(drop),
        // Reads nothing until the host has written `bytes` bytes elsewhere: waits so many milliseconds, then takes everything.
        b'w' => {
            thread::sleep(Duration::from_millis(bytes));
            read_pattern(&mut stream, seed).and_then(|(digest, _)| stream.write_all(format!("{digest:032x}").as_bytes()))
        }
        // Closes at once.
        _ => Ok(()),
    };
}
