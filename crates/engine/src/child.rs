//! The new process between clone and exec: it confines itself, then becomes QEMU.
//!
//! [`start`] clones; the child runs [`Prepared::become_program`], which only makes system calls on values made ready before: another thread may have held
//! any lock at the clone, so nothing there may allocate, lock or panic. Parent and child talk over a socket pair until the exec closes it.
//! Neighbours: `spawn` owns the thread that calls this. Sources: clone(2), user_namespaces(7), prctl(2). Reasons: docs/engine.md, "Confinement".

#![expect(unsafe_code, reason = "between clone and exec only bare system calls are allowed")]

use std::ffi::{CString, c_char, c_int, c_long};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr;

use rustix::fs::{Mode, OFlags, RawDir};

use crate::confinement::Isolation;
use crate::root::OwnRoot;

/// The unprivileged user and group that a root launcher's VM runs as: `nobody`, which owns no files (the kernel's overflow id).
pub(crate) const NOBODY: u32 = 65534;

/// Every namespace but the user one.
const NAMESPACES: c_int = libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWPID | libc::CLONE_NEWUTS;

/// include/uapi/linux/securebits.h.
const SECBIT_NOROOT: u8 = 1;
const SECBIT_NOROOT_LOCKED: u8 = 2;

/// What the parent tells the child: the user mapping is written.
const MAPPED: u8 = b'm';
/// What the parent tells the child: it is alive, so its death will be noticed; go on.
const GO: u8 = b'g';
/// What the child tells its parent: the signal for its parent's death is set. Two bytes follow, 1 = yes: does it have
/// a file tree of its own, did it give up root?
pub(crate) const READY: u8 = b'r';
/// What the child tells its parent before it gives up; a [`Step`] and an errno follow.
pub(crate) const FAILED: u8 = b'f';

/// Where the child can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    /// Giving up root.
    DropRoot = 1,
    /// Setting its limits and signals.
    Prepare = 2,
    /// Arranging its file descriptors.
    Descriptors = 3,
    /// Becoming the program.
    Exec = 4,
}

impl Step {
    pub(crate) fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::DropRoot,
            2 => Self::Prepare,
            3 => Self::Descriptors,
            _ => Self::Exec,
        }
    }
}

/// Whether a root launcher's VM becomes [`NOBODY`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DropRoot {
    /// It stays who it is: the launcher is not root, or nobody could not open what the VM needs.
    No,
    /// Only where it sees a file tree of its own: on the host's, the folder with QEMU is closed to others (such as root's home).
    WithOwnRoot,
    /// In any case.
    Yes,
}

/// Everything the child needs, made ready before the clone.
///
/// # Invariants
///
/// `arguments` and `environment` end with a null pointer; all other pointers in them point into strings that `_strings` owns.
pub(crate) struct Prepared {
    program: CString,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    _strings: Vec<CString>,
    /// File descriptors that survive the exec under their numbers, all at least 3.
    pub keep: Vec<RawFd>,
    /// Becomes standard input and output.
    pub null: RawFd,
    /// Becomes standard error.
    pub stderr: RawFd,
    /// Whether to become [`NOBODY`].
    pub drop_root: DropRoot,
    /// The file tree to go to; none = the host's.
    pub own_root: Option<OwnRoot>,
    /// The child's end of the socket pair.
    pub child_end: RawFd,
    /// The parent's end: closed by the child, so that it sees its parent's death as an end of file.
    pub parent_end: RawFd,
}

impl Prepared {
    /// Makes a program ready to be started with these arguments (the first is its name) and this environment.
    pub(crate) fn new(program: CString, arguments: Vec<CString>, environment: Vec<CString>) -> Self {
        let pointers = |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
        let (argument_pointers, environment_pointers) = (pointers(&arguments), pointers(&environment));
        // INVARIANT: moving a CString does not move its bytes.
        let strings = arguments.into_iter().chain(environment).collect();
        Self {
            program,
            arguments: argument_pointers,
            environment: environment_pointers,
            _strings: strings,
            keep: Vec::new(),
            null: -1,
            stderr: -1,
            drop_root: DropRoot::No,
            own_root: None,
            child_end: -1,
            parent_end: -1,
        }
    }

