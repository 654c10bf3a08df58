//! One enclave from creation to release: [`Enclave`], its [`State`] and its [`Summary`].
//!
//! The operations are in the files of their names: [`crate::vcpu`], [`crate::image`], [`crate::memory`], [`crate::start`],
//! [`crate::event`], [`crate::release`], [`crate::extension`].

use core::marker::PhantomData;

use nitroxide_abi::extension::{self, EnclaveInfo};
use nitroxide_abi::pci::{self, Command, Reply};
use nitroxide_abi::{Cid, SlotUid};

use crate::device::{exchange, DeviceError};
use crate::slot::Holder;
use crate::{Device, Slot};

/// Where an enclave is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Being set up.
    Init,
    /// Started.
    Running,
    /// Ended, on its own or by NE_STOP.
    Stopped,
    /// Something else that the device said after an event; treated as neither set up nor ended.
    Other(u16),
    /// The device went away and took the slot with it.
    Gone,
}

/// A range of the client's memory that the enclave has, with its pages; the storage of an [`Enclave`] has one per call.
#[derive(Debug)]
pub struct Region<P> {
    pub(crate) address: u64,
    pub(crate) size: u64,
    pub(crate) pages: Option<P>,
}

impl<P> Default for Region<P> {
    fn default() -> Self {
        Self { address: 0, size: 0, pages: None }
    }
}

impl<P> Region<P> {
    /// Where the range starts in the client's address space, and its bytes.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        (self.address, self.size)
    }

    /// The pages that the device has or may have; fewer than the range if the device took only a part of it.
    #[must_use]
    pub fn pages(&self) -> Option<&P> {
        self.pages.as_ref()
    }
}

/// An enclave over storage of the home: `P` are the pages of one region, and `R` holds its memory regions, one per successful call of SET_USER_MEMORY_REGION.
///
/// The home keeps it behind one lock and keeps it until [`Enclave::release`] has succeeded: dropping it before would give
/// pages back that the device still uses.
#[derive(Debug)]
pub struct Enclave<P, R> {
    pub(crate) slot: SlotUid,
    /// As pool and ledger know it.
    pub(crate) holder: Holder,
    /// The pool's node when the slot was made; memory must be on it.
    pub(crate) node: i32,
    pub(crate) regions: R,
    pages: PhantomData<P>,
    pub(crate) region_count: usize,
    /// SLOT_FREE had no reply: the slot may be gone already.
    pub(crate) free_in_doubt: bool,
    /// ENCLAVE_START had no reply: the enclave may run although its state is `Init`.
    pub(crate) start_in_doubt: bool,
    /// Everything was given back.
    pub(crate) released: bool,
    pub(crate) summary: Summary,
}

/// What there is to see of an enclave; a home keeps a copy that can be read while the enclave is locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Summary {
    /// The slot's number.
    pub slot: SlotUid,
    /// Where it is in its life.
    pub state: State,
    /// Its CID; 0 before the start.
    pub cid: Cid,
    /// The flags it was started with.
    pub start_flags: u64,
    /// Why it ended, one of [`extension::exit_reason`].
    pub exit_reason: u32,
    /// What stands in the way of its end, bits of [`extension::trouble`].
    pub trouble: u32,
    /// Does poll report POLLHUP? Never taken back.
    pub hung_up: bool,
    /// vCPUs that were added.
    pub vcpus: u32,
    /// Bytes of memory that the device has accepted.
    pub memory_bytes: u64,
    /// Contiguous runs that the device has accepted, or may have.
    pub runs: u64,
    /// Most runs that the device takes.
    pub max_regions: u64,
    /// The device's last refusal as it came; 0 if there was none.
    pub device_rc: i32,
    /// Commands sent for this enclave.
    pub device_commands: u64,
    /// Commands that the device refused.
    pub device_refusals: u64,
    /// Commands without a reply in time.
    pub device_timeouts: u64,
    /// Events that this enclave looked at.
    pub events: u64,
    /// Nanoseconds since boot when it was created.
    pub created_ns: u64,
    /// Nanoseconds since boot when it was started; 0 before.
    pub started_ns: u64,
    /// Nanoseconds since boot when its end was noticed; 0 before.
    pub ended_ns: u64,
}

