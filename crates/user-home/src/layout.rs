//! The processes of one `exec` ([`run`]), and who waits for whom.
//!
//! ```text
//! caller ── what the shell started: passes signals on, ends as the client did
//!   └─ supervisor ── answers calls, owns device and enclaves; lives as long as any client does
//!        └─ reaper ── parent of all clients, adopted ones among them; tells the caller how the client ended
//!             └─ client, and whatever it starts
//! ```
//!
//! The supervisor is above all clients, because Yama lets a process look into its descendants only. Daemons of clients become the reaper's children,
//! which waits for any child and so could not be the supervisor, whose other children have somebody who waits for each. The client's own process tree
//! below the reaper is all that is under the filter.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus};
use std::sync::Arc;

use nitroxide_client::ServedDevice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, PidfdGetfdFlags, Resource, Rlimit, Signal, WaitOptions, dumpable_behavior, getpid, getrlimit,
    pidfd_getfd, pidfd_open, pidfd_send_signal, set_child_subreaper, setrlimit, wait, waitpid,
};

use crate::filter::{Instruction, Part, program, rules};
use crate::program::{Program, ProgramError};
use crate::supervisor::Supervisor;
use crate::sys;

/// In a client's environment: it is supervised, and what it starts is, too.
pub const MARK: &str = "NITROXIDE_EXEC";

/// What the supervisor's standard error is written to, if it is set; else nowhere.
const LOG: &str = "NITROXIDE_EXEC_LOG";

/// Signals that are passed on when a process sends them to the caller; those of the terminal come to the client anyway.
const PASSED_ON: &[i32] =
    &[libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGALRM, libc::SIGWINCH, libc::SIGCONT];
/// Signals that supervisor and reaper survive, as the terminal sends them to the whole group.
const SURVIVED: &[i32] = &[
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGPIPE,
];

/// How long the caller waits for the supervisor when no client is left, so that what it had is free when `exec` returns.
const LAST_PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// A program to run as a client.
#[derive(Debug)]
pub struct Execution {
    /// The program, as a shell would be given it.
    pub program: OsString,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables that are added to its environment.
    pub environment: Vec<(OsString, OsString)>,
}

/// How a client ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exited(u8),
    /// This signal killed it.
    Killed(i32),
}

impl Ended {
    /// Ends this process in the same way; returns 128 and the signal if the signal does not.
    #[must_use]
    pub fn relay(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => {
                sys::die_by(signal);
                u8::try_from(signal.saturating_add(128)).unwrap_or(u8::MAX)
            }
        }
    }
}

/// Why a client could not be run to its end.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum RunError {
    /// {0}
    Program(#[from] ProgramError),
    /// {0}
    Supervisor(String),
    /// the supervisor was lost; the client's calls to the driver fail from now on
    Lost,
    /// processes for it could not be made
    System(#[from] io::Error),
}

/// Is this process a client already? Then what it starts is one, too, in the same world.
#[must_use]
pub fn is_supervised() -> bool {
    let has_filter = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        status.lines().filter_map(|line| line.strip_prefix("Seccomp:")).any(|mode| mode.trim() == "2")
    };
    std::env::var_os(MARK).is_some() && has_filter()
}

/// Becomes the program, as part of the supervision that this process is under.
///
/// # Errors
///
/// Always, if it returns.
pub fn become_program(execution: &Execution) -> RunError {
    match Program::find(&execution.program, std::env::var_os("PATH").as_deref()) {
        Ok(program) => ProgramError::NotExecutable(program.path.clone(), command(&program, execution).exec()).into(),
        Err(error) => error.into(),
    }
}

fn command(program: &Program, execution: &Execution) -> Command {
    let mut command = Command::new(&program.path);
    command.arg0(&program.name).args(&execution.arguments).envs(execution.environment.iter().cloned());
    command
}

