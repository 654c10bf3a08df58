// SPDX-License-Identifier: GPL-2.0
//! One enclave behind its descriptor: [`EnclaveFile`], and how NE_CREATE_VM makes one.

use core::convert::Infallible;

use kernel::alloc::flags::GFP_KERNEL_ACCOUNT;
use kernel::fs::file::{flags, FileDescriptorReservation};
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::{Acquire, Atomic, Full, Relaxed, Release};
use kernel::sync::barrier::smp_mb;
use kernel::sync::poll::{PollCondVar, PollCondVarBox};
use kernel::sync::{new_mutex, new_spinlock, static_lock_class, Arc, Mutex, SpinLock, UniqueArc};
use kernel::task::Task;
use nitroxide_abi::{Code, SlotUid};
use nitroxide_driver::call::Look;
use nitroxide_driver::extension::Listed;
use nitroxide_driver::{call, CreateError, Enclave, EventOutcome, Machine, Region, Slot, State, Summary};

use crate::caller::{Caller, PinnedPages};
use crate::device::NitroDevice;
use crate::file::EnclaveDescriptor;
use crate::home::{Home, Table, FACTS};
use crate::{statistics, sys, trace};

type Regions = Table<Region<PinnedPages>>;

/// Regions that an enclave has at most, whatever the device would take: bounds its table to 768 KiB.
const MOST_REGIONS: u64 = 16_384;

/// The serial number of the next enclave.
static SERIALS: Atomic<u64> = Atomic::new(1);

/// An enclave, from NE_CREATE_VM until the device has let it go after the last close.
#[pin_data]
pub(crate) struct EnclaveFile {
    home: Arc<Home>,
    device: Arc<NitroDevice>,
    /// Tells enclaves apart where the slot's number might come again; ascending, 1 and up.
    serial: u64,
    uid: SlotUid,
    /// The creator's address space; held, so that its address means it (W7).
    owner: ARef<Mm>,
    owner_uid: u32,
    owner_task: ARef<Task>,
    closed: Atomic<bool>,
    /// Was its end counted?
    end_counted: Atomic<bool>,
    /// Is there an event that nobody has looked at for this enclave?
    event: Atomic<bool>,
    #[pin]
    enclave: Mutex<Enclave<PinnedPages, Regions>>,
    /// A copy for those who must not wait for a call.
    #[pin]
    summary: SpinLock<Summary>,
    /// The parts of it that are looked at all the time, so that neither lock nor copy is needed.
    is_init: Atomic<bool>,
    hung_up: Atomic<bool>,
    /// Those who poll; in a box that RCU frees, since a condition variable of its own would wait for a grace period at every close.
    ended: PollCondVarBox,
}