impl<P, R> Enclave<P, R> {
    /// The enclave of a slot, in state `Init`. `regions` bounds how many memory regions it can have.
    pub fn new(slot: &Slot, regions: R, device: &mut impl Device) -> Self {
        let summary = Summary {
            slot: slot.uid(),
            state: State::Init,
            cid: Cid::ANY,
            start_flags: 0,
            exit_reason: extension::exit_reason::NONE,
            trouble: 0,
            hung_up: false,
            vcpus: 0,
            memory_bytes: 0,
            runs: 0,
            max_regions: slot.max_regions,
            device_rc: 0,
            device_commands: 0,
            device_refusals: 0,
            device_timeouts: 0,
            events: 0,
            created_ns: device.now_ns(),
            started_ns: 0,
            ended_ns: 0,
        };
        Self {
            slot: slot.uid(),
            holder: slot.holder,
            node: slot.node,
            regions,
            pages: PhantomData,
            region_count: 0,
            free_in_doubt: false,
            start_in_doubt: false,
            released: false,
            summary,
        }
    }

    /// The slot's number.
    #[must_use]
    pub fn slot_uid(&self) -> SlotUid {
        self.slot
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> State {
        self.summary.state
    }

    /// Does poll report POLLHUP?
    #[must_use]
    pub fn hung_up(&self) -> bool {
        self.summary.hung_up
    }

    /// Everything there is to see.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// The device was reset or removed, and with it the slot: the enclave has ended, and [`Enclave::release`] only tidies up.
    pub fn device_gone(&mut self, device: &mut impl Device) {
        if self.summary.state != State::Gone {
            let was_over = self.summary.exit_reason != extension::exit_reason::NONE;
            self.summary.state = State::Gone;
            self.end(device, if was_over { self.summary.exit_reason } else { extension::exit_reason::DEVICE_GONE });
        }
    }

    /// The enclave is over: wakes pollers, for good.
    pub(crate) fn end(&mut self, device: &mut impl Device, exit_reason: u32) {
        self.summary.hung_up = true;
        self.summary.exit_reason = exit_reason;
        if self.summary.ended_ns == 0 {
            self.summary.ended_ns = device.now_ns();
        }
    }

    /// Sends one command for this enclave and counts what comes of it.
    pub(crate) fn exchange(&mut self, device: &mut impl Device, command: Command, request: &[u8]) -> Result<Reply, DeviceError> {
        if self.summary.state == State::Gone {
            return Err(DeviceError::Gone);
        }
        self.summary.device_commands = self.summary.device_commands.saturating_add(1);
        let result = exchange(device, command, request);
        match result {
            Ok(_) => {}
            Err(DeviceError::Refused { rc, .. }) => {
                self.summary.device_rc = rc;
                self.summary.device_refusals = self.summary.device_refusals.saturating_add(1);
            }
            Err(DeviceError::NoReply) => self.summary.device_timeouts = self.summary.device_timeouts.saturating_add(1),
            Err(DeviceError::NotSent) => {}
            Err(DeviceError::Gone) => self.device_gone(device),
        }
        result
    }

    /// The device's state of this slot.
    pub(crate) fn ask_state(&mut self, device: &mut impl Device) -> Result<State, DeviceError> {
        let request = pci::SlotInfo { slot_uid: self.slot.0 }.to_bytes();
        let reply = self.exchange(device, Command::SlotInfo, &request)?;
        Ok(match reply.state {
            pci::state::RUNNING => State::Running,
            pci::state::STOPPED => State::Stopped,
            other => State::Other(other),
        })
    }
}

impl State {
    /// The value that NE_ENCLAVE_INFO and NE_LIST show.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Init => extension::state::INIT,
            Self::Running => extension::state::RUNNING,
            Self::Stopped | Self::Gone => extension::state::STOPPED,
            Self::Other(state) => u32::from(state),
        }
    }
}

impl Summary {
    /// As NE_ENCLAVE_INFO shows it; `size` and `flags` are left 0.
    #[must_use]
    pub fn to_info(&self) -> EnclaveInfo {
        EnclaveInfo {
            size: 0,
            flags: 0,
            slot_uid: self.slot.0,
            enclave_cid: u64::from(self.cid.0),
            start_flags: self.start_flags,
            state: self.state.number(),
            exit_reason: self.exit_reason,
            device_rc: self.device_rc,
            vcpus: self.vcpus,
            memory_size: self.memory_bytes,
            regions: clamp(self.runs),
            max_regions: clamp(self.max_regions),
            created_ns: self.created_ns,
            started_ns: self.started_ns,
            ended_ns: self.ended_ns,
            device_commands: self.device_commands,
            device_refusals: self.device_refusals,
            device_timeouts: self.device_timeouts,
            events: self.events,
        }
    }
}

pub(crate) fn clamp(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