/// Runs a program with a device of its own, which `open` makes in the process that will have it. Returns when the program has ended; others that it
/// has started may go on.
///
/// Call it before this process has other threads. Descriptors that it has open go to the client as far as they are not close-on-exec, and to nobody else.
///
/// # Errors
///
/// [`RunError`] says what is missing.
pub fn run(execution: &Execution, open: impl FnOnce() -> Result<ServedDevice, String>) -> Result<Ended, RunError> {
    let client = Program::find(&execution.program, std::env::var_os("PATH").as_deref())?;
    let (told, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    let caller = pidfd_open(getpid(), PidfdFlags::empty()).map_err(io::Error::from)?;
    let Some(supervisor) = sys::fork()? else {
        drop(told);
        sys::exit(supervise(execution, &client, &caller, tell, open));
    };
    drop((tell, caller));
    let end = follow(&File::from(told), supervisor);
    // It may go on for a client's daemons; then nobody waits for it, and init will.
    let _ = waitpid(Some(supervisor), WaitOptions::NOHANG);
    end
}

// ---------------------------------------------------------------- what the caller is told

#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// The client's process.
    Started(i32),
    /// The client's wait status, and whether no other client is left.
    Ended(i32, bool),
    /// There is no supervision, and why.
    Failed(String),
}

