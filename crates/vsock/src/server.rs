//! A device whose front-ends come by a path and may come again: the one of a parent VM, whose QEMU is started, killed, started again.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost::vhost_user::Listener;
use vhost_user_backend::ShutdownHandle;

use crate::config::VsockConfig;
use crate::device::{Device, Statistics};
use crate::limits;
use crate::service::{Service, SharedDevice, lock};

/// A vsock device for one front-end after the other.
///
/// While one is connected, the next waits in the queue of the listening socket. Between two there is no connection at all: every stream is
/// closed, and programs that come to [`VsockConfig::listener`] are turned away at once. Dropping it ends its threads and closes everything.
#[derive(Debug)]
pub struct VsockServer {
    device: SharedDevice,
    ending: Arc<Ending>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// How the server's thread is told to end.
struct Ending {
    wanted: AtomicBool,
    /// Readable once `wanted` is set.
    bell: OwnedFd,
    /// Whom is being served?
    current: Mutex<Option<ShutdownHandle>>,
}

impl std::fmt::Debug for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ending").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

impl VsockServer {
    /// Serves the front-ends that connect to `frontends`
    /// (QEMU: `-chardev socket,id=v,path=PATH -device vhost-user-vsock-pci,chardev=v`).
    ///
    /// Whoever may connect to the socket may be the guest, so its path belongs where only this user gets. The file stays when the server ends.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a CID that no guest can have; else what the system says about threads and descriptors.
    pub fn start(frontends: UnixListener, config: VsockConfig) -> io::Result<Self> {
        let device = Arc::new(Mutex::new(Device::new(config)?));
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ending = Arc::new(Ending { wanted: AtomicBool::new(false), bell, current: Mutex::new(None) });
        frontends.set_nonblocking(false)?;
        let events = lock(&device).events_fd().try_clone_to_owned()?;
        let serving = Serving { device: Arc::clone(&device), ending: Arc::clone(&ending), knocking: frontends.try_clone()?, events };
        let thread = std::thread::Builder::new().name("vsock-frontends".to_owned()).spawn(move || serving.run(frontends))?;
        Ok(Self { device, ending, thread: Mutex::new(Some(thread)) })
    }

    /// Connects a stream of the host to `port` of the guest, as [`VsockBackend::connect`](crate::VsockBackend::connect) does.
    ///
    /// # Errors
    ///
    /// As there; `NotConnected` also while there is no front-end.
    pub fn connect(&self, stream: UnixStream, source: (u32, u32), port: u32) -> io::Result<()> {
        lock(&self.device).connect(stream, source, port)
    }

    /// The counters now; they go on from one front-end to the next.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        lock(&self.device).statistics()
    }

    /// Ends the server: returns when its threads are gone and every connection is closed. May be called from any thread, and again.
    pub fn stop(&self) {
        self.ending.now();
        // The lock is held while waiting, so that everyone who calls returns after the end.
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It cannot panic; and if it did, it is gone all the same.
            let _ = thread.join();
        }
    }
}

impl Drop for VsockServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Ending {
    fn now(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        // The counter cannot overflow in the lifetime of a server.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        self.shut_down_current();
    }

    fn shut_down_current(&self) {
        if let Some(current) = &*self.current.lock().unwrap_or_else(PoisonError::into_inner) {
            current.shutdown();
        }
    }

    /// Notes who is being served; one that came after the end is sent away.
    fn serves(&self, current: Option<ShutdownHandle>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
        if self.wanted.load(Ordering::SeqCst) {
            self.shut_down_current();
        }
    }
}

/// What the server's thread has.
struct Serving {
    device: SharedDevice,
    ending: Arc<Ending>,
    /// The listening socket again, to look at: the other one belongs to the crate.
    knocking: UnixListener,
    /// The device's events descriptor again.
    events: OwnedFd,
}

impl Serving {
    fn run(self, frontends: UnixListener) {
        let mut listener = Listener::from(frontends);
        while self.wait_for_frontend() {
            // Nobody else accepts, and a connection that waits stays: this does not block.
            match Service::accept(&self.device, &mut listener) {
                Ok(service) => {
                    self.ending.serves(Some(service.shutdown_handle()));
                    service.run();
                    self.ending.serves(None);
                }
                Err(error) => {
                    tracing::warn!(%error, "A VM cannot be given its vsock device; trying again shortly. Raise the limits of files and threads.");
                    self.pause();
                }
            }
        }
    }

    /// `true` when a front-end is there, `false` at the end. The device is looked after meanwhile: programs are turned away.
    fn wait_for_frontend(&self) -> bool {
        loop {
            let (bell, knocking, events) = (&self.ending.bell, &self.knocking, &self.events);
            let mut polled = [PollFd::new(bell, PollFlags::IN), PollFd::new(knocking, PollFlags::IN), PollFd::new(events, PollFlags::IN)];
            // Interrupted or out of memory: look again.
            let _ = poll(&mut polled, None);
            if self.ending.wanted.load(Ordering::SeqCst) {
                return false;
            }
            let [_, knocking, device] = polled.map(|fd| !fd.revents().is_empty());
            if device {
                lock(&self.device).host_events();
            }
            if knocking {
                return true;
            }
        }
    }

    /// Waits a moment, or until the end.
    fn pause(&self) {
        let wait = Timespec::try_from(limits::ACCEPT_RETRY).ok();
        let _ = poll(&mut [PollFd::new(&self.ending.bell, PollFlags::IN)], wait.as_ref());
    }
}
