//! The background owner of one enclave, and how `run-enclave` speaks to it.
//!
//! `run-enclave` ends when the enclave runs, but an enclave ends with its owner. So a process of its own owns it: this program again, with a hidden
//! command, detached ([`crate::detach`]). The two speak JSON lines over a socket: the request, then [`Message`]s, and a last byte by which the
//! starting side says that its user knows of the enclave. If the starting side goes away before that (Ctrl-C, a full disk), the enclave ends.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
    sync::{Arc, Weak},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nitroxide_client::DeviceKind;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
};
use serde::{Deserialize, Serialize};

use crate::{
    arguments::EngineKind,
    codes::ErrorCode,
    detach, ending,
    failure::Failure,
    heartbeat::{self, Heartbeat},
    host,
    launch::{self, Cancel, Running, Started},
    remarks::Remarks,
    request::LaunchRequest,
    world,
};

/// The hidden command.
pub const COMMAND: &str = "enclave-owner";
/// The longest line that is read, in bytes.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// How often it is looked whether a start is over.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
const ACCEPTED: u8 = b'!';

/// What the owner is told first.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    request: LaunchRequest,
    wait_for_heartbeat: bool,
}

/// What the owner says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// What it is doing.
    Progress(String),
    /// The enclave runs. Last.
    Started(Started),
    /// It does not. Last.
    Failed { code: String, message: String, cause: Option<String>, help: Option<String> },
}

/// Starts an enclave in the background. Returns when it has booted, or runs (without `wait_for_heartbeat`), and `tell` has told the user of it: an enclave
/// that nobody knows of does not stay.
pub fn start(
    request: LaunchRequest,
    wait_for_heartbeat: bool,
    remarks: Remarks,
    tell: impl FnOnce(&Started) -> Result<(), Failure>,
) -> Result<Started, Failure> {
    let progress = remarks.spinner("Starting");
    let (mut child, socket) = detach::spawn(COMMAND)
        .map_err(|error| Failure::new(ErrorCode::SPAWN, "The background process could not be started").because(error))?;
    let lost = || Failure::new(ErrorCode::ENCLAVE_PROCESS_CONNECTION, "The background process ended before the enclave was started");
    send(&socket, &Order { request, wait_for_heartbeat }).map_err(|error| lost().because(error))?;
    let mut lines = BufReader::new(&socket);
    loop {
        match receive(&mut lines).map_err(|error| lost().because(error))? {
            Some(Message::Progress(text)) => progress.say(text),
            Some(Message::Started(started)) => {
                drop(progress);
                if let Err(failure) = tell(&started) {
                    // The owner takes this for our end, and ends the enclave; nothing of it is to be left when we return.
                    let _ = socket.shutdown(Shutdown::Write);
                    let _ = child.wait();
                    return Err(failure.help("The enclave was ended again, since nobody would have known of it."));
                }
                (&socket).write_all(&[ACCEPTED]).map_err(|error| lost().because(error))?;
                return Ok(started);
            }
            Some(Message::Failed { code, message, cause, help }) => {
                // It is about to end; nothing of it is to be left when we return.
                let _ = child.wait();
                return Err(failure(&code, message, cause, help));
            }
            None => {
                let status = child.wait().map(|status| status.to_string()).unwrap_or_default();
                return Err(lost().because(status));
            }
        }
    }
}

/// The owner itself: the hidden command.
pub fn run() -> ExitCode {
    detach::leave_session();
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else { return ExitCode::FAILURE };
    let order = match receive::<Order>(&mut BufReader::new(&socket)) {
        Ok(Some(order)) => order,
        // Started by hand, or the starting side has gone.
        _ => return ExitCode::FAILURE,
    };
    let cancel = Arc::new(Cancel::default());
    if let Ok(socket) = socket.try_clone() {
        watch_starting_side(socket, Arc::downgrade(&cancel));
    }
    let running = match bring_up(&order, &socket, &cancel) {
        Ok(running) => running,
        Err(failure) => {
            // The starting side may have gone; then nobody wants to know, and the start broke off somewhere.
            if cancel.is_asked_for() {
                world::sweep_up();
            }
            let _ = send(&socket, &failed(&failure));
            return ExitCode::from(failure.code().exit_status());
        }
    };
    drop(cancel);
    if send(&socket, &Message::Started(running.started.clone())).is_err() || !is_accepted(&socket) {
        return ExitCode::FAILURE;
    }
    drop(socket);
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        // Closes our last end of the socket.
        let _ = rustix::stdio::dup2_stdin(&null);
    }
    keep(running, &order.request)
}

