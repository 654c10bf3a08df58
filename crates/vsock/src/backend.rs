//! The device as its owner sees it: made by [`spawn`], handed to QEMU by [`VsockBackend::take_frontend`], ended by dropping it.
//!
//! Three threads per device: one moves data, and two sleep: one reads vhost-user messages (crate `vhost-user-backend` has it that way), one
//! waits for that one's end, so that QEMU's death closes every connection.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vhost::vhost_user::Listener;
use vhost_user_backend::{ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::config::VsockConfig;
use crate::device::{Device, Statistics};
use crate::face::{Face, HOST_EVENT};

/// A running vsock device; dropping it ends its threads and closes every connection.
#[derive(Debug)]
pub struct VsockBackend {
    face: Arc<Face>,
    frontend: Mutex<Option<OwnedFd>>,
    shutdown: Shutdown,
    supervisor: Option<JoinHandle<()>>,
}

/// The crate's handle, which has no `Debug` of its own.
struct Shutdown(ShutdownHandle);

impl std::fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shutdown")
    }
}

/// Starts a vsock device.
///
/// # Errors
///
/// `InvalidInput` for a CID that no guest can have; else what the system says about threads, sockets and memory.
pub fn spawn(config: VsockConfig) -> io::Result<VsockBackend> {
    let device = Device::new(config)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let face = Arc::new(Face::new(device, memory.clone())?);
    let mut daemon = VhostUserDaemon::new("vsock-messages".to_owned(), Arc::clone(&face), memory)
        .map_err(|error| io::Error::other(error.to_string()))?;
    for handler in daemon.get_epoll_handlers() {
        // The descriptor outlives the handler: the handler's thread ends with the daemon, and the face lives in both.
        let events = face.device().events_fd().as_raw_fd();
        handler.register_listener(events, EventSet::IN, HOST_EVENT)?;
    }
    let frontend = connect_pair(&mut daemon)?;
    let shutdown = daemon.shutdown_handle().ok_or_else(|| io::Error::other("The vhost-user thread ended at once."))?;
    let supervised = Arc::clone(&face);
    let supervisor = std::thread::Builder::new().name("vsock-end".to_owned()).spawn(move || {
        if let Err(error) = daemon.wait() {
            tracing::debug!(%error, "The vhost-user connection ended.");
        }
        supervised.device().stop();
        drop(daemon); // ends and joins the thread that moves data
        supervised.device().stop(); // what it opened in the meantime
    })?;
    Ok(VsockBackend { face, frontend: Mutex::new(Some(frontend)), shutdown: Shutdown(shutdown), supervisor: Some(supervisor) })
}

impl VsockBackend {
    /// Takes the connected vhost-user socket for QEMU (`-chardev socket,id=v,fd=N -device vhost-user-vsock-device,chardev=v`).
    ///
    /// `Some` once. Close it after QEMU has its copy: the device notices QEMU's death by the end of this socket.
    #[must_use]
    pub fn take_frontend(&self) -> Option<OwnedFd> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Connects a stream of the host to `port` of the guest; the guest sees `source` as its peer.
    ///
    /// `source` is (CID, port): CID 3 or 2, any but 1 and 3 towards a parent VM; port 0 takes a free one. Returns at once: the stream carries
    /// data when the guest has accepted, and is closed if it refuses or does not answer within 10 s.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a source CID that the guest may not see; `AddrInUse` for a pair of ports in use; `NotConnected` while the guest's
    /// driver does not run; `QuotaExceeded` at the limit of connections.
    pub fn connect(&self, stream: UnixStream, source: (u32, u32), port: u32) -> io::Result<()> {
        self.face.device().connect(stream, source, port)
    }

    /// The counters now.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.face.device().statistics()
    }
}

impl Drop for VsockBackend {
    fn drop(&mut self) {
        self.frontend.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.shutdown.0.shutdown();
        if let Some(supervisor) = self.supervisor.take() {
            // It cannot panic; and if it did, its threads are gone all the same.
            let _ = supervisor.join();
        }
    }
}

/// Connects the daemon to ourselves and returns the other end.
///
/// The crate can only listen or connect by a path, so a socket file lives for this moment in a new directory that only this user can enter;
/// then both are gone. No abstract name: any local user could take or reach it.
fn connect_pair(daemon: &mut VhostUserDaemon<Arc<Face>>) -> io::Result<OwnedFd> {
    let directory = private_directory()?;
    // Through the descriptor, the path is short enough for a socket address wherever the directory lies.
    let handle = std::fs::File::open(directory.path())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/vhost", handle.as_raw_fd()));
    let listening = UnixListener::bind(&path)?;
    let frontend = UnixStream::connect(&path)?;
    let mut listener = Listener::from(listening);
    daemon.start(&mut listener).map_err(|error| io::Error::other(error.to_string()))?;
    drop(listener);
    directory.close()?;
    Ok(frontend.into())
}

/// A new directory with mode 0700 in the first place that allows one.
fn private_directory() -> io::Result<tempfile::TempDir> {
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("nitroxide-vsock-");
        builder
    };
    let places = [std::env::temp_dir(), PathBuf::from("/tmp"), PathBuf::from("/dev/shm")];
    let made = places.iter().find_map(|place| builder().tempdir_in(place).ok());
    made.map_or_else(|| builder().tempdir(), Ok)
}