/// NE_CREATE_VM: makes a slot and its descriptor, and writes the slot's number to the caller.
///
/// # Errors
///
/// 272 without a free core, then what descriptors and memory give, then the device's, then EFAULT (docs/driver.md, "CREATE_VM").
pub(crate) fn create(home: &Arc<Home>, device: &Arc<NitroDevice>, argument: u64) -> Result<u32, Code> {
    if !home.with_pool(|pool, _| pool.has_free_core()) {
        return Err(refused(CreateError::NoCpus));
    }
    let owner: ARef<Mm> = kernel::current!().mm().map(|mm| ARef::from(&**mm)).ok_or(Code::EIO)?;
    let owner_task = ARef::from(kernel::current!().group_leader());
    let memory = UniqueArc::<EnclaveFile>::new_uninit(GFP_KERNEL_ACCOUNT).map_err(|_| Code::ENOMEM)?;
    let number = FileDescriptorReservation::get_unused_fd_flags(flags::O_CLOEXEC).map_err(sys::code)?;
    let descriptor = EnclaveDescriptor::new().map_err(sys::code)?;
    let ended = PollCondVarBox::new(c"nitroxide::ended", static_lock_class!()).map_err(|_| Code::ENOMEM)?;
    let place = home.place().map_err(|_| Code::ENOMEM)?;

    let mut link = device.link(true);
    let slot = Slot::allocate(&**home, &mut link).map_err(refused)?;
    let count = usize::try_from(slot.max_regions().min(MOST_REGIONS)).unwrap_or(0);
    // Without a table it is made all the same: its release is what frees the slot.
    let (regions, mut out_of_memory) = match Table::new(count, GFP_KERNEL_ACCOUNT) {
        Ok(regions) => (regions, false),
        Err(_) => (Table::empty(), true),
    };
    let uid = slot.uid();
    let enclave = Enclave::new(&slot, regions, &mut link);
    let summary = enclave.summary();
    let made = memory.pin_init_with::<Infallible>(pin_init!(EnclaveFile {
        home: home.clone(),
        device: device.clone(),
        serial: SERIALS.fetch_add(1, Relaxed),
        uid,
        owner,
        owner_uid: sys::fsuid(),
        owner_task,
        closed: Atomic::new(false),
        end_counted: Atomic::new(false),
        event: Atomic::new(false),
        enclave <- new_mutex!(enclave, "nitroxide::enclave"),
        summary <- new_spinlock!(summary, "nitroxide::summary"),
        is_init: Atomic::new(true),
        hung_up: Atomic::new(false),
        ended,
    }? Infallible));
    let file: Arc<EnclaveFile> = match made {
        Ok(file) => file.into(),
        Err(never) => match never {},
    };
    out_of_memory |= !place.enter(file.clone());
    // From here on dropping the descriptor releases the enclave.
    let descriptor = descriptor.carry(file.clone());
    if out_of_memory {
        return Err(Code::ENOMEM);
    }
    // The device may have gone before the enclave was in the list, where its end would have been told.
    if home.device().is_none_or(|now| !Arc::ptr_eq(&now, device)) {
        file.device_gone();
    }
    call::create_vm(&mut Caller { owner: None }, uid, argument)?;
    let fd = number.reserved_fd();
    number.fd_install(descriptor.into_file());
    statistics::ENCLAVES_CREATED.count();
    Ok(fd)
}

/// Why no enclave is made, for who traces, and as a code.
fn refused(error: CreateError) -> Code {
    trace::refused(SlotUid(0), &error);
    error.code()
}

impl call::Look for EnclaveFile {
    fn state(&self) -> State {
        if self.is_init.load(Acquire) {
            State::Init
        } else {
            self.summary().state
        }
    }

    fn summary(&self) -> Summary {
        *self.summary.lock()
    }
}

impl EnclaveFile {
    /// The device that it is on.
    pub(crate) fn device(&self) -> &Arc<NitroDevice> {
        &self.device
    }

    /// Its number among all enclaves since the module was loaded.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// User id of its creator, of the initial namespace.
    pub(crate) fn owner_uid(&self) -> u32 {
        self.owner_uid
    }

