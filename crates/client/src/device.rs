//! A device as a client sees it: one interface over the real device file and over a local device.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nitroxide_abi::limits::GRANULE;
use nitroxide_abi::{Cid, CpuId, SlotUid, flags};
use nitroxide_device::{Faults, Launcher};
use nitroxide_enclave::{ParentMemory, ProcessLauncher};
use nitroxide_world::World;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::image::write_image;
use crate::local::memory::LocalMemory;
use crate::local::{Explain, Home};
use crate::{
    AddMemoryError, AddVcpuError, AllocateError, CreateError, DeviceChoice, ImageLoadInfoError, LocalOptions, OpenError, StartError,
    WriteImageError, host, local,
};

/// What kind of device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A device file of this machine, with whatever driver is behind it.
    Host,
    /// Driver and device in this process.
    Local,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Local => "local",
        })
    }
}

/// A Nitro Enclaves device.
///
/// It can be used from several threads. A local device lives until it and all its enclaves are dropped; then everything that it has
/// started is gone.
#[derive(Debug)]
pub struct Device {
    path: Kind,
}

#[derive(Debug)]
enum Kind {
    Host(host::Device),
    Local(LocalDevice),
}

struct LocalDevice {
    home: Arc<Home>,
    launcher: Option<Arc<ProcessLauncher>>,
}

impl fmt::Debug for LocalDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.home.fmt(f)
    }
}

impl Device {
    /// Opens the device that was chosen.
    ///
    /// # Errors
    ///
    /// Each says what is missing and what to do. `Auto` fails only if a local device cannot be had either.
    pub fn open(choice: DeviceChoice) -> Result<Self, OpenError> {
        match choice {
            DeviceChoice::Host(path) => Ok(Self { path: Kind::Host(host::Device::open(&path)?) }),
            DeviceChoice::Local(options) => Self::open_local(&options),
            DeviceChoice::Auto(options) => match host::Device::open(Path::new(host::DEVICE_FILE)) {
                Ok(device) => Ok(Self { path: Kind::Host(device) }),
                Err(OpenError::NoDeviceFile(_)) => Self::open_local(&options),
                Err(error) => {
                    tracing::warn!(%error, "the machine's device cannot be used; a local one is used instead");
                    Self::open_local(&options)
                }
            },
        }
    }

    fn open_local(options: &LocalOptions) -> Result<Self, OpenError> {
        let (home, launcher) = open_local(options)?;
        Ok(Self { path: Kind::Local(LocalDevice { home: Arc::new(home), launcher: Some(launcher) }) })
    }

    /// A local device that starts its enclaves through another launcher than the usual one; for tests, and for other homes of enclaves.
    ///
    /// `make_launcher` gets the parent's memory, in which the launcher finds what SLOT_ADD_MEM names. `options.launch` is not used.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn local_with(
        options: &LocalOptions,
        make_launcher: impl FnOnce(Arc<LocalMemory>) -> Arc<dyn Launcher>,
    ) -> Result<Self, OpenError> {
        let home = local_with(options, make_launcher)?;
        Ok(Self { path: Kind::Local(LocalDevice { home: Arc::new(home), launcher: None }) })
    }

    /// What kind of device it is.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        match &self.path {
            Kind::Host(_) => DeviceKind::Host,
            Kind::Local(_) => DeviceKind::Local,
        }
    }

    /// The device file, for a host device.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.path {
            Kind::Host(device) => Some(device.path()),
            Kind::Local(_) => None,
        }
    }

    /// What starts the enclaves of a local device: it knows their records and why a start was refused.
    #[must_use]
    pub fn launcher(&self) -> Option<&Arc<ProcessLauncher>> {
        match &self.path {
            Kind::Host(_) => None,
            Kind::Local(local) => local.launcher.as_ref(),
        }
    }

    /// Replaces the fault rules of a local device; `false` for a host device, which has none.
    pub fn set_faults(&self, faults: Faults) -> bool {
        match &self.path {
            Kind::Host(_) => false,
            Kind::Local(local) => {
                local.home.set_faults(faults);
                true
            }
        }
    }

    /// What a local device has given away at the moment.
    #[must_use]
    pub fn usage(&self) -> Option<nitroxide_device::Usage> {
        match &self.path {
            Kind::Host(_) => None,
            Kind::Local(local) => Some(local.home.inner.device.usage()),
        }
    }

    /// Gets memory that can be filled and then given to an enclave of this device.
    ///
    /// `bytes` is a multiple of 2 MiB above zero. A host device needs free huge pages; it takes the largest first, and may take more than asked
    /// for if only large ones are left ([`Memory::size`]). The memory is zero.
    ///
    /// # Errors
    ///
    /// [`AllocateError`] says how much is missing.
    pub fn allocate_memory(&self, bytes: u64) -> Result<Memory, AllocateError> {
        if bytes == 0 {
            return Err(AllocateError::Empty);
        }
        if !bytes.is_multiple_of(GRANULE) {
            return Err(AllocateError::NotMultiple(bytes));
        }
        let place = match &self.path {
            Kind::Host(_) => Place::Host(host::Memory::allocate(bytes)?),
            Kind::Local(local) => {
                let inner = &local.home.inner;
                let memory = local::memory::Memory::allocate(&inner.memory, bytes, inner.region_bytes);
                Place::Local(memory.map_err(AllocateError::System)?)
            }
        };
        Ok(Memory { place })
    }

    /// Creates an enclave: NE_CREATE_VM.
    ///
    /// # Errors
    ///
    /// Code 272 if no core of the CPU pool is free; others as the device gives them.
    pub fn create_enclave(&self) -> Result<Enclave, CreateError> {
        let path = match &self.path {
            Kind::Host(device) => EnclaveKind::Host(device.create_enclave()?),
            Kind::Local(local) => EnclaveKind::Local(local::enclave::Enclave::create(&local.home)?),
        };
        Ok(Enclave { path })
    }
}

