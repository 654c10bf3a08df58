//! Which device a client uses, and what a local one is like.

use std::path::PathBuf;
use std::time::Duration;

use nitroxide_abi::limits::DEVICE_TIMEOUT_MS;
use nitroxide_device::{Faults, Limits};
use nitroxide_enclave::LaunchOptions;
use nitroxide_world::World;
use serde::{Deserialize, Serialize};

/// Which device a client uses.
#[derive(Debug)]
pub enum DeviceChoice {
    /// The device file `/dev/nitro_enclaves` if there is one that opens, else a local device with these options.
    Auto(LocalOptions),
    /// This device file, usually `/dev/nitro_enclaves`.
    Host(PathBuf),
    /// A device in this process.
    Local(LocalOptions),
}

/// What a local device is like. The default is one that needs nothing from the machine: virtual CPUs, ordinary memory, no faults.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// The world whose slots, CIDs and CPUs are used; `None` is the user's own, which all local devices share.
    pub world: Option<World>,
    /// The virtual CPUs of the parent.
    pub topology: Topology,
    /// The CPU pool, as one writes it to `ne_cpus`: a CPU list without CPU 0 and its core's other threads.
    pub pool: String,
    /// What goes wrong on purpose, see `docs/device.md`.
    pub faults: Faults,
    /// How much the device gives away.
    pub limits: Limits,
    /// How long the driver waits for a reply before the call fails with ETIMEDOUT; mainline waits 120 s. Matters with [`faults`](Self::faults) only.
    pub reply_timeout: Duration,
    /// The largest piece in which memory is given to the device, in bytes, rounded down to 2 MiB (but at least that). The default is one piece per
    /// [`Memory`](crate::Memory); smaller ones make a client meet several regions.
    pub region_bytes: u64,
    /// How enclaves are run: name, engine and so on.
    pub launch: LaunchOptions,
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self {
            world: None,
            topology: Topology::default(),
            pool: "1-63".to_owned(),
            faults: Faults::none(),
            limits: Limits::default(),
            reply_timeout: Duration::from_millis(DEVICE_TIMEOUT_MS.into()),
            region_bytes: u64::MAX,
            launch: LaunchOptions::new("enclave"),
        }
    }
}

/// The virtual CPUs of a local parent. CPUs `n * threads` to `n * threads + threads - 1` are one core; all are on NUMA node 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// How many CPUs there are, 2 to 4096, a multiple of `threads`.
    pub cpus: u32,
    /// Threads of a core, 1 to 8.
    pub threads: u32,
}

impl Topology {
    /// Whether there can be such a machine.
    #[must_use]
    pub fn is_valid(self) -> bool {
        (2..=4096).contains(&self.cpus) && (1..=8).contains(&self.threads) && self.cpus.is_multiple_of(self.threads)
    }
}

impl Default for Topology {
    /// 64 CPUs with one thread per core: virtual CPUs cost nothing until they run, and any number of vCPUs up to 63 fits.
    fn default() -> Self {
        Self { cpus: 64, threads: 1 }
    }
}
