//! The device as its faces see it: one call per command, events, counters, reset.
//!
//! [`Device`] applies injected [`Faults`], counts replies and events and hands the commands themselves to `commands`. The
//! rules are described in `docs/device.md`.

use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use nitroxide_abi::SlotUid;
use nitroxide_abi::pci::{EventCounter, Reply};

use crate::fault::{FaultState, Field, Strike};
use crate::slots::{Phase, Slots};
use crate::{DeviceCode, EndedNotifier, Faults, Launcher, Limits, commands};

/// One Nitro Enclaves device: slots, commands, events.
///
/// Everything may be called from any thread, several at a time. Commands for one slot are carried out one after the other; a command that
/// takes long (START, STOP, SLOT_ADD_MEM, SLOT_FREE) holds up no other slot, and SLOT_INFO not even for its own.
///
/// Dropping the device is a [`reset`](Self::reset).
pub struct Device {
    shared: Arc<Shared>,
}

/// What commands, notifiers and delayed events share.
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    /// [`Limits::max_regions`] as it is now.
    pub(crate) max_regions: AtomicU32,
    pub(crate) launcher: Arc<dyn Launcher>,
    pub(crate) slots: Slots,
    faults: Mutex<FaultState>,
    /// How many replies were given, wrapping.
    replies: AtomicU16,
    /// How many events were raised, wrapping.
    events: AtomicU16,
    on_event: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
}

/// What is given away at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated slots, those being allocated or freed included.
    pub slots: usize,
    /// Pieces of memory of all slots.
    pub regions: usize,
    /// Bytes of memory of all slots.
    pub memory_bytes: u64,
    /// vCPUs of all slots.
    pub vcpus: u64,
}

impl Device {
    /// A device without slots. `launcher` is what its enclaves are started through.
    #[must_use]
    pub fn new(limits: Limits, faults: Faults, launcher: Arc<dyn Launcher>) -> Self {
        let shared = Shared {
            limits,
            max_regions: AtomicU32::new(limits.max_regions),
            launcher,
            slots: Slots::default(),
            faults: Mutex::new(FaultState::new(faults)),
            replies: AtomicU16::new(0),
            events: AtomicU16::new(0),
            on_event: Mutex::new(None),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Carries out one command and gives its reply; `None` if an injected fault has lost the reply, so that the caller sees a timeout.
    ///
    /// `number` is the command register's value. `request` is what stands in the request window, from its first byte; only the bytes of the
    /// command's own struct are read, and fewer than those are refused with EINVAL. No input makes it panic.
    ///
    /// Returns when the command is done, which can take as long as the launcher takes.
    #[must_use]
    pub fn command(&self, number: u32, request: &[u8]) -> Option<Reply> {
        let strike = lock(&self.shared.faults).next_command(number);
        let outcome = match strike.refuse {
            Some(code) => Err(code),
            None if strike.hold => {
                tracing::warn!(number, "an injected fault holds the command until the device is reset");
                self.shared.slots.await_reset(Duration::MAX);
                Err(DeviceCode::ENODEV)
            }
            None => commands::carry_out(&self.shared, number, request),
        };
        let mut reply = outcome.unwrap_or_else(|code| Reply { rc: code.raw(), ..Reply::default() });
        if strike.spurious {
            self.shared.raise_event_now();
        }
        self.shared.slots.await_reset(strike.delay);
        if strike.lost {
            tracing::warn!(number, "an injected fault loses the reply");
            return None;
        }
        falsify(&mut reply, &strike);
        self.shared.replies.fetch_add(1, Ordering::SeqCst);
        Some(reply)
    }

    /// Sets what is called for every event (vector 1 of the PCI face); it replaces an earlier one.
    ///
    /// `callback` runs on the thread that notices the event. It must not block and must not call into the device: it sets a flag or writes
    /// an eventfd, and another thread looks with SLOT_INFO.
    pub fn on_event(&self, callback: impl Fn() + Send + Sync + 'static) {
        *lock(&self.shared.on_event) = Some(Arc::new(callback));
    }

    /// How many replies were given and events raised, both wrapping: what the register at 0x00C shows.
    #[must_use]
    pub fn event_counter(&self) -> EventCounter {
        let (replies, events) = (self.shared.replies.load(Ordering::SeqCst), self.shared.events.load(Ordering::SeqCst));
        EventCounter { replies, events }
    }

    /// What `ENABLE := 0`, a device reset and a closed connection do: ends every enclave and frees every slot.
    ///
    /// Waits for commands under way; commands that come meanwhile are refused with ENODEV. When it returns, nothing is given away, and the
    /// device can be used again.
    pub fn reset(&self) {
        self.shared.slots.free_all(|| self.shared.launcher.interrupt());
    }

    /// Replaces the fault rules; occurrences are counted afresh.
    pub fn set_faults(&self, faults: Faults) {
        *lock(&self.shared.faults) = FaultState::new(faults);
    }

    /// Raises an event although nothing has happened, as `event=spurious` does.
    pub fn raise_spurious_event(&self) {
        self.shared.raise_event_now();
    }

    /// Says that the enclave of a slot has ended by itself, as the launcher would; false if it does not run.
    ///
    /// The launcher is not told, so what it started goes on until the slot is freed. For tests of drivers and clients.
    pub fn report_end(&self, uid: SlotUid) -> bool {
        let starts = self.shared.slots.lock().slots.get(&uid).filter(|entry| entry.phase == Phase::Running).map(|entry| entry.starts);
        if let Some(starts) = starts {
            self.shared.ended(uid, starts);
        }
        starts.is_some()
    }

    /// Changes how many pieces of memory a slot may have ([`Limits::max_regions`]); drivers are told with their next SLOT_ALLOC.
    pub fn set_max_regions(&self, max_regions: u32) {
        self.shared.max_regions.store(max_regions, Ordering::SeqCst);
    }

    /// What is given away at the moment.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let table = self.shared.slots.lock();
        let reserving = usize::try_from(table.reserving).unwrap_or(usize::MAX);
        Usage {
            slots: table.slots.len().saturating_add(reserving),
            regions: table.donated.len(),
            memory_bytes: table.memory_bytes,
            vcpus: table.slots.values().map(|entry| u64::from(entry.vcpus())).sum(),
        }
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits { max_regions: self.shared.max_regions(), ..self.shared.limits }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.reset();
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("limits", &self.shared.limits).field("usage", &self.usage()).finish_non_exhaustive()
    }
}

impl Shared {
    /// How many pieces of memory a slot may have.
    pub(crate) fn max_regions(&self) -> u32 {
        self.max_regions.load(Ordering::SeqCst)
    }