/// A home with the usual launcher.
pub(crate) fn open_local(options: &LocalOptions) -> Result<(Home, Arc<ProcessLauncher>), OpenError> {
    let world = world_of(options)?;
    let memory = Arc::new(LocalMemory::default());
    let parent = Arc::clone(&memory) as Arc<dyn ParentMemory>;
    let launcher = Arc::new(ProcessLauncher::new(world.clone(), parent, options.launch.clone()));
    let knows = Arc::clone(&launcher);
    let explain: Explain = Box::new(move |slot_uid| {
        let refusal = slot_uid.map_or_else(|| knows.reservation_refusal(), |slot_uid| knows.refusal(slot_uid.0))?;
        Some((refusal.errno, refusal.message))
    });
    let home = Home::new(options, world, memory, Arc::clone(&launcher) as Arc<dyn Launcher>, explain)?;
    Ok((home, launcher))
}

/// A home with another launcher.
pub(crate) fn local_with(
    options: &LocalOptions,
    make_launcher: impl FnOnce(Arc<LocalMemory>) -> Arc<dyn Launcher>,
) -> Result<Home, OpenError> {
    let world = world_of(options)?;
    let memory = Arc::new(LocalMemory::default());
    let launcher = make_launcher(Arc::clone(&memory));
    Home::new(options, world, memory, launcher, Box::new(|_| None))
}

pub(crate) fn world_of(options: &LocalOptions) -> Result<World, OpenError> {
    match &options.world {
        Some(world) => Ok(world.clone()),
        None => Ok(World::open_default()?),
    }
}

/// Memory that can be given to an enclave. Until then its content can be written; what the enclave sees is the content at that moment.
#[derive(Debug)]
pub struct Memory {
    place: Place,
}

#[derive(Debug)]
enum Place {
    Host(host::Memory),
    Local(local::memory::Memory),
}

impl Memory {
    /// Bytes, at least what was asked for.
    #[must_use]
    pub fn size(&self) -> u64 {
        match &self.place {
            Place::Host(memory) => memory.size(),
            Place::Local(memory) => memory.size(),
        }
    }

    /// Writes at an offset from the enclave's first byte.
    ///
    /// # Errors
    ///
    /// If the memory ends before `bytes` do, or the system has none left.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match &mut self.place {
            Place::Host(memory) => memory.write_at(offset, bytes),
            Place::Local(memory) => memory.write_at(offset, bytes),
        }
    }

    /// Reads `image_bytes` bytes and puts them where the driver wants an image: at 8 MiB.
    ///
    /// The image is not looked at, and never held in memory as a whole.
    ///
    /// # Errors
    ///
    /// [`WriteImageError`], which says how much memory would suffice if it is too little.
    pub fn write_image(&mut self, image: &mut impl io::Read, image_bytes: u64) -> Result<(), WriteImageError> {
        write_image(image, image_bytes, self.size(), |offset, bytes| self.write_at(offset, bytes))
    }
}

/// An enclave. Dropping it ends it: it is stopped and freed, and its memory and vCPUs go back.
#[derive(Debug)]
pub struct Enclave {
    path: EnclaveKind,
}

#[derive(Debug)]
enum EnclaveKind {
    Host(host::Enclave),
    Local(local::enclave::Enclave),
}

impl Enclave {
    /// The slot's number, from which the enclave's id is made. Never zero.
    #[must_use]
    pub fn slot_uid(&self) -> SlotUid {
        match &self.path {
            EnclaveKind::Host(enclave) => enclave.slot_uid(),
            EnclaveKind::Local(enclave) => enclave.slot_uid(),
        }
    }

    /// Where in the enclave's memory an image belongs, in bytes: NE_GET_IMAGE_LOAD_INFO. [`Memory::write_image`] uses the only value there is.
    ///
    /// # Errors
    ///
    /// Code 270 after the start.
    pub fn image_load_info(&mut self) -> Result<u64, ImageLoadInfoError> {
        self.image_load_info_with(flags::EIF_IMAGE)
    }

