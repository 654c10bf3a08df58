//! The system calls that Rust cannot check: seccomp notifications, another process's memory, ptrace, fork, signals. The only such module.
//!
//! What leaves it is safe: descriptors are owned, memory of a client is bytes that were copied, and a fork is refused while there are other threads.

#![expect(unsafe_code, reason = "seccomp, process_vm_*, ptrace, fork and signal dispositions have no safe form in rustix or std")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;

use crate::filter::Instruction;

/// `ERESTARTSYS`: the call is made again or fails with EINTR, as its signal's handler wants. Only for a task that is about to stop.
pub(crate) const RESTART_BY_HANDLER: i32 = 512;
/// `ERESTARTNOINTR`: the call is made again whatever the signal was.
pub(crate) const RESTART_ALWAYS: i32 = 513;

fn checked(value: libc::c_long) -> io::Result<libc::c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Takes a descriptor that a system call has just given.
fn owned(value: libc::c_long) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(checked(value)?).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made it for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

// ---------------------------------------------------------------- seccomp

/// Puts this process, which has one thread, and all that it starts under a filter; returns where its notifications come out.
///
/// Privileges can no more be gained by exec afterwards. Where the kernel can do it (5.19), a client that waits for an answer is woken by nothing
/// but a deadly signal.
///
/// # Errors
///
/// EBUSY if there is a listener above us already; EINVAL or ENOSYS for a kernel that cannot.
pub(crate) fn install_filter(program: &[Instruction]) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    let whole = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        // `Instruction` is laid out as `sock_filter`; the kernel only reads.
        filter: program.as_ptr().cast_mut().cast(),
    };
    let install = |flags: libc::c_ulong| {
        // SAFETY: `whole` and the instructions it points to live for the call.
        owned(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const whole) })
    };
    match install(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER),
        other => other,
    }
}

/// Lets who makes a call and who answers it take turns on one CPU, where the kernel can do that (6.6): on an idle machine waking another one takes far longer.
pub(crate) fn take_turns(listener: BorrowedFd<'_>) {
    /// `SECCOMP_IOCTL_NOTIF_SET_FLAGS` and `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` (linux/seccomp.h).
    const SET_FLAGS: libc::Ioctl = 0x4008_2104;
    const SYNC_WAKE_UP: u64 = 1;
    // SAFETY: the command takes a number, not a pointer. Without an effect where it is not known.
    unsafe { libc::ioctl(listener.as_raw_fd(), SET_FLAGS, SYNC_WAKE_UP) };
}

/// A system call that waits for an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notification {
    /// Names it in all that is asked about it.
    pub(crate) id: u64,
    /// The thread that makes it.
    pub(crate) thread: i32,
    /// Its number.
    pub(crate) call: i64,
    /// Its arguments.
    pub(crate) arguments: [u64; 6],
}

/// Takes the next notification, which must be there (poll).
///
/// # Errors
///
/// ENOENT if its task died in between, EINTR.
pub(crate) fn receive(listener: BorrowedFd<'_>) -> io::Result<Notification> {
    // SAFETY: plain numbers, for which zeros are valid; the kernel wants them zero.
    let mut raw: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the command writes a `seccomp_notif`, and that is what it gets.
    checked(unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut raw) }.into())?;
    let thread = i32::try_from(raw.pid).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Notification { id: raw.id, thread, call: raw.data.nr.into(), arguments: raw.data.args })
}

/// Does the task still wait for this answer? If so, everything that was found out about its thread before was about that thread.
pub(crate) fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the command reads a number that lives for the call.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) == 0 }
}

/// Ends a call: with a value, a positive errno, or by letting the kernel do it.
///
/// # Errors
///
/// ENOENT if nobody waits for it any more.
pub(crate) fn answer(listener: BorrowedFd<'_>, id: u64, result: Result<i64, i32>, goes_on: bool) -> io::Result<()> {
    let flags = if goes_on { u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or(1) } else { 0 };
    let (val, error) = match result {
        Ok(value) => (value, 0),
        Err(errno) => (0, errno.saturating_neg()),
    };
    let response = libc::seccomp_notif_resp { id, val, error, flags };
    // SAFETY: the command reads a `seccomp_notif_resp` that lives for the call.
    checked(unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const response) }.into())?;
    Ok(())
}