impl Message {
    fn send(&self, to: &OwnedFd) {
        let bytes = match self {
            Self::Started(process) => [&[1][..], &process.to_le_bytes()].concat(),
            Self::Ended(status, is_last) => [&[2][..], &status.to_le_bytes(), &[u8::from(*is_last)]].concat(),
            Self::Failed(text) => {
                // In one piece: shorter than what a pipe takes at once.
                let cut = (0..=text.len().min(2000)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
                let text = text.get(..cut).unwrap_or_default();
                let length = u16::try_from(text.len()).unwrap_or(0);
                [&[3][..], &length.to_le_bytes(), text.as_bytes()].concat()
            }
        };
        // A caller that is gone is told nothing.
        let _ = rustix::io::write(to, &bytes);
    }

    /// `None` at the end.
    fn receive(mut from: &File) -> Option<Self> {
        fn take<const N: usize>(mut from: &File) -> Option<[u8; N]> {
            let mut bytes = [0; N];
            from.read_exact(&mut bytes).ok()?;
            Some(bytes)
        }
        match take::<1>(from)? {
            [1] => Some(Self::Started(i32::from_le_bytes(take(from)?))),
            [2] => Some(Self::Ended(i32::from_le_bytes(take(from)?), take::<1>(from)? != [0])),
            _ => {
                let mut text = vec![0; u16::from_le_bytes(take(from)?).into()];
                from.read_exact(&mut text).ok()?;
                Some(Self::Failed(String::from_utf8_lossy(&text).into_owned()))
            }
        }
    }
}

/// The caller: passes signals on until the client has ended.
fn follow(told: &File, supervisor: Pid) -> Result<Ended, RunError> {
    let signals = sys::Signals::block(PASSED_ON)?;
    let mut client: Option<OwnedFd> = None;
    // Those that came before there was anybody to pass them on to.
    let mut early = Vec::new();
    loop {
        let mut fds = [PollFd::new(told, PollFlags::IN), PollFd::new(signals.queue(), PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [message, _] = &fds;
        let has_message = !message.revents().is_empty();
        while let Some(received) = signals.next() {
            if received.is_from_process {
                early.push(received.signal);
            }
        }
        if has_message {
            match Message::receive(told) {
                Some(Message::Started(process)) => {
                    client = Pid::from_raw(process).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
                }
                Some(Message::Ended(status, is_last)) => {
                    if is_last {
                        wait_for(supervisor);
                    }
                    return Ok(ended(status));
                }
                Some(Message::Failed(text)) => return Err(RunError::Supervisor(text)),
                None => return Err(RunError::Lost),
            }
        }
        if let Some(client) = &client {
            for signal in early.drain(..).filter_map(Signal::from_named_raw) {
                // A client that has just ended gets none.
                let _ = pidfd_send_signal(client, signal);
            }
        }
    }
}

fn ended(status: i32) -> Ended {
    let status = ExitStatus::from_raw(status);
    match (status.code(), status.signal()) {
        (_, Some(signal)) => Ended::Killed(signal),
        (code, None) => Ended::Exited(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)),
    }
}

fn wait_for(supervisor: Pid) {
    if let Ok(supervisor) = pidfd_open(supervisor, PidfdFlags::empty()) {
        let _ = poll(&mut [PollFd::new(&supervisor, PollFlags::IN)], Some(&LAST_PATIENCE));
    }
}

// ---------------------------------------------------------------- the supervisor

/// The process that answers calls; returns its exit status.
fn supervise(
    execution: &Execution,
    client: &Program,
    caller: &OwnedFd,
    tell: OwnedFd,
    open: impl FnOnce() -> Result<ServedDevice, String>,
) -> i32 {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Message::Failed(format!("{what}: {error}")).send(&tell);
        1
    };
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (here, there) = match pair {
        Ok(pair) => pair,
        Err(error) => return failed("There is no socket for the client", &error),
    };
    let reaper = match sys::fork() {
        Ok(Some(reaper)) => reaper,
        Ok(None) => {
            drop(here);
            reap(execution, client, there, &tell);
        }
        Err(error) => return failed("There is no process for the client", &error),
    };
    drop(there);
    sys::close_all_but(&[here.as_fd(), tell.as_fd(), caller.as_fd()]);
    raise_file_limit();
    sys::disregard(SURVIVED);
    let reaper = match pidfd_open(reaper, PidfdFlags::empty()) {
        Ok(reaper) => reaper,
        Err(error) => return failed("The client's process is lost", &error),
    };
    let (listener, process) = match take_listener(&here) {
        Ok(both) => both,
        Err(error) => return failed("Calls of the client cannot be looked at", &explained(&error)),
    };
    let (client, has_copies) = match look_into(process) {
        Ok(both) => both,
        Err(error) => return failed("The client's memory cannot be read", &whose_fault(&error)),
    };
    // On an error the client has no go-ahead, and ends without having begun.
    let device = match open() {
        Ok(device) => device,
        Err(text) => return failed("There is no device for the client", &text),
    };
    let supervisor = match Supervisor::new(listener, device, has_copies) {
        Ok(supervisor) => Arc::new(supervisor),
        Err(error) => return failed("The device cannot be served", &error),
    };
    let serving = Arc::clone(&supervisor);
    if let Err(error) = std::thread::Builder::new().name("notifications".to_owned()).spawn(move || serving.serve()) {
        return failed("The device cannot be served", &error);
    }
    drop(tell);
    let_go_of_terminal();
    if rustix::net::send(&here, b"go", SendFlags::NOSIGNAL).is_err() {
        return 1;
    }
    drop(here);
    attend(&supervisor, &reaper, caller, &client);
    // The last reference may be a thread's that waits for work; what clients had is closed by now.
    supervisor.end();
    0
}

/// Each call that waits takes some descriptors of ours.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised it stays.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// What EBUSY and its like mean here.
fn explained(error: &io::Error) -> String {
    let what_to_do = match error.raw_os_error() {
        Some(libc::EBUSY) => {
            "something above this process looks at system calls already (a container runtime with a seccomp agent, or another such supervisor)"
        }
        Some(libc::ENOSYS | libc::EINVAL) => "this kernel has no seccomp user notification (Linux 5.9 or later is needed)",
        Some(libc::EPERM | libc::EACCES) => "seccomp is forbidden here; in a container, give it a seccomp profile that allows it",
        _ => return error.to_string(),
    };
    format!("{error}: {what_to_do}")
}

/// Waits for the end of all clients, and gives back what they close meanwhile.
fn attend(supervisor: &Supervisor, reaper: &OwnedFd, caller: &OwnedFd, client: &OwnedFd) {
    /// A closed file loses its lock a moment after it is told.
    const SOON: [i64; 4] = [1, 10, 100, 1000];
    let (mut caller_lives, mut client_lives) = (true, true);
    let mut looks_left = 0;
    let mut is_something_open = false;
    loop {
        let (watch, bell) = (supervisor.watch().queue(), supervisor.bell());
        let mut fds = vec![PollFd::new(reaper, PollFlags::IN), PollFd::new(&watch, PollFlags::IN), PollFd::new(&bell, PollFlags::IN)];
        if client_lives {
            fds.push(PollFd::new(client, PollFlags::IN));
            if caller_lives {
                fds.push(PollFd::new(caller, PollFlags::IN));
            }
        }
        let soon = SOON.len().checked_sub(looks_left).and_then(|index| SOON.get(index));
        // Now and then without being told, in case something was missed.
        let limit = soon.copied().or_else(|| is_something_open.then_some(5000));
        let limit = limit.map(|ms| Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 });
        // EINTR: looking once too often does no harm.
        let _ = poll(&mut fds, limit.as_ref());
        let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (no_client, was_closed, client_ended, caller_ended) = (is_ready(0), is_ready(1), is_ready(3), is_ready(4));
        if no_client {
            return;
        }
        looks_left = if was_closed { SOON.len() } else { looks_left.saturating_sub(1) };
        if was_closed {
            supervisor.watch().drain();
        }
        is_something_open = supervisor.settle();
        if client_ended {
            client_lives = false;
        } else if caller_ended {
            // Who kills the command means the program that it runs.
            caller_lives = false;
            let _ = pidfd_send_signal(client, Signal::KILL);
        }
    }
}