    /// The child's whole life until it is QEMU. Only system calls from here on.
    fn become_program(&self, isolation: Isolation) -> ! {
        close(self.parent_end);
        if isolation == Isolation::Full && !self.hears(MAPPED) {
            exit();
        }
        // Root gets no capabilities by becoming another program (capabilities(7)); refused to the unprivileged, who have none.
        prctl(libc::PR_SET_SECUREBITS, u64::from(SECBIT_NOROOT | SECBIT_NOROOT_LOCKED));
        let mut has_own_root = false;
        let mut drops_root = self.drop_root == DropRoot::Yes;
        match isolation {
            Isolation::Nothing => self.drop_root_if(drops_root),
            // The new root must belong to the user who stays, and that user may not see what it is made of: so the change comes in between.
            Isolation::Full => {
                make_mounts_private();
                let collected = self.own_root.as_ref().and_then(|root| Some((root, root.collect().ok()?)));
                drops_root |= self.drop_root == DropRoot::WithOwnRoot && collected.is_some();
                self.drop_root_if(drops_root);
                has_own_root = collected.is_some_and(|(root, collected)| root.enter(&collected).is_ok());
            }
            // Without a user namespace only root may mount.
            Isolation::WithoutUser => {
                make_mounts_private();
                has_own_root =
                    self.own_root.as_ref().is_some_and(|root| root.collect().and_then(|collected| root.enter(&collected)).is_ok());
                drops_root |= self.drop_root == DropRoot::WithOwnRoot && has_own_root;
                self.drop_root_if(drops_root);
            }
        }
        // After the change of user, which would reset it.
        if !prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL.unsigned_abs().into()) || !prctl(libc::PR_SET_NO_NEW_PRIVS, 1) {
            self.fail(Step::Prepare);
        }
        // The parent may have died before the signal was set: then nobody answers. If it answers, its death comes later and is noticed.
        if !self.says(&[READY, u8::from(has_own_root), u8::from(drops_root)]) || !self.hears(GO) {
            exit();
        }
        if !prepare_process() {
            self.fail(Step::Prepare);
        }
        if !self.arrange_descriptors() {
            self.fail(Step::Descriptors);
        }
        // SAFETY: program, arguments and environment are NUL-terminated strings in null-terminated arrays (invariant of the type).
        unsafe { libc::execve(self.program.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr()) };
        self.fail(Step::Exec)
    }

    fn drop_root_if(&self, wanted: bool) {
        if wanted && !drop_root() {
            self.fail(Step::DropRoot);
        }
    }

    /// Standard streams, and nothing else but what was asked for.
    fn arrange_descriptors(&self) -> bool {
        if !(dup2(self.null, 0) && dup2(self.null, 1) && dup2(self.stderr, 2)) {
            return false;
        }
        // SAFETY: the call takes three numbers; descriptors are only marked.
        let marked =
            unsafe { libc::syscall(libc::SYS_close_range, 3 as c_long, c_long::from(u32::MAX), c_long::from(libc::CLOSE_RANGE_CLOEXEC)) };
        // Linux before 5.11 cannot.
        if marked != 0 && !mark_listed() {
            return false;
        }
        // SAFETY: clearing a flag on descriptors that the caller owns.
        self.keep.iter().all(|&descriptor| unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } == 0)
    }

    fn says(&self, bytes: &[u8]) -> bool {
        // SAFETY: the buffer is readable for its length.
        let sent = unsafe { libc::send(self.child_end, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        usize::try_from(sent) == Ok(bytes.len())
    }

    fn hears(&self, expected: u8) -> bool {
        let mut byte = 0_u8;
        // SAFETY: the buffer is one writable byte.
        let got = unsafe { libc::read(self.child_end, ptr::from_mut(&mut byte).cast(), 1) };
        got == 1 && byte == expected
    }

    fn fail(&self, step: Step) -> ! {
        // SAFETY: errno is this thread's own.
        let errno = unsafe { *libc::__errno_location() };
        let [a, b, c, d] = errno.to_ne_bytes();
        self.says(&[FAILED, step as u8, a, b, c, d]);
        exit()
    }
}

/// Clones into an isolation and lets the child run up to its first question. Gives its id and its pidfd.
///
/// The calling thread must have all signals blocked and must live as long as the process: its end kills the child.
///
/// # Errors
///
/// The errno of clone(2): the host may not allow this isolation.
pub(crate) fn start(prepared: &Prepared, isolation: Isolation) -> std::io::Result<(libc::pid_t, OwnedFd)> {
    let flags = match isolation {
        Isolation::Full => NAMESPACES | libc::CLONE_NEWUSER,
        Isolation::WithoutUser => NAMESPACES,
        Isolation::Nothing => 0,
    };
    match clone(flags)? {
        None => prepared.become_program(isolation),
        Some(child) => Ok(child),
    }
}

/// Writes the user mapping of a child in a user namespace (one user only: itself, or nobody). `proc` is where the host's processes are shown.
///
/// # Errors
///
/// Where the child is gone or the mapping is refused.
pub(crate) fn map_users(pid: libc::pid_t, prepared: &Prepared, proc: &Path) -> std::io::Result<()> {
    let folder = proc.join(pid.to_string());
    let (user, group) = if prepared.drop_root != DropRoot::No {
        (NOBODY, NOBODY)
    } else {
        // Without privileges a group can be mapped only where the groups cannot be changed any more (user_namespaces(7)).
        std::fs::write(folder.join("setgroups"), "deny")?;
        (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
    };
    for (file, id) in [("uid_map", user), ("gid_map", group)] {
        std::fs::write(folder.join(file), format!("{id} {id} 1"))?;
    }
    Ok(())
}

/// Lets a child go on whose user mapping is written.
///
/// # Errors
///
/// Where the child is gone.
pub(crate) fn tell_mapped(parent_end: BorrowedFd<'_>) -> std::io::Result<()> {
    rustix::io::write(parent_end, &[MAPPED])?;
    Ok(())
}

/// Lets a program that is started from this thread end with it: it is killed when the thread ends.
pub(crate) fn end_with_thread(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // It may have ended before the signal was set.
        if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: two system calls on numbers that were copied before; nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(prepare) };
}

/// Blocks every signal for the calling thread, so that no handler of the host program runs in a child.
pub(crate) fn block_signals() {
    let all: u64 = u64::MAX;
    // SAFETY: the kernel's signal set is 8 bytes long.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, c_long::from(libc::SIG_SETMASK), &raw const all, ptr::null::<u64>(), size_of::<u64>());
    };
}

