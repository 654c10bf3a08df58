//! Starting a confined process from a thread that lasts, and handing out its pidfd.
//!
//! The kernel sends a process its parent-death signal when the *thread* that made it ends (prctl(2), PR_SET_PDEATHSIG). So one thread per process does
//! nothing but start VMs; it ends with the process. [`spawn`] may be called from any thread. Neighbours: `child` does what happens between clone and exec.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
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
    pub process: Process,
    pub isolation: Isolation,
    /// Does it see a file tree of its own?
    pub has_own_root: bool,
    /// Did it give up root?
    pub dropped_root: bool,
}

/// A process that is killed when nobody wants it: dropping it returns once it is gone.
#[derive(Debug)]
pub(crate) struct Process(Option<OwnedFd>);

impl Process {
    /// Its pidfd. It is the caller's now, to kill and to wait for.
    pub(crate) fn take_over(mut self) -> Option<OwnedFd> {
        self.0.take()
    }

    /// Its pidfd, to wait for its end.
    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.0 {
            // One that is gone already and one that was reaped answer with errors.
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
            let _ = rustix::process::waitid(rustix::process::WaitId::PidFd(pidfd.as_fd()), rustix::process::WaitIdOptions::EXITED);
        }
    }
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
        // If nobody waits any more, the process is dropped with the answer and so killed.
        let _ = answer.send(start(plan, Path::new("/proc")));
    }
}

/// Starts the program as isolated as this host allows; `proc` is where the host's processes are shown.
fn start(plan: Plan, proc: &Path) -> Result<Spawned, SpawnError> {
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
    let mut last = std::io::Error::from_raw_os_error(libc::EINVAL);
    for isolation in [Isolation::Full, Isolation::WithoutUser, Isolation::Nothing] {
        match start_in(&mut prepared, isolation, proc) {
            Ok(spawned) => return Ok(spawned),
            Err(Refused::Isolation(error)) => {
                tracing::debug!(?isolation, %error, "This host does not allow a VM's process these namespaces");
                last = error;
            }
            Err(Refused::Start(error)) => return Err(error),
        }
    }
    Err(SpawnError::Clone(last))
}

/// Why a process could not be started in an isolation.
enum Refused {
    /// The host does not allow it: a weaker one may do.
    Isolation(std::io::Error),
    /// It would not start in another either.
    Start(SpawnError),
}

impl From<SpawnError> for Refused {
    fn from(error: SpawnError) -> Self {
        Self::Start(error)
    }
}

fn start_in(prepared: &mut Prepared, isolation: Isolation, proc: &Path) -> Result<Spawned, Refused> {
    let (parent_end, child_end) = UnixStream::pair().map_err(SpawnError::Clone)?;
    let child_end = above_standard(&child_end.into()).map_err(SpawnError::Clone)?;
    prepared.child_end = child_end.as_raw_fd();
    prepared.parent_end = parent_end.as_raw_fd();
    let (pid, pidfd) = child::start(prepared, isolation).map_err(Refused::Isolation)?;
    let process = Process(Some(pidfd));
    drop(child_end);
    if isolation == Isolation::Full {
        // Some hosts let everybody make a user namespace, but not map users into it, or hide processes from their parents.
        child::map_users(pid, prepared, proc).map_err(Refused::Isolation)?;
        child::tell_mapped(parent_end.as_fd()).map_err(|_| SpawnError::Vanished)?;
    }
    let (has_own_root, dropped_root) = converse(&parent_end)?;
    Ok(Spawned { pid, process, isolation, has_own_root, dropped_root })
}

/// The parent's part of the talk with the child, until the exec closes its end. Returns whether the child has a file tree of its own, and whether it
/// gave up root.
fn converse(mut parent_end: &UnixStream) -> Result<(bool, bool), SpawnError> {
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

#[cfg(test)]
mod tests {
    use rustix::process::{WaitId, WaitIdOptions, waitid};

    use super::*;

    fn plan(script: &str) -> Plan {
        Plan {
            program: c"/bin/sh".to_owned(),
            arguments: [c"sh", c"-c"].map(ToOwned::to_owned).into_iter().chain([CString::new(script).unwrap()]).collect(),
            environment: Vec::new(),
            keep: Vec::new(),
            stderr: std::fs::File::options().write(true).open("/dev/null").unwrap().into(),
            drop_root: DropRoot::No,
            own_root: None,
        }
    }

    /// Starts it on a thread as the spawner's is, where processes are shown at `proc`, and waits for its end: its isolation and exit status.
    fn run(script: &str, proc: &'static str) -> (Isolation, i32) {
        let plan = plan(script);
        let act = move || {
            child::block_signals();
            let spawned = start(plan, Path::new(proc)).unwrap();
            let status = waitid(WaitId::PidFd(spawned.process.pidfd().unwrap()), WaitIdOptions::EXITED).unwrap().unwrap();
            (spawned.isolation, status.exit_status().unwrap())
        };
        std::thread::spawn(act).join().unwrap()
    }

    #[test]
    fn a_host_that_refuses_the_user_mapping_gets_a_process_with_less_isolation() {
        let (usual, status) = run("exit 7", "/proc");
        assert_eq!(status, 7);
        let (isolation, status) = run("exit 7", "/nonexistent");
        assert_eq!(status, 7);
        assert_ne!(isolation, Isolation::Full);
        println!("usually {usual:?}, with a mapping refused {isolation:?}");
    }

    #[test]
    fn a_process_that_nobody_takes_over_is_killed() {
        let spawned = spawn(plan("sleep 1000")).unwrap();
        let pid = spawned.pid;
        drop(spawned);
        assert!(!Path::new("/proc").join(pid.to_string()).exists());
    }
}
