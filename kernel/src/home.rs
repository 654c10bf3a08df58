// SPDX-License-Identifier: GPL-2.0
//! What all enclaves share: the CPU pool, the ledger of pages, the list of enclaves and the device: [`Home`].
//!
//! Lock order: list > enclave > pool, ledger > mailbox of the device. `device` is held for a look only, with nothing inside. Neither
//! the list nor pool or ledger is held while somebody waits for the device (docs/kernel.md, "Locks").

use kernel::alloc::allocator::KVmalloc;
use kernel::alloc::{AllocError, Flags, Vec};
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex};
use nitroxide_abi::extension::{backend, home as place, isolation};
use nitroxide_abi::SlotUid;
use nitroxide_driver::extension::{Listed, HOME_ERRATA};
use nitroxide_driver::{CpuEntry, Ledger, LedgerEntry, Machine, Pool, State};

use crate::cpu::KernelCpus;
use crate::device::NitroDevice;
use crate::enclave::EnclaveFile;
use crate::sys;

/// What NE_QUERY says of this home: a kernel module cannot see what is behind its device.
pub(crate) const FACTS: nitroxide_driver::extension::Home = nitroxide_driver::extension::Home {
    home: place::KERNEL,
    backend: backend::UNKNOWN,
    isolation: isolation::UNKNOWN,
    errata: HOME_ERRATA,
    features: 0,
};

/// Entries of the ledger beside what the machine's memory could fill.
const SPARE_RUNS: usize = 1024;

/// Storage of the core: a table that does not grow.
pub(crate) struct Table<T>(Vec<T, KVmalloc>);

impl<T> Table<T> {
    /// A table without entries.
    pub(crate) fn empty() -> Self {
        Self(Vec::new())
    }

    /// A table of `count` entries as `T::default` makes them.
    ///
    /// # Errors
    ///
    /// If there is no memory; without a warning of the kernel (W8).
    pub(crate) fn new(count: usize, flags: Flags) -> Result<Self, AllocError>
    where
        T: Default,
    {
        let flags = flags | kernel::alloc::flags::__GFP_NOWARN;
        let mut table = Vec::with_capacity(count, flags)?;
        for _ in 0..count {
            table.push(T::default(), flags)?;
        }
        Ok(Self(table))
    }
}

impl<T> AsRef<[T]> for Table<T> {
    fn as_ref(&self) -> &[T] {
        &self.0
    }
}

impl<T> AsMut<[T]> for Table<T> {
    fn as_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// The pool and the CPUs that it is made of.
struct PoolState {
    pool: Pool<Table<CpuEntry>>,
    cpus: KernelCpus,
}

/// The enclaves there are.
///
/// # Invariants
///
/// There is room for `promised` more.
struct List {
    enclaves: KVec<Arc<EnclaveFile>>,
    promised: usize,
}

/// A place in the list for an enclave that is being made: had before the device is asked, since an enclave that is in no list is never tried again.
pub(crate) struct Place<'a>(&'a Home);

impl Place<'_> {
    /// Puts an enclave there; false only if the room has gone, which cannot be.
    #[must_use]
    pub(crate) fn enter(self, enclave: Arc<EnclaveFile>) -> bool {
        // In a statement of its own: dropping `self` takes the lock again.
        let entered = self.0.list.lock().enclaves.push_within_capacity(enclave).is_ok();
        entered
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut list = self.0.list.lock();
        list.promised = list.promised.saturating_sub(1);
    }
}

/// Everything that the module has.
#[pin_data]
pub(crate) struct Home {
    #[pin]
    list: Mutex<List>,
    #[pin]
    pool: Mutex<PoolState>,
    #[pin]
    ledger: Mutex<Ledger<Table<LedgerEntry>>>,
    /// The device that is bound now; one at a time (W17).
    #[pin]
    device: Mutex<Option<Arc<NitroDevice>>>,
}

impl Machine for Home {
    type CpuTable = Table<CpuEntry>;
    type RunTable = Table<LedgerEntry>;
    type Cpus = KernelCpus;

    fn with_pool<T>(&self, act: impl FnOnce(&mut Pool<Self::CpuTable>, &mut Self::Cpus) -> T) -> T {
        let mut state = self.pool.lock();
        let PoolState { pool, cpus } = &mut *state;
        act(pool, cpus)
    }

    fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger<Self::RunTable>) -> T) -> T {
        act(&mut self.ledger.lock())
    }
}

