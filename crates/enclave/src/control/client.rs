//! The client's end of the control socket: one function per thing one can want of an enclave.
//!
//! All of them look the enclave up by its slot uid in a [`World`]; [`find`] turns what people type into one.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nitroxide_world::{Endpoint, World, enclave_id, slot_of_enclave_id};

use super::frame;
use super::protocol::{Answer, Command, Failure, MAX_ANSWER_BYTES, Reply, Request, VERSION};
use crate::report::{Description, EndReport};

/// How long an enclave process may take to accept a connection or to answer a question. Longer than a server waits for measurements.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait for the enclave process, and what its owner holds for it, to be gone after its VM is.
const PROCESS_PATIENCE: Duration = Duration::from_secs(5);

/// Why an enclave cannot be spoken to.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no enclave `{0}`; `nitroxide describe-enclaves` lists those that run.
    NotFound(String),
    /// {0}
    NotDebug(String),
    /// {0}
    NotAllowed(String),
    /// {0}
    Refused(String),
    /// The enclave process ended before it answered.
    Gone,
    /// The enclave process does not answer; it may be stopped (`ps` shows a T) or its host overloaded.
    Silent,
    /// The enclave process answered something that is not understood; use the version of nitroxide that started it.
    Protocol,
    /// The enclave process cannot be spoken to
    Io(#[source] io::Error),
    /// The directory of running enclaves cannot be read
    World(#[source] nitroxide_world::ClaimError),
}

/// What people call an enclave by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// Its id.
    Id(String),
    /// Its name.
    Name(String),
}

/// Describes all enclaves of a world that answer, by ascending slot uid. Those that end meanwhile are left out.
///
/// # Errors
///
/// When the world's directory cannot be read.
pub fn list(world: &World) -> Result<Vec<Description>, ControlError> {
    let slots = world.enclaves().map_err(ControlError::World)?;
    let mut descriptions = Vec::with_capacity(slots.len());
    for slot_uid in slots {
        match describe(world, slot_uid) {
            Ok(description) => descriptions.push(description),
            Err(error) => tracing::warn!(enclave = enclave_id(slot_uid), %error, "An enclave is not listed."),
        }
    }
    Ok(descriptions)
}

/// Finds an enclave's slot uid.
///
/// # Errors
///
/// [`ControlError::NotFound`] when there is none.
pub fn find(world: &World, selector: &Selector) -> Result<u64, ControlError> {
    let slots = world.enclaves().map_err(ControlError::World)?;
    let (found, text) = match selector {
        Selector::Id(id) => (slot_of_enclave_id(id).filter(|slot_uid| slots.contains(slot_uid)), id),
        Selector::Name(name) => {
            let has_name = |slot_uid: &u64| {
                ask(world, *slot_uid, Command::Describe { measured: false })
                    .is_ok_and(|answer| matches!(answer.1, Answer::Description(description) if description.enclave_name == *name))
            };
            (slots.into_iter().find(has_name), name)
        }
    };
    found.ok_or_else(|| ControlError::NotFound(text.clone()))
}

/// Describes an enclave; waits for its measurements, within reason.
///
/// # Errors
///
/// [`ControlError`].
pub fn describe(world: &World, slot_uid: u64) -> Result<Description, ControlError> {
    describe_with(world, slot_uid, true)
}

/// Describes an enclave as it is now, with measurements only if they are known already.
///
/// # Errors
///
/// [`ControlError`].
pub fn describe_now(world: &World, slot_uid: u64) -> Result<Description, ControlError> {
    describe_with(world, slot_uid, false)
}

fn describe_with(world: &World, slot_uid: u64, measured: bool) -> Result<Description, ControlError> {
    match ask(world, slot_uid, Command::Describe { measured })?.1 {
        Answer::Description(description) => Ok(*description),
        _ => Err(ControlError::Protocol),
    }
}

/// Ends an enclave; returns when its VM is gone and, if its owner lets go of it within 5 s, its process and its CPUs are free too: who
/// starts another enclave on these CPUs next shall not find them taken.
///
/// # Errors
///
/// [`ControlError`].
pub fn terminate(world: &World, slot_uid: u64) -> Result<EndReport, ControlError> {
    let cpus = match describe_now(world, slot_uid) {
        Ok(description) => description.cpu_ids,
        // An enclave can be ended although its description, which quotes its image, cannot be read. Then its CPUs are not waited for.
        Err(ControlError::Protocol) => Vec::new(),
        Err(error) => return Err(error),
    };
    let (mut stream, answer) = ask(world, slot_uid, Command::Terminate)?;
    let Answer::Ended(report) = answer else { return Err(ControlError::Protocol) };
    let begin = Instant::now();
    let left = || PROCESS_PATIENCE.checked_sub(begin.elapsed()).filter(|left| !left.is_zero());
    while let Some(left) = left() {
        let _ = stream.set_read_timeout(Some(left));
        match stream.read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The end of the connection is the end of the process; an error or silence is not worth more waiting.
            _ => break,
        }
    }
    // The owner gives the CPUs back last, when the slot is free.
    let is_held = |claimed: Vec<u32>| claimed.iter().any(|cpu| cpus.contains(cpu));
    while left().is_some() && world.claimed_cpus().is_ok_and(is_held) {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(report)
}