    /// As [`image_load_info`](Self::image_load_info), with flags of any value; for programs that test drivers.
    ///
    /// # Errors
    ///
    /// Code 274 for flags that mean nothing.
    pub fn image_load_info_with(&mut self, flags: u64) -> Result<u64, ImageLoadInfoError> {
        let offset = match &mut self.path {
            EnclaveKind::Host(enclave) => enclave.image_load_info(flags),
            EnclaveKind::Local(enclave) => enclave.image_load_info(flags),
        };
        offset.map_err(ImageLoadInfoError::Refused)
    }

    /// Gives memory to the enclave: NE_SET_USER_MEMORY_REGION for each of its regions. Its content is taken now.
    ///
    /// Several calls add up; the enclave's memory is in the order of the calls.
    ///
    /// # Errors
    ///
    /// 265 if the device takes no more regions, 270 after the start, others as the driver gives them. The memory is gone in any case: what the
    /// driver has accepted before the error stays with the enclave.
    pub fn add_memory(&mut self, memory: Memory) -> Result<(), AddMemoryError> {
        let added = match (&mut self.path, memory.place) {
            (EnclaveKind::Host(enclave), Place::Host(memory)) => enclave.add_memory(memory),
            (EnclaveKind::Local(enclave), Place::Local(memory)) if memory.belongs_to(&enclave.home().inner.memory) => {
                enclave.add_memory(memory)
            }
            _ => return Err(AddMemoryError::OtherDevice),
        };
        added.map_err(AddMemoryError::Refused)
    }

    /// Adds a vCPU and says which CPU it is: NE_ADD_VCPU. `None` leaves the choice to the driver.
    ///
    /// # Errors
    ///
    /// 256 added before, 257 not in the pool or another enclave's, 271 no such CPU, 272 none left, 270 after the start.
    pub fn add_vcpu(&mut self, cpu: Option<CpuId>) -> Result<CpuId, AddVcpuError> {
        let wanted = cpu.unwrap_or(CpuId::ANY);
        let added = match &mut self.path {
            EnclaveKind::Host(enclave) => enclave.add_vcpu(wanted),
            EnclaveKind::Local(enclave) => enclave.add_vcpu(wanted),
        };
        added.map_err(AddVcpuError::Refused)
    }

    /// Starts the enclave and says which CID it has: NE_START_ENCLAVE. `None` leaves the choice to the device.
    ///
    /// # Errors
    ///
    /// 266 to 269 if something is missing, 270 started before, 275 no CID for an enclave, EADDRINUSE a CID in use, EINVAL an image that does not
    /// verify. The enclave can be started again, but for 270.
    pub fn start(&mut self, cid: Option<Cid>, debug: bool) -> Result<Cid, StartError> {
        let flags = if debug { flags::ENCLAVE_DEBUG_MODE } else { flags::ENCLAVE_PRODUCTION_MODE };
        self.start_with(flags, cid.unwrap_or(Cid::ANY).0.into())
    }

    /// As [`start`](Self::start), with flags and CID of any value; for programs that test drivers.
    ///
    /// # Errors
    ///
    /// 274 for flags that mean nothing, and those of [`start`](Self::start).
    pub fn start_with(&mut self, flags: u64, enclave_cid: u64) -> Result<Cid, StartError> {
        let cid = match &mut self.path {
            EnclaveKind::Host(enclave) => enclave.start(flags, enclave_cid),
            EnclaveKind::Local(enclave) => enclave.start(flags, enclave_cid),
        };
        cid.map_err(StartError::Refused)
    }

    /// A descriptor that reports POLLHUP, and nothing else, when the enclave has ended. It is for poll, not for reading.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        match &self.path {
            EnclaveKind::Host(enclave) => enclave.poll_fd(),
            EnclaveKind::Local(enclave) => enclave.poll_fd(),
        }
    }

    /// Whether the enclave has ended by itself.
    ///
    /// # Errors
    ///
    /// If poll fails.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Waits until the enclave has ended by itself. One that was never started never ends.
    ///
    /// # Errors
    ///
    /// If poll fails.
    pub fn wait(&self) -> io::Result<()> {
        while !self.poll(None)? {}
        Ok(())
    }

    /// Waits until the enclave has ended by itself, but no longer than `limit`; says whether it has.
    ///
    /// # Errors
    ///
    /// If poll fails.
    pub fn wait_timeout(&self, limit: Duration) -> io::Result<bool> {
        let begin = Instant::now();
        loop {
            let left = limit.saturating_sub(begin.elapsed());
            if self.poll(Some(left))? {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
        }
    }

    fn poll(&self, limit: Option<Duration>) -> io::Result<bool> {
        let fd = self.poll_fd();
        // A limit beyond what a timespec holds is no limit.
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = [PollFd::new(&fd, PollFlags::empty())];
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => Ok(fds[0].revents().contains(PollFlags::HUP)),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What the driver of a local device knows about the enclave.
    #[must_use]
    pub fn summary(&self) -> Option<nitroxide_driver::Summary> {
        match &self.path {
            EnclaveKind::Host(_) => None,
            EnclaveKind::Local(enclave) => Some(enclave.summary()),
        }
    }

    /// Ends the enclave, as dropping it does.
    pub fn close(self) {
        drop(self);
    }
}
