//! What all enclaves of one parent share, behind the home's locks: [`Machine`].

use crate::{CpuEntry, Cpus, Ledger, LedgerEntry, Pool};

/// The shared parts of one parent machine.
///
/// Both methods lock, call once, unlock. The core never calls one inside the other and never waits for the device inside them.
pub trait Machine {
    /// Storage of the pool: one entry per CPU number.
    type CpuTable: AsRef<[CpuEntry]> + AsMut<[CpuEntry]>;
    /// Storage of the ledger: one entry per contiguous run that enclaves may have at once.
    type RunTable: AsRef<[LedgerEntry]> + AsMut<[LedgerEntry]>;
    /// The machine's CPUs, guarded by the pool's lock.
    type Cpus: Cpus;

    /// Does something with the pool locked.
    fn with_pool<T>(&self, act: impl FnOnce(&mut Pool<Self::CpuTable>, &mut Self::Cpus) -> T) -> T;

    /// Does something with the ledger locked.
    fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger<Self::RunTable>) -> T) -> T;
}
