//! The launcher that a device starts real enclaves through: one process for each.
//!
//! [`ProcessLauncher`] belongs to the owner of a device. Besides what the device asks of it, it remembers what an owner wants to tell its user:
//! why a START was refused, and how an enclave came up and ended.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

use nitroxide_device::{DeviceCode, Launcher, Slot, StartRequest};
use nitroxide_world::World;

use crate::given::Given;
use crate::options::{LaunchOptions, ParentMemory, SlotDetails};
use crate::report::EndReport;
use crate::slot::{ProcessSlot, lock};
use crate::stage::StageTime;

/// Of how many freed slots records are kept.
const MOST_FINISHED: usize = 64;

/// Why a START or a reservation was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the device answered, positive.
    pub errno: i32,
    /// Why, for people.
    pub message: String,
}

/// What is known about a slot's enclave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotRecord {
    /// Its id.
    pub enclave_id: String,
    /// Its name, once it runs.
    pub name: Option<String>,
    /// Its CID, once it runs.
    pub cid: Option<u32>,
    /// Its process, once there is one.
    pub process_id: Option<u32>,
    /// The stages its owner knows of.
    pub stages: Vec<StageTime>,
    /// Why its last START was refused.
    pub refusal: Option<Refusal>,
    /// How it ended.
    pub end: Option<EndReport>,
}

/// What an owner may want to tell its user about, as it happens.
#[derive(Debug)]
pub enum Happening<'a> {
    /// An enclave runs.
    Started {
        /// Its slot; its record has CID, name and process.
        slot_uid: u64,
        /// Its memory in bytes.
        memory_bytes: u64,
        /// How it was started.
        request: &'a StartRequest,
    },
    /// An enclave was not started.
    Refused {
        /// Its slot.
        slot_uid: u64,
        /// Why not.
        refusal: &'a Refusal,
    },
    /// An enclave has ended, by itself or because it was stopped.
    Ended {
        /// Its slot.
        slot_uid: u64,
        /// How.
        report: &'a EndReport,
    },
}

/// Who is told.
type Observer = dyn Fn(&Happening<'_>) + Send + Sync;

/// Starts every enclave in a process of its own.
pub struct ProcessLauncher {
    inner: Arc<Inner>,
}

/// What the launcher's slots share.
pub(crate) struct Inner {
    pub(crate) world: World,
    pub(crate) memory: Arc<dyn ParentMemory>,
    pub(crate) options: LaunchOptions,
    /// Pages of the parent's that are with enclaves.
    pub(crate) given: Arc<Given>,
    details: Mutex<HashMap<u64, SlotDetails>>,
    records: Mutex<Records>,
    observer: Mutex<Option<Arc<Observer>>>,
    /// Our ends of the sockets of processes that have not answered their start yet.
    starting: Mutex<Vec<Weak<OwnedFd>>>,
}

#[derive(Debug, Default)]
struct Records {
    by_slot: HashMap<u64, SlotRecord>,
    /// Freed slots, oldest first.
    finished: VecDeque<u64>,
    /// Why the last reservation was refused.
    reservation: Option<Refusal>,
}

impl ProcessLauncher {
    /// A launcher for enclaves of `world` whose memory comes from `memory`. Removes what killed processes left behind in the world.
    #[must_use]
    pub fn new(world: World, memory: Arc<dyn ParentMemory>, options: LaunchOptions) -> Self {
        if let Err(error) = world.sweep() {
            tracing::warn!(%error, "The world's directory cannot be swept.");
        }
        Self {
            inner: Arc::new(Inner {
                world,
                memory,
                options,
                given: Arc::default(),
                details: Mutex::default(),
                records: Mutex::default(),
                observer: Mutex::default(),
                starting: Mutex::default(),
            }),
        }
    }

    /// Sets who is told of what happens; it replaces an earlier one. Called from any thread, and must not call back into the device.
    pub fn observe(&self, observer: impl Fn(&Happening<'_>) + Send + Sync + 'static) {
        *lock(&self.inner.observer) = Some(Arc::new(observer));
    }

    /// Decides about one slot; takes effect at its next START.
    pub fn set_details(&self, slot_uid: u64, details: SlotDetails) {
        lock(&self.inner.details).insert(slot_uid, details);
    }

    /// What was decided about a slot, or what holds for all.
    #[must_use]
    pub fn details(&self, slot_uid: u64) -> SlotDetails {
        self.inner.details(slot_uid)
    }

    /// Why the last START of a slot was refused.
    #[must_use]
    pub fn refusal(&self, slot_uid: u64) -> Option<Refusal> {
        self.record(slot_uid)?.refusal
    }

    /// Why the last reservation of a slot was refused.
    #[must_use]
    pub fn reservation_refusal(&self) -> Option<Refusal> {
        lock(&self.inner.records).reservation.clone()
    }

    /// What is known about a slot's enclave; of freed slots, the last 64 are known.
    #[must_use]
    pub fn record(&self, slot_uid: u64) -> Option<SlotRecord> {
        lock(&self.inner.records).by_slot.get(&slot_uid).cloned()
    }

    /// The world that its enclaves live in.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.inner.world
    }
}

impl Launcher for ProcessLauncher {
    fn reserve_slot(&self) -> Result<Box<dyn Slot>, DeviceCode> {
        match self.inner.world.claim_slot() {
            Ok(claim) => Ok(Box::new(ProcessSlot::new(Arc::clone(&self.inner), claim))),
            Err(error) => {
                let (errno, message) = (error.errno(), crate::refused::chain(&error));
                tracing::warn!(errno, message, "No slot can be reserved.");
                lock(&self.inner.records).reservation = Some(Refusal { errno, message });
                Err(DeviceCode::from_raw(-errno).unwrap_or(DeviceCode::EIO))
            }
        }
    }

    fn interrupt(&self) {
        for socket in lock(&self.inner.starting).drain(..).filter_map(|socket| socket.upgrade()) {
            // Its process sees our end close and ends. The start is refused even if it does not: then it is killed.
            let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
        }
    }
}

impl fmt::Debug for ProcessLauncher {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("ProcessLauncher").field(&self.inner).finish()
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Inner").field("world", &self.world).field("options", &self.options).finish_non_exhaustive()
    }
}

