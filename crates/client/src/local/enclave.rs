//! One enclave of a local device: the driver core's enclave behind a lock, and a pipe whose end is the enclave's end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use nitroxide_abi::ioctl::{self, EnclaveStartInfo, UserMemoryRegion};
use nitroxide_abi::{Cid, Code, CpuId, SlotUid};
use nitroxide_driver::extension::Home as Facts;
use nitroxide_driver::{Client, DeviceError, EventOutcome, Region, Slot, Summary, call};
use rustix::pipe::{PipeFlags, pipe_with};

use super::link::Link;
use super::memory::{DonatedPages, Memory, OnePiece};
use super::{Home, Inner, lock};
use crate::CreateError;
use crate::error::{Call, Refused};

type Core = nitroxide_driver::Enclave<DonatedPages, Vec<Region<DonatedPages>>>;

/// An open enclave. Dropping it stops and frees it; what cannot be freed now is kept and tried again.
pub(crate) struct Enclave {
    shared: Arc<Shared>,
    /// Reports POLLHUP when the enclave has ended.
    poll_end: OwnedFd,
    home: Arc<Home>,
}

/// What the watching thread sees of an enclave.
pub(crate) struct Shared {
    slot_uid: SlotUid,
    guarded: Mutex<Guarded>,
    /// A copy for those who must not wait for a call.
    seen: Mutex<Summary>,
    /// Was there an event that nobody has looked at yet?
    event_pending: AtomicBool,
}

struct Guarded {
    core: Core,
    /// The pipe's other end, until the enclave has ended.
    alive: Option<OwnedFd>,
}

impl Enclave {
    pub(crate) fn create(home: &Arc<Home>) -> Result<Self, CreateError> {
        let inner = &home.inner;
        // Before the device is asked, so that a lack of descriptors leaves no slot behind.
        let (poll_end, alive) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| CreateError::System(errno.into()))?;
        inner.machine.look_for_foreign_cpus();
        let mut link = Link(inner);
        let slot = Slot::allocate(&inner.machine, &mut link)
            .map_err(|error| CreateError::Refused(refused(Call::CreateVm, error, error.code(), explained(inner, None, error.code()))))?;
        let most = slot.max_regions().min(inner.max_regions.into());
        let regions = (0..most).map(|_| Region::default()).collect();
        let core = Core::new(&slot, regions, &mut link);
        let shared = Arc::new(Shared {
            slot_uid: slot.uid(),
            seen: Mutex::new(core.summary()),
            guarded: Mutex::new(Guarded { core, alive: Some(alive) }),
            event_pending: AtomicBool::new(false),
        });
        lock(&inner.enclaves).open.push(Arc::downgrade(&shared));
        Ok(Self { shared, poll_end, home: Arc::clone(home) })
    }

    pub(crate) fn slot_uid(&self) -> SlotUid {
        self.shared.slot_uid
    }

    pub(crate) fn poll_fd(&self) -> BorrowedFd<'_> {
        self.poll_end.as_fd()
    }

    pub(crate) fn summary(&self) -> Summary {
        // As after every call: an event that came while this held the lock was left to us.
        self.act(|core, _| core.summary())
    }

    /// As it was after the last call or event that is over: waits for none.
    pub(crate) fn seen(&self) -> Summary {
        *lock(&self.shared.seen)
    }

    /// One command on its descriptor, made by another program.
    pub(crate) fn call(
        &self,
        client: &mut impl Client<Pages = DonatedPages>,
        facts: &Facts,
        word: u32,
        argument: u64,
    ) -> Result<u32, Code> {
        let inner = &self.home.inner;
        if !call::enclave_call_needs_lock(word) {
            return call::enclave_look(&self.seen(), &inner.machine, client, facts, word, argument);
        }
        if word == ioctl::ADD_VCPU {
            inner.machine.look_for_foreign_cpus();
        }
        let result = self.act(|core, link| call::enclave_call(core, &inner.machine, link, client, word, argument));
        // The driver core only heard "no" and says that the CPU is somebody's; it is not.
        if let Some(reason) = result.err().and_then(|code| explained(inner, Some(self.slot_uid()), code)) {
            tracing::warn!(slot_uid = self.slot_uid().0, "a client's call was refused: {reason}");
        }
        let is_untrue = word == ioctl::ADD_VCPU && result.is_err() && inner.machine.cpu_trouble().is_some();
        if is_untrue { Err(Code::EIO) } else { result }
    }

    pub(crate) fn home(&self) -> &Arc<Home> {
        &self.home
    }

    pub(crate) fn add_memory(&mut self, memory: Memory) -> Result<(), Refused> {
        let inner = &self.home.inner;
        for piece in memory.into_pieces() {
            let request = UserMemoryRegion { flags: 0, memory_size: piece.size(), userspace_addr: piece.gpa().0 };
            let mut client = OnePiece::new(piece, inner.is_owner());
            self.act(|core, link| core.set_memory(&inner.machine, link, &mut client, &request)).map_err(|error| {
                refused(Call::SetUserMemoryRegion, error, error.code(), explained(inner, Some(self.slot_uid()), error.code()))
            })?;
        }
        Ok(())
    }

    pub(crate) fn image_load_info(&mut self, flags: u64) -> Result<u64, Refused> {
        self.act(|core, _| core.image_load_info(flags)).map_err(|error| refused(Call::GetImageLoadInfo, error, error.code(), None))
    }

    pub(crate) fn add_vcpu(&mut self, wanted: CpuId) -> Result<CpuId, Refused> {
        let inner = &self.home.inner;
        inner.machine.look_for_foreign_cpus();
        self.act(|core, link| core.add_vcpu(&inner.machine, link, inner.is_owner(), wanted)).map_err(|error| {
            match inner.machine.cpu_trouble() {
                // The driver core only heard "no" and says that the CPU is somebody's; it is not.
                Some(trouble) => Refused::new(Call::AddVcpu, Code::EIO).with_detail(Some(trouble)),
                None => refused(Call::AddVcpu, error, error.code(), None),
            }
        })
    }

    pub(crate) fn start(&mut self, flags: u64, enclave_cid: u64) -> Result<Cid, Refused> {
        let inner = &self.home.inner;
        let request = EnclaveStartInfo { flags, enclave_cid };
        let cid = self
            .act(|core, link| core.start(&inner.machine, link, &request))
            .map_err(|error| refused(Call::StartEnclave, error, error.code(), explained(inner, Some(self.slot_uid()), error.code())))?;
        u32::try_from(cid).map(Cid).map_err(|_| Refused::new(Call::StartEnclave, Code::EIO))
    }

    /// Does something with the driver core's enclave, then looks at events that came meanwhile.
    fn act<T>(&self, act: impl FnOnce(&mut Core, &mut Link<'_>) -> T) -> T {
        let inner = &self.home.inner;
        let result = self.shared.with(|core| act(core, &mut Link(inner)));
        if self.shared.look(inner) {
            inner.bell.wake(); // the watching thread asks again until it is known
        }
        result
    }
}

