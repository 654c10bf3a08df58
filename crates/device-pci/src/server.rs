//! The device at a socket: one QEMU after the other, each with a [`Function`] of its own.
//!
//! The protocol is crate `vfio_user`'s. Its server takes one client per call, has no way to be stopped, and panics on some malformed messages; so
//! every connection is served on a thread of its own, whose end, of whatever kind, is the end of that connection (docs/device-pci.md, "The connection").

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use displaydoc::Display;
use nitroxide_abi::pci::{BAR, MIN_VECTORS};
use nitroxide_device::Device;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

use crate::config::{CONFIG_BYTES, MSIX_BAR};
use crate::function::{Function, Space};
use crate::ram::{ParentRam, Window};
use crate::registers::BAR_BYTES;
use crate::socket::{BindError, SocketFile, listen_at};

/// What a server may be told.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServerOptions {
    /// Offer the test control (docs/device-pci.md, "Test control") and deliver late replies. Only for guests that may misuse the device.
    pub test_control: bool,
}

/// Why serving has ended.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Connections cannot be waited for.
    Wait(#[source] io::Error),
    /// The system has no thread for a connection.
    Thread(#[source] io::Error),
}

/// The device at a socket. Dropping it removes the socket's file.
#[derive(Debug)]
pub struct PciServer {
    listener: UnixListener,
    _file: SocketFile,
    options: ServerOptions,
    device: Arc<Device>,
    ram: Arc<ParentRam>,
    stop: Arc<Stop>,
}

/// Ends [`PciServer::run`] from another thread.
#[derive(Debug)]
pub struct Stop {
    told: AtomicBool,
    wake: OwnedFd,
}

impl Stop {
    /// Ends the server: the present connection is closed, every enclave is ended.
    pub fn stop(&self) {
        self.told.store(true, Ordering::SeqCst);
        // A counter that is full wakes all the same.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn is_told(&self) -> bool {
        self.told.load(Ordering::SeqCst)
    }
}

impl PciServer {
    /// Listens at `path`. A socket file that nobody listens at any more is replaced.
    ///
    /// `device` is what guests get, `ram` is told what memory they have.
    ///
    /// # Errors
    ///
    /// Each says what is in the way.
    pub fn bind(path: &Path, options: ServerOptions, device: Arc<Device>, ram: Arc<ParentRam>) -> Result<Self, BindError> {
        let failed = |error| BindError::Io(path.to_owned(), error);
        let (listener, file) = listen_at(path)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| failed(errno.into()))?;
        let stop = Arc::new(Stop { told: AtomicBool::new(false), wake });
        Ok(Self { listener, _file: file, options, device, ram, stop })
    }

    /// What ends [`run`](Self::run).
    #[must_use]
    pub fn stopper(&self) -> Arc<Stop> {
        Arc::clone(&self.stop)
    }

    /// Serves one QEMU after the other until it is told to stop. Between two of them nothing is given away.
    ///
    /// # Errors
    ///
    /// When the system fails; a client's errors cost its connection only.
    pub fn run(&self) -> Result<(), ServeError> {
        while self.wait(self.listener.as_fd())? {
            self.serve_one()?;
            self.device.reset();
            self.ram.unmap_all();
        }
        self.device.reset();
        Ok(())
    }

    /// Waits until `fd` can be read (true) or the server is to stop (false).
    fn wait(&self, fd: BorrowedFd<'_>) -> Result<bool, ServeError> {
        loop {
            if self.stop.is_told() {
                return Ok(false);
            }
            let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::from_borrowed_fd(self.stop.wake.as_fd(), PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) if self.stop.is_told() => return Ok(false),
                Ok(_) if !polled[0].revents().is_empty() => return Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(ServeError::Wait(errno.into())),
            }
        }
    }

    /// Serves the client that waits at the listener, to its end.
    fn serve_one(&self) -> Result<(), ServeError> {
        let function = Function::new(&self.device, self.options.test_control).map_err(ServeError::Thread)?;
        let listener = self.listener.try_clone().map_err(ServeError::Wait)?;
        let ram = Arc::clone(&self.ram);
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| ServeError::Wait(errno.into()))?;
        let tell = ended.try_clone().map_err(ServeError::Wait)?;
        let serve = move || {
            let _tell = TellEnd(tell);
            let mut backend = Backend { function, ram };
            let outcome = Server::from_owned_fd(listener.into(), true, interrupts(), regions()).run(&mut backend);
            match outcome {
                Ok(()) => tracing::info!("The virtual machine is gone."),
                Err(error) => tracing::warn!(%error, "The connection to the virtual machine is lost."),
            }
            // Here the backend is dropped: it ends every enclave.
        };
        let thread = std::thread::Builder::new().name("ne-vfio-user".to_owned()).spawn(serve).map_err(ServeError::Thread)?;
        if !self.wait(ended.as_fd())? {
            // The thread may be about to accept, so one look may be too early.
            while !thread.is_finished() {
                self.hang_up();
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        if thread.join().is_err() {
            tracing::error!("The connection to the virtual machine ended with a panic of the protocol's library.");
        }
        Ok(())
    }

    /// Closes the connection that the library has accepted and does not show: it is the socket of this process that bears the listener's name.
    fn hang_up(&self) {
        let Ok(ours) = rustix::net::getsockname(&self.listener) else { return };
        let Ok(process) = pidfd_open(getpid(), PidfdFlags::empty()) else { return };
        let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
        for number in entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()) {
            let Ok(copy) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else { continue };
            let is_connection = rustix::net::getsockname(&copy).is_ok_and(|name| name == ours)
                && rustix::net::sockopt::socket_acceptconn(&copy).is_ok_and(|listens| !listens);
            if is_connection {
                let _ = rustix::net::shutdown(&copy, rustix::net::Shutdown::Both);
            }
        }
    }
}

