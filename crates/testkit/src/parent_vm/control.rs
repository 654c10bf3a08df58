//! The host's side of the serial port to a parent VM's init: commands out, their output and status in.
//!
//! A thread reads the port and hands each frame to the [`Job`] that it belongs to; see `nitroxide_parent::frame`.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nitroxide_parent::frame::{self, Kind};

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 + N where signal N ended it.
    pub status: i32,
    /// Standard output and error, mixed.
    pub stdout: String,
}

/// Why a command has no exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobError {
    /// The VM ended or started anew.
    Gone(String),
    /// Init could not start it.
    Failed(String),
    /// It still ran, and was killed; with what it had printed.
    TimedOut(String),
}

impl std::fmt::Display for JobError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone(printed) => write!(f, "the VM ended or restarted under it; printed so far:\n{printed}"),
            Self::Failed(reason) => write!(f, "it could not be started: {reason}"),
            Self::TimedOut(printed) => write!(f, "it did not end in time and was killed; printed so far:\n{printed}"),
        }
    }
}

enum Event {
    Output(Vec<u8>),
    Exited(i32),
    Failed(String),
    Gone,
}

#[derive(Default)]
struct State {
    jobs: HashMap<u32, Sender<Event>>,
    last_number: u32,
    /// How often init has said that it is ready: once per start of the VM.
    starts: u32,
    /// Milliseconds that the kernel had run when init was ready last.
    uptime_ms: u64,
    is_gone: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    writer: Mutex<UnixStream>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, kind: Kind, number: u32, content: &[u8]) -> io::Result<()> {
        frame::write(&mut *self.writer.lock().unwrap_or_else(PoisonError::into_inner), kind, number, content)
    }
}

/// The connection to a VM's init; clones share it.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    /// Takes over the port's stream.
    ///
    /// # Errors
    ///
    /// What copying a descriptor gives.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let mut reader = stream.try_clone()?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), writer: Mutex::new(stream) });
        let read = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok(Some(frame)) = frame::read(&mut reader) {
                receive(&read, frame);
            }
            let mut state = read.state();
            state.is_gone = true;
            end_all(&mut state);
            read.changed.notify_all();
        });
        Ok(Self(shared))
    }

    /// Waits until init was ready `starts` times; the kernel's milliseconds until then. None after `patience`, or where the port is closed.
    pub fn wait_ready(&self, starts: u32, patience: Duration) -> Option<u64> {
        let deadline = Instant::now() + patience;
        let mut state = self.0.state();
        while state.starts < starts {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.is_gone || left.is_zero() {
                return None;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(state.uptime_ms)
    }

    /// How often init was ready.
    pub fn starts(&self) -> u32 {
        self.0.state().starts
    }

    /// Starts `script` with `sh -c`.
    pub fn start(&self, script: &str) -> Job {
        self.begin(Kind::Run, script.as_bytes())
    }

    /// Starts `script`, or a shell where it is empty, on a terminal of that many rows and columns.
    pub fn start_on_terminal(&self, script: &str, (rows, columns): (u16, u16)) -> Job {
        self.begin(Kind::Terminal, &[&frame::size_to_bytes(rows, columns), script.as_bytes()].concat())
    }

    fn begin(&self, kind: Kind, content: &[u8]) -> Job {
        let (sender, events) = mpsc::channel();
        let number = {
            let mut state = self.0.state();
            state.last_number += 1;
            if !state.is_gone {
                let number = state.last_number;
                state.jobs.insert(number, sender);
            }
            state.last_number
        };
        if let Err(error) = self.0.send(kind, number, content)
            && let Some(sender) = self.0.state().jobs.remove(&number)
        {
            let _ = sender.send(if error.kind() == io::ErrorKind::InvalidInput { Event::Failed(error.to_string()) } else { Event::Gone });
        }
        Job { control: self.clone(), number, events, printed: Vec::new(), ended: None }
    }
}

fn receive(shared: &Shared, frame: frame::Frame) {
    let mut state = shared.state();
    let number = frame.command;
    let event = match frame.kind {
        Kind::Ready => {
            // What an earlier start of the VM was asked for has gone with it.
            end_all(&mut state);
            state.starts += 1;
            state.uptime_ms = String::from_utf8_lossy(&frame.content).parse().unwrap_or(0);
            shared.changed.notify_all();
            return;
        }
        Kind::Output => Event::Output(frame.content),
        Kind::Exited => Event::Exited(frame.content.try_into().map_or(-1, i32::from_le_bytes)),
        Kind::Failed => Event::Failed(String::from_utf8_lossy(&frame.content).into_owned()),
        // The guest never sends these.
        Kind::Run | Kind::Terminal | Kind::Input | Kind::Signal | Kind::Resize => return,
    };
    let is_last = !matches!(event, Event::Output(_));
    if let Some(job) = state.jobs.get(&number) {
        // A job that was dropped wants no more of it.
        let _ = job.send(event);
    }
    if is_last {
        state.jobs.remove(&number);
    }
}

fn end_all(state: &mut State) {
    for (_, job) in state.jobs.drain() {
        let _ = job.send(Event::Gone);
    }
}

/// A command that was started. Dropped, it runs on.
#[derive(Debug)]
pub struct Job {
    control: Control,
    number: u32,
    events: Receiver<Event>,
    printed: Vec<u8>,
    ended: Option<Result<i32, JobError>>,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Event")
    }
}