    /// The notifier for the `starts`th start of a slot. It does not keep the device alive.
    pub(crate) fn notifier(self: &Arc<Self>, uid: SlotUid, starts: u64) -> EndedNotifier {
        let shared = Arc::downgrade(self);
        EndedNotifier::from_fn(move || {
            if let Some(shared) = Weak::upgrade(&shared) {
                shared.ended(uid, starts);
            }
        })
    }

    /// The enclave has ended by itself.
    fn ended(self: &Arc<Self>, uid: SlotUid, starts: u64) {
        let mut table = self.slots.lock();
        let Some(entry) = table.slots.get_mut(&uid).filter(|entry| entry.starts == starts) else { return };
        match entry.phase {
            // START has not answered yet: it tells when it does.
            Phase::Starting => entry.ended_early = true,
            Phase::Running => {
                entry.phase = Phase::Ended;
                drop(table);
                self.raise_event();
            }
            Phase::Init | Phase::Ended | Phase::Stopping | Phase::Stopped | Phase::Freeing => {}
        }
    }

    /// Raises an event, unless a fault loses or delays it.
    pub(crate) fn raise_event(self: &Arc<Self>) {
        let strike = lock(&self.faults).next_event();
        if strike.lost {
            tracing::warn!("an injected fault loses an event");
        } else if strike.delay.is_zero() {
            self.raise_event_now();
        } else {
            self.raise_event_after(strike.delay);
        }
    }

    fn raise_event_after(self: &Arc<Self>, delay: Duration) {
        let shared = Arc::downgrade(self);
        let later = move || {
            thread::sleep(delay);
            if let Some(shared) = Weak::upgrade(&shared) {
                shared.raise_event_now();
            }
        };
        if thread::Builder::new().name("late-event".to_owned()).spawn(later).is_err() {
            self.raise_event_now();
        }
    }

    fn raise_event_now(&self) {
        self.events.fetch_add(1, Ordering::SeqCst);
        let callback = lock(&self.on_event).clone();
        if let Some(callback) = callback {
            callback();
        }
    }
}

/// Puts into a reply what the fault rules say.
fn falsify(reply: &mut Reply, strike: &Strike) {
    if let Some(rc) = strike.positive_code.filter(|_| reply.rc == 0) {
        reply.rc = rc;
    }
    for &(field, value) in &strike.fields {
        match field {
            Field::Uid => reply.slot_uid = value,
            Field::Cid => reply.enclave_cid = value,
            Field::Regions => reply.mem_regions = value,
            // The field has 16 bits; a rule's further bits have no place in it.
            Field::State => reply.state = u16::try_from(value & 0xFFFF).unwrap_or(u16::MAX),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
