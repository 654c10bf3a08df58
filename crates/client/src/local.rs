//! The local path: driver core and device in this process, one [`Home`] per device.
//!
//! A home brings what the driver core wants of its surroundings: locks ([`enclave`]), CPUs and tables ([`machine`]), memory ([`memory`]),
//! the way to the device ([`link`]), and a thread that looks at enclaves when the device has raised an event ([`watch`]).

pub(crate) mod enclave;
mod link;
pub(crate) mod machine;
pub(crate) mod memory;
mod watch;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nitroxide_abi::SlotUid;
use nitroxide_abi::limits::GRANULE;
use nitroxide_device::{Device, Faults, Launcher};
use nitroxide_world::World;

use crate::{LocalOptions, OpenError};
use enclave::Shared;
use machine::LocalMachine;
use memory::LocalMemory;
use watch::Bell;

/// What a launcher says about why it last refused something for a slot, or (`None`) to reserve one: the errno and a message.
pub(crate) type Explain = Box<dyn Fn(Option<SlotUid>) -> Option<(i32, String)> + Send + Sync>;

/// A local device with its driver. Dropping it resets the device: every enclave ends, every claim goes back.
pub(crate) struct Home {
    pub(crate) inner: Arc<Inner>,
    watcher: Option<JoinHandle<()>>,
}

/// What the enclaves, the watching thread and the home share.
pub(crate) struct Inner {
    pub(crate) device: Arc<Device>,
    pub(crate) machine: LocalMachine,
    pub(crate) memory: Arc<LocalMemory>,
    pub(crate) bell: Bell,
    /// All enclaves that are open, and closed ones that could not be freed yet.
    pub(crate) enclaves: Mutex<Enclaves>,
    /// Whether replies can be late or lost.
    pub(crate) has_faults: std::sync::atomic::AtomicBool,
    pub(crate) reply_timeout: Duration,
    pub(crate) region_bytes: u64,
    pub(crate) max_regions: u32,
    pub(crate) explain: Explain,
    /// The process that made this home. A child of it is a stranger to its enclaves, as to a driver in the kernel.
    creator: AtomicU32,
}

#[derive(Default)]
pub(crate) struct Enclaves {
    pub(crate) open: Vec<std::sync::Weak<Shared>>,
    pub(crate) leftover: Vec<Arc<Shared>>,
}

impl Home {
    /// Makes a home around a launcher that `launcher` makes from the parent's memory.
    pub(crate) fn new(
        options: &LocalOptions,
        world: World,
        memory: Arc<LocalMemory>,
        launcher: Arc<dyn Launcher>,
        explain: Explain,
    ) -> Result<Self, OpenError> {
        let topology = options.topology;
        if !topology.is_valid() {
            return Err(OpenError::Topology { cpus: topology.cpus, threads: topology.threads });
        }
        let machine = LocalMachine::new(topology, &options.pool, options.limits, world)
            .map_err(|reason| OpenError::Pool { pool: options.pool.clone(), reason })?;
        let device = Arc::new(Device::new(options.limits, options.faults.clone(), launcher));
        let inner = Arc::new(Inner {
            device,
            machine,
            memory,
            bell: Bell::new().map_err(OpenError::System)?,
            enclaves: Mutex::default(),
            has_faults: (!options.faults.is_empty()).into(),
            reply_timeout: options.reply_timeout,
            region_bytes: (options.region_bytes - options.region_bytes % GRANULE).max(GRANULE),
            max_regions: options.limits.max_regions,
            explain,
            creator: AtomicU32::new(std::process::id()),
        });
        let bell = inner.bell.clone();
        inner.device.on_event(move || bell.ring());
        let watched = Arc::clone(&inner);
        let watcher = std::thread::Builder::new().name("enclave-events".to_owned()).spawn(move || watch::run(&watched));
        Ok(Self { watcher: Some(watcher.map_err(OpenError::System)?), inner })
    }

    pub(crate) fn set_faults(&self, faults: Faults) {
        self.inner.has_faults.store(!faults.is_empty(), Ordering::SeqCst);
        self.inner.device.set_faults(faults);
    }
}

impl Inner {
    pub(crate) fn is_owner(&self) -> bool {
        self.creator.load(Ordering::Relaxed) == std::process::id()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.inner.bell.stop();
        if let Some(watcher) = self.watcher.take() {
            // It ends by itself; a panic in it was reported by the panic hook.
            let _ = watcher.join();
        }
        self.inner.device.reset();
        // The device holds nothing any more: what could not be freed before goes back now.
        for leftover in std::mem::take(&mut lock(&self.inner.enclaves).leftover) {
            leftover.device_gone(&self.inner);
        }
    }
}

impl std::fmt::Debug for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Home").field("device", &self.inner.device).finish_non_exhaustive()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
