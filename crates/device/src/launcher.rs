//! What the device starts enclaves through: a [`Launcher`] hands out [`Slot`]s, a slot takes memory, starts, stops, and gives back on drop.
//!
//! The device owns rules and accounting, the launcher owns everything that exists outside this process: claims, processes, memory, VMs. The
//! real launcher is `nitroxide_enclave::ProcessLauncher`; tests use [`NullLauncher`](crate::testing::NullLauncher).
//!
//! The device never holds a lock while one of these calls runs, and calls for one slot never overlap, so every one of them may be slow.

use std::fmt;
use std::sync::Arc;

use nitroxide_abi::{Cid, CpuId, Gpa, SlotUid};

use crate::DeviceCode;

/// A piece of the parent's memory, as a driver donates it.
///
/// The device has checked that `gpa` and `size` are multiples of 2 MiB, that `size` is not zero and that the end does not wrap. It has not
/// checked that the parent has such memory: that is the launcher's to find out (and to answer with [`DeviceCode::EFAULT`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryRun {
    /// Guest-physical address in the parent where the run begins, a multiple of 2 MiB.
    pub gpa: Gpa,
    /// Bytes, a multiple of 2 MiB above zero.
    pub size: u64,
}

/// How an enclave is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartRequest {
    /// The CID the client asks for, 4 to 0xFFFFFFFE; `None` leaves the choice to the launcher.
    pub cid: Option<Cid>,
    /// Whether the enclave runs in debug mode: with a readable console and zeroed PCRs.
    pub debug: bool,
    /// Number of vCPUs, 1 and up.
    pub vcpus: u32,
    /// The Linux CPU numbers the driver named, ascending. Fewer than `vcpus` if some were added in bulk, which names none.
    pub cpus: Vec<CpuId>,
}

/// Hands out slots.
pub trait Launcher: Send + Sync {
    /// Reserves what one enclave needs before it has memory: at least a uid that no other slot of this world has.
    ///
    /// Called for SLOT_ALLOC, from any thread, possibly several at a time.
    ///
    /// # Errors
    ///
    /// The code that the driver is given; nothing stays reserved.
    fn reserve_slot(&self) -> Result<Box<dyn Slot>, DeviceCode>;

    /// Asks calls under way to come back soon, refused: the device is being reset and waits for them.
    ///
    /// Called from any thread, again and again while the reset waits. Stops and drops may go on as ever.
    fn interrupt(&self) {}
}

/// One reserved slot. Dropping it is SLOT_FREE: whatever the state, everything it holds goes back before the drop returns.
pub trait Slot: Send {
    /// The uid, never zero, the same at every call.
    fn uid(&self) -> SlotUid;

    /// Takes the present content of a piece of the parent's memory as the enclave's next piece of linear memory.
    ///
    /// Called for SLOT_ADD_MEM, before a successful [`start`](Slot::start) only. The device has refused runs that overlap others.
    ///
    /// # Errors
    ///
    /// The code that the driver is given; nothing of the run is kept then.
    fn add_memory(&mut self, run: MemoryRun) -> Result<(), DeviceCode>;

    /// Starts the enclave and returns its CID.
    ///
    /// Called for ENCLAVE_START, when memory and vCPUs suffice; again after a failure, never after a success. From its success on, `ended`
    /// is to be told when the enclave ends by itself.
    ///
    /// # Errors
    ///
    /// The code that the driver is given: [`DeviceCode::EADDRINUSE`] for a CID in use, [`DeviceCode::EINVAL`] for an image that does not
    /// verify. The slot is as before the call.
    fn start(&mut self, request: &StartRequest, ended: EndedNotifier) -> Result<Cid, DeviceCode>;

    /// Ends the enclave; returns when its VM and its processes are gone, since the driver then reuses the memory.
    ///
    /// Called after a successful [`start`](Slot::start) only, also if the enclave has ended by itself meanwhile. It cannot fail.
    fn stop(&mut self);
}

/// With it a launcher says that an enclave has ended by itself.
#[derive(Clone)]
pub struct EndedNotifier(Arc<dyn Fn() + Send + Sync>);

impl EndedNotifier {
    /// A notifier that calls `f`, which must not block. Public for tests of launchers.
    pub fn from_fn(f: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    /// Says that the enclave has ended by itself.
    ///
    /// May be called from any thread, any number of times, even from inside [`Slot::start`] and after [`Slot::stop`] or the slot's drop:
    /// only the first call for a running enclave has an effect. It never waits for a command.
    pub fn notify(&self) {
        (self.0)();
    }
}

impl fmt::Debug for EndedNotifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EndedNotifier")
    }
}
