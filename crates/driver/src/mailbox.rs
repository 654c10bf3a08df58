//! The device's registers used without mistaking one reply for another: a [`Mailbox`] is a [`Device`] over a [`Port`].
//!
//! Every reply moves the low half of register 0x00c by one, and nothing else does. A reply is believed only once the counter has moved
//! since its command was given; while a reply is owed, nothing is sent (W3). So where the counter stands before a command is known from
//! the reply before it, and one read per command is enough. Decisions: docs/driver.md, "The mailbox".

use nitroxide_abi::limits::DEVICE_TIMEOUT_MS;
use nitroxide_abi::pci::{Command, EventCounter, Reply, SlotFree};
use nitroxide_abi::SlotUid;

use crate::device::{Device, Notice, SendError};

/// Registers and the reply interrupt, as a home reaches them. The home serialises all use of one port.
pub trait Port {
    /// Writes the request's bytes to the request window and then the command's number; forgets reply interrupts that came before.
    ///
    /// # Errors
    ///
    /// The device was switched off or removed.
    fn submit(&mut self, command: Command, request: &[u8]) -> Result<(), PortGone>;

    /// Sleeps until a reply interrupt comes, at most `timeout_ms`; returns the milliseconds that are left, `None` when the time is
    /// up. An interrupt that came since the last `submit` or `wait` ends it at once.
    ///
    /// # Errors
    ///
    /// The device was switched off or removed.
    fn wait(&mut self, timeout_ms: u32) -> Result<Option<u32>, PortGone>;

    /// Reads the counter register.
    ///
    /// # Errors
    ///
    /// The device was switched off or removed.
    fn counter(&mut self) -> Result<EventCounter, PortGone>;

    /// Reads the reply window.
    ///
    /// # Errors
    ///
    /// The device was switched off or removed.
    fn reply(&mut self) -> Result<Reply, PortGone>;

    /// See [`Device::events_seen`].
    fn events_seen(&mut self) -> u64;

    /// See [`Device::now_ns`].
    fn now_ns(&mut self) -> u64;

    /// See [`Device::notice`].
    fn notice(&mut self, notice: &Notice);
}

/// Byte offsets of the 32-bit words of a reply that the core looks at after this command; whatever the others hold changes nothing.
///
/// Reading a register is a way to the device and back, so a port need not read more; mainline reads 18 words each time.
#[must_use]
pub fn words_of_reply(command: Command) -> &'static [usize] {
    // rc at 0, slot_uid at 8, enclave_cid at 16, mem_regions at 32, state at 64 (kernel file ne_pci_dev.h, struct ne_pci_dev_cmd_reply).
    match command {
        Command::SlotAlloc => &[0, 8, 12, 32, 36],
        Command::EnclaveStart => &[0, 16, 20],
        Command::SlotInfo => &[0, 64],
        _ => &[0],
    }
}

/// The device behind a port was switched off or removed, so that it holds nothing any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortGone;

impl From<PortGone> for SendError {
    fn from(_: PortGone) -> Self {
        Self::Gone
    }
}

/// How long after its first interrupt a device may take to move its counter, in milliseconds. If it does not, it is hardware that we
/// do not know, and interrupts are believed instead, until the counter is seen to move after all.
const GRACE_MS: u32 = 1_000;

/// How long a wait sleeps before it looks whether the reply came without its interrupt, in milliseconds; each further sleep is twice as long.
const FIRST_SLEEP_MS: u32 = 1_000;

/// Slots that are remembered because nobody knows them and the device refused to free them. Each takes a late reply to SLOT_ALLOC and a refusal.
const MOST_ORPHANS: usize = 8;

/// One device's mailbox.
#[derive(Debug)]
pub struct Mailbox<P> {
    port: P,
    timeout_ms: u32,
    /// The command whose reply is owed, and the reply counter when it was given.
    owed: Option<(Command, u16)>,
    /// Does the reply counter move? Unknown until the first reply; only `Some(true)` is final.
    counts: Option<bool>,
    /// Where the reply counter stands, if that is known without a look.
    settled: Option<u16>,
    /// Slots that nobody knows, to be freed before the next command; 0 is none.
    orphans: [u64; MOST_ORPHANS],
}

impl<P: Port> Mailbox<P> {
    /// A mailbox over the registers of a device that was just enabled.
    pub fn new(port: P) -> Self {
        Self { port, timeout_ms: DEVICE_TIMEOUT_MS, owed: None, counts: None, settled: None, orphans: [0; MOST_ORPHANS] }
    }

    /// The same with another time limit per command, in milliseconds.
    #[must_use]
    pub fn with_timeout(self, timeout_ms: u32) -> Self {
        Self { timeout_ms, ..self }
    }

    /// The port, for what a home does beside commands.
    pub fn port_mut(&mut self) -> &mut P {
        &mut self.port
    }