/// Ends a call with a descriptor: gives the caller one for the same open file, and its number is the call's value. Both or neither, from Linux 5.14 on; before, a
/// call that a signal ends in between leaves its caller a descriptor that it does not know of.
///
/// # Errors
///
/// ENOENT if nobody waits any more, EMFILE if the caller has no room.
pub(crate) fn answer_with(listener: BorrowedFd<'_>, id: u64, file: BorrowedFd<'_>, close_on_exec: bool) -> io::Result<()> {
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    let give = |flags: u32| {
        let request = libc::seccomp_notif_addfd {
            id,
            flags,
            srcfd: number(file.as_raw_fd()),
            newfd: 0,
            newfd_flags: if close_on_exec { number(libc::O_CLOEXEC) } else { 0 },
        };
        // SAFETY: the command reads a `seccomp_notif_addfd` that lives for the call.
        checked(unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request) }.into())
    };
    match give(u32::try_from(libc::SECCOMP_ADDFD_FLAG_SEND).unwrap_or(2)) {
        // A flag that it does not know.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => answer(listener, id, Ok(give(0)?), false),
        other => other.map(drop),
    }
}

// ---------------------------------------------------------------- another process

/// Copies from the memory of a thread's process; how many bytes there were.
///
/// # Errors
///
/// EFAULT if there is none, EPERM and ESRCH.
pub(crate) fn read_memory(thread: i32, address: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let remote = remote(address, bytes.len())?;
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the local piece is `bytes`; the remote one is the other process's, and the kernel checks it.
    let count = unsafe { libc::process_vm_readv(thread, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Copies to the memory of a thread's process; how many bytes could be written.
///
/// # Errors
///
/// As [`read_memory`].
pub(crate) fn write_memory(thread: i32, address: u64, bytes: &[u8]) -> io::Result<usize> {
    let remote = remote(address, bytes.len())?;
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the local piece is `bytes`, which is only read; the remote one is the other process's, and the kernel checks it.
    let count = unsafe { libc::process_vm_writev(thread, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn remote(address: u64, length: usize) -> io::Result<libc::iovec> {
    let address = usize::try_from(address).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
    Ok(libc::iovec { iov_base: std::ptr::without_provenance_mut::<c_void>(address), iov_len: length })
}

/// Have two threads the same address space?
///
/// # Errors
///
/// ENOSYS and EPERM where kcmp is not to be had, ESRCH.
pub(crate) fn same_memory(one: i32, other: i32) -> io::Result<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: no pointers.
    Ok(checked(unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) })? == 0)
}

// ---------------------------------------------------------------- ptrace

/// A thread that was seized; [`Seized::let_go`] must be called on this thread. Dropped, it is let go without a signal.
#[derive(Debug)]
pub(crate) struct Seized {
    thread: i32,
    is_held: bool,
}

/// Why a seized thread has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// Because it was interrupted, or its group is stopped.
    Interrupted,
    /// At the entry or the exit of a system call.
    AtCall,
    /// Because it is about to get this signal.
    Signal(i32),
}

impl Seized {
    /// Seizes a thread and asks it to stop soon; it does not stop before it leaves the system call that it is in.
    ///
    /// # Errors
    ///
    /// EPERM if it is traced by another, or may not be.
    pub(crate) fn interrupt(thread: i32) -> io::Result<Self> {
        trace(libc::PTRACE_SEIZE, thread, 0, usize::try_from(libc::PTRACE_O_TRACESYSGOOD).unwrap_or(1))?;
        let seized = Self { thread, is_held: true };
        trace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
        Ok(seized)
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    ///
    /// ESRCH if it is gone.
    pub(crate) fn wait(&mut self) -> io::Result<Stopped> {
        let mut status = 0;
        loop {
            // SAFETY: `status` lives for the call.
            let thread = unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) };
            if thread == self.thread {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if !libc::WIFSTOPPED(status) {
            self.is_held = false;
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        let signal = libc::WSTOPSIG(status);
        // PTRACE_EVENT_STOP, which libc does not have everywhere.
        Ok(match (status >> 16, signal) {
            (128, _) => Stopped::Interrupted,
            (_, signal) if signal == libc::SIGTRAP | 0x80 => Stopped::AtCall,
            (_, signal) => Stopped::Signal(signal),
        })
    }

    /// Lets it run on to the entry or the exit of its next system call.
    ///
    /// # Errors
    ///
    /// ESRCH if it is gone.
    pub(crate) fn run_to_call(&mut self) -> io::Result<()> {
        trace(libc::PTRACE_SYSCALL, self.thread, 0, 0)
    }

    /// Its registers.
    ///
    /// # Errors
    ///
    /// ESRCH if it is gone.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        trace(libc::PTRACE_GETREGS, self.thread, 0, (&raw mut registers).expose_provenance())?;
        Ok(registers)
    }

    /// Changes its registers.
    ///
    /// # Errors
    ///
    /// ESRCH if it is gone.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn set_registers(&mut self, registers: &libc::user_regs_struct) -> io::Result<()> {
        trace(libc::PTRACE_SETREGS, self.thread, 0, std::ptr::from_ref(registers).expose_provenance())
    }

    /// Lets it go, with the signal for which it had stopped.
    pub(crate) fn let_go(mut self, signal: Option<i32>) {
        self.is_held = false;
        // It fails only for a thread that is gone.
        let _ = trace(libc::PTRACE_DETACH, self.thread, 0, usize::try_from(signal.unwrap_or(0)).unwrap_or(0));
    }
}

impl Drop for Seized {
    fn drop(&mut self) {
        if self.is_held {
            // It can only be let go while it is stopped; the interrupt that is under way stops it.
            let _ = self.wait();
            let _ = trace(libc::PTRACE_DETACH, self.thread, 0, 0);
        }
    }
}

fn trace(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: requests that transfer memory are given the address of a value of their type, which lives for the call.
    checked(unsafe { libc::ptrace(request, thread, address, data) })?;
    Ok(())
}

// ---------------------------------------------------------------- processes and signals

/// Makes a copy of this process: `None` in the copy.
///
/// # Errors
///
/// EAGAIN and ENOMEM; refused if there are other threads, whose locks would be for ever taken in the copy.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads cannot be copied"));
    }
    // SAFETY: there is one thread, so nothing that the copy needs is held by somebody who is not in it.
    let pid = checked(unsafe { libc::fork() }.into())?;
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw))
}