/// Tells the child that its parent lives.
///
/// # Errors
///
/// Where the child is gone.
pub(crate) fn let_go(parent_end: BorrowedFd<'_>) -> std::io::Result<()> {
    rustix::io::write(parent_end, &[GO])?;
    Ok(())
}

/// Like fork, with a pidfd: in the child none, in the parent the child.
fn clone(flags: c_int) -> std::io::Result<Option<(libc::pid_t, OwnedFd)>> {
    let mut pidfd: c_int = -1;
    let flags = c_long::from(flags | libc::CLONE_PIDFD | libc::SIGCHLD);
    let none: c_long = 0;
    // SAFETY: without CLONE_VM the child gets a copy of everything, like after fork; a null stack keeps the current one. `pidfd` outlives the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, ptr::from_mut(&mut pidfd), none, none) };
    match libc::pid_t::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(Some((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })))
        }
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Becomes [`NOBODY`] with no other groups and so without capabilities.
fn drop_root() -> bool {
    // In a user namespace of its own the child may be refused an empty list of groups; the mapping then hides those it has.
    // SAFETY: an empty list.
    unsafe { libc::syscall(libc::SYS_setgroups, 0 as c_long, ptr::null::<libc::gid_t>()) };
    let id = c_long::from(NOBODY);
    // SAFETY: plain numbers; the bare call changes this only thread, where libc would signal others.
    let group = unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) };
    // SAFETY: as above.
    let user = unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) };
    group == 0 && user == 0
}