impl Job {
    /// What it has printed so far.
    pub fn printed(&mut self) -> String {
        while self.take(Duration::ZERO) {}
        self.text()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        while self.take(Duration::ZERO) {}
        self.ended.is_some()
    }

    /// Waits until it has printed `text`; false where it ended before, or `patience` is over.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if self.text().contains(text) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.take(left) {
                return self.text().contains(text);
            }
        }
    }

    /// Waits for its end; killed where `patience` is over.
    ///
    /// # Errors
    ///
    /// [`JobError`].
    pub fn wait(&mut self, patience: Duration) -> Result<Output, JobError> {
        let deadline = Instant::now() + patience;
        while self.take(deadline.saturating_duration_since(Instant::now())) {}
        match self.ended.clone() {
            Some(Ok(status)) => Ok(Output { status, stdout: self.text() }),
            Some(Err(error)) => Err(error),
            None => {
                self.signal(9);
                Err(JobError::TimedOut(self.text()))
            }
        }
    }

    /// The next piece of output, as it comes; none at its end, or after `patience`.
    pub fn next_output(&mut self, patience: Duration) -> Option<Vec<u8>> {
        let before = self.printed.len();
        self.take(patience);
        self.printed.get(before..).filter(|piece| !piece.is_empty()).map(<[u8]>::to_vec)
    }

    /// Gives bytes to its standard input.
    pub fn input(&self, bytes: &[u8]) {
        // An empty frame would close it. An init that is gone shows in the job's end.
        for piece in bytes.chunks(64 << 10) {
            let _ = self.control.0.send(Kind::Input, self.number, piece);
        }
    }

    /// Closes its standard input.
    pub fn close_input(&self) {
        let _ = self.control.0.send(Kind::Input, self.number, &[]);
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, signal: u8) {
        let _ = self.control.0.send(Kind::Signal, self.number, &[signal]);
    }

    /// Tells its terminal a new size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let _ = self.control.0.send(Kind::Resize, self.number, &frame::size_to_bytes(rows, columns));
    }

    /// A handle for giving input from another thread.
    pub fn sender(&self) -> JobInput {
        JobInput { control: self.control.clone(), number: self.number }
    }

    /// Takes one event; false where it has ended or none came in time.
    fn take(&mut self, patience: Duration) -> bool {
        if self.ended.is_some() {
            return false;
        }
        match self.events.recv_timeout(patience) {
            Ok(Event::Output(bytes)) => self.printed.extend(bytes),
            Ok(Event::Exited(status)) => self.ended = Some(Ok(status)),
            Ok(Event::Failed(reason)) => self.ended = Some(Err(JobError::Failed(reason))),
            Ok(Event::Gone) | Err(RecvTimeoutError::Disconnected) => self.ended = Some(Err(JobError::Gone(self.text()))),
            Err(RecvTimeoutError::Timeout) => return false,
        }
        true
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.printed).replace('\r', "")
    }
}

/// Standard input of a job.
#[derive(Debug, Clone)]
pub struct JobInput {
    control: Control,
    number: u32,
}

impl JobInput {
    /// Gives bytes; an empty slice closes it.
    ///
    /// # Errors
    ///
    /// The VM is gone.
    pub fn give(&self, bytes: &[u8]) -> io::Result<()> {
        self.control.0.send(Kind::Input, self.number, bytes)
    }
}