/// Ends this process at once, without what a return from `main` would do.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: it does not return, and nothing of this process is needed afterwards.
    unsafe { libc::_exit(status) }
}

/// Closes all descriptors from 3 up but these.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) {
    let mut numbers: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    numbers.sort_unstable();
    let mut first = 3_u32;
    for number in numbers.into_iter().filter(|number| *number >= 3).chain([u32::MAX]) {
        if let Some(last) = number.checked_sub(1).filter(|last| *last >= first) {
            // SAFETY: callers have just been forked, and hold nothing open but what they name.
            unsafe { libc::close_range(first, last, 0) };
        }
        first = number.saturating_add(1);
    }
}

/// Lets these signals do nothing. Unlike ignoring them, this does not go on in programs that are executed.
pub(crate) fn disregard(signals: &[i32]) {
    extern "C" fn nothing(_signal: libc::c_int) {}
    for signal in signals {
        let handler: extern "C" fn(libc::c_int) = nothing;
        // SAFETY: plain data, for which zeros are valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = (handler as *const c_void).expose_provenance();
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing, which is safe at any time. It fails only for what is no signal.
        unsafe { libc::sigaction(*signal, &raw const action, std::ptr::null_mut()) };
    }
}

/// A signal that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Which.
    pub(crate) signal: i32,
    /// Did a process send it to this one, by kill() or the like? A terminal sends to its whole group.
    pub(crate) is_from_process: bool,
}

/// Signals that are blocked and come out of a descriptor instead.
#[derive(Debug)]
pub(crate) struct Signals {
    queue: OwnedFd,
}

impl Signals {
    /// Blocks them in this thread.
    ///
    /// # Errors
    ///
    /// EMFILE.
    pub(crate) fn block(signals: &[i32]) -> io::Result<Self> {
        let set = set_of(signals);
        // SAFETY: the set is initialised, and the old one is not asked for.
        checked(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) }.into())?;
        // SAFETY: the set is initialised.
        let queue = owned(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) }.into())?;
        Ok(Self { queue })
    }

    /// Readable when one has come.
    pub(crate) fn queue(&self) -> &OwnedFd {
        &self.queue
    }

    /// Takes the next one, if one has come.
    pub(crate) fn next(&self) -> Option<Received> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut raw: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = size_of_val(&raw);
        // SAFETY: `raw` has room for what is read.
        let count = unsafe { libc::read(self.queue.as_raw_fd(), (&raw mut raw).cast(), size) };
        (usize::try_from(count) == Ok(size)).then(|| Received {
            signal: i32::try_from(raw.ssi_signo).unwrap_or(0),
            // SI_USER and SI_QUEUE, SI_TKILL; the terminal's is SI_KERNEL.
            is_from_process: raw.ssi_code <= 0,
        })
    }
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: plain data; sigemptyset initialises it, sigaddset refuses what is no signal.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

/// Ends this process by a signal, so that whoever waits for it sees just that. Returns if the signal does not end a process.
pub(crate) fn die_by(signal: i32) {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let set = set_of(&[signal]);
    // SAFETY: no memory but the values above, which live for the calls; the disposition becomes the default.
    unsafe {
        // The one core file is the client's.
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        libc::signal(signal, libc::SIG_DFL);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::kill(libc::getpid(), signal);
    }
}