impl Home {
    /// An empty pool, ledger and list.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let cpus = usize::try_from(kernel::cpu::nr_cpu_ids())?;
        // No run is shorter than 2 MiB: more than these there cannot be, unless memory is plugged in later.
        let runs = usize::try_from(sys::ram_bytes() / nitroxide_abi::limits::GRANULE)?.saturating_add(SPARE_RUNS);
        let pool = Pool::new(Table::new(cpus, GFP_KERNEL)?);
        let ledger = Ledger::new(Table::new(runs, GFP_KERNEL)?);
        Arc::pin_init(
            pin_init!(Self {
                list <- new_mutex!(List { enclaves: KVec::new(), promised: 0 }, "nitroxide::list"),
                pool <- new_mutex!(PoolState { pool, cpus: KernelCpus }, "nitroxide::pool"),
                ledger <- new_mutex!(ledger, "nitroxide::ledger"),
                device <- new_mutex!(None, "nitroxide::device"),
            }),
            GFP_KERNEL,
        )
    }

    /// The device that is bound now.
    pub(crate) fn device(&self) -> Option<Arc<NitroDevice>> {
        self.device.lock().clone()
    }

    /// Makes a device the one that new enclaves are created on.
    ///
    /// # Errors
    ///
    /// EBUSY if there is one.
    pub(crate) fn publish(&self, device: Arc<NitroDevice>) -> Result {
        let mut place = self.device.lock();
        if place.is_some() {
            return Err(EBUSY);
        }
        *place = Some(device);
        Ok(())
    }

    /// No enclave is created on this device any more.
    pub(crate) fn unpublish(&self, device: &Arc<NitroDevice>) {
        let mut place = self.device.lock();
        if place.as_ref().is_some_and(|published| Arc::ptr_eq(published, device)) {
            *place = None;
        }
    }

    /// Promises a place in the list.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub(crate) fn place(&self) -> Result<Place<'_>, AllocError> {
        let mut list = self.list.lock();
        let promised = list.promised.saturating_add(1);
        list.enclaves.reserve(promised, GFP_KERNEL)?;
        // INVARIANT: reserved just now, and nothing makes a vector's room smaller.
        list.promised = promised;
        Ok(Place(self))
    }

    /// Strikes an enclave out.
    pub(crate) fn forget(&self, enclave: &EnclaveFile) {
        self.list.lock().enclaves.retain(|entry| !core::ptr::eq::<EnclaveFile>(&**entry, enclave));
    }

    /// Does something with every enclave of a device that is in the list now, one after the other, with the list unlocked.
    ///
    /// It needs no memory, since what is to be done must be done.
    pub(crate) fn for_each_on(&self, device: &Arc<NitroDevice>, act: impl Fn(&EnclaveFile)) {
        let mut after = 0;
        while let Some(enclave) = self.first_on(device, after) {
            after = enclave.serial();
            act(&enclave);
        }
    }

    /// The enclave of a device with the lowest serial number above `after`.
    fn first_on(&self, device: &Arc<NitroDevice>, after: u64) -> Option<Arc<EnclaveFile>> {
        let list = self.list.lock();
        let of_device = list.enclaves.iter().filter(|enclave| Arc::ptr_eq(enclave.device(), device) && enclave.serial() > after);
        of_device.min_by_key(|enclave| enclave.serial()).cloned()
    }

    /// The enclave with the lowest slot above `cursor` of those that the caller may see.
    pub(crate) fn next_after(&self, cursor: SlotUid) -> Option<Listed> {
        let (is_admin, fsuid) = (sys::is_admin(), sys::fsuid());
        let list = self.list.lock();
        list.enclaves
            .iter()
            .filter(|enclave| is_admin || enclave.owner_uid() == fsuid)
            .map(|enclave| enclave.listed())
            .filter(|listed| listed.summary.slot > cursor)
            // The number of an enclave whose device is gone may have come again, and the living one is meant then.
            .min_by_key(|listed| (listed.summary.slot, listed.summary.state == State::Gone))
    }

    /// Tries again to give back what was closed but not let go by the device (W10); `but` was tried a moment ago.
    ///
    /// What would have to wait for the device's turn is left to the timer: of a device that does not answer each would wait two minutes.
    pub(crate) fn retry_closed(&self, device: &Arc<NitroDevice>, but: Option<&EnclaveFile>) {
        self.for_each_on(device, |enclave| {
            if enclave.is_closed() && !but.is_some_and(|but| core::ptr::eq(but, enclave)) && !device.is_busy() {
                enclave.give_back();
            }
        });
    }
}
