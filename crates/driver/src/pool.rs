//! The CPU pool: which CPUs may become vCPUs, which core each belongs to, and who has it: [`Pool`].
//!
//! Setting and reading it as text is in [`crate::pool_text`]. Whole cores go to an enclave with their first CPU and come back
//! together (docs/driver.md, "The CPU pool").

use nitroxide_abi::{CpuId, SlotUid};

use crate::error::AddVcpuError;
use crate::slot::Holder;
use crate::Cpus;

/// What is known of one CPU number; the storage of a [`Pool`] has one per CPU number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuEntry {
    /// The lowest CPU number of its core; that is the core's name.
    pub(crate) core: u32,
    pub(crate) place: Place,
    pub(crate) vcpu: Vcpu,
}

/// Where a CPU is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Place {
    /// With the parent.
    #[default]
    Outside,
    /// In the pool, with no enclave.
    Free,
    /// In the pool, but an enclave of another process of this world has it.
    Foreign,
    /// With this enclave.
    Held(Holder),
}

/// Does the device know this CPU of an enclave?
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Vcpu {
    #[default]
    No,
    /// SLOT_ADD_VCPU had no reply.
    InDoubt,
    Added,
}

/// The CPU pool of one parent.
///
/// # Invariants
///
/// All threads of a core are in the same place. No place is `Held` while `slots` is 0.
#[derive(Clone, Debug)]
pub struct Pool<T> {
    pub(crate) table: T,
    pub(crate) text: crate::pool_text::PoolText,
    /// Slots that exist, those that could not be freed included. While there are any, the pool does not change.
    pub(crate) slots: u32,
    /// The serial number of the last slot that was asked for.
    pub(crate) serial: u64,
    pub(crate) node: i32,
    pub(crate) threads_per_core: u32,
}

/// A CPU that was reserved for an enclave and waits for the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reserved {
    pub(crate) cpu: CpuId,
    /// Did the core come from the pool for this very call? Then it goes back if the device refuses.
    pub(crate) took_core: bool,
}

impl<T: AsRef<[CpuEntry]> + AsMut<[CpuEntry]>> Pool<T> {
    /// An empty pool over `table`, which needs one entry per CPU number; CPUs beyond it do not exist for the pool.
    pub fn new(mut table: T) -> Self {
        table.as_mut().fill(CpuEntry::default());
        Self { table, text: crate::pool_text::PoolText::EMPTY, slots: 0, serial: 0, node: -1, threads_per_core: 0 }
    }

    /// The pool's NUMA node; -1 while it is empty.
    #[must_use]
    pub fn node(&self) -> i32 {
        self.node
    }

    /// Threads of the pool's first core; 0 while it is empty.
    #[must_use]
    pub fn threads_per_core(&self) -> u32 {
        self.threads_per_core
    }

    /// Slots that exist.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Is this CPU in the pool, and is it free?
    #[must_use]
    pub fn membership(&self, cpu: CpuId) -> (bool, bool) {
        match self.entry(cpu).map(|entry| entry.place) {
            Some(Place::Free) => (true, true),
            Some(Place::Foreign | Place::Held(_)) => (true, false),
            Some(Place::Outside) | None => (false, false),
        }
    }

