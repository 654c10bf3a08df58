//! Made-up CPUs, and the pool and ledger behind what would be locks: [`TestMachine`].

use std::cell::RefCell;
use std::collections::BTreeSet;

use nitroxide_abi::{Code, CpuId};
use nitroxide_driver::{CpuEntry, Cpus, Ledger, LedgerEntry, Machine, Pool, PoolError};

/// The CPUs of the machine, as sibling sets on nodes.
#[derive(Clone, Debug, Default)]
pub struct TestCpus {
    pub online: Vec<bool>,
    pub core_of: Vec<u32>,
    pub node_of: Vec<i32>,
    /// CPUs that cannot be taken offline.
    pub stuck: BTreeSet<u32>,
    /// CPUs that the home does not give away, for a reason of its own.
    pub withheld: BTreeSet<u32>,
    /// CPUs that enclaves have, as the home sees it.
    pub claimed: BTreeSet<u32>,
}

impl Cpus for TestCpus {
    fn count(&self) -> u32 {
        u32::try_from(self.online.len()).unwrap()
    }
    fn is_online(&self, cpu: CpuId) -> bool {
        self.online.get(cpu.0 as usize).copied().unwrap_or(false)
    }
    fn core_of(&self, cpu: CpuId) -> CpuId {
        assert!(self.is_online(cpu), "siblings of an offline CPU are not known");
        CpuId(self.core_of[cpu.0 as usize])
    }
    fn node_of(&self, cpu: CpuId) -> i32 {
        self.node_of[cpu.0 as usize]
    }
    fn set_online(&mut self, cpu: CpuId, online: bool) -> Result<(), Code> {
        if !online && self.stuck.contains(&cpu.0) {
            return Err(Code::EBUSY);
        }
        self.online[cpu.0 as usize] = online;
        Ok(())
    }
    fn claim(&mut self, cpu: CpuId) -> bool {
        // A pool CPU that is online was brought back by hand: the parent runs on it.
        if self.withheld.contains(&cpu.0) || self.is_online(cpu) {
            return false;
        }
        assert!(self.claimed.insert(cpu.0), "CPU {cpu} was claimed twice");
        true
    }
    fn unclaim(&mut self, cpu: CpuId) {
        assert!(self.claimed.remove(&cpu.0), "CPU {cpu} was not claimed");
    }
}

/// What the enclaves of the test's parent share.
pub struct TestMachine {
    shared: RefCell<(Pool<Vec<CpuEntry>>, TestCpus)>,
    ledger: RefCell<Ledger<Vec<LedgerEntry>>>,
}

impl TestMachine {
    /// `count` CPUs on node 0, neighbours sharing a core.
    pub fn with_threads(count: u32, threads: u32) -> Self {
        let core_of = (0..count).map(|cpu| cpu - cpu % threads).collect();
        let cpus = TestCpus { online: vec![true; count as usize], core_of, node_of: vec![0; count as usize], ..TestCpus::default() };
        Self::with_cpus(cpus)
    }

    pub fn with_cpus(cpus: TestCpus) -> Self {
        let pool = Pool::new(vec![CpuEntry::default(); cpus.online.len()]);
        Self { shared: RefCell::new((pool, cpus)), ledger: RefCell::new(Ledger::new(vec![LedgerEntry::default(); 4096])) }
    }

    pub fn write_pool(&self, text: &str) -> Result<(), PoolError> {
        self.with_pool(|pool, cpus| pool.write(text.as_bytes(), cpus))
    }

    pub fn read_pool(&self) -> String {
        self.with_pool(|pool, _| {
            let (text, end) = pool.read();
            String::from_utf8([text, end].concat()).unwrap()
        })
    }

    /// CPUs that are online, as a list.
    pub fn online(&self) -> Vec<u32> {
        self.with_pool(|_, cpus| (0..).zip(&cpus.online).filter(|(_, online)| **online).map(|(cpu, _)| cpu).collect())
    }

    /// CPUs of the pool that no enclave has.
    pub fn free(&self) -> Vec<u32> {
        self.with_pool(|pool, _| pool.cpus().filter(|(_, _, free)| *free).map(|(cpu, _, _)| cpu.0).collect())
    }

    pub fn assert_nothing_held(&self) {
        self.with_pool(|pool, cpus| {
            assert_eq!(pool.slots(), 0, "slots are counted");
            assert!(cpus.claimed.is_empty(), "CPUs are claimed: {:?}", cpus.claimed);
            assert!(pool.cpus().all(|(_, _, free)| free), "cores are held");
        });
        self.with_ledger(|ledger| assert_eq!(ledger.used(), 0, "the ledger has entries"));
    }
}

impl Machine for TestMachine {
    type CpuTable = Vec<CpuEntry>;
    type RunTable = Vec<LedgerEntry>;
    type Cpus = TestCpus;

    // RefCell panics if the core takes a lock inside itself, which would be a deadlock in a home.
    fn with_pool<T>(&self, act: impl FnOnce(&mut Pool<Vec<CpuEntry>>, &mut TestCpus) -> T) -> T {
        let mut shared = self.shared.borrow_mut();
        let (pool, cpus) = &mut *shared;
        let _no_ledger_inside = self.ledger.borrow_mut();
        act(pool, cpus)
    }

    fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger<Vec<LedgerEntry>>) -> T) -> T {
        let _no_pool_inside = self.shared.borrow_mut();
        act(&mut self.ledger.borrow_mut())
    }
}
