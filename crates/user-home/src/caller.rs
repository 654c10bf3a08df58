//! Who makes a call: [`Caller`], its memory, and whether it is the one that made an enclave: [`Owner`].
//!
//! A notification names a thread by number. All that is found out by that number is believed only after asking the kernel that the thread still
//! waits for its answer, since a number can be used again.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use nitroxide_abi::Code;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::sys::{self, Notification};

/// The longest path, its NUL included.
const PATH_BYTES: usize = 4096;
const PAGE: u64 = 4096;

/// The thread behind one notification.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'a> {
    listener: BorrowedFd<'a>,
    id: u64,
    /// Its number.
    pub(crate) thread: i32,
}

impl<'a> Caller<'a> {
    pub(crate) fn new(listener: &'a OwnedFd, notification: &Notification) -> Self {
        Self { listener: listener.as_fd(), id: notification.id, thread: notification.thread }
    }

    /// Does it still wait for its answer?
    pub(crate) fn is_waiting(&self) -> bool {
        sys::is_waiting(self.listener, self.id)
    }

    /// Ends its call, if it still waits.
    pub(crate) fn answer(&self, result: Result<i64, i32>) {
        // Who does not wait any more is gone, or was interrupted and knows.
        let _ = sys::answer(self.listener, self.id, result, false);
    }

    /// Copies from its memory; EFAULT if not all of it is there.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Code> {
        let count = sys::read_memory(self.thread, address, bytes).map_err(|_| Code::EFAULT)?;
        if count == bytes.len() && self.is_waiting() { Ok(()) } else { Err(Code::EFAULT) }
    }

    /// Copies to its memory; EFAULT if not all of it can be written.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Code> {
        if !self.is_waiting() {
            return Err(Code::EFAULT);
        }
        let count = sys::write_memory(self.thread, address, bytes).map_err(|_| Code::EFAULT)?;
        if count == bytes.len() { Ok(()) } else { Err(Code::EFAULT) }
    }

    /// A path in its memory, without the NUL. Nothing behind the page of the NUL is read: it need not be there.
    pub(crate) fn path(&self, address: u64) -> io::Result<Vec<u8>> {
        let mut path = Vec::new();
        let mut at = address;
        let mut bytes = [0; 256];
        while path.len() < PATH_BYTES {
            let to_page_end = usize::try_from(PAGE - at % PAGE).unwrap_or(0);
            let wanted = to_page_end.min(bytes.len());
            let count = sys::read_memory(self.thread, at, bytes.get_mut(..wanted).unwrap_or_default())?;
            let got = bytes.get(..count).unwrap_or_default();
            let end = got.iter().position(|byte| *byte == 0);
            path.extend_from_slice(got.get(..end.unwrap_or(count)).unwrap_or_default());
            if end.is_some() {
                return if self.is_waiting() { Ok(path) } else { Err(io::ErrorKind::NotFound.into()) };
            }
            at = u64::try_from(count)
                .ok()
                .filter(|count| *count > 0)
                .and_then(|count| at.checked_add(count))
                .ok_or(io::ErrorKind::InvalidInput)?;
        }
        Err(io::ErrorKind::InvalidFilename.into())
    }

    /// A copy of one of its descriptors: the same open file. While it is there the file is not closed, so it is not to be kept.
    pub(crate) fn copy_of(&self, descriptor: i32) -> io::Result<OwnedFd> {
        /// `PIDFD_THREAD`, of Linux 6.9.
        const THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());
        let thread = Pid::from_raw(self.thread).ok_or(io::ErrorKind::InvalidData)?;
        let of_process =
            || Ok::<_, io::Error>(pidfd_open(Pid::from_raw(self.process()?).ok_or(io::ErrorKind::InvalidData)?, PidfdFlags::empty())?);
        // The first is enough for a process's first thread.
        let pidfd = pidfd_open(thread, PidfdFlags::empty()).or_else(|_| pidfd_open(thread, THREAD)).or_else(|_| of_process())?;
        let copy = pidfd_getfd(&pidfd, descriptor, PidfdGetfdFlags::empty())?;
        if self.is_waiting() { Ok(copy) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Is there a signal that it would be woken by if it did not wait for us?
    pub(crate) fn has_signal(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread)).unwrap_or_default();
        let set = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
        };
        (set("SigPnd:") | set("ShdPnd:")) & !set("SigBlk:") != 0
    }

    /// Is its process about to stop (Ctrl-Z), and waits for this thread? The others that do not wait here, too, have stopped then, so a few are enough to look at.
    pub(crate) fn is_stopping(&self) -> bool {
        const MOST_LOOKED_AT: usize = 16;
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.thread)).into_iter().flatten().flatten().take(MOST_LOOKED_AT);
        let is_stopped = |status: String| status.lines().any(|line| line.starts_with("State:\tT"));
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok()).any(is_stopped)
    }

    /// The process that it is a thread of.
    pub(crate) fn process(&self) -> io::Result<i32> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread))?;
        let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        let process = line.and_then(|text| text.trim().parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        if self.is_waiting() { Ok(process) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Its effective user.
    pub(crate) fn user(&self) -> io::Result<u32> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread))?;
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        line.and_then(|text| text.split_whitespace().nth(1)?.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// The address space that made an enclave.
///
/// Held by an open `/proc/PID/mem`: that keeps the kernel's structure, so no other address space can pass for it (W7), and tells when it is gone,
/// by exec as well as by death.
#[derive(Debug)]
pub(crate) struct Owner {
    process: i32,
    pidfd: OwnedFd,
    memory: File,
}

impl Owner {
    /// The caller's.
    pub(crate) fn of(caller: &Caller<'_>) -> io::Result<Self> {
        let process = caller.process()?;
        let pid = Pid::from_raw(process).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let memory = File::open(format!("/proc/{}/mem", caller.thread))?;
        if caller.is_waiting() { Ok(Self { process, pidfd, memory }) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// The process that it was.
    pub(crate) fn process(&self) -> i32 {
        self.process
    }

    /// Does this thread run in that address space? Threads do, and a child until it executes a program if it was made by vfork.
    pub(crate) fn is(&self, caller: &Caller<'_>) -> bool {
        self.lives() && caller.process().is_ok_and(|process| process == self.process || self.is_shared_with(caller.thread))
    }

    fn is_shared_with(&self, thread: i32) -> bool {
        sys::same_memory(self.process, thread).unwrap_or(false)
    }

    /// Is the process still there, and has it not executed another program?
    pub(crate) fn lives(&self) -> bool {
        // A memory that is gone is empty; in one that is there, nothing is mapped at 0, or there is something to be read.
        !self.is_dead() && !matches!(self.memory.read_at(&mut [0], 0), Ok(0))
    }

    fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(count) if count > 0)
    }
}
