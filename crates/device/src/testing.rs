//! A launcher that starts nothing, for tests and benchmarks of devices, drivers and clients.
//!
//! [`NullLauncher`] keeps books only. Tests can make single calls fail, make them wait at a gate, and end enclaves as if by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nitroxide_abi::{Cid, SlotUid};

use crate::{DeviceCode, EndedNotifier, Launcher, MemoryRun, Slot, StartRequest};

/// The first CID that is chosen when a client leaves the choice.
const FIRST_FREE_CID: u32 = 16;

/// A call to a launcher or one of its slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// [`Launcher::reserve_slot`].
    ReserveSlot,
    /// [`Slot::add_memory`].
    AddMemory,
    /// [`Slot::start`].
    Start,
    /// [`Slot::stop`]. It can wait at a gate, but not be refused.
    Stop,
    /// The drop of a slot. It can wait at a gate, but not be refused.
    Drop,
}

/// A launcher that starts nothing. Clones are the same launcher.
#[derive(Debug, Clone, Default)]
pub struct NullLauncher {
    books: Arc<Books>,
}

#[derive(Debug, Default)]
struct Books {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last_uid: u64,
    slots: BTreeMap<SlotUid, SlotBook>,
    refusals: BTreeMap<Call, DeviceCode>,
    closed_gates: BTreeSet<Call>,
    waiting: Vec<Call>,
}

#[derive(Debug, Default)]
struct SlotBook {
    memory: Vec<MemoryRun>,
    running: Option<(Cid, EndedNotifier)>,
    start: Option<StartRequest>,
}

impl NullLauncher {
    /// Number of slots that are reserved and not dropped.
    #[must_use]
    pub fn live_slots(&self) -> usize {
        self.books.lock().slots.len()
    }

    /// Number of enclaves that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.books.lock().slots.values().filter(|slot| slot.running.is_some()).count()
    }

    /// The pieces of memory a slot was given, in order; empty for a slot that is not there.
    #[must_use]
    pub fn memory(&self, uid: SlotUid) -> Vec<MemoryRun> {
        self.books.lock().slots.get(&uid).map(|slot| slot.memory.clone()).unwrap_or_default()
    }

    /// What the slot was last started with, successfully.
    #[must_use]
    pub fn start_request(&self, uid: SlotUid) -> Option<StartRequest> {
        self.books.lock().slots.get(&uid).and_then(|slot| slot.start.clone())
    }

    /// Makes every later call of this kind fail, or work again with `None`.
    pub fn refuse(&self, call: Call, code: Option<DeviceCode>) {
        let mut state = self.books.lock();
        match code {
            Some(code) => state.refusals.insert(call, code),
            None => state.refusals.remove(&call),
        };
    }

    /// Lets calls of this kind wait until [`open_gate`](Self::open_gate).
    pub fn close_gate(&self, call: Call) {
        self.books.lock().closed_gates.insert(call);
    }

    /// Lets calls of this kind, waiting ones included, go on.
    pub fn open_gate(&self, call: Call) {
        self.books.lock().closed_gates.remove(&call);
        self.books.changed.notify_all();
    }

    /// Waits until a call of this kind waits at its gate.
    pub fn wait_at_gate(&self, call: Call) {
        let mut state = self.books.lock();
        while !state.waiting.contains(&call) {
            state = self.books.wait(state);
        }
    }

    /// Ends a running enclave as if by itself; `false` if none runs in this slot.
    pub fn end(&self, uid: SlotUid) -> bool {
        let ended = self.books.lock().slots.get_mut(&uid).and_then(|slot| slot.running.take());
        ended.is_some_and(|(_, notifier)| {
            notifier.notify();
            true
        })
    }
}

impl Books {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits at the call's gate, then says whether the call is refused.
    fn enter(&self, call: Call) -> Result<MutexGuard<'_, State>, DeviceCode> {
        let mut state = self.lock();
        if state.closed_gates.contains(&call) {
            state.waiting.push(call);
            self.changed.notify_all();
            while state.closed_gates.contains(&call) {
                state = self.wait(state);
            }
            if let Some(position) = state.waiting.iter().position(|waiting| *waiting == call) {
                state.waiting.swap_remove(position);
            }
        }
        match state.refusals.get(&call) {
            Some(code) => Err(*code),
            None => Ok(state),
        }
    }
}

impl Launcher for NullLauncher {
    fn reserve_slot(&self) -> Result<Box<dyn Slot>, DeviceCode> {
        let mut state = self.books.enter(Call::ReserveSlot)?;
        state.last_uid = state.last_uid.wrapping_add(1);
        let uid = SlotUid(state.last_uid);
        state.slots.insert(uid, SlotBook::default());
        Ok(Box::new(NullSlot { books: Arc::clone(&self.books), uid }))
    }
}

struct NullSlot {
    books: Arc<Books>,
    uid: SlotUid,
}

impl Slot for NullSlot {
    fn uid(&self) -> SlotUid {
        self.uid
    }

    fn add_memory(&mut self, run: MemoryRun) -> Result<(), DeviceCode> {
        let mut state = self.books.enter(Call::AddMemory)?;
        state.slots.entry(self.uid).or_default().memory.push(run);
        Ok(())
    }

    fn start(&mut self, request: &StartRequest, ended: EndedNotifier) -> Result<Cid, DeviceCode> {
        let mut state = self.books.enter(Call::Start)?;
        let taken: BTreeSet<Cid> = state.slots.values().filter_map(|slot| slot.running.as_ref()).map(|(cid, _)| *cid).collect();
        let cid = match request.cid {
            Some(cid) if taken.contains(&cid) => return Err(DeviceCode::EADDRINUSE),
            Some(cid) => cid,
            None => (FIRST_FREE_CID..).map(Cid).find(|cid| !taken.contains(cid)).ok_or(DeviceCode::ENOSPC)?,
        };
        let slot = state.slots.entry(self.uid).or_default();
        slot.running = Some((cid, ended));
        slot.start = Some(request.clone());
        Ok(cid)
    }

    fn stop(&mut self) {
        let state = self.books.enter(Call::Stop);
        let mut state = state.unwrap_or_else(|_| self.books.lock());
        state.slots.entry(self.uid).or_default().running = None;
    }
}

impl Drop for NullSlot {
    fn drop(&mut self) {
        let state = self.books.enter(Call::Drop);
        let mut state = state.unwrap_or_else(|_| self.books.lock());
        state.slots.remove(&self.uid);
    }
}
