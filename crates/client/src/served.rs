//! A local device whose calls other programs make: what a home for unmodified clients needs of it ([`ServedDevice`], [`ServedEnclave`]).
//!
//! It is the very device that [`Device`](crate::Device) is, reached by ioctl words and a [`Client`] instead of by methods. Whoever serves it brings the
//! descriptors, the memory of its clients, and who made which enclave; locks, CPUs, events, and what is left of closed enclaves are here.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nitroxide_abi::{Code, SlotUid};
use nitroxide_device::{Faults, Launcher};
use nitroxide_driver::extension::Home as Facts;
use nitroxide_driver::{Client, Machine, Summary, call};
use nitroxide_enclave::{ProcessLauncher, SlotDetails};
use nitroxide_world::{InstanceId, World};

use crate::device::{open_local, world_of};
use crate::local::memory::{DonatedPages, LocalMemory, Memory};
use crate::local::{Home, enclave::Enclave};
use crate::{CreateError, LocalOptions, OpenError};

/// A local device that other programs use. Once it and its enclaves are dropped, everything that it has started is gone.
#[derive(Debug, Clone)]
pub struct ServedDevice {
    home: Arc<Home>,
    world: World,
    /// None where another launcher was given.
    launcher: Option<Arc<ProcessLauncher>>,
    instance_id: InstanceId,
}

impl ServedDevice {
    /// Opens a device of its own.
    ///
    /// # Errors
    ///
    /// As [`Device::open`](crate::Device::open).
    pub fn open(options: &LocalOptions) -> Result<Self, OpenError> {
        let (home, launcher) = open_local(options)?;
        let instance_id = options.launch.parent_identity.instance_id.clone();
        Ok(Self { home: Arc::new(home), world: launcher.world().clone(), launcher: Some(launcher), instance_id })
    }

    /// As [`Device::local_with`](crate::Device::local_with).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn with(options: &LocalOptions, make_launcher: impl FnOnce(Arc<LocalMemory>) -> Arc<dyn Launcher>) -> Result<Self, OpenError> {
        let world = world_of(options)?;
        let options = LocalOptions { world: Some(world.clone()), ..options.clone() };
        let home = Arc::new(crate::device::local_with(&options, make_launcher)?);
        Ok(Self { home, world, launcher: None, instance_id: options.launch.parent_identity.instance_id })
    }

    /// The first half of NE_CREATE_VM: an enclave that nobody can see yet. The second half is [`call::create_vm`]; if that fails, drop it.
    ///
    /// # Errors
    ///
    /// 272, the device's code, EMFILE and the like.
    pub fn create(&self) -> Result<ServedEnclave, Code> {
        let enclave = Enclave::create(&self.home).map_err(|error| match error {
            CreateError::Refused(refused) => refused.code(),
            CreateError::NoSlotUid => Code::EIO,
            CreateError::System(error) => error.raw_os_error().and_then(Code::new).unwrap_or(Code::ENOMEM),
        })?;
        Ok(ServedEnclave { enclave })
    }

    /// What goes wrong on purpose from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.home.set_faults(faults);
    }

    /// The device behind it, for tests that make it do what devices do by themselves.
    #[must_use]
    pub fn device(&self) -> &nitroxide_device::Device {
        &self.home.inner.device
    }

    /// The world of its enclaves.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Decides which process's listener gets the heartbeat of an enclave that is not started yet; this one's unless it was said.
    pub fn set_heartbeat(&self, slot_uid: SlotUid, process: u32) {
        if let Some(launcher) = &self.launcher {
            let details = SlotDetails { creator_pid: process, ..launcher.details(slot_uid.0) };
            launcher.set_details(slot_uid.0, details);
        }
    }

    /// A command on `/dev/nitro_enclaves` that needs nothing but the machine: [`call::device_call`].
    ///
    /// # Errors
    ///
    /// The code that the caller gets.
    pub fn call(&self, client: &mut impl Client, facts: &Facts, word: u32, argument: u64) -> Result<u32, Code> {
        call::device_call(&self.home.inner.machine, client, facts, word, argument)
    }

    /// What reading `ne_cpus` gives.
    #[must_use]
    pub fn pool_text(&self) -> Vec<u8> {
        self.home.inner.machine.with_pool(|pool, _| {
            let (text, end) = pool.read();
            [text, end].concat()
        })
    }

    /// The parent's instance id, which its enclaves attest.
    #[must_use]
    pub fn instance_id(&self) -> &InstanceId {
        &self.instance_id
    }

    /// Memory for copies of a client's, all zero.
    ///
    /// # Errors
    ///
    /// ENOMEM, EMFILE.
    pub fn memory(&self, bytes: u64) -> io::Result<ServedMemory> {
        Memory::allocate(&self.home.inner.memory, bytes, u64::MAX).map(ServedMemory)
    }
}

/// Memory that is filled, and then the pages of a region ([`DonatedPages::donate`]). Dropped, it is gone.
#[derive(Debug)]
pub struct ServedMemory(pub(crate) Memory);

impl ServedMemory {
    /// Writes at an offset.
    ///
    /// # Errors
    ///
    /// Beyond its end, or if there is no memory.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, bytes)
    }
}

/// An enclave of a [`ServedDevice`]. Dropping it is the last close: it is stopped and freed, or kept and tried again if the device refuses.
#[derive(Debug)]
pub struct ServedEnclave {
    enclave: Enclave,
}

impl ServedEnclave {
    /// Its slot.
    #[must_use]
    pub fn slot_uid(&self) -> SlotUid {
        self.enclave.slot_uid()
    }

    /// What there is to see of it, without waiting for a call that is under way.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.enclave.seen()
    }

    /// The read end of a pipe that reports POLLHUP once it has ended, and nothing before.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.enclave.poll_fd()
    }

    /// One command on its descriptor. Waits for other commands on it, unless it is one that only looks.
    ///
    /// # Errors
    ///
    /// The code that the caller gets.
    pub fn call(&self, client: &mut impl Client<Pages = DonatedPages>, facts: &Facts, word: u32, argument: u64) -> Result<u32, Code> {
        self.enclave.call(client, facts, word, argument)
    }
}
