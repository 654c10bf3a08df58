//! The parent machine of a local device: virtual CPUs that processes of one world share, and the driver core's tables.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use nitroxide_abi::{Code, CpuId};
use nitroxide_device::Limits;
use nitroxide_driver::{CpuEntry, Cpus, Ledger, LedgerEntry, Machine, Pool, PoolError};
use nitroxide_world::{Claim, ClaimError, World};

use super::lock;
use crate::Topology;

/// The one NUMA node.
pub(crate) const NODE: i32 = 0;

/// The most runs that are kept book of, whatever the limits say: 1.5 MB of them. Local memory comes in few pieces.
const MAX_RUNS: u64 = 1 << 16;

/// What all enclaves of one local device share.
pub(crate) struct LocalMachine {
    pool: Mutex<(Pool<Vec<CpuEntry>>, LocalCpus)>,
    ledger: Mutex<Ledger<Vec<LedgerEntry>>>,
}

impl LocalMachine {
    /// A machine with this topology (which is valid) and CPU pool.
    pub(crate) fn new(topology: Topology, pool_text: &str, limits: Limits, world: World) -> Result<Self, PoolError> {
        let mut cpus = LocalCpus { topology, world, claims: BTreeMap::new(), trouble: None };
        let entries = usize::try_from(topology.cpus).unwrap_or(0);
        let mut pool = Pool::new(vec![CpuEntry::default(); entries]);
        pool.write(pool_text.as_bytes(), &mut cpus)?;
        let runs = u64::from(limits.max_slots).saturating_mul(limits.max_regions.into()).min(MAX_RUNS);
        let ledger = Ledger::new(vec![LedgerEntry::default(); usize::try_from(runs).unwrap_or(0)]);
        Ok(Self { pool: Mutex::new((pool, cpus)), ledger: Mutex::new(ledger) })
    }

    /// Looks which CPUs other processes of the world have, so that the driver core chooses among the others.
    ///
    /// What changes between this look and the core's choice is noticed by [`LocalCpus::claim`].
    pub(crate) fn look_for_foreign_cpus(&self) {
        let mut guard = lock(&self.pool);
        let (pool, cpus) = &mut *guard;
        cpus.trouble = None;
        let foreign = match cpus.foreign_cores() {
            Ok(foreign) => foreign,
            Err(error) => {
                tracing::warn!(%error, "which CPUs other processes have cannot be read; each is tried instead");
                return;
            }
        };
        let members: Vec<CpuId> = pool.cpus().map(|(cpu, _, _)| cpu).collect();
        for cpu in members {
            pool.set_foreign(cpu, foreign.contains(&cpus.core_of(cpu)));
        }
    }

    /// Why a CPU that nobody has could not be claimed since the last look, if that was so: the world's directory is full, say.
    pub(crate) fn cpu_trouble(&self) -> Option<String> {
        lock(&self.pool).1.trouble.take()
    }
}

impl Machine for LocalMachine {
    type CpuTable = Vec<CpuEntry>;
    type RunTable = Vec<LedgerEntry>;
    type Cpus = LocalCpus;

    fn with_pool<T>(&self, act: impl FnOnce(&mut Pool<Self::CpuTable>, &mut Self::Cpus) -> T) -> T {
        let mut guard = lock(&self.pool);
        let (pool, cpus) = &mut *guard;
        act(pool, cpus)
    }

    fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger<Self::RunTable>) -> T) -> T {
        act(&mut lock(&self.ledger))
    }
}

/// Virtual CPUs. Having one means holding its claim in the world.
pub(crate) struct LocalCpus {
    topology: Topology,
    world: World,
    /// The CPUs of this process's enclaves.
    claims: BTreeMap<CpuId, Claim>,
    /// Why the last claim failed that did not fail because somebody else has the CPU.
    trouble: Option<String>,
}

impl LocalCpus {
    /// The cores of which other processes have a CPU, by their lowest CPU.
    fn foreign_cores(&self) -> Result<BTreeSet<CpuId>, ClaimError> {
        let claimed = self.world.claimed_cpus()?.into_iter().map(CpuId);
        Ok(claimed.filter(|cpu| !self.claims.contains_key(cpu)).map(|cpu| self.core_of(cpu)).collect())
    }
}

impl Cpus for LocalCpus {
    fn count(&self) -> u32 {
        self.topology.cpus
    }

    fn is_online(&self, cpu: CpuId) -> bool {
        cpu.0 < self.topology.cpus
    }

    fn core_of(&self, cpu: CpuId) -> CpuId {
        CpuId(cpu.0 - cpu.0.checked_rem(self.topology.threads).unwrap_or(0))
    }

    fn node_of(&self, _cpu: CpuId) -> i32 {
        NODE
    }

    fn set_online(&mut self, _cpu: CpuId, _online: bool) -> Result<(), Code> {
        Ok(()) // virtual CPUs take nothing from the machine
    }

    fn claim(&mut self, cpu: CpuId) -> bool {
        match self.world.claim_cpu(cpu.0) {
            Ok(claim) => {
                self.claims.insert(cpu, claim);
                true
            }
            Err(ClaimError::Taken(_)) => false,
            Err(error) => {
                tracing::debug!(%cpu, %error, "CPU cannot be claimed");
                self.trouble = Some(error.to_string());
                false
            }
        }
    }

    fn unclaim(&mut self, cpu: CpuId) {
        self.claims.remove(&cpu);
    }
}