    /// Was its last descriptor closed?
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Acquire)
    }

    /// Does poll report POLLHUP?
    pub(crate) fn has_hung_up(&self) -> bool {
        self.hung_up.load(Acquire)
    }

    /// Where those wait who poll.
    pub(crate) fn ended(&self) -> &PollCondVar {
        &self.ended
    }

    /// As NE_LIST shows it to the caller.
    pub(crate) fn listed(&self) -> Listed {
        Listed {
            summary: self.summary(),
            owner_uid: sys::uid_for_caller(self.owner_uid),
            owner_pid: u32::try_from(self.owner_task.tgid_nr_ns(None)).unwrap_or(0),
        }
    }

    /// One command on its descriptor.
    ///
    /// # Errors
    ///
    /// The code that the caller gets.
    pub(crate) fn ioctl(&self, word: u32, argument: u64) -> Result<u32, Code> {
        let result = self.call(word, argument);
        trace::ioctl(word, self.uid, result);
        result
    }

    fn call(&self, word: u32, argument: u64) -> Result<u32, Code> {
        let mut caller = Caller { owner: Some(&self.owner) };
        if !call::enclave_call_needs_lock(word) {
            return call::enclave_look(self, &*self.home, &mut caller, &FACTS, word, argument);
        }
        let result = {
            // Nobody sees this answer: only a kill ends the wait.
            let mut enclave = sys::lock_killable(&self.enclave).ok_or(Code::EINTR)?;
            let result = call::enclave_call(&mut enclave, &*self.home, &mut self.device.link(true), &mut caller, word, argument);
            self.show(&enclave);
            result
        };
        self.look_at_event();
        result
    }

    /// There was an event: looks at it now, or leaves it to the one who has the enclave locked.
    pub(crate) fn note_event(&self) {
        self.event.xchg(true, Full);
        self.look_at_event();
    }

    /// Looks at an event that came, unless somebody has the enclave locked, who looks afterwards.
    fn look_at_event(&self) {
        loop {
            // Between the release of the lock and the look at the flag, as in `note_event` between the flag and the lock: one of both sees the other.
            smp_mb(kernel::sync::barrier::Full);
            if !self.event.load(Relaxed) {
                return;
            }
            let Some(mut enclave) = self.enclave.try_lock() else { return };
            if !self.event.xchg(false, Full) {
                continue;
            }
            let mut link = self.device.link(false);
            let outcome = if self.device.is_gone() {
                enclave.device_gone(&mut link);
                enclave.give_back_gone(&*self.home);
                EventOutcome::Ended
            } else {
                enclave.device_event(&mut link)
            };
            self.show(&enclave);
            drop(enclave);
            if outcome == EventOutcome::Unknown {
                // Looked at again after the next call or event, or when it is time.
                self.event.store(true, Release);
                self.device.try_again_later();
                return;
            }
        }
    }

    /// The device went away and took the slot with it; what was closed before comes back now.
    ///
    /// Waits for no call: one that waits for its caller's memory may take as long as the caller likes, and tells the enclave when it ends.
    pub(crate) fn device_gone(&self) {
        self.note_event();
        if self.is_closed() {
            self.give_back();
        }
    }

    /// What the device did not do is tried again: to let a closed enclave go, or to tell a state.
    pub(crate) fn retry(&self) {
        if self.is_closed() {
            self.give_back();
        } else {
            self.look_at_event();
        }
    }

    /// The last descriptor was closed.
    ///
    /// A process that ends, killed perhaps, does not wait for a device that works for another or owes a reply; its enclave is given back a moment later (W9). Neither does
    /// a thread of the kernel's, which closes files of others, too. A process that closes finds everything given back.
    pub(crate) fn close(&self) {
        // Between this and the look whether the device is gone, as in `device_gone` in the opposite order: one of both gives back.
        self.closed.xchg(true, Full);
        if sys::is_nobody_waiting() && self.device.is_busy() {
            self.device.try_again_later();
            return;
        }
        self.give_back();
        self.home.retry_closed(&self.device, Some(self));
    }

    /// Ends a closed enclave and gives back what it has; it stays in the list if the device does not let it go (W10).
    pub(crate) fn give_back(&self) {
        let released = {
            let mut enclave = self.enclave.lock();
            let released = enclave.release(&*self.home, &mut self.device.link(false)).is_ok();
            self.show(&enclave);
            if released {
                self.count_end();
            }
            released
        };
        if released {
            self.home.forget(self);
        } else {
            self.device.try_again_later();
        }
    }

    /// Copies the summary for those who only look, and wakes pollers at the end.
    fn show(&self, enclave: &Enclave<PinnedPages, Regions>) {
        let new = enclave.summary();
        let old = core::mem::replace(&mut *self.summary.lock(), new);
        if new.state != State::Init {
            self.is_init.store(false, Release);
        }
        if new.hung_up && !old.hung_up {
            self.hung_up.store(true, Release);
            self.ended.notify_all();
        }
        if new.started_ns != 0 && old.started_ns == 0 {
            statistics::ENCLAVES_STARTED.count();
        }
        if new.state != old.state {
            trace::state(new.slot, old.state.number(), new.state.number());
        }
        if new.state != State::Running {
            self.count_end();
        }
    }

    /// An enclave that runs no more is counted once, if it was ever started.
    fn count_end(&self) {
        if self.summary().started_ns != 0 && !self.end_counted.xchg(true, Full) {
            statistics::ENCLAVES_ENDED.count();
        }
    }
}