/// What the launcher says about its last refusal for a slot, or of a slot, if that is where `code` comes from.
fn explained(inner: &Inner, slot_uid: Option<SlotUid>, code: Code) -> Option<String> {
    (inner.explain)(slot_uid).filter(|(errno, _)| *errno == code.number()).map(|(_, message)| message)
}

/// A refusal with what there is to say about it beyond the code: the launcher's reason, or the driver's sentence if the code alone says less.
fn refused(call: Call, error: impl std::fmt::Display, code: Code, explained: Option<String>) -> Refused {
    let sentence = || Some(error.to_string()).filter(|sentence| sentence != code.text());
    Refused::new(call, code).with_detail(explained.or_else(sentence))
}

impl Drop for Enclave {
    fn drop(&mut self) {
        let inner = &self.home.inner;
        if self.shared.release(inner).is_err() {
            // The device still has its memory and CPUs, so they stay here as well.
            lock(&inner.enclaves).leftover.push(Arc::clone(&self.shared));
            inner.bell.wake();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.guarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Core) -> T) -> T {
        let mut guarded = self.lock();
        let result = act(&mut guarded.core);
        self.publish(&mut guarded);
        result
    }

    /// Lets pollers and those who look know.
    fn publish(&self, guarded: &mut Guarded) {
        *lock(&self.seen) = guarded.core.summary();
        if guarded.core.hung_up() {
            guarded.alive = None;
        }
    }

    /// The device has raised an event. Says whether the state could not be found out, so that one should ask again.
    pub(crate) fn event(&self, inner: &Inner) -> bool {
        self.event_pending.store(true, Ordering::SeqCst);
        self.look(inner)
    }

    /// Looks at a pending event, unless a call is under way, which then looks itself when it is done: a long START of one enclave holds up
    /// the events of no other.
    fn look(&self, inner: &Inner) -> bool {
        let mut unknown = false;
        while self.event_pending.load(Ordering::SeqCst) {
            let mut guarded = match self.guarded.try_lock() {
                Ok(guarded) => guarded,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return unknown,
            };
            self.event_pending.store(false, Ordering::SeqCst);
            unknown = guarded.core.device_event(&mut Link(inner)) == EventOutcome::Unknown;
            self.publish(&mut guarded);
        }
        unknown
    }

    /// Stops and frees it.
    pub(crate) fn release(&self, inner: &Inner) -> Result<(), DeviceError> {
        let mut guarded = self.lock();
        guarded.alive = None;
        let result = guarded.core.release(&inner.machine, &mut Link(inner));
        self.publish(&mut guarded);
        result
    }

    /// The device was reset: gives back what it had.
    pub(crate) fn device_gone(&self, inner: &Inner) {
        let mut guarded = self.lock();
        guarded.core.device_gone(&mut Link(inner));
        // It sends nothing to a device that is gone, so it cannot fail.
        let _: Result<(), DeviceError> = guarded.core.release(&inner.machine, &mut Link(inner));
        guarded.alive = None;
    }
}

impl std::fmt::Debug for Enclave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enclave").field("slot_uid", &self.shared.slot_uid).finish_non_exhaustive()
    }
}
