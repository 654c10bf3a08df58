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
use vhost_user_backend::ShutdownHandle;

use crate::config::VsockConfig;
use crate::device::{Device, Statistics};
use crate::service::{Service, SharedDevice, lock};

/// A running vsock device; dropping it ends its threads and closes every connection.
#[derive(Debug)]
pub struct VsockBackend {
    device: SharedDevice,
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
    let device = Arc::new(Mutex::new(Device::new(config)?));
    let (listener, frontend) = connected_pair()?;
    let service = Service::accept(&device, &mut Listener::from(listener))?;
    let shutdown = service.shutdown_handle();
    let supervisor = std::thread::Builder::new().name("vsock-end".to_owned()).spawn(move || service.run())?;
    Ok(VsockBackend { device, frontend: Mutex::new(Some(frontend)), shutdown: Shutdown(shutdown), supervisor: Some(supervisor) })
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
        lock(&self.device).connect(stream, source, port)
    }

    /// The counters now.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        lock(&self.device).statistics()
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

/// A socket that nobody can connect to any more, with one connection waiting in it, and the other end of that.
///
/// The crate accepts its connection itself, so a socket file lives for this moment in a new directory that only this user can enter; both are
/// gone before anything else is done. (`kill -9` just here leaves them behind: there is no way to bind without a name.) No abstract name: any
/// local user could reach it.
fn connected_pair() -> io::Result<(UnixListener, OwnedFd)> {
    let directory = private_directory()?;
    // Through the descriptor, the path is short enough for a socket address wherever the directory lies.
    let handle = std::fs::File::open(directory.path())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/vhost", handle.as_raw_fd()));
    let listener = UnixListener::bind(&path)?;
    let frontend = UnixStream::connect(&path)?;
    directory.close()?;
    Ok((listener, frontend.into()))
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