/// Standard input, output and error are the client's alone: whoever reads them sees their end with it.
fn let_go_of_terminal() {
    let Ok(nothing) = File::options().read(true).write(true).open("/dev/null") else { return };
    let log = std::env::var_os(LOG).and_then(|path| File::options().append(true).create(true).open(path).ok());
    // They fail only for descriptors that are not open.
    let _ = rustix::stdio::dup2_stdin(&nothing);
    let _ = rustix::stdio::dup2_stdout(&nothing);
    let _ = rustix::stdio::dup2_stderr(log.as_ref().unwrap_or(&nothing));
}

/// Tries on a client, which is still a copy of this process, what is needed to answer its calls: its memory must be read, its sockets need copies of descriptors.
/// Gives its pidfd, and whether its descriptors can be copied.
fn look_into(client: Pid) -> io::Result<(OwnedFd, bool)> {
    static SOMETHING: u8 = 42;
    let pidfd = pidfd_open(client, PidfdFlags::empty())?;
    // A copy of a program that may not be read cannot be looked into, so nothing can be tried; what it executes can.
    if dumpable_behavior() != Ok(DumpableBehavior::Dumpable) {
        return Ok((pidfd, true));
    }
    let address = u64::try_from(std::ptr::from_ref(&SOMETHING).addr()).map_err(|_| io::ErrorKind::InvalidData)?;
    sys::read_memory(client.as_raw_nonzero().get(), address, &mut [0])?;
    // It need not be open.
    let has_copies = matches!(pidfd_getfd(&pidfd, 0, PidfdGetfdFlags::empty()), Ok(_) | Err(Errno::BADF));
    Ok((pidfd, has_copies))
}

/// What EPERM and its like mean where a client's memory is read.
fn whose_fault(error: &io::Error) -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match (error.raw_os_error(), scope.trim()) {
        (Some(libc::EPERM), "2" | "3") => {
            format!("{error}: Yama forbids it (kernel.yama.ptrace_scope is {}; set it to 1, or run `nitroxide exec` as root)", scope.trim())
        }
        (Some(libc::EPERM | libc::EACCES | libc::ENOSYS), _) => format!(
            "{error}: in a container, allow process_vm_readv, process_vm_writev and ptrace in its seccomp profile; on the machine, look for a security \
             module that forbids them"
        ),
        _ => error.to_string(),
    }
}