/// A session of its own, no core dumps, default signals, a neutral working directory.
fn prepare_process() -> bool {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `none` is a valid limit.
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) } == 0;
    // SAFETY: no arguments; fails only for a group leader, which a new child is not.
    unsafe { libc::setsid() };
    // SAFETY: a NUL-terminated constant.
    let moved = unsafe { libc::chdir(c"/".as_ptr()) } == 0;
    // SAFETY: resets a disposition; Rust programs ignore SIGPIPE, which exec would keep.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let no_signals: u64 = 0;
    // SAFETY: the kernel's signal set is 8 bytes long; the parent's thread had blocked all.
    let unblocked = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            c_long::from(libc::SIG_SETMASK),
            &raw const no_signals,
            ptr::null::<u64>(),
            size_of::<u64>(),
        )
    } == 0;
    limited && moved && unblocked
}

/// Nothing mounted here shows outside. Refused where a policy denies it; the namespace alone then has no effect, and does no harm.
fn make_mounts_private() {
    // SAFETY: a NUL-terminated path, and null where mount(2) takes none for a change of propagation.
    unsafe { libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), libc::MS_REC | libc::MS_PRIVATE, ptr::null()) };
}

/// Marks every descriptor from 3 on to be closed at exec, as /proc lists them: a process may have a few out of millions of numbers.
fn mark_listed() -> bool {
    let Ok(folder) = rustix::fs::open(c"/proc/self/fd", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return false;
    };
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(folder, &mut buffer);
    while let Some(entry) = entries.next() {
        let Ok(entry) = entry else { return false };
        // `.` and `..` are no numbers.
        let number = entry.file_name().to_bytes().iter().try_fold(0, |number: RawFd, byte| {
            let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
            number.checked_mul(10)?.checked_add(RawFd::from(digit))
        });
        if let Some(number) = number.filter(|number| *number >= 3) {
            // SAFETY: setting a flag on a descriptor of this process.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    true
}

fn prctl(option: c_int, argument: u64) -> bool {
    // SAFETY: the options used here take one number.
    unsafe { libc::prctl(option, argument, 0_u64, 0_u64, 0_u64) == 0 }
}

fn dup2(from: RawFd, to: RawFd) -> bool {
    // SAFETY: this process has one thread; the numbers are its standard streams.
    unsafe { libc::dup2(from, to) == to }
}

fn close(descriptor: RawFd) {
    // SAFETY: this process is a copy in which nobody uses the descriptor.
    unsafe { libc::close(descriptor) };
}

fn exit() -> ! {
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use rustix::io::FdFlags;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;

    #[test]
    fn every_open_descriptor_is_marked_however_high_its_number() {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
        let highest = limit.maximum.unwrap_or(1 << 20).min(1 << 20) - 1;
        let file = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: a new descriptor, which nobody else owns.
        let high = unsafe { OwnedFd::from_raw_fd(libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), libc::F_DUPFD, highest)) };
        assert_eq!(rustix::io::fcntl_getfd(&high).unwrap(), FdFlags::empty());

        assert!(mark_listed());

        assert_eq!(rustix::io::fcntl_getfd(&high).unwrap(), FdFlags::CLOEXEC);
    }

    #[test]
    fn a_program_ends_with_the_thread_that_started_it() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        end_with_thread(&mut command);
        let mut child = std::thread::spawn(move || command.spawn()).join().unwrap().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}
