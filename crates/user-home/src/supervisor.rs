//! What looks at the calls of clients: [`Supervisor`].
//!
//! One thread takes notifications and answers at once what needs nobody else ([`Supervisor::serve`]); the rest goes to [`Workers`]. Another waits for
//! the end of clients and for closed descriptors ([`crate::layout`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nitroxide_abi::ioctl;
use nitroxide_client::ServedDevice;
use nitroxide_driver::call::enclave_call_needs_lock;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, memfd_create, statat};

use crate::answer::Answer;
use crate::caller::Caller;
use crate::enclaves::Enclaves;
use crate::handed::{Identity, Watch, identity, reopen};
use crate::huge::{self, HugePages};
use crate::paths::{Around, Base, Shown, low, low_signed};
use crate::sys::{self, Notification};
use crate::vsock::{self, Sockets};
use crate::workers::Workers;

/// What clients have open as the device: a character device to which poll, lseek and mmap do what they do to the driver's, and whose own commands are none.
/// So a descriptor of it that a client has for its own sake takes the driver's commands, too; nobody sends them there.
const STAND_IN: &str = "/dev/null";

/// How long calls of clients that are gone are waited for: a start takes seconds on a busy machine.
const LAST_CALLS: Duration = Duration::from_secs(15);

/// Everything that clients of one `exec` share.
#[derive(Debug)]
pub(crate) struct Supervisor {
    listener: OwnedFd,
    enclaves: Enclaves,
    huge: HugePages,
    sockets: Sockets,
    watch: Watch,
    workers: Workers,
    /// What clients have open as the device.
    device_file: OwnedFd,
    device_identity: Identity,
}

