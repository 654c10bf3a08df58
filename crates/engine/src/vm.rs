//! A running VM: watched until it ends, and stopped when dropped.
//!
//! One thread per VM listens to QMP, to QEMU's standard error and to its pidfd, and writes one [`ExitReport`]; [`Vm::wait`] and [`VmStopper::stop`] may be
//! called from any thread, any number of times. A VM without a process ([`Engine::none`](crate::Engine::none)) has the same face and ends when stopped.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions};

use crate::accelerate::Choice;
use crate::confinement::Confinement;
use crate::qmp;
use crate::spawn::Spawned;

/// How much of QEMU's standard error is kept: its last bytes.
const MAX_DETAIL_BYTES: usize = 8 << 10;

/// Why a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest rebooted; an enclave does not start again. A stock kernel's panic looks the same: see [`PanicWatch`](crate::PanicWatch).
    Rebooted,
    /// The guest's kernel reported a panic through a panic device.
    Panicked,
    /// It was stopped by [`VmStopper::stop`] or by dropping the [`Vm`].
    Stopped,
    /// QEMU ended by itself: killed by another, crashed, or it met an error; the report's detail says which.
    EngineFailed,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitReport {
    /// Why.
    pub reason: ExitReason,
    /// How QEMU's process ended and the last of what it wrote to standard error, at most 8 KiB; empty after an orderly end.
    pub detail: String,
}

/// A VM that runs or has run. Dropping it stops it and returns once its process is gone.
#[derive(Debug)]
pub struct Vm {
    shared: Arc<Shared>,
    console: Option<OwnedFd>,
    watcher: Option<JoinHandle<()>>,
    choice: Option<Choice>,
    confinement: Confinement,
    pid: Option<u32>,
}

/// Stops one VM, from anywhere; it does not keep the VM alive.
#[derive(Debug, Clone)]
pub struct VmStopper {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The process; its pidfd stays valid, but without effect, after the process has ended. None = a VM without a process.
    process: Option<OwnedFd>,
}

#[derive(Debug, Default)]
struct State {
    /// Did QEMU say that the machine runs?
    running: bool,
    /// Did somebody ask for the end?
    stop_requested: bool,
    /// How did it end?
    report: Option<ExitReport>,
}

/// What became of a start.
#[derive(Debug)]
pub(crate) enum Started {
    /// The guest runs.
    Running,
    /// QEMU ended before.
    Ended(ExitReport),
    /// QEMU neither ran its guest nor ended.
    Silent,
}

impl Vm {
    /// Watches a process that was just started.
    pub(crate) fn watch(
        spawned: Spawned,
        qmp: OwnedFd,
        stderr: OwnedFd,
        console: OwnedFd,
        choice: Choice,
        confinement: Confinement,
    ) -> io::Result<Self> {
        // Until here a way out would end the process: `Spawned` does.
        rustix::io::ioctl_fionbio(&stderr, true)?;
        rustix::io::ioctl_fionbio(&qmp, true)?;
        let pid = u32::try_from(spawned.pid).ok();
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), process: spawned.process.take_over() });
        let watched = Arc::clone(&shared);
        let watcher = std::thread::Builder::new().name("vm-watcher".to_owned()).spawn(move || watched.watch(&qmp, &stderr));
        let mut vm = Self { shared, console: Some(console), watcher: None, choice: Some(choice), confinement, pid };
        match watcher {
            Ok(watcher) => vm.watcher = Some(watcher),
            Err(error) => {
                // Nobody will reap it but us.
                vm.shared.kill();
                vm.shared.reap();
                vm.shared.finish(ExitReport { reason: ExitReason::EngineFailed, detail: error.to_string() });
                return Err(error);
            }
        }
        Ok(vm)
    }

    /// A VM without a process, which runs until it is stopped.
    pub(crate) fn without_process() -> Self {
        let state = Mutex::new(State { running: true, ..State::default() });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), process: None });
        Self { shared, console: None, watcher: None, choice: None, confinement: Confinement::default(), pid: None }
    }

    /// The readable end of the guest's serial port, once. While nobody reads, the guest's output waits (after some 200 KiB); once closed, it is discarded.
    ///
    /// None at the second call, and for an engine without a VM.
    pub fn take_console(&mut self) -> Option<OwnedFd> {
        self.console.take()
    }

    /// A handle that stops this VM from elsewhere.
    pub fn stopper(&self) -> VmStopper {
        VmStopper { shared: Arc::clone(&self.shared) }
    }

    /// Waits until the VM has ended and its process is gone.
    pub fn wait(&self) -> ExitReport {
        let mut state = self.shared.lock();
        loop {
            if let Some(report) = &state.report {
                return report.clone();
            }
            state = self.shared.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// How the VM ended; none while it runs.
    pub fn report(&self) -> Option<ExitReport> {
        self.shared.lock().report.clone()
    }

    /// What it runs on and why; none for an engine without a VM.
    pub fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }

    /// What keeps its process apart from the host.
    pub fn confinement(&self) -> Confinement {
        self.confinement
    }

    /// Its process's id, for people; none for an engine without a VM.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Waits for the guest to run or for the process to end.
    pub(crate) fn wait_started(&self, patience: Duration) -> Started {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            // A machine that ran counts as started even where it has ended since: the report tells.
            if state.running {
                return Started::Running;
            }
            if let Some(report) = &state.report {
                return Started::Ended(report.clone());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Started::Silent };
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(watcher) = self.watcher.take() {
            // A watcher that panicked has nothing left to tell, and the process was killed above.
            let _ = watcher.join();
        }
    }
}