/// Waits until an enclave ends, which must exist now.
///
/// # Errors
///
/// [`ControlError`]; [`ControlError::Gone`] when its process was killed.
pub fn wait(world: &World, slot_uid: u64) -> Result<EndReport, ControlError> {
    match ask(world, slot_uid, Command::Wait)?.1 {
        Answer::Ended(report) => Ok(report),
        _ => Err(ControlError::Protocol),
    }
}

/// The console's output from the oldest byte that is kept; with `follow`, until the enclave ends.
///
/// # Errors
///
/// [`ControlError`].
pub fn logs(world: &World, slot_uid: u64, follow: bool) -> Result<ConsoleStream, ControlError> {
    open_stream(world, slot_uid, Command::Logs { follow })
}

/// The console of an enclave in debug mode, until the enclave ends.
///
/// # Errors
///
/// [`ControlError::NotDebug`] when it is not in debug mode.
pub fn console(world: &World, slot_uid: u64) -> Result<ConsoleStream, ControlError> {
    open_stream(world, slot_uid, Command::Console)
}

fn open_stream(world: &World, slot_uid: u64, command: Command) -> Result<ConsoleStream, ControlError> {
    let (stream, answer) = ask(world, slot_uid, command)?;
    match answer {
        Answer::Stream => {
            stream.set_read_timeout(None).map_err(ControlError::Io)?;
            Ok(ConsoleStream { stream, piece: io::Cursor::new(Vec::new()), ended: false, report: None })
        }
        _ => Err(ControlError::Protocol),
    }
}

/// An enclave's console as a reader; its end is the end of the enclave, or of what there was.
#[derive(Debug)]
pub struct ConsoleStream {
    stream: UnixStream,
    piece: io::Cursor<Vec<u8>>,
    ended: bool,
    report: Option<EndReport>,
}

impl ConsoleStream {
    /// How the enclave ended; none before the stream has ended, and none if the enclave goes on.
    #[must_use]
    pub fn report(&self) -> Option<&EndReport> {
        self.report.as_ref()
    }

    /// The connection, for example to shut it down from another thread.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.stream
    }
}

impl Read for ConsoleStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || self.ended || buffer.is_empty() {
                return Ok(count);
            }
            let piece = frame::read(&mut self.stream, MAX_ANSWER_BYTES)?;
            if piece.is_empty() {
                self.ended = true;
                let reply: Reply = frame::read_json(&mut self.stream, MAX_ANSWER_BYTES)?;
                if let Answer::Ended(report) = reply.answer {
                    self.report = Some(report);
                }
            }
            self.piece = io::Cursor::new(piece);
        }
    }
}

/// Sends a request and reads the first answer.
fn ask(world: &World, slot_uid: u64, command: Command) -> Result<(UnixStream, Answer), ControlError> {
    let mut stream = world.connect_patiently(Endpoint::Control(slot_uid), None, PATIENCE).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => ControlError::NotFound(enclave_id(slot_uid)),
        io::ErrorKind::WouldBlock => ControlError::Silent,
        _ => ControlError::Io(error),
    })?;
    let patience = (!command.is_long()).then_some(PATIENCE);
    stream.set_read_timeout(patience).map_err(ControlError::Io)?;
    frame::write_json(&mut stream, &Request { protocol: VERSION, command }).map_err(conversation_error)?;
    let reply: Reply = frame::read_json(&mut stream, MAX_ANSWER_BYTES).map_err(conversation_error)?;
    match reply.answer {
        Answer::Failed { failure, message } => Err(match failure {
            Failure::NotDebug => ControlError::NotDebug(message),
            Failure::NotAllowed => ControlError::NotAllowed(message),
            Failure::Busy | Failure::NoConsole | Failure::Version | Failure::Malformed => ControlError::Refused(message),
        }),
        answer => Ok((stream, answer)),
    }
}

fn conversation_error(error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Gone,
        // A receive timeout on a socket is reported as EAGAIN.
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ControlError::Silent,
        io::ErrorKind::InvalidData => ControlError::Protocol,
        _ => ControlError::Io(error),
    }
}