/// Ends the start when the starting side goes away (Ctrl-C). The thread ends with the start.
fn watch_starting_side(socket: UnixStream, starting: Weak<Cancel>) {
    std::thread::spawn(move || {
        while let Some(cancel) = starting.upgrade() {
            let mut events = [PollFd::new(&socket, PollFlags::RDHUP)];
            if matches!(poll(&mut events, Some(&LOOK)), Ok(1..)) {
                cancel.ask();
                // It may be about to wait for something else: it is told again.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
}

/// Everything up to the enclave's heartbeat.
fn bring_up(order: &Order, socket: &UnixStream, cancel: &Cancel) -> Result<Running, Failure> {
    let request = &order.request;
    // A starting side that has gone is noticed by its own thread.
    let mut say = |text: &str| drop(send(socket, &Message::Progress(text.to_owned())));
    let prepared = launch::prepare(request, cancel, &mut say)?;
    let is_waited_for = order.wait_for_heartbeat && request.engine != EngineKind::None;
    // On a real device somebody has to answer in any case: AWS's init ends without an answer.
    let heartbeat = if is_waited_for || prepared.kind() == DeviceKind::Host { Some(Heartbeat::bind(prepared.kind())?) } else { None };
    say("Starting the enclave");
    let running = prepared.start(request)?;
    match heartbeat {
        Some(heartbeat) if is_waited_for => {
            say("Waiting for the enclave to boot");
            wait_for_heartbeat(running, &heartbeat, request, socket)
        }
        Some(heartbeat) => {
            drop(answer_behind(heartbeat, running.started.enclave_cid, patience(request)));
            Ok(running)
        }
        None => Ok(running),
    }
}

/// How long the enclave may take to boot.
fn patience(request: &LaunchRequest) -> Duration {
    let image_bytes = std::fs::metadata(&request.image).map_or(0, |metadata| metadata.len());
    heartbeat::patience(image_bytes, request.memory_mib)
}

/// Answers the heartbeat of the enclave with `cid` while nobody waits for it; lets go of the port then, or after `patience`, since others need it.
fn answer_behind(heartbeat: Heartbeat, cid: u32, patience: Duration) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let begin = Instant::now();
        loop {
            let mut events = [PollFd::new(&heartbeat, PollFlags::IN)];
            let Some(left) = patience.checked_sub(begin.elapsed()) else { return };
            match poll(&mut events, Timespec::try_from(left).ok().as_ref()) {
                Ok(0) => return,
                // A connection that is no heartbeat is passed over.
                Ok(_) if heartbeat.answer(cid).unwrap_or(false) => return,
                _ => {}
            }
        }
    })
}

fn wait_for_heartbeat(running: Running, heartbeat: &Heartbeat, request: &LaunchRequest, socket: &UnixStream) -> Result<Running, Failure> {
    let patience = patience(request);
    let begin = Instant::now();
    loop {
        let left = patience.saturating_sub(begin.elapsed());
        // Looked at here and not only when nothing comes: an enclave that connects again and again without a heartbeat has booted no more.
        if left.is_zero() {
            return Err(Failure::new(ErrorCode::BOOT, format!("The enclave has not sent its heartbeat within {} s", patience.as_secs()))
                .help("`nitroxide run` shows its console. With --no-wait an enclave is left running without a heartbeat."));
        }
        let mut events = [
            PollFd::new(heartbeat, PollFlags::IN),
            PollFd::from_borrowed_fd(running.enclave.poll_fd(), PollFlags::IN),
            // Only a hang-up: the starting side says nothing now.
            PollFd::new(socket, PollFlags::RDHUP),
        ];
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut events, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(Failure::new(ErrorCode::EVENT_WAIT, "Waiting for the enclave failed").because(error)),
            Ok(_) => {}
        }
        let [beat, enclave, front] = events.map(|event| !event.revents().is_empty());
        // A heartbeat that came just before the end still counts as booted. A connection that is no heartbeat is not waited for longer.
        if beat && heartbeat.answer(running.started.enclave_cid).unwrap_or(false) {
            return Ok(running);
        }
        if enclave {
            return Err(ended_early(running));
        }
        if front {
            return Err(Failure::new(ErrorCode::NOT_EXECUTED, "The starting side has gone"));
        }
    }
}