impl VmStopper {
    /// Kills the VM; without effect once it has ended. Returns at once: [`Vm::wait`] tells when it is gone.
    pub fn stop(&self) {
        self.shared.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn stop(&self) {
        let mut state = self.lock();
        state.stop_requested = true;
        if self.process.is_none() && state.report.is_none() {
            state.report = Some(ExitReport { reason: ExitReason::Stopped, detail: String::new() });
            self.changed.notify_all();
        }
        drop(state);
        self.kill();
    }

    fn kill(&self) {
        if let Some(process) = &self.process {
            // ESRCH: it is gone already.
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
    }

    fn finish(&self, report: ExitReport) {
        self.lock().report.get_or_insert(report);
        self.changed.notify_all();
    }

    /// Waits for the process and takes its exit status: a phrase for people, empty for status 0.
    fn reap(&self) -> String {
        let Some(process) = &self.process else { return String::new() };
        let status = loop {
            match rustix::process::waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED) {
                Err(Errno::INTR) => {}
                // ECHILD: the host program reaps every child it sees; then nobody knows.
                Err(_) | Ok(None) => return String::new(),
                Ok(Some(status)) => break status,
            }
        };
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => String::new(),
            (Some(code), _) => format!("QEMU ended with status {code}."),
            (None, Some(signal)) => format!("QEMU was killed by signal {signal}."),
            (None, None) => String::new(),
        }
    }

    /// The watcher's life.
    fn watch(&self, qmp: &OwnedFd, stderr: &OwnedFd) {
        let mut ears = Ears::default();
        let _ = rustix::io::write(qmp, qmp::HELLO);
        let (mut qmp_open, mut stderr_open) = (true, true);
        loop {
            let Some(process) = &self.process else { return };
            let mut waiting = vec![PollFd::new(process, PollFlags::IN)];
            waiting.extend(qmp_open.then(|| PollFd::new(qmp, PollFlags::IN)));
            waiting.extend(stderr_open.then(|| PollFd::new(stderr, PollFlags::IN)));
            match rustix::event::poll(&mut waiting, None) {
                Ok(_) | Err(Errno::INTR) => {}
                // Not for descriptors of our own; if ever, the VM must not run unwatched.
                Err(_) => self.kill(),
            }
            let ended = waiting.first().is_some_and(|process| !process.revents().is_empty());
            qmp_open = qmp_open && ears.hear_qmp(qmp);
            stderr_open = stderr_open && ears.hear_stderr(stderr);
            if ears.running {
                self.lock().running = true;
                self.changed.notify_all();
            }
            if ended {
                break;
            }
        }
        let status = self.reap();
        let stop_requested = self.lock().stop_requested;
        self.finish(ears.report(stop_requested, &status));
    }
}