impl Supervisor {
    /// Without copies of clients' descriptors there is no AF_VSOCK.
    ///
    /// # Errors
    ///
    /// EMFILE and the like.
    pub(crate) fn new(listener: OwnedFd, device: ServedDevice, has_copies: bool) -> io::Result<Self> {
        sys::take_turns(listener.as_fd());
        let device_file = rustix::fs::open(STAND_IN, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            listener,
            sockets: Sockets::new(device.world().clone(), has_copies)?,
            enclaves: Enclaves::new(device),
            huge: HugePages::default(),
            watch: Watch::new()?,
            workers: Workers::default(),
            device_identity: identity(device_file.as_fd())?,
            device_file,
        })
    }

    /// Tells when something was closed.
    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Rings when there is something to give back beside that.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.sockets.bell()
    }

    /// Gives back what nobody has any more; says whether something is left that could be closed.
    pub(crate) fn settle(&self) -> bool {
        self.enclaves.settle();
        self.huge.forget_closed();
        self.sockets.settle() || !self.enclaves.is_empty()
    }

    /// Gives back everything: no client is left.
    pub(crate) fn end(&self) {
        // Calls that were under way when their client was killed still have an enclave, or a socket.
        self.workers.finish(LAST_CALLS);
        self.settle();
        self.sockets.clear();
    }

    /// Answers notifications until no task is left that could make one.
    pub(crate) fn serve(self: &Arc<Self>) {
        loop {
            let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
            // EINTR: this thread gets signals that do nothing.
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let [fd] = &fds;
            if fd.revents().contains(PollFlags::IN) {
                // ENOENT and EINTR: the task was gone, or woken, before it was heard.
                if let Ok(notification) = sys::receive(self.listener.as_fd()) {
                    self.handle(notification);
                }
            } else if fd.revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
                return;
            }
        }
    }

    fn handle(self: &Arc<Self>, notification: Notification) {
        let caller = Caller::new(&self.listener, &notification);
        let [first, second, third, _, fifth, _] = notification.arguments;
        #[cfg(target_arch = "x86_64")]
        let here = Base::WorkingDirectory;
        let at = Base::from_argument(first);
        let answer = match notification.call {
            libc::SYS_ioctl => return self.command(notification),
            libc::SYS_mmap => {
                return self.later(notification, |this, caller, call| this.huge.map(caller, call, |pages| this.enclaves.renew(&pages)));
            }
            libc::SYS_fstatfs => return self.later(notification, |this, caller, call| this.huge.file_system(caller, call)),
            libc::SYS_socket => self.sockets.create(&notification),
            libc::SYS_bind => return self.later(notification, |this, caller, call| this.sockets.bind(caller, call)),
            libc::SYS_connect => return self.later(notification, |this, caller, call| this.sockets.connect(caller, call)),
            libc::SYS_accept | libc::SYS_accept4 => {
                return self.later(notification, |this, caller, call| this.sockets.accept(caller, call));
            }
            libc::SYS_getsockname | libc::SYS_getpeername => self.sockets.name_of(&caller, &notification),
            libc::SYS_shutdown => self.sockets.shutdown(&caller, &notification),
            libc::SYS_getsockopt => self.sockets.option(&caller, &notification),
            libc::SYS_setsockopt => self.sockets.set_option(&caller, &notification),
            libc::SYS_memfd_create => self.huge.memory_file(&caller, &self.watch, &notification),
            libc::SYS_openat => self.open(&caller, at, second, third),
            libc::SYS_openat2 => self.open2(&caller, at, second, third),
            libc::SYS_faccessat | libc::SYS_faccessat2 => access(&caller, at, second, third),
            libc::SYS_readlinkat => constant(&caller, at, second, Answer::Error(libc::EINVAL)),
            libc::SYS_getxattr | libc::SYS_lgetxattr => constant(&caller, Base::WorkingDirectory, first, Answer::Error(libc::ENODATA)),
            libc::SYS_listxattr | libc::SYS_llistxattr => constant(&caller, Base::WorkingDirectory, first, Answer::Value(0)),
            libc::SYS_newfstatat => stat(&caller, at, second, third),
            libc::SYS_statx => statx(&caller, at, second, fifth),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => self.open(&caller, here, first, second),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_creat => self.open(&caller, here, first, u64::from((libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC).cast_unsigned())),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_stat | libc::SYS_lstat => stat(&caller, here, first, second),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_readlink => constant(&caller, here, first, Answer::Error(libc::EINVAL)),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_access => access(&caller, here, first, second),
            _ => Answer::GoesOn,
        };
        self.finish(&notification, answer);
    }

    /// Has a call handled by a thread that may wait.
    fn later(
        self: &Arc<Self>,
        notification: Notification,
        handle: impl FnOnce(&Self, &Caller<'_>, &Notification) -> Answer + Send + 'static,
    ) {
        let this = Arc::clone(self);
        self.workers.hand(move || {
            let answer = handle(&this, &Caller::new(&this.listener, &notification), &notification);
            this.finish(&notification, answer);
        });
    }

    /// Ends a call. What cannot be told to anybody is taken back by being dropped.
    fn finish(&self, notification: &Notification, answer: Answer) {
        let (listener, id) = (self.listener.as_fd(), notification.id);
        // The caller runs on before this thread does; until then our copy of the descriptor is one that is not closed.
        let handing = matches!(answer, Answer::Handed(..)).then(|| self.enclaves.handing());
        let result = match &answer {
            Answer::GoesOn => sys::answer(listener, id, Ok(0), true),
            Answer::Value(value) => sys::answer(listener, id, Ok(*value), false),
            Answer::Error(errno) => sys::answer(listener, id, Err(*errno), false),
            Answer::Descriptor(file, close_on_exec) => sys::answer_with(listener, id, file.as_fd(), *close_on_exec),
            Answer::Handed(handed, close_on_exec) => sys::answer_with(listener, id, handed.description(), *close_on_exec),
            Answer::Done => Ok(()),
        };
        if let Err(error) = result
            && matches!(answer, Answer::Descriptor(..) | Answer::Handed(..))
        {
            // EMFILE, or the task is gone and does not hear it.
            let _ = sys::answer(listener, id, Err(error.raw_os_error().unwrap_or(libc::EMFILE)), false);
        }
        drop(answer);
        drop(handing);
    }

    fn open(&self, caller: &Caller<'_>, base: Base, path: u64, flags: u64) -> Answer {
        match Shown::of(caller, base, path) {
            Some(shown) => self.open_shown(shown, flags),
            None => Answer::GoesOn,
        }
    }

    /// openat2, whose flags are in a struct.
    fn open2(&self, caller: &Caller<'_>, base: Base, path: u64, how: u64) -> Answer {
        let Some(shown) = Shown::of(caller, base, path) else { return Answer::GoesOn };
        let mut flags = [0; 8];
        match caller.read(how, &mut flags) {
            Ok(()) => self.open_shown(shown, u64::from_le_bytes(flags)),
            Err(code) => Answer::Error(code.number()),
        }
    }

    fn open_shown(&self, shown: Shown, flags: u64) -> Answer {
        if let Err(errno) = shown.may_open(flags) {
            return Answer::Error(errno);
        }
        let kept = [OFlags::ACCMODE, OFlags::NONBLOCK, OFlags::PATH].into_iter().fold(OFlags::empty(), OFlags::union);
        let wanted = OFlags::from_bits_retain(low(flags)) & kept;
        // Each open has a description of its own.
        let opened = match shown {
            Shown::Device | Shown::Vsock => reopen(self.device_file.as_fd(), wanted),
            shown => {
                sealed_file("nitroxide", &self.content(shown), Mode::from_raw_mode(0o444)).and_then(|file| reopen(file.as_fd(), wanted))
            }
        };
        match opened {
            Ok(file) => Answer::Descriptor(file, low_signed(flags) & libc::O_CLOEXEC != 0),
            Err(error) => error.into(),
        }
    }

    /// What is read from a file.
    fn content(&self, shown: Shown) -> Vec<u8> {
        match shown {
            Shown::Device | Shown::Vsock => Vec::new(),
            Shown::Pool => self.enclaves.device().pool_text(),
            Shown::AssetTag => format!("{}\n", self.enclaves.device().instance_id()).into_bytes(),
            Shown::FreePages | Shown::AllPages => format!("{}\n", huge::pages()).into_bytes(),
        }
    }

    /// ioctl with a word of the driver's.
    fn command(self: &Arc<Self>, notification: Notification) {
        let caller = Caller::new(&self.listener, &notification);
        let [descriptor, word, argument, ..] = notification.arguments;
        let word = low(word);
        let Some(file) = file_behind(&caller, low_signed(descriptor)) else { return self.finish(&notification, Answer::GoesOn) };
        if file == self.device_identity {
            if word == vsock::GET_LOCAL_CID {
                return self.finish(&notification, caller.write(argument, &vsock::PARENT.to_le_bytes()).into());
            }
            if word == ioctl::CREATE_VM {
                return self.later(notification, move |this, caller, _| this.enclaves.create(caller, &this.huge, &this.watch, argument));
            }
            return self.finish(&notification, self.enclaves.device_call(&caller, &self.huge, word, argument));
        }
        let Some(open) = self.enclaves.get(file) else { return self.finish(&notification, Answer::GoesOn) };
        if enclave_call_needs_lock(word) {
            self.later(notification, move |this, caller, _| {
                if word == ioctl::START_ENCLAVE {
                    open.set_heartbeat(this.enclaves.device(), &this.sockets);
                }
                this.enclaves.enclave_call(&open, caller, &this.huge, word, argument)
            });
        } else {
            let answer = self.enclaves.enclave_call(&open, &caller, &self.huge, word, argument);
            // Before the answer, after which the caller may close it, and that may be the end of it.
            drop(open);
            self.finish(&notification, answer);
        }
    }
}