    /// Is a reply owed, so that no command can be sent?
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.owed.is_some()
    }

    /// The device was switched off and on again: it owes nothing and holds nothing. Its counters may start anew.
    pub fn was_reset(&mut self) {
        self.owed = None;
        self.settled = None;
        self.orphans = [0; MOST_ORPHANS];
    }

    /// Waits for the reply to the command that is owed; false when the time is up.
    ///
    /// `look_first`: may the reply have come long ago? Behind a command that was given a moment ago a look would only cost a read.
    fn await_reply(&mut self, look_first: bool) -> Result<bool, SendError> {
        let Some((_, before)) = self.owed else { return Ok(true) };
        let mut left_ms = self.timeout_ms;
        let mut sleep_ms = FIRST_SLEEP_MS;
        let mut interrupted = false;
        let mut look = look_first;
        loop {
            if look && self.was_counted(before)? {
                return Ok(true);
            }
            look = true;
            if interrupted && self.counts == Some(false) {
                return Ok(true);
            }
            if left_ms == 0 {
                if !interrupted || self.counts.is_some() {
                    return Ok(false);
                }
                self.counts = Some(false);
                self.port.notice(&Notice::CounterStandsStill);
                continue;
            }
            let now_ms = sleep_ms.min(left_ms);
            left_ms = left_ms.saturating_sub(now_ms);
            match self.port.wait(now_ms)? {
                Some(rest_ms) => {
                    interrupted = true;
                    // Each costs a millisecond at least: interrupts that come faster than a clock ticks must not make the wait endless.
                    left_ms = left_ms.saturating_add(rest_ms.min(now_ms.saturating_sub(1)));
                    if self.counts != Some(true) {
                        left_ms = left_ms.min(GRACE_MS);
                    }
                }
                // The reply may be there although its interrupt was lost.
                None => sleep_ms = sleep_ms.saturating_mul(2),
            }
        }
    }

    /// Has the counter moved since it was `before`?
    fn was_counted(&mut self, before: u16) -> Result<bool, PortGone> {
        let now = self.port.counter()?.replies;
        if now == before {
            return Ok(false);
        }
        self.counts = Some(true);
        // More than one: this device counts what we did not ask for, and the next command looks before it begins.
        self.settled = Some(now).filter(|now| *now == before.wrapping_add(1));
        Ok(true)
    }

    /// Waits until the device owes nothing; a late reply is thrown away, but a slot in it will be freed.
    fn drain(&mut self) -> Result<(), SendError> {
        let Some((command, _)) = self.owed else { return Ok(()) };
        if !self.await_reply(true)? {
            return Err(SendError::NotSent);
        }
        self.owed = None;
        let reply = self.port.reply()?;
        self.port.notice(&Notice::LateReply { command });
        if command == Command::SlotAlloc && reply.rc >= 0 {
            // Its caller was told ETIMEDOUT: nobody else will ever free this slot. Where there is no place left it stays until a reset.
            if let Some(place) = self.orphans.iter_mut().find(|slot| **slot == 0) {
                *place = reply.slot_uid;
            }
        }
        Ok(())
    }

    /// Frees one slot that nobody knows; if the device refuses, the next command tries the next one.
    fn free_orphan(&mut self) -> Result<(), SendError> {
        let Some(place) = self.orphans.iter_mut().find(|slot| **slot != 0) else { return Ok(()) };
        // Taken out: without a reply it may be free, and its number another's.
        let slot_uid = core::mem::take(place);
        match self.exchange(Command::SlotFree, &SlotFree { slot_uid }.to_bytes()) {
            Ok(reply) if reply.rc >= 0 => self.port.notice(&Notice::OrphanFreed { slot: SlotUid(slot_uid) }),
            Ok(_) => {
                self.orphans.rotate_left(1);
                if let Some(place) = self.orphans.iter_mut().rev().find(|slot| **slot == 0) {
                    *place = slot_uid;
                }
            }
            // The command that waits behind this one was not sent.
            Err(SendError::NoReply | SendError::NotSent) => return Err(SendError::NotSent),
            Err(SendError::Gone) => return Err(SendError::Gone),
        }
        Ok(())
    }

    fn exchange(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        // Only replies move the counter, and none is owed: it stands where the last reply left it.
        let before = match self.settled.take() {
            Some(before) => before,
            None => self.port.counter()?.replies,
        };
        self.port.submit(command, request)?;
        self.owed = Some((command, before));
        if !self.await_reply(false)? {
            self.port.notice(&Notice::Timeout { command });
            return Err(SendError::NoReply);
        }
        self.owed = None;
        Ok(self.port.reply()?)
    }
}

impl<P: Port> Device for Mailbox<P> {
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        self.drain()?;
        self.free_orphan()?;
        self.exchange(command, request)
    }

    fn events_seen(&mut self) -> u64 {
        self.port.events_seen()
    }

    fn now_ns(&mut self) -> u64 {
        self.port.now_ns()
    }

    fn notice(&mut self, notice: &Notice) {
        self.port.notice(notice);
    }
}
