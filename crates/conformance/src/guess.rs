//! What random cases suppose of the driver while they are made: [`Guess`].
//!
//! A rough model for [`random`](crate::random) only, which never looks at answers: what is open, how far each enclave is, which pages and cores are taken.
//! Where it errs, a step finds no enclave; [`coverage`](crate::coverage) counts how often.

use crate::step::{Area, ENCLAVES, Op, PAGES, Pointer, Who};
use nitroxide_abi::limits::GRANULE;

/// The first CPUs of the cores of the pool `2-5`.
const CORES: [u32; 2] = [2, 4];

/// How far an enclave is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Nobody has it.
    Closed,
    /// Only the other process has it.
    Kept {
        /// Was it started, and has not ended?
        running: bool,
    },
    /// Being set up.
    Init,
    /// Started.
    Running,
    /// Ended by itself.
    Ended,
}

#[derive(Debug, Clone, Default)]
struct One {
    open: bool,
    kept: bool,
    running: bool,
    ended: bool,
    /// Its making cannot have failed.
    surely: bool,
    pages: u64,
    vcpus: Vec<u32>,
    cores: Vec<u32>,
}

/// The supposed state.
#[derive(Debug, Clone)]
pub struct Guess {
    enclaves: [One; ENCLAVES],
    /// Whose each page is.
    owners: Vec<Option<usize>>,
    pool: Vec<u32>,
    faults: String,
    struck: u32,
}

impl Default for Guess {
    fn default() -> Self {
        let owners = (0..PAGES).map(|_| None).collect();
        Self { enclaves: Default::default(), owners, pool: CORES.to_vec(), faults: String::new(), struck: 0 }
    }
}

impl Guess {
    /// How far this enclave is.
    #[must_use]
    pub fn stage(&self, enclave: usize) -> Stage {
        match self.enclaves.get(enclave) {
            Some(one) if one.open && one.ended => Stage::Ended,
            Some(one) if one.open && one.running => Stage::Running,
            Some(one) if one.open => Stage::Init,
            Some(one) if one.kept => Stage::Kept { running: one.running && !one.ended },
            _ => Stage::Closed,
        }
    }

    /// Has the other process this enclave?
    #[must_use]
    pub fn is_kept(&self, enclave: usize) -> bool {
        self.enclaves.get(enclave).is_some_and(|one| one.kept)
    }

    /// An enclave that its owner has.
    #[must_use]
    pub fn any_open(&self) -> Option<usize> {
        self.enclaves.iter().position(|one| one.open)
    }

    /// Is there an enclave, without any doubt?
    #[must_use]
    pub fn is_surely_used(&self) -> bool {
        self.enclaves.iter().any(|one| one.surely && (one.open || one.kept))
    }

    /// Cores that no enclave has.
    #[must_use]
    pub fn cores_free(&self) -> usize {
        self.pool.len()
    }

    /// Pages of this enclave.
    #[must_use]
    pub fn pages(&self, enclave: usize) -> u64 {
        self.enclaves.get(enclave).map_or(0, |one| one.pages)
    }

    /// Has nobody this page?
    #[must_use]
    pub fn is_free(&self, page: u64) -> bool {
        usize::try_from(page).ok().and_then(|page| self.owners.get(page)).is_some_and(Option::is_none)
    }

    /// Could this enclave not be started for want of CPUs that there are?
    #[must_use]
    pub fn misses_vcpus(&self, enclave: usize) -> bool {
        self.enclaves.get(enclave).is_some_and(|one| {
            let whole = one.vcpus.len() == one.cores.len() * 2;
            if one.cores.is_empty() { !self.pool.is_empty() } else { !whole }
        })
    }

