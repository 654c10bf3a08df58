// SPDX-License-Identifier: GPL-2.0
//! The machine's CPUs: what is known of them, hotplug, and which of them enclaves have ([`KernelCpus`], [`HotplugGuard`]).
//!
//! The pool's lock is held while CPUs come and go, so nothing that hotplug calls back may ask the pool: it looks at [`GIVEN`].

use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use nitroxide_abi::{Code, CpuId};
use nitroxide_driver::Cpus;

use crate::{log, statistics, sys};

/// Bits of one word of [`GIVEN`].
const BITS: usize = 64;

/// CPUs that enclaves have, one bit each. Written with the pool locked only, so that load and store are enough.
static GIVEN: [Atomic<u64>; (bindings::NR_CPUS as usize).div_ceil(BITS)] =
    [const { Atomic::new(0) }; (bindings::NR_CPUS as usize).div_ceil(BITS)];

/// The word of a CPU, and its bit there.
fn place(cpu: CpuId) -> Option<(&'static Atomic<u64>, u64)> {
    let number = usize::try_from(cpu.0).ok()?;
    Some((GIVEN.get(number / BITS)?, 1 << (number % BITS)))
}

fn set_given(cpu: CpuId, given: bool) {
    if let Some((word, bit)) = place(cpu) {
        let others = word.load(Relaxed) & !bit;
        word.store(if given { others | bit } else { others }, Relaxed);
    }
}

fn is_given(cpu: CpuId) -> bool {
    place(cpu).is_some_and(|(word, bit)| word.load(Relaxed) & bit != 0)
}

/// The machine's CPUs, guarded by the pool's lock.
pub(crate) struct KernelCpus;

impl Cpus for KernelCpus {
    fn count(&self) -> u32 {
        kernel::cpu::nr_cpu_ids()
    }

    fn is_online(&self, cpu: CpuId) -> bool {
        sys::cpu_online(cpu)
    }

    fn core_of(&self, cpu: CpuId) -> CpuId {
        sys::cpu_first_sibling(cpu)
    }

    fn node_of(&self, cpu: CpuId) -> i32 {
        sys::cpu_node(cpu)
    }

    fn set_online(&mut self, cpu: CpuId, online: bool) -> Result<(), Code> {
        sys::set_cpu_online(cpu, online).inspect_err(|code| {
            // That nobody else tells: the pool is empty or another already when a CPU does not come back.
            if online {
                log::line(&core::format_args!("CPU {cpu} cannot be brought online again ({code}); it stays offline"));
            }
        })
    }

    /// A CPU that somebody brought online again stays with the parent; one that was given away is not brought online any more (W18).
    fn claim(&mut self, cpu: CpuId) -> bool {
        sys::without_hotplug(|| {
            if sys::cpu_online(cpu) {
                return false;
            }
            set_given(cpu, true);
            statistics::CPUS_DONATED.count();
            true
        })
    }

    fn unclaim(&mut self, cpu: CpuId) {
        set_given(cpu, false);
        statistics::CPUS_DONATED.take(1);
    }
}

/// As long as it lives, nobody brings a CPU online that an enclave has.
pub(crate) struct HotplugGuard(bindings::cpuhp_state);

impl HotplugGuard {
    /// Begins.
    ///
    /// # Errors
    ///
    /// ENOSPC if the kernel has no place for one more callback; ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        // Of the states before a CPU runs: there a refusal has nothing to undo on the CPU itself.
        let state = bindings::cpuhp_state_CPUHP_BP_PREPARE_DYN;
        let name = c"nitro_enclaves:online".as_char_ptr();
        // SAFETY: The name is static; the callback stays until `drop` removes it. CPUs that are online now are not asked.
        let place = unsafe { bindings::__cpuhp_setup_state(state, name, false, Some(before_online), None, false) };
        kernel::error::to_result(place)?;
        Ok(Self(bindings::cpuhp_state::try_from(place)?))
    }
}

impl Drop for HotplugGuard {
    fn drop(&mut self) {
        // SAFETY: It is the place that `new` got, removed once.
        unsafe { bindings::__cpuhp_remove_state(self.0, false) }
    }
}

/// A CPU is about to come online, and hotplug is locked for everybody else.
///
/// # Safety
///
/// None: numbers that do not exist are nobody's.
unsafe extern "C" fn before_online(cpu: c_uint) -> c_int {
    let cpu = CpuId(cpu);
    if !is_given(cpu) {
        return 0;
    }
    log::line(&core::format_args!("CPU {cpu} belongs to an enclave and stays offline"));
    // Not EBUSY, upon which the kernel tries again five times.
    EPERM.to_errno()
}