impl Inner {
    /// What was decided about a slot, or what holds for all.
    pub(crate) fn details(&self, slot_uid: u64) -> SlotDetails {
        let default = || SlotDetails { name: self.options.name.clone(), creator_pid: self.options.creator_pid };
        lock(&self.details).get(&slot_uid).cloned().unwrap_or_else(default)
    }

    pub(crate) fn begin_record(&self, slot_uid: u64) {
        let enclave_id = self.options.parent_identity.instance_id.enclave_id(slot_uid);
        let record = SlotRecord { enclave_id, ..SlotRecord::default() };
        lock(&self.records).by_slot.insert(slot_uid, record);
    }

    pub(crate) fn update_record(&self, slot_uid: u64, update: impl FnOnce(&mut SlotRecord)) {
        if let Some(record) = lock(&self.records).by_slot.get_mut(&slot_uid) {
            update(record);
        }
    }

    pub(crate) fn add_stage(&self, slot_uid: u64, time: StageTime) {
        self.update_record(slot_uid, |record| {
            // A slot that starts a second time tells of its second start.
            record.stages.retain(|earlier| earlier.stage != time.stage);
            record.stages.push(time);
        });
    }

    pub(crate) fn refuse(&self, slot_uid: u64, refusal: Refusal) {
        tracing::warn!(errno = refusal.errno, message = refusal.message, "An enclave is not started.");
        self.tell(&Happening::Refused { slot_uid, refusal: &refusal });
        self.update_record(slot_uid, |record| record.refusal = Some(refusal));
    }

    /// Notes a process that has not answered its start yet, so that it can be interrupted.
    pub(crate) fn begins(&self, socket: &Arc<OwnedFd>) {
        let mut starting = lock(&self.starting);
        starting.retain(|socket| socket.strong_count() > 0);
        starting.push(Arc::downgrade(socket));
    }

    /// It has answered.
    pub(crate) fn has_begun(&self, socket: &Arc<OwnedFd>) {
        lock(&self.starting).retain(|known| !std::ptr::eq(known.as_ptr(), Arc::as_ptr(socket)));
    }

    /// Tells the observer, if there is one.
    pub(crate) fn tell(&self, happening: &Happening<'_>) {
        let observer = lock(&self.observer).clone();
        if let Some(observer) = observer {
            observer(happening);
        }
    }

    /// Keeps the record of a freed slot for a while.
    pub(crate) fn finish_record(&self, slot_uid: u64) {
        lock(&self.details).remove(&slot_uid);
        let mut records = lock(&self.records);
        records.finished.push_back(slot_uid);
        while records.finished.len() > MOST_FINISHED {
            if let Some(oldest) = records.finished.pop_front() {
                records.by_slot.remove(&oldest);
            }
        }
    }
}