/// Says on drop, thus also after a panic, that a connection has ended.
struct TellEnd(OwnedFd);

impl Drop for TellEnd {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// The interrupts as VFIO counts them: MSI-X with two vectors, and an error index that is never used but expected by QEMU.
fn interrupts() -> Vec<IrqInfo> {
    let info = |index| match index {
        VFIO_PCI_ERR_IRQ_INDEX => IrqInfo { index, flags: VFIO_IRQ_INFO_EVENTFD, count: 1 },
        VFIO_PCI_MSIX_IRQ_INDEX => IrqInfo { index, flags: VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, count: MIN_VECTORS.into() },
        _ => IrqInfo { index, flags: 0, count: 0 },
    };
    (0..VFIO_PCI_NUM_IRQS).map(info).collect()
}

/// The regions as VFIO counts them: BARs by number, configuration space. None can be mapped, so that every access comes here.
fn regions() -> Vec<ServerRegion> {
    let region = |index| {
        let size = match space_of(index) {
            Some(Space::Config) => CONFIG_BYTES,
            Some(Space::Interrupts | Space::Registers) => BAR_BYTES,
            None => 0,
        };
        let flags = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
        let argsz = u32::try_from(size_of::<vfio_region_info>()).unwrap_or(u32::MAX);
        let region_info = vfio_region_info { argsz, flags, index, size, ..vfio_region_info::default() };
        ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

fn space_of(region: u32) -> Option<Space> {
    match region {
        VFIO_PCI_CONFIG_REGION_INDEX => Some(Space::Config),
        bar if bar == u32::from(MSIX_BAR) => Some(Space::Interrupts),
        bar if bar == u32::from(BAR) => Some(Space::Registers),
        _ => None,
    }
}

/// What the library calls. An error would be sent with errno 0, which QEMU takes for success; so there are none.
struct Backend {
    function: Function,
    ram: Arc<ParentRam>,
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), io::Error> {
        match space_of(region) {
            Some(space) => self.function.read(space, offset, data),
            None => data.fill(0),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        if let Some(space) = space_of(region) {
            self.function.write(space, offset, data);
        }
        Ok(())
    }

    fn dma_map(&mut self, flags: DmaMapFlags, offset: u64, address: u64, size: u64, fd: Option<File>) -> Result<(), io::Error> {
        self.ram.map(Window {
            iova: address,
            size,
            file_offset: offset,
            readable: flags.contains(DmaMapFlags::READ),
            writable: flags.contains(DmaMapFlags::WRITE),
            file: fd.map(OwnedFd::from),
        });
        Ok(())
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> Result<(), io::Error> {
        if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            self.ram.unmap_all();
        } else {
            self.ram.unmap(address, size);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), io::Error> {
        self.function.reset();
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> Result<(), io::Error> {
        if index == VFIO_PCI_MSIX_IRQ_INDEX {
            self.function.set_interrupts(flags, start, count, fds);
        }
        Ok(())
    }
}
