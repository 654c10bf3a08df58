//! One vhost-user connection of a device: from the moment its front-end connects until everything of it is closed.
//!
//! Used by [`spawn`](crate::spawn), whose device has one front-end in its life, and by [`VsockServer`](crate::VsockServer), whose device has
//! one after the other.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::Listener;
use vhost_user_backend::{ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::device::Device;
use crate::face::{Face, HOST_EVENT};

/// A device that threads share.
///
/// The lock is held by the thread that moves data, for one bounded piece of work at a time, and by owners for a look or a new connection.
pub type SharedDevice = Arc<Mutex<Device>>;

/// The device behind its lock. A panic elsewhere does not take it away: its state is plain data.
pub fn lock(device: &SharedDevice) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connected front-end.
pub struct Service {
    device: SharedDevice,
    daemon: VhostUserDaemon<Arc<Face>>,
    shutdown: ShutdownHandle,
}

impl Service {
    /// Waits for a front-end at `listener` and serves it from then on, on threads of its own.
    ///
    /// # Errors
    ///
    /// What the system says about threads, descriptors and the connection; nothing is left then.
    pub fn accept(device: &SharedDevice, listener: &mut Listener) -> io::Result<Self> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let face = Arc::new(Face::new(Arc::clone(device), memory.clone())?);
        let mut daemon = VhostUserDaemon::new("vsock-messages".to_owned(), Arc::clone(&face), memory)
            .map_err(|error| io::Error::other(error.to_string()))?;
        for handler in daemon.get_epoll_handlers() {
            // The descriptor outlives the handler: the handler's thread ends with the daemon, and `self` has both.
            let events = lock(device).events_fd().as_raw_fd();
            handler.register_listener(events, EventSet::IN, HOST_EVENT)?;
        }
        daemon.start(listener).map_err(|error| io::Error::other(error.to_string()))?;
        let shutdown = daemon.shutdown_handle().ok_or_else(|| io::Error::other("The vhost-user thread ended at once."))?;
        Ok(Self { device: Arc::clone(device), daemon, shutdown })
    }

    /// Ends [`run`](Self::run) from any thread, also one that has ended already.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.shutdown.clone()
    }

    /// Returns when the front-end is gone (or the handle was used) and every thread and connection of it has ended.
    pub fn run(mut self) {
        if let Err(error) = self.daemon.wait() {
            tracing::debug!(%error, "The vhost-user connection ended.");
        }
        lock(&self.device).stop();
        drop(self.daemon); // ends and joins the thread that moves data
        lock(&self.device).stop(); // what it opened in the meantime
    }
}
