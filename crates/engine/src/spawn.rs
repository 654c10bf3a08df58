//! Starting a confined process from a thread that lasts, and handing out its pidfd.
//!
//! The kernel sends a process its parent-death signal when the *thread* that made it ends (prctl(2), PR_SET_PDEATHSIG). So one thread per process does
//! nothing but start VMs; it ends with the process. [`spawn`] may be called from any thread. Neighbours: `child` does what happens between clone and exec.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc;

use displaydoc::Display;
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use crate::child::{self, DropRoot, Prepared, Step};
use crate::confinement::Isolation;
use crate::root::OwnRoot;

/// A program to be started.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The file to execute.
    pub program: CString,
    /// Its arguments, its own name first.
    pub arguments: Vec<CString>,
    /// Its whole environment, `NAME=value` each.
    pub environment: Vec<CString>,
    /// What it inherits, under the same numbers; all at least 3 (see [`above_standard`]). The caller keeps them open until [`spawn`] returns.
    pub keep: Vec<RawFd>,
    /// Its standard error.
    pub stderr: OwnedFd,
    /// Whether it becomes an unprivileged user (only root can).
    pub drop_root: DropRoot,
    /// The file tree it sees, where namespaces are allowed; none = the host's.
    pub own_root: Option<OwnRoot>,
}

/// A program that was started.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub isolation: Isolation,
    /// Does it see a file tree of its own?
    pub has_own_root: bool,
    /// Did it give up root?
    pub dropped_root: bool,
}

/// A process that could not be started.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// No process could be made for the VM
    Clone(#[source] std::io::Error),
    /// The VM's process could not be given its file descriptors
    Descriptors(#[source] std::io::Error),
    /// The VM's process could not give up root; run it as an ordinary user
    DropRoot(#[source] std::io::Error),
    /// The VM's process could not set its limits
    Prepare(#[source] std::io::Error),
    /// The program cannot be executed
    Exec(#[source] std::io::Error),
    /// The VM's process ended before it became QEMU
    Vanished,
}

struct Job {
    plan: Plan,
    answer: mpsc::SyncSender<Result<Spawned, SpawnError>>,
}

/// The thread's door, and the process it belongs to: after a fork the child has none.
static SPAWNER: Mutex<Option<(u32, mpsc::Sender<Job>)>> = Mutex::new(None);

/// Starts a program; returns once it executes or has failed to.
pub(crate) fn spawn(plan: Plan) -> Result<Spawned, SpawnError> {
    let (answer, answered) = mpsc::sync_channel(1);
    door().map_err(SpawnError::Clone)?.send(Job { plan, answer }).map_err(|_| SpawnError::Vanished)?;
    answered.recv().map_err(|_| SpawnError::Vanished)?
}

/// Copies a descriptor past the standard streams, which the new process replaces.
pub(crate) fn above_standard(descriptor: &OwnedFd) -> std::io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(descriptor, 3)?)
}

fn door() -> std::io::Result<mpsc::Sender<Job>> {
    let mut spawner = SPAWNER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let process = std::process::id();
    match &*spawner {
        Some((owner, door)) if *owner == process => Ok(door.clone()),
        _ => {
            let (door, jobs) = mpsc::channel();
            std::thread::Builder::new().name("vm-spawner".to_owned()).spawn(move || serve(&jobs))?;
            *spawner = Some((process, door.clone()));
            Ok(door)
        }
    }
}

/// The thread: never ends before the process, as the door in the static never closes.
fn serve(jobs: &mpsc::Receiver<Job>) {
    child::block_signals();
    while let Ok(Job { plan, answer }) = jobs.recv() {
        // Nobody waits any more: the process is dropped and so killed by whoever holds its pidfd; here there is nobody, so it is dropped at once.
        let _ = answer.send(start(plan));
    }
}

fn start(plan: Plan) -> Result<Spawned, SpawnError> {
    let (parent_end, child_end) = UnixStream::pair().map_err(SpawnError::Clone)?;
    let child_end = above_standard(&child_end.into()).map_err(SpawnError::Clone)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| SpawnError::Descriptors(error.into()))?;
    let null = above_standard(&null).map_err(SpawnError::Descriptors)?;
    let stderr = above_standard(&plan.stderr).map_err(SpawnError::Descriptors)?;
    let mut prepared = Prepared::new(plan.program, plan.arguments, plan.environment);
    prepared.keep = plan.keep;
    prepared.null = null.as_raw_fd();
    prepared.stderr = stderr.as_raw_fd();
    prepared.drop_root = plan.drop_root;
    prepared.own_root = plan.own_root;
    prepared.child_end = child_end.as_raw_fd();
    prepared.parent_end = parent_end.as_raw_fd();
    let child = child::start(&prepared).map_err(SpawnError::Clone)?;
    drop(child_end);
    match converse(&child, &prepared, &parent_end) {
        Ok((has_own_root, dropped_root)) => {
            Ok(Spawned { pid: child.pid, pidfd: child.pidfd, isolation: child.isolation, has_own_root, dropped_root })
        }
        Err(error) => {
            let _ = rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL);
            let _ = rustix::process::waitid(rustix::process::WaitId::PidFd(child.pidfd.as_fd()), rustix::process::WaitIdOptions::EXITED);
            Err(error)
        }
    }
}

/// The parent's part of the talk with the child, until the exec closes its end. Returns whether the child has a file tree of its own, and whether it
/// gave up root.
fn converse(child: &child::Child, prepared: &Prepared, mut parent_end: &UnixStream) -> Result<(bool, bool), SpawnError> {
    child::map_users(child, prepared, parent_end.as_fd()).map_err(SpawnError::DropRoot)?;
    let mut first = [0];
    parent_end.read_exact(&mut first).map_err(|_| SpawnError::Vanished)?;
    if first == [child::READY] {
        let mut facts = [0; 2];
        parent_end.read_exact(&mut facts).map_err(|_| SpawnError::Vanished)?;
        child::let_go(parent_end.as_fd()).map_err(|_| SpawnError::Vanished)?;
        match parent_end.read(&mut first) {
            Ok(0) => return Ok((facts[0] == 1, facts[1] == 1)),
            Ok(_) => {}
            Err(_) => return Err(SpawnError::Vanished),
        }
    }
    let mut failure = [0; 5];
    if first != [child::FAILED] || parent_end.read_exact(&mut failure).is_err() {
        return Err(SpawnError::Vanished);
    }
    let [step, a, b, c, d] = failure;
    let error = std::io::Error::from_raw_os_error(i32::from_ne_bytes([a, b, c, d]));
    Err(match Step::from_byte(step) {
        Step::DropRoot => SpawnError::DropRoot(error),
        Step::Prepare => SpawnError::Prepare(error),
        Step::Descriptors => SpawnError::Descriptors(error),
        Step::Exec => SpawnError::Exec(error),
    })
}