/// What was heard from QEMU so far.
#[derive(Debug, Default)]
struct Ears {
    qmp: qmp::Reader,
    running: bool,
    ended: Option<ExitReason>,
    stderr: Vec<u8>,
}

impl Ears {
    /// Reads what is there; false once the other end is closed.
    fn hear_qmp(&mut self, from: &OwnedFd) -> bool {
        let Self { qmp, running, ended, .. } = self;
        drain(from, |bytes| {
            qmp.feed(bytes, |message| match message {
                qmp::Message::Running => *running = true,
                // A panic is followed by a reset or a shutdown: the first word stands.
                qmp::Message::Panicked => *ended = Some(ExitReason::Panicked),
                qmp::Message::PoweredOff => *ended = Some(ended.unwrap_or(ExitReason::PoweredOff)),
                qmp::Message::Reset => *ended = Some(ended.unwrap_or(ExitReason::Rebooted)),
            });
        })
    }

    fn hear_stderr(&mut self, from: &OwnedFd) -> bool {
        let kept = &mut self.stderr;
        drain(from, |bytes| {
            kept.extend_from_slice(bytes);
            let surplus = kept.len().saturating_sub(MAX_DETAIL_BYTES);
            kept.drain(..surplus);
        })
    }

    fn report(&self, stop_requested: bool, status: &str) -> ExitReport {
        let reason = match self.ended {
            Some(reason) => reason,
            None if stop_requested => ExitReason::Stopped,
            None => ExitReason::EngineFailed,
        };
        if reason != ExitReason::EngineFailed {
            return ExitReport { reason, detail: String::new() };
        }
        let mut detail = if status.is_empty() { "QEMU ended unasked.".to_owned() } else { status.to_owned() };
        let text = String::from_utf8_lossy(&self.stderr);
        if text.trim().is_empty() {
            detail.push_str(" It wrote no message.");
        } else {
            let _ = write!(detail, " Its last messages:\n{}", text.trim());
        }
        ExitReport { reason, detail }
    }
}

/// Reads all that is there without waiting; false once there will be no more.
fn drain(from: &OwnedFd, mut take: impl FnMut(&[u8])) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(from, &mut buffer) {
            Ok(0) => return false,
            Ok(length) => take(buffer.get(..length).unwrap_or_default()),
            Err(Errno::AGAIN) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_without_a_process_runs_until_it_is_stopped() {
        let vm = Vm::without_process();
        assert!(matches!(vm.wait_started(Duration::ZERO), Started::Running));
        assert_eq!(vm.report(), None);
        vm.stopper().stop();
        vm.stopper().stop();
        assert_eq!(vm.wait().reason, ExitReason::Stopped);
    }

    #[test]
    fn the_guests_word_comes_before_a_stop_and_a_panic_before_the_reset_it_causes() {
        let mut ears = Ears::default();
        assert_eq!(ears.report(true, "").reason, ExitReason::Stopped);
        assert_eq!(ears.report(false, "").reason, ExitReason::EngineFailed);
        ears.ended = Some(ExitReason::PoweredOff);
        assert_eq!(ears.report(true, "").reason, ExitReason::PoweredOff);
    }

    #[test]
    fn a_failure_tells_status_and_last_messages() {
        let ears = Ears { stderr: b"qemu: no memory\n".to_vec(), ..Ears::default() };
        assert_eq!(ears.report(false, "QEMU ended with status 1.").detail, "QEMU ended with status 1. Its last messages:\nqemu: no memory");
        assert_eq!(Ears::default().report(false, "").detail, "QEMU ended unasked. It wrote no message.");
    }

    #[test]
    fn only_the_last_messages_are_kept() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let mut ears = Ears::default();
        for _ in 0..5 {
            rustix::io::write(&write, &[b'a'; 4000]).unwrap();
            assert!(ears.hear_stderr(&read));
        }
        rustix::io::write(&write, b"end").unwrap();
        drop(write);
        assert!(!ears.hear_stderr(&read));
        assert_eq!(ears.stderr.len(), MAX_DETAIL_BYTES);
        assert!(ears.stderr.ends_with(b"aend"));
    }
}
