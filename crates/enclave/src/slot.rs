//! One slot as its owner's device sees it: memory taken, a process when it runs, everything back on drop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nitroxide_abi::{Cid, SlotUid};
use nitroxide_device::{DeviceCode, EndedNotifier, MemoryRun, Slot, StartRequest};
use nitroxide_world::{SlotClaim, enclave_id};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::gathered::SlotMemory;
use crate::launcher::{Happening, Inner, Refusal};
use crate::options::LaunchOptions;
use crate::packet::{self, FromProcess, StartSpec, ToProcess};
use crate::report::{EndReason, EndReport};
use crate::stage::{Stage, StageTime, monotonic_ns};

/// How long an enclave process may take to end after it was told to, before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// How long a process that was refused its start, or refused it, may take to end before it is killed.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

/// A reserved slot.
#[derive(Debug)]
pub(crate) struct ProcessSlot {
    launcher: Arc<Inner>,
    claim: SlotClaim,
    memory: SlotMemory,
    running: Option<Running>,
}

/// Its process.
#[derive(Debug)]
struct Running {
    socket: Arc<OwnedFd>,
    pidfd: OwnedFd,
    /// Was it told to end, so that its end is no news?
    stopping: Arc<AtomicBool>,
    watcher: JoinHandle<()>,
}

impl ProcessSlot {
    pub(crate) fn new(launcher: Arc<Inner>, claim: SlotClaim) -> Self {
        launcher.begin_record(claim.slot_uid);
        let memory = SlotMemory::new(Arc::clone(&launcher.given));
        Self { launcher, claim, memory, running: None }
    }

    fn refuse(&self, errno: i32, message: String) -> DeviceCode {
        self.launcher.refuse(self.claim.slot_uid, Refusal { errno, message });
        // An errno of zero would be a success; there is none.
        DeviceCode::from_raw(errno.checked_neg().unwrap_or(i32::MIN)).unwrap_or(DeviceCode::EIO)
    }

    fn start_process(&mut self, request: &StartRequest, ended: EndedNotifier) -> Result<Cid, DeviceCode> {
        let requested = StageTime { stage: Stage::Requested, at_ns: monotonic_ns() };
        self.launcher.add_stage(self.claim.slot_uid, requested);
        let spawned = spawn(&self.launcher.options).and_then(|(child, socket)| {
            let pidfd = pidfd_of(&child);
            Ok((Offspring(Some(child)), socket, pidfd?))
        });
        let (child, socket, pidfd) = spawned.map_err(|error| self.failed("The enclave process cannot be started", &error))?;
        let begun = StageTime { stage: Stage::Spawned, at_ns: monotonic_ns() };
        self.launcher.add_stage(self.claim.slot_uid, begun);
        self.launcher.update_record(self.claim.slot_uid, |record| record.process_id = child.id());

        let socket = Arc::new(socket);
        // Before anything is sent: a process that does not read makes even that wait.
        self.launcher.begins(&socket);
        let sent = self.memory.send(&*socket).and_then(|()| self.send_start(&socket, request, [requested, begun]));
        let started = match sent {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(self.failed("The enclave process cannot be given its memory", &error))
            }
            _ => self.await_start(&socket),
        };
        self.launcher.has_begun(&socket);
        let cid = started?;

        let stopping = Arc::<AtomicBool>::default();
        let watch = Watch {
            launcher: Arc::clone(&self.launcher),
            slot_uid: self.claim.slot_uid,
            socket: Arc::clone(&socket),
            stopping: Arc::clone(&stopping),
            ended,
        };
        // The child goes along as what it is: should there be no thread, it is not left behind.
        let watcher = std::thread::Builder::new().name("enclave-watch".to_owned()).spawn(move || watch.run(child));
        let watcher = watcher.map_err(|error| self.failed("A thread cannot be started", &error))?;
        self.running = Some(Running { socket, pidfd, stopping, watcher });
        self.launcher.tell(&Happening::Started { slot_uid: self.claim.slot_uid, memory_bytes: self.memory.bytes(), request });
        Ok(Cid(cid))
    }

    fn send_start(&self, socket: &OwnedFd, request: &StartRequest, stages: [StageTime; 2]) -> io::Result<()> {
        let LaunchOptions { engine, accelerator, discovery, memory, parent, parent_identity, .. } = &self.launcher.options;
        let details = self.launcher.details(self.claim.slot_uid);
        let spec = StartSpec {
            slot_uid: self.claim.slot_uid,
            cid: request.cid.map(|cid| cid.0),
            debug: request.debug,
            vcpus: request.vcpus,
            cpus: request.cpus.iter().map(|cpu| cpu.0).collect(),
            name: details.name,
            creator_pid: details.creator_pid,
            memory: *memory,
            parent: *parent,
            parent_identity: parent_identity.clone(),
            engine: engine.clone(),
            accelerator: (*accelerator).into(),
            virtio_by_command_line: *discovery == nitroxide_engine::VirtioDiscovery::Cmdline,
            world_path: self.launcher.world.path().to_string_lossy().into_owned(),
            stages: stages.to_vec(),
        };
        let claim = self.claim.claim.as_fd().ok_or(io::ErrorKind::InvalidInput)?;
        packet::send(socket, &ToProcess::Start(Box::new(spec)), &[self.launcher.world.as_fd(), claim])
    }

    /// Waits for the answer of a process that has everything.
    fn await_start(&self, socket: &OwnedFd) -> Result<u32, DeviceCode> {
        loop {
            match packet::receive::<FromProcess>(socket) {
                Ok(Some((FromProcess::Stage(time), _))) => self.launcher.add_stage(self.claim.slot_uid, time),
                Ok(Some((FromProcess::Started { cid, name }, _))) => {
                    self.launcher.update_record(self.claim.slot_uid, |record| {
                        record.cid = Some(cid);
                        record.name = Some(name);
                    });
                    return Ok(cid);
                }
                Ok(Some((FromProcess::Refused { errno, message }, _))) => return Err(self.refuse(errno, message)),
                Ok(Some((FromProcess::Ended(_), _))) => {} // Only after `Started`.
                Ok(None) => {
                    let message = "The enclave process ended before the enclave ran; its last messages are on standard error.";
                    return Err(self.refuse(Errno::IO.raw_os_error(), message.to_owned()));
                }
                Err(error) => return Err(self.failed("The enclave process cannot be understood", &error)),
            }
        }
    }

    fn failed(&self, what: &str, error: &io::Error) -> DeviceCode {
        let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
        self.refuse(errno.raw_os_error(), format!("{what}: {error}"))
    }
}