/// The listener and the client's process, or why there is none.
fn take_listener(from: &OwnedFd) -> io::Result<(OwnedFd, Pid)> {
    let mut bytes = [0; 4];
    let mut space = [const { std::mem::MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes != bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let listener = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let number = i32::from_le_bytes(bytes);
    // Without a listener the number is the reason.
    let listener = listener.ok_or_else(|| io::Error::from_raw_os_error(number))?;
    Ok((listener, Pid::from_raw(number).ok_or(io::ErrorKind::InvalidData)?))
}

// ---------------------------------------------------------------- reaper and client

/// The process that is the parent of all clients: waits for them, and ends with the last one.
fn reap(execution: &Execution, client: &Program, there: OwnedFd, tell: &OwnedFd) -> ! {
    // Without it, daemons would get away from the supervisor; they would lose the device, and no more.
    let _ = set_child_subreaper(Some(getpid()));
    let process = match sys::fork() {
        Ok(Some(process)) => process,
        Ok(None) => become_client(execution, client, &there),
        Err(error) => {
            Message::Failed(format!("There is no process for the client: {error}")).send(tell);
            sys::exit(1);
        }
    };
    drop(there);
    sys::close_all_but(&[tell.as_fd()]);
    sys::disregard(SURVIVED);
    Message::Started(process.as_raw_nonzero().get()).send(tell);
    let_go_of_terminal();
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == process => Message::Ended(status.as_raw(), is_alone()).send(tell),
            Err(Errno::CHILD) => sys::exit(0),
            _ => {}
        }
    }
}

/// Has this process no child any more?
fn is_alone() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Err(Errno::CHILD) => return true,
            Ok(Some(_)) | Err(Errno::INTR) => {}
            _ => return false,
        }
    }
}

/// The program itself, from the filter on.
fn become_client(execution: &Execution, client: &Program, there: &OwnedFd) -> ! {
    let listener = sys::install_filter(&filter());
    let number = match &listener {
        Ok(_) => getpid().as_raw_nonzero().get(),
        Err(error) => error.raw_os_error().unwrap_or(libc::EINVAL),
    };
    let files: Vec<_> = listener.iter().map(AsFd::as_fd).collect();
    let mut space = [const { std::mem::MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let sent = sendmsg(there, &[io::IoSlice::new(&number.to_le_bytes())], &mut control, SendFlags::NOSIGNAL);
    if sent.is_err() || listener.is_err() {
        sys::exit(125);
    }
    drop(listener);
    let mut go = [0; 2];
    if rustix::io::read(there, &mut go) != Ok(2) {
        sys::exit(125);
    }
    let error = command(client, execution).env(MARK, "1").exec();
    let _ = writeln!(io::stderr(), "nitroxide: `{}` cannot be executed: {error}", client.path.display());
    sys::exit(126)
}

fn filter() -> Vec<Instruction> {
    program(&rules(&[Part::Commands, Part::Paths, Part::HugePages, Part::Sockets]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_were_sent() {
        let (from, to) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let messages = [Message::Started(4711), Message::Ended(9, true), Message::Ended(256, false), Message::Failed("é".repeat(3000))];
        for message in &messages {
            message.send(&to);
        }
        drop(to);
        let from = File::from(from);
        let [first, second, third, _] = &messages;
        assert_eq!(Message::receive(&from).as_ref(), Some(first));
        assert_eq!(Message::receive(&from).as_ref(), Some(second));
        assert_eq!(Message::receive(&from).as_ref(), Some(third));
        assert_eq!(Message::receive(&from), Some(Message::Failed("é".repeat(1000))));
        assert_eq!(Message::receive(&from), None);
    }

    #[test]
    fn wait_statuses_are_what_a_shell_says() {
        assert_eq!(
            [ended(0), ended(3 << 8), ended(9), ended(11 | 0x80)],
            [Ended::Exited(0), Ended::Exited(3), Ended::Killed(9), Ended::Killed(11)]
        );
    }
}
