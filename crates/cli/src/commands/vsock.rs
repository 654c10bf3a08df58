//! `vsock connect` and `vsock listen`: standard input and output as a vsock stream of the parent.
//!
//! For local enclaves the streams are the world's sockets (docs/world.md); on an instance with the real device they are AF_VSOCK. A CID that a
//! local enclave has is that enclave unless `--device host` says otherwise.

use std::{
    io::{self, IsTerminal, Read, Write},
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use nitroxide_guest_sys::vsock;
use nitroxide_world::{Endpoint, VsockAddress};
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    arguments::{DeviceKind, VsockCommand},
    codes::ErrorCode,
    failure::Failure,
    remarks::Remarks,
    world,
};

const PARENT_CID: u32 = 3;
/// How long a connection may take; a guest that just boots is slow.
const PATIENCE: Duration = Duration::from_secs(20);
const COPY_BYTES: usize = 64 * 1024;

/// Runs either command.
pub fn run(command: &VsockCommand, device: DeviceKind, remarks: Remarks) -> Result<(), Failure> {
    match *command {
        VsockCommand::Connect { cid, port } => {
            let stream = connect(cid, port, device)?;
            exchange(stream, true)
        }
        VsockCommand::Listen { port, keep } => listen(port, keep, device, remarks),
    }
}

fn connect(cid: u32, port: u32, device: DeviceKind) -> Result<OwnedFd, Failure> {
    let failure = |error: io::Error| {
        let failure = match error.kind() {
            io::ErrorKind::ConnectionRefused if cid == PARENT_CID => {
                Failure::new(ErrorCode::SOCKET, format!("Nobody listens on port {port} of the parent"))
            }
            io::ErrorKind::ConnectionRefused => Failure::new(ErrorCode::NAMING, format!("No running enclave has the CID {cid}"))
                .help("`nitroxide describe-enclaves` shows the CIDs."),
            io::ErrorKind::ConnectionReset => Failure::new(ErrorCode::SOCKET, format!("Nothing listens on port {port} of CID {cid}"))
                .help("The application may not have come that far yet; `nitroxide logs` shows what it prints."),
            _ => Failure::new(ErrorCode::SOCKET, format!("Cannot connect to port {port} of CID {cid}")),
        };
        failure.because(error)
    };
    if on_real_vsock(cid, device)? {
        return vsock::connect(cid, port, PATIENCE).map(OwnedFd::from).map_err(failure);
    }
    let world = world::open()?;
    let from = VsockAddress { cid: PARENT_CID, port: 0 };
    let stream = if cid == PARENT_CID {
        // A port of our own that no other process has: nothing checks it, but the listener may show it.
        let from = VsockAddress { port: 1 << 30 | std::process::id(), ..from };
        world.connect_parent(from, port, PATIENCE)
    } else {
        world.connect_enclave(from, cid, port, PATIENCE).map(|(stream, _)| stream)
    };
    stream.map(OwnedFd::from).map_err(failure)
}

/// Whether an address is meant on the machine's own AF_VSOCK instead of in the world of local enclaves.
fn on_real_vsock(cid: u32, device: DeviceKind) -> Result<bool, Failure> {
    Ok(match device {
        DeviceKind::Host => true,
        DeviceKind::Local => false,
        DeviceKind::Auto => {
            Path::new("/dev/nitro_enclaves").exists() && !(cid != PARENT_CID && world::open()?.is_cid_claimed(cid).unwrap_or(false))
        }
    })
}

/// Takes the next connection: the stream, and the peer's CID and port where they are known.
type Accept = Box<dyn FnMut() -> io::Result<(OwnedFd, Option<(u32, u32)>)>>;

fn listen(port: u32, keep: bool, device: DeviceKind, remarks: Remarks) -> Result<(), Failure> {
    let failure = |error: Box<dyn std::error::Error + Send + Sync>| {
        Failure::new(ErrorCode::SOCKET, format!("Cannot listen on port {port} of the parent")).because(error)
    };
    let mut accept: Accept = if on_real_vsock(PARENT_CID, device)? {
        let listener = vsock::Listener::bind(port).map_err(|error| failure(error.into()))?;
        Box::new(move || listener.accept().map(|(stream, cid, port)| (stream.into(), Some((cid, port)))))
    } else {
        let listener = world::open()?.bind(Endpoint::ParentPort(port)).map_err(|error| failure(error.into()))?;
        Box::new(move || listener.accept().map(|(stream, peer)| (stream.into(), peer.map(|peer| (peer.cid, peer.port)))))
    };
    remarks.note(format!("Listening on port {port} of the parent (CID 3)"));
    loop {
        let (stream, peer) = accept().map_err(|error| failure(error.into()))?;
        if let Some((cid, port)) = peer {
            remarks.note(format!("Connection from CID {cid}, port {port}"));
        }
        match exchange(stream, !keep) {
            // One broken connection does not end a listener that is to stay.
            Err(failure) if keep => remarks.note(failure.one_line()),
            result if !keep => return result,
            _ => {}
        }
    }
}

/// Copies standard input to the stream (if wanted; its end is passed on) and the stream to standard output until the peer ends it.
fn exchange(stream: OwnedFd, with_input: bool) -> Result<(), Failure> {
    let failure = |what: &str, error: io::Error| Failure::new(ErrorCode::UNUSABLE_CONNECTION, what).because(error);
    // Works for AF_VSOCK as well: only generic socket calls are made on it.
    let stream = UnixStream::from(stream);
    let mut sent = None;
    if with_input {
        let duplicated = |error| failure("The connection cannot be duplicated", error);
        let input = stream.try_clone().map_err(duplicated)?;
        let (end, sending) = UnixStream::pair().map_err(duplicated)?;
        sent = Some(end);
        // Not joined: it may wait for input for ever while the peer has long gone.
        thread::spawn(move || {
            // A peer that has gone shows on the other side.
            let _ = copy(&mut io::stdin().lock(), &mut &input, false);
            let _ = input.shutdown(Shutdown::Write);
            drop(sending);
        });
    }
    let mut output = io::stdout().lock();
    match copy(&mut &stream, &mut output, true) {
        Ok(()) => {}
        // Whoever read our output has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
        Err(error) => return Err(failure("The connection broke off", error)),
    }
    // A peer that only has nothing more to say still wants what a file or a pipe holds for it. A person at a terminal has seen its last word.
    if let Some(sent) = sent
        && !io::stdin().is_terminal()
    {
        wait_for_either_end(&sent, &stream).map_err(|error| failure("The connection cannot be waited for", error))?;
    }
    Ok(())
}

/// Waits until all of the input is sent, or the peer takes no more.
fn wait_for_either_end(sent: &UnixStream, stream: &UnixStream) -> io::Result<()> {
    // Nothing is asked for on the stream: only that both directions are closed, or an error, is told.
    let mut events = [PollFd::new(sent, PollFlags::IN), PollFd::new(stream, PollFlags::empty())];
    loop {
        match poll(&mut events, None) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map(drop).map_err(io::Error::from),
        }
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write, flush: bool) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(buffer.get(..count).unwrap_or_default())?;
        if flush {
            to.flush()?;
        }
    }
}