/// The enclave ended before its heartbeat: why, and the last it printed.
fn ended_early(running: Running) -> Failure {
    let failure = Failure::new(ErrorCode::BOOT, "The enclave ended before it had booted");
    let Some(report) = running.into_report() else { return failure };
    let tail: Vec<&str> = report.console_tail.lines().rev().take(12).collect();
    let tail: String = tail.into_iter().rev().fold(String::new(), |text, line| text + "\n  " + line);
    failure
        .because(format!("{}; the last lines of its console:{tail}", ending::text(&report)))
        .help("`nitroxide run` shows all of its console; too little memory is a frequent reason (--memory).")
}

/// Keeps the enclave until it ends by itself or is ended through its control socket.
fn keep(running: Running, request: &LaunchRequest) -> ExitCode {
    // For an enclave on the real device we are also the process that others ask.
    let server = match running.device.kind() {
        DeviceKind::Local => None,
        DeviceKind::Host => match host::serve(&running, request) {
            Ok(server) => Some(server),
            Err(_) => return ExitCode::FAILURE,
        },
    };
    // An error would mean that we cannot wait at all: then the enclave must not outlive our interest in it.
    let waited = match &server {
        Some(server) => server.wait(&running),
        None => running.enclave.wait(),
    };
    drop(running);
    drop(server);
    if waited.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn is_accepted(socket: &UnixStream) -> bool {
    let mut answer = [0];
    let mut socket = socket;
    socket.read_exact(&mut answer).is_ok() && answer == [ACCEPTED]
}

fn failed(failure: &Failure) -> Message {
    Message::Failed {
        code: failure.code().to_string(),
        message: failure.to_string(),
        cause: failure.causes(),
        help: failure.help_text().map(str::to_owned),
    }
}

fn failure(code: &str, message: String, cause: Option<String>, help: Option<String>) -> Failure {
    let failure = Failure::new(code.parse().unwrap_or(ErrorCode::UNSPECIFIED), message);
    let failure = match cause {
        Some(cause) => failure.because(cause),
        None => failure,
    };
    match help {
        Some(help) => failure.help(help),
        None => failure,
    }
}

fn send(mut socket: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// The next line; `None` at the end.
fn receive<T: for<'de> Deserialize<'de>>(lines: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    lines.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_slice(&line)?)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nitroxide_world::{Endpoint, VsockAddress, World};

    #[test]
    fn a_heartbeat_nobody_waits_for_is_answered_and_its_port_is_free_again_then() {
        let directory = tempfile::tempdir().unwrap();
        let world = World::open(&directory.path().join("world")).unwrap();
        let place = Endpoint::Heartbeat(1);
        let answering = answer_behind(Heartbeat::Local(world.bind(place).unwrap()), 16, Duration::from_secs(600));
        let connect = || world.connect(place, Some(VsockAddress { cid: 16, port: 1 })).unwrap();
        connect().write_all(b"?").unwrap();
        let mut guest = connect();
        guest.write_all(&[0xB7]).unwrap();
        let mut answer = [0];
        guest.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [0xB7]);
        answering.join().unwrap();
        drop(world.bind(place).unwrap());
    }

    #[test]
    fn a_heartbeat_that_never_comes_is_not_waited_for_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let world = World::open(&directory.path().join("world")).unwrap();
        let listener = world.bind(Endpoint::Heartbeat(1)).unwrap();
        answer_behind(Heartbeat::Local(listener), 16, Duration::from_millis(20)).join().unwrap();
    }
}