/// The file that a caller's descriptor refers to, if it can be used for ioctl.
///
/// It is looked at without being opened: a copy of the descriptor here would put off its last close.
fn file_behind(caller: &Caller<'_>, descriptor: i32) -> Option<Identity> {
    let link = format!("/proc/{}/fd/{descriptor}", caller.thread);
    let stat = statat(CWD, &link, AtFlags::empty()).ok()?;
    // Of a descriptor opened with O_PATH the link can neither be read nor written.
    let is_usable = statat(CWD, &link, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|link| link.st_mode & 0o600 != 0);
    (is_usable && caller.is_waiting()).then_some((stat.st_dev, stat.st_ino))
}

/// What is answered of any of our files: they are no links, and have no extended attributes.
fn constant(caller: &Caller<'_>, base: Base, path: u64, answer: Answer) -> Answer {
    if Shown::of(caller, base, path).is_some() { answer } else { Answer::GoesOn }
}

fn access(caller: &Caller<'_>, base: Base, path: u64, mode: u64) -> Answer {
    match Shown::of(caller, base, path) {
        None => Answer::GoesOn,
        Some(shown) => shown.access(low(mode)).map_or_else(Answer::Error, |()| Answer::Value(0)),
    }
}

fn stat(caller: &Caller<'_>, base: Base, path: u64, to: u64) -> Answer {
    match Shown::of(caller, base, path) {
        None => Answer::GoesOn,
        Some(shown) => caller.write(to, &shown.stat(&around(shown))).into(),
    }
}

fn statx(caller: &Caller<'_>, base: Base, path: u64, to: u64) -> Answer {
    match Shown::of(caller, base, path) {
        None => Answer::GoesOn,
        Some(shown) => caller.write(to, &shown.statx(&around(shown))).into(),
    }
}

fn around(shown: Shown) -> Around {
    rustix::fs::stat(shown.directory()).map_or_else(|_| Around::default(), |stat| Around { device: stat.st_dev, seconds: stat.st_mtime })
}

/// A memory file with this content, which nobody can change.
fn sealed_file(name: &str, content: &[u8], mode: Mode) -> io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fchmod(&file, mode)?;
    rustix::io::write(&file, content)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}