impl Slot for ProcessSlot {
    fn uid(&self) -> SlotUid {
        SlotUid(self.claim.slot_uid)
    }

    fn add_memory(&mut self, run: MemoryRun) -> Result<(), DeviceCode> {
        self.memory.add(&*self.launcher.memory, self.launcher.options.memory, run)
    }

    fn start(&mut self, request: &StartRequest, ended: EndedNotifier) -> Result<Cid, DeviceCode> {
        self.start_process(request, ended)
    }

    fn stop(&mut self) {
        let Some(Running { socket, pidfd, stopping, watcher }) = self.running.take() else { return };
        stopping.store(true, Ordering::Release);
        // The process sees our end close; what it still has to say can be received.
        let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Write);
        if !wait_for_exit(&pidfd, STOP_PATIENCE) {
            tracing::error!(enclave = enclave_id(self.claim.slot_uid), "The enclave process does not end and is killed.");
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
        let _ = watcher.join();
    }
}

impl Drop for ProcessSlot {
    fn drop(&mut self) {
        self.stop();
        self.memory.scrub(self.launcher.options.memory);
        self.launcher.finish_record(self.claim.slot_uid);
    }
}

/// What watches a running process.
struct Watch {
    launcher: Arc<Inner>,
    slot_uid: u64,
    socket: Arc<OwnedFd>,
    stopping: Arc<AtomicBool>,
    ended: EndedNotifier,
}

impl Watch {
    /// Notes how the enclave ends and takes the process's exit status.
    fn run(self, mut child: Offspring) {
        let mut told = false;
        while let Ok(Some((packet, _))) = packet::receive::<FromProcess>(&*self.socket) {
            match packet {
                FromProcess::Stage(time) => self.launcher.add_stage(self.slot_uid, time),
                FromProcess::Ended(report) => {
                    told = true;
                    self.end(report);
                }
                FromProcess::Started { .. } | FromProcess::Refused { .. } => {}
            }
        }
        let status = child.take().map(|mut child| child.wait());
        if !told {
            let detail = match status {
                Some(Ok(status)) => format!("The enclave process ended unexpectedly ({status})."),
                _ => "The enclave process ended unexpectedly.".to_owned(),
            };
            self.end(EndReport { reason: EndReason::ProcessLost, detail, application: None, console_tail: String::new() });
        }
    }

    fn end(&self, report: EndReport) {
        self.launcher.add_stage(self.slot_uid, StageTime { stage: Stage::Ended, at_ns: monotonic_ns() });
        self.launcher.tell(&Happening::Ended { slot_uid: self.slot_uid, report: &report });
        self.launcher.update_record(self.slot_uid, |record| record.end = Some(report));
        if !self.stopping.load(Ordering::Acquire) {
            self.ended.notify();
        }
    }
}

/// A child that is killed and waited for unless it is taken.
struct Offspring(Option<Child>);

impl Offspring {
    fn id(&self) -> Option<u32> {
        self.0.as_ref().map(Child::id)
    }

    fn take(&mut self) -> Option<Child> {
        self.0.take()
    }
}

impl Drop for Offspring {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        // Our end of its socket is closed by now, so it ends by itself; unless it is stuck.
        let begin = std::time::Instant::now();
        while matches!(child.try_wait(), Ok(None)) {
            if begin.elapsed() > LEAVE_PATIENCE {
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Starts the enclave process; returns our end of the socket that is its standard input.
fn spawn(options: &LaunchOptions) -> io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut command = match &options.program.path {
        Some(path) => Command::new(path),
        None => {
            // Not by its path: the file may have been replaced by another version, or be gone.
            let mut command = Command::new("/proc/self/exe");
            if let Some(name) = std::env::args_os().next() {
                command.arg0(name);
            }
            command
        }
    };
    command.args(&options.program.arguments).stdin(Stdio::from(theirs)).stdout(Stdio::null());
    let child = command.spawn()?;
    // The command holds the other end; only the child may, or its death would go unnoticed.
    drop(command);
    Ok((child, ours))
}

fn pidfd_of(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    // The child is not waited for yet, so the number is still its own.
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits for a process to end; says whether it has.
fn wait_for_exit(pidfd: &OwnedFd, patience: Duration) -> bool {
    let begin = std::time::Instant::now();
    loop {
        let left = patience.saturating_sub(begin.elapsed());
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(left.subsec_nanos()) };
        let mut polled = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

/// Locks a mutex whatever became of its last holder.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
