//! What the core wants from the machine's CPUs: [`Cpus`].

use nitroxide_abi::{Code, CpuId};

/// The CPUs of the parent. Used only while the home holds the pool's lock.
pub trait Cpus {
    /// One more than the highest CPU number that can exist (`nr_cpu_ids`).
    fn count(&self) -> u32;

    /// Is this CPU online now? False for numbers that do not exist.
    fn is_online(&self, cpu: CpuId) -> bool;

    /// The lowest CPU number among this CPU's online siblings, itself included. Asked only while the CPU is online.
    ///
    /// Cores are told apart by this, never by core ids, which repeat and have gaps (W18).
    fn core_of(&self, cpu: CpuId) -> CpuId;

    /// The CPU's NUMA node; -1 if it has none.
    fn node_of(&self, cpu: CpuId) -> i32;

    /// Takes the CPU from the parent's scheduler or gives it back. A home whose CPUs are virtual does nothing.
    ///
    /// # Errors
    ///
    /// The code that hotplug gave.
    fn set_online(&mut self, cpu: CpuId, online: bool) -> Result<(), Code>;

    /// May this pool CPU go to an enclave now? True claims it until [`Cpus::unclaim`].
    ///
    /// A kernel says no to a CPU that somebody brought online again by hand (W18); a home of several processes says no to one that
    /// another process has.
    fn claim(&mut self, cpu: CpuId) -> bool;

    /// The CPU came back from its enclave.
    fn unclaim(&mut self, cpu: CpuId);
}
