// SPDX-License-Identifier: GPL-2.0
//! Nitroxide's Linux module `nitro_enclaves.ko`: the driver core at home in the kernel (docs/kernel.md).
//!
//! `pci` binds the device, `file` is what programs open, `enclave` is one enclave, `home` what all share, `parameter` the CPU pool's text;
//! `device` reaches the registers, `caller` the calling process, `cpu` the machine's CPUs, `sys` the kernel's C functions; `statistics` counts, `trace` shows
//! what happens. What a call checks and answers is
//! the crate `nitroxide_driver`, compiled unchanged.

use kernel::prelude::*;
use kernel::sync::Arc;
use nitroxide_driver::Machine;

mod caller;
mod cpu;
mod device;
mod enclave;
mod file;
mod home;
mod log;
mod parameter;
mod pci;
mod statistics;
mod sys;
mod trace;

use crate::cpu::HotplugGuard;
use crate::home::Home;
use crate::sys::OrderedQueue;

module! {
    type: NitroEnclaves,
    name: "nitro_enclaves",
    authors: ["Nitroxide"],
    description: "Nitroxide: Nitro Enclaves driver",
    license: "GPL",
}

/// What `modinfo` and `/sys/module/nitro_enclaves/version` show: this is not mainline's driver.
#[link_section = ".modinfo"]
#[used(compiler)]
static VERSION: [u8; 24] = *b"version=nitroxide-0.1.0\0";

/// What the module has while it is loaded.
struct Loaded {
    home: Arc<Home>,
    queue: Arc<OrderedQueue>,
    hotplug: HotplugGuard,
}

kernel::sync::global_lock! {
    // SAFETY: Initialised before its first use, in `NitroEnclaves::init`; `parameter` uses it only after that.
    unsafe(uninit) static LOADED: Mutex<Option<Loaded>> = None;
}

/// What all enclaves share; none before the module is initialised and while it is unloaded.
fn home() -> Option<Arc<Home>> {
    LOADED.lock().as_ref().map(|loaded| loaded.home.clone())
}

/// Where work waits.
fn queue() -> Option<Arc<OrderedQueue>> {
    LOADED.lock().as_ref().map(|loaded| loaded.queue.clone())
}

/// The module: first the driver goes, then the pool's CPUs come back.
#[pin_data]
struct NitroEnclaves {
    #[pin]
    _driver: kernel::driver::Registration<pci::Adapter>,
    _unload: Unload,
}

/// Dropped, it ends everything that does not hang on the device.
struct Unload;

impl Drop for Unload {
    fn drop(&mut self) {
        // A text that is being written is in the pool when this returns, and none comes later: its CPUs would stay offline for ever.
        let Some(loaded) = parameter::locked(|| LOADED.lock().take()) else { return };
        // Work that still waits is done before the queue ends; nobody can queue more, since no device is bound.
        drop(loaded.queue);
        // No enclave is left, so nothing is guarded any more; and what was must not stand in the way of the next line.
        drop(loaded.hotplug);
        loaded.home.with_pool(|pool, cpus| pool.clear(cpus));
    }
}

impl kernel::InPlaceModule for NitroEnclaves {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            // SAFETY: Called once, before any use.
            unsafe { LOADED.init() };
            let home = Home::new()?;
            let queue = Arc::new(OrderedQueue::new(c"nitro_enclaves")?, GFP_KERNEL)?;
            let hotplug = HotplugGuard::new()?;
            *LOADED.lock() = Some(Loaded { home: home.clone(), queue, hotplug });
            let unload = Unload;
            parameter::start(&home)?;
            Ok(try_pin_init!(Self {
                _driver <- kernel::driver::Registration::new(c"nitro_enclaves", module),
                _unload: unload,
            }? Error))
        })
    }
}