    /// Takes note of a step.
    pub fn follow(&mut self, op: &Op) {
        match *op {
            Op::WritePool { ref text, privileged: true } if !self.enclaves.iter().any(|one| one.open || one.kept) => {
                self.pool = match text.trim() {
                    "2-3" => vec![2],
                    "4-5" | "4-N" => vec![4],
                    "2-5" | "2,3,4,5" => CORES.to_vec(),
                    _ => Vec::new(),
                };
            }
            Op::Faults(ref rules) => {
                rules.clone_into(&mut self.faults);
                self.struck = 0;
            }
            Op::Create { enclave, pointer } => self.create(enclave, pointer),
            Op::AddVcpu { enclave, who, cpu, pointer } if pointer != Pointer::Null => self.add_vcpu(enclave, who, cpu),
            Op::SetMemory { enclave, who: Who::Owner, flags: 0, place, size, pointer: Pointer::Good | Pointer::ReadOnly }
                if matches!(place.area, Area::Pages | Area::Alias)
                    && place.offset % GRANULE == 0
                    && size % GRANULE == 0
                    && size < 1 << 30 =>
            {
                self.set_memory(enclave, place.offset / GRANULE, size / GRANULE);
            }
            Op::Start { enclave, flags: 0 | 1, cid: 0 | 4..=0xFFFF_FFFE, pointer, .. } if pointer != Pointer::Null => self.start(enclave),
            Op::Keep(enclave) => self.change(enclave, |one| one.kept = one.open),
            Op::Unkeep(enclave) => self.change(enclave, |one| one.kept = false),
            Op::Close(enclave) => self.change(enclave, |one| one.open = false),
            Op::End(enclave) => self.change(enclave, |one| one.ended = one.running),
            _ => {}
        }
    }

    /// Does the device refuse this command now? It counts.
    fn refuses(&mut self, command: &str) -> bool {
        let Some((rule, action)) = self.faults.split_once('=') else { return false };
        let (name, when) = rule.split_once('@').unwrap_or((rule, ""));
        if name != command {
            return false;
        }
        self.struck += 1;
        action.starts_with('-') && when.parse().map_or(true, |when: u32| when == self.struck)
    }

    fn create(&mut self, enclave: usize, pointer: Pointer) {
        let free = self.enclaves.iter().all(|one| !one.open && !one.kept) && self.pool == CORES;
        let may_fail = self.faults.starts_with("alloc");
        if self.pool.is_empty() || self.stage(enclave) != Stage::Closed || self.refuses("alloc") || pointer != Pointer::Good {
            return;
        }
        if let Some(one) = self.enclaves.get_mut(enclave) {
            *one = One { open: true, surely: free && !may_fail, ..One::default() };
        }
    }

    fn add_vcpu(&mut self, enclave: usize, who: Who, cpu: u32) {
        if self.stage(enclave) != Stage::Init || cpu >= 6 || cpu == 1 {
            return;
        }
        let Some(one) = self.enclaves.get(enclave) else { return };
        let sibling = one.cores.iter().flat_map(|core| [*core, core + 1]).find(|cpu| !one.vcpus.contains(cpu));
        let wanted = match cpu {
            0 => sibling.or_else(|| self.pool.first().copied()),
            cpu => Some(cpu).filter(|cpu| !one.vcpus.contains(cpu)),
        };
        let Some(wanted) = wanted else { return };
        let core = wanted & !1;
        let (owned, in_pool) = (one.cores.contains(&core), self.pool.contains(&core));
        if !owned && !in_pool {
            return;
        }
        // The C driver moves the core first.
        self.pool.retain(|free| *free != core);
        let refused = who != Who::Owner || self.refuses("add-vcpu");
        if let Some(one) = self.enclaves.get_mut(enclave) {
            one.cores.extend((!owned).then_some(core));
            one.vcpus.extend((!refused).then_some(wanted));
        }
    }

    fn set_memory(&mut self, enclave: usize, first: u64, count: u64) {
        let all_free = count > 0 && (first..first + count).all(|page| self.is_free(page));
        if self.stage(enclave) != Stage::Init || !all_free || self.refuses("add-mem") {
            return;
        }
        for page in first..first + count {
            if let Some(owner) = usize::try_from(page).ok().and_then(|page| self.owners.get_mut(page)) {
                *owner = Some(enclave);
            }
        }
        if let Some(one) = self.enclaves.get_mut(enclave) {
            one.pages += count;
        }
    }

    fn start(&mut self, enclave: usize) {
        let ready = self.enclaves.get(enclave).is_some_and(|one| one.pages >= 32 && !one.cores.is_empty()) && !self.misses_vcpus(enclave);
        if self.stage(enclave) != Stage::Init || !ready || self.refuses("start") {
            return;
        }
        self.change(enclave, |one| one.running = true);
    }

    fn change(&mut self, enclave: usize, act: impl FnOnce(&mut One)) {
        let Some(one) = self.enclaves.get_mut(enclave) else { return };
        act(one);
        if !one.open && !one.kept {
            self.pool.append(&mut one.cores);
            self.pool.sort_unstable();
            *one = One::default();
            self.owners.iter_mut().filter(|owner| **owner == Some(enclave)).for_each(|owner| *owner = None);
        }
    }
}
