//! The enclave process from its first line to its last.
//!
//! Its standard input is the socket to its owner. One thread only reads that socket, so that the owner's end is noticed whatever else goes
//! on; the main thread brings the enclave up, waits for the owner to let go, and takes everything down in order. What the order cannot reach, a
//! stuck start for example, ends with the process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, setsid};

use crate::bring_up::{Donation, bring_up};
use crate::life::Life;
use crate::packet::{self, FromProcess, ToProcess};
use crate::refused::Refused;
use crate::stage::{PAUSE_VARIABLE, Stage, Stages};

/// How long a start may go on after the owner has left before the process ends as it is.
const START_GRACE: Duration = Duration::from_millis(700);

/// How long an orderly end may take before the process ends as it is. Killing a VM takes as long as freeing its memory.
const END_GRACE: Duration = Duration::from_secs(20);

/// How long clients may take to fetch the last answers and the last console output.
const CLIENT_GRACE: Duration = Duration::from_millis(300);

/// Why there is no enclave process.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum ProcessError {
    /// This command is started by nitroxide itself: its standard input must be a socket to its owner.
    NoOwner,
    /// The enclave process cannot be set up
    Setup(#[source] io::Error),
}

/// What every part of the process may use.
#[derive(Debug)]
pub(crate) struct Process {
    /// The socket to the owner.
    pub(crate) owner: OwnedFd,
    /// The stages reached.
    pub(crate) stages: Arc<Stages>,
    /// The enclave's life.
    pub(crate) life: Arc<Life>,
}

impl Process {
    /// Notes a stage, tells the owner, and stops for ever if that is wanted here.
    pub(crate) fn reach(&self, stage: Stage) {
        if let Some(time) = self.stages.reach(stage) {
            self.tell(&FromProcess::Stage(time));
        }
        if std::env::var_os(PAUSE_VARIABLE).is_some_and(|name| name == stage.name()) {
            tracing::warn!("The enclave process pauses at {}.", stage.name());
            loop {
                std::thread::park();
            }
        }
    }

    /// Tells the owner something. If it is gone, the thread that reads from it knows.
    pub(crate) fn tell(&self, packet: &FromProcess) {
        let _ = packet::send(&self.owner, packet, &[]);
    }
}

/// Runs this process as an enclave process; returns when the enclave is gone. Call it before anything else reads standard input.
///
/// # Errors
///
/// When standard input is no socket, or nothing can be set up. Whatever goes wrong later is told to the owner.
pub fn run_process() -> Result<(), ProcessError> {
    let owner = take_owner_socket()?;
    // Out of the terminal's reach: Ctrl-C is for the owner, whose end is ours anyway. Fails only for a group's leader.
    let _ = setsid();
    allow_many_files();
    let (sender, receiver) = channel();
    let ears = owner.try_clone().map_err(ProcessError::Setup)?;
    let process = Arc::new(Process { owner, stages: Arc::default(), life: Arc::default() });
    let life = Arc::clone(&process.life);
    std::thread::Builder::new().name("owner".to_owned()).spawn(move || listen(&ears, &sender, &life)).map_err(ProcessError::Setup)?;
    process.reach(Stage::Begun);

    let enclave = match collect(&receiver) {
        Ok(Some(donation)) => {
            // What the owner noted comes before what we note; both read one clock.
            for time in &donation.spec.stages {
                process.stages.add(*time);
            }
            process.reach(Stage::Received);
            bring_up(&process, donation)
        }
        Ok(None) => return Ok(()), // The owner left before it asked for anything.
        Err(refused) => Err(refused),
    };
    let enclave = match enclave {
        Ok(enclave) => enclave,
        Err(Refused { errno, message }) => {
            tracing::warn!(errno, message, "The enclave is not started.");
            process.tell(&FromProcess::Refused { errno, message });
            return Ok(());
        }
    };
    process.life.wait_for_owner_s_leave();
    // The owner's leave stops the VM.
    if process.life.wait_for_end(END_GRACE).is_none() {
        tracing::error!("The VM does not end although it was killed.");
    }
    enclave.drain_clients(CLIENT_GRACE);
    drop(enclave);
    Ok(())
}

/// Reads what the owner sends until it leaves.
fn listen(owner: &OwnedFd, sender: &Sender<(ToProcess, Vec<OwnedFd>)>, life: &Life) {
    loop {
        match packet::receive::<ToProcess>(owner) {
            Ok(Some(packet)) => {
                // Nobody listens any more once the enclave runs; nothing more is to come then.
                let _ = sender.send(packet);
            }
            Ok(None) => break,
            Err(error) => {
                tracing::error!(%error, "The owner sent something that cannot be received.");
                break;
            }
        }
    }
    life.owner_left();
    std::thread::sleep(START_GRACE);
    if life.state() != crate::report::State::Terminating {
        end_as_it_is();
    }
    std::thread::sleep(END_GRACE);
    end_as_it_is();
}

#[expect(clippy::exit, reason = "the main thread does not come to its end; claims, VM and children end with the process")]
fn end_as_it_is() -> ! {
    std::process::exit(1)
}

/// Gathers what the owner sends up to `Start`; `None` when it leaves before.
fn collect(receiver: &Receiver<(ToProcess, Vec<OwnedFd>)>) -> Result<Option<Donation>, Refused> {
    let mut files: Vec<Arc<OwnedFd>> = Vec::new();
    let mut ranges = Vec::new();
    while let Ok((packet, descriptors)) = receiver.recv() {
        match packet {
            ToProcess::Files => files.extend(descriptors.into_iter().map(Arc::new)),
            ToProcess::Ranges(more) => ranges.extend(more),
            ToProcess::Start(spec) => return Donation::new(*spec, &files, &ranges, descriptors).map(Some),
        }
    }
    Ok(None)
}

/// Takes the owner's socket away from standard input, which becomes /dev/null.
fn take_owner_socket() -> Result<OwnedFd, ProcessError> {
    let stdin = rustix::stdio::stdin();
    if !fstat(stdin).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket) {
        return Err(ProcessError::NoOwner);
    }
    let take = || {
        let owner = fcntl_dupfd_cloexec(stdin, 3)?;
        let null = openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        rustix::stdio::dup2_stdin(null.as_fd())?;
        Ok(owner)
    };
    take().map_err(|errno: rustix::io::Errno| ProcessError::Setup(errno.into()))
}

/// Raises the limit of open files to what is allowed: every vsock connection of the guest is one.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