    /// The CPUs of the pool, ascending: the CPU, its core's lowest CPU, and whether it is free.
    pub fn cpus(&self) -> impl Iterator<Item = (CpuId, CpuId, bool)> + '_ {
        self.numbered()
            .filter(|(_, entry)| entry.place != Place::Outside)
            .map(|(cpu, entry)| (cpu, CpuId(entry.core), entry.place == Place::Free))
    }

    /// Is there a core that an enclave could take? Creating one without is refused (272).
    #[must_use]
    pub fn has_free_core(&self) -> bool {
        self.table.as_ref().iter().any(|entry| entry.place == Place::Free)
    }

    /// Marks the whole core of `cpu` as taken by another process's enclave, or as free again.
    ///
    /// For homes whose world several processes share. Cores of this process's enclaves, and CPUs outside the pool, stay as they are.
    pub fn set_foreign(&mut self, cpu: CpuId, foreign: bool) {
        let Some(core) = self.entry(cpu).map(|entry| entry.core) else { return };
        let (from, to) = if foreign { (Place::Free, Place::Foreign) } else { (Place::Foreign, Place::Free) };
        for entry in self.table.as_mut().iter_mut().filter(|entry| entry.core == core && entry.place == from) {
            entry.place = to;
        }
    }

    /// Chooses a CPU for an enclave in mainline's order and takes its core, unless the caller is not the owner.
    ///
    /// The owner check stands between looking and taking, so that a foreign caller gets the code that mainline gives and
    /// changes nothing (W11).
    pub(crate) fn reserve(
        &mut self,
        cpus: &mut impl Cpus,
        holder: Holder,
        wanted: CpuId,
        is_owner: bool,
    ) -> Result<Reserved, AddVcpuError> {
        if wanted == CpuId::ANY {
            return self.reserve_any(cpus, holder, is_owner);
        }
        let entry = self.entry(wanted).ok_or(AddVcpuError::NotInPool)?;
        match entry.place {
            Place::Held(other) if other == holder && entry.vcpu == Vcpu::Added => Err(AddVcpuError::AlreadyUsed),
            Place::Held(other) if other == holder => owner_only(is_owner, Reserved { cpu: wanted, took_core: false }),
            Place::Free => {
                let reserved = owner_only(is_owner, Reserved { cpu: wanted, took_core: true })?;
                if self.take_core(cpus, holder, entry.core) {
                    Ok(reserved)
                } else {
                    Err(AddVcpuError::NotInPool)
                }
            }
            Place::Outside | Place::Foreign | Place::Held(_) => Err(AddVcpuError::NotInPool),
        }
    }

    /// The first thread that is left of the enclave's own cores, else the lowest CPU of the pool's first free core.
    fn reserve_any(&mut self, cpus: &mut impl Cpus, holder: Holder, is_owner: bool) -> Result<Reserved, AddVcpuError> {
        let own = self
            .numbered()
            .filter(|(_, entry)| entry.place == Place::Held(holder) && entry.vcpu != Vcpu::Added)
            .min_by_key(|(cpu, entry)| (entry.core, *cpu));
        if let Some((cpu, _)) = own {
            return owner_only(is_owner, Reserved { cpu, took_core: false });
        }
        let mut not_below = 0;
        while let Some(core) = self.first_free_core(not_below) {
            let reserved = owner_only(is_owner, Reserved { cpu: CpuId(core), took_core: true })?;
            if self.take_core(cpus, holder, core) {
                return Ok(reserved);
            }
            not_below = core.saturating_add(1);
        }
        Err(AddVcpuError::NoCpus)
    }

    fn first_free_core(&self, not_below: u32) -> Option<u32> {
        self.table
            .as_ref()
            .iter()
            .filter(|entry| entry.place == Place::Free)
            .map(|entry| entry.core)
            .filter(|core| *core >= not_below)
            .min()
    }

    /// Moves a free core to an enclave; false, and nothing moved, if the home cannot give one of its CPUs.
    fn take_core(&mut self, cpus: &mut impl Cpus, holder: Holder, core: u32) -> bool {
        let refused =
            self.numbered().filter(|(_, entry)| entry.core == core && entry.place == Place::Free).find(|(cpu, _)| !cpus.claim(*cpu));
        if let Some((refused, _)) = refused {
            for (cpu, _) in self.numbered().filter(|(cpu, entry)| entry.core == core && entry.place == Place::Free && *cpu < refused) {
                cpus.unclaim(cpu);
            }
            return false;
        }
        for entry in self.table.as_mut().iter_mut().filter(|entry| entry.core == core && entry.place == Place::Free) {
            *entry = CpuEntry { place: Place::Held(holder), vcpu: Vcpu::No, ..*entry };
        }
        true
    }

    /// Records what the device said about a reserved CPU.
    pub(crate) fn record_vcpu(&mut self, cpu: CpuId, vcpu: Vcpu) {
        if let Some(entry) = usize::try_from(cpu.0).ok().and_then(|index| self.table.as_mut().get_mut(index)) {
            entry.vcpu = vcpu;
        }
    }

    /// The device refused the CPU: a core that came for it goes back, unless the device may know another thread of it.
    pub(crate) fn undo(&mut self, cpus: &mut impl Cpus, holder: Holder, reserved: Reserved) {
        let Some(core) = self.entry(reserved.cpu).filter(|_| reserved.took_core).map(|entry| entry.core) else { return };
        self.give_back_where(cpus, |entry| entry.place == Place::Held(holder) && entry.core == core);
    }

    /// Gives all cores of an enclave back; they are usable at once.
    pub(crate) fn give_back(&mut self, cpus: &mut impl Cpus, holder: Holder) {
        self.give_back_where(cpus, |entry| entry.place == Place::Held(holder));
    }

    fn give_back_where(&mut self, cpus: &mut impl Cpus, which: impl Fn(&CpuEntry) -> bool) {
        for (cpu, entry) in (0..).map(CpuId).zip(self.table.as_mut()).filter(|(_, entry)| which(entry)) {
            *entry = CpuEntry { place: Place::Free, vcpu: Vcpu::No, ..*entry };
            cpus.unclaim(cpu);
        }
    }

    /// Does an enclave of this number hold a core?
    pub(crate) fn holds(&self, slot: SlotUid) -> bool {
        self.table.as_ref().iter().any(|entry| matches!(entry.place, Place::Held(holder) if holder.slot == slot))
    }

    /// Has a core of this enclave a thread that was not added? It cannot start then (269).
    pub(crate) fn has_half_core(&self, holder: Holder) -> bool {
        self.table.as_ref().iter().any(|entry| entry.place == Place::Held(holder) && entry.vcpu != Vcpu::Added)
    }

    pub(crate) fn entry(&self, cpu: CpuId) -> Option<CpuEntry> {
        usize::try_from(cpu.0).ok().and_then(|index| self.table.as_ref().get(index)).copied()
    }

    /// All entries with their CPU numbers.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (CpuId, CpuEntry)> + '_ {
        (0..).map(CpuId).zip(self.table.as_ref().iter().copied())
    }
}

fn owner_only(is_owner: bool, reserved: Reserved) -> Result<Reserved, AddVcpuError> {
    if is_owner {
        Ok(reserved)
    } else {
        Err(AddVcpuError::NotOwner)
    }
}
