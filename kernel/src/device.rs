// SPDX-License-Identifier: GPL-2.0
//! The device behind BAR 3: its registers as the core's `Port`, its two interrupts, and how it is switched on and off.
//!
//! [`NitroDevice`] outlives the PCI device: enclaves hold it, and learn from it that it is gone.

use kernel::io::Io;
use kernel::irq::{Handler, IrqReturn};
use kernel::pci;
use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Relaxed, Release};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::Delta;
use kernel::workqueue::{impl_has_delayed_work, impl_has_work, new_delayed_work, new_work, DelayedWork, Work, WorkItem};
use nitroxide_abi::pci as registers;
use nitroxide_abi::pci::{Command, EventCounter, Reply};
use nitroxide_abi::{limits, Code, SlotUid};
use nitroxide_driver::mailbox::{words_of_reply, PortGone};
use nitroxide_driver::{Device, Mailbox, Notice, Port, SendError};

use crate::enclave::EnclaveFile;
use crate::home::Home;
use crate::sys::{OrderedQueue, ReplySignal, Waited};
use crate::{log, statistics, sys, trace};

/// Bytes of BAR 3 that are used.
pub(crate) const REGISTER_BYTES: usize = registers::REGISTER_BYTES as usize;
const ENABLE: usize = registers::ENABLE as usize;
const VERSION: usize = registers::VERSION as usize;
const COMMAND: usize = registers::COMMAND as usize;
const EVENT_COUNTER: usize = registers::EVENT_COUNTER as usize;
const REQUEST: usize = registers::REQUEST as usize;
const REPLY: usize = registers::REPLY as usize;

/// How often switching off is looked at, in milliseconds.
const LOOK_MS: u32 = 10;
/// What a register of a device that was pulled out reads as.
const PULLED_OUT: u8 = 0xFF;

type Bar = pci::DevresBar<REGISTER_BYTES>;

/// BAR 3 and what the interrupts leave behind.
#[pin_data]
pub(crate) struct Registers {
    bar: Bar,
    #[pin]
    reply: ReplySignal,
    events: Atomic<i64>,
    /// Is the device being switched off for good? Set before it is told.
    leaving: Atomic<bool>,
    /// Was the device switched off, or pulled out? Never taken back: the next device has registers of its own.
    gone: Atomic<bool>,
}

impl Registers {
    /// The registers of a device that is not enabled yet.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub(crate) fn new(bar: Bar) -> Result<Arc<Self>> {
        let registers = pin_init!(Self {
            bar,
            reply <- ReplySignal::new(),
            events: Atomic::new(0),
            leaving: Atomic::new(false),
            gone: Atomic::new(false),
        });
        Arc::pin_init(registers, GFP_KERNEL)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Acquire)
    }

    /// Everybody who waits for the device, or will, learns that it is gone.
    fn set_gone(&self) {
        self.gone.store(true, Release);
        self.reply.give();
    }

    /// A register reads as ones: so do all of a device that was pulled out, and this one cannot.
    fn look_whether_gone(&self) {
        if matches!(self.enabled(), None | Some(PULLED_OUT)) {
            self.set_gone();
        }
    }

    /// From now on what stands in the reply's window is not a reply any more: it is empty, which would look like success.
    fn set_leaving(&self) {
        self.leaving.store(true, Release);
    }

    /// Waits for the end of switching off, if that has begun: a command that was under way then was not answered.
    fn wait_if_leaving(&self) {
        while self.leaving.load(Acquire) && !self.is_gone() {
            kernel::time::delay::fsleep(Delta::from_millis(LOOK_MS.into()));
        }
    }

    fn enabled(&self) -> Option<u8> {
        self.bar.try_access_with(|bar| bar.read8(ENABLE))
    }

    /// Switches the device off and waits until it says so; false if it does not within two minutes.
    fn disable(&self) -> bool {
        if self.bar.try_access_with(|bar| bar.write8(registers::DISABLED, ENABLE)).is_none() {
            return true;
        }
        for _ in 0..=limits::DEVICE_TIMEOUT_MS / LOOK_MS {
            if matches!(self.enabled(), None | Some(registers::DISABLED | PULLED_OUT)) {
                return true;
            }
            kernel::time::delay::fsleep(Delta::from_millis(LOOK_MS.into()));
        }
        false
    }

    /// Mainline's handshake: off, version 1, on.
    ///
    /// # Errors
    ///
    /// EIO if the device has another version, or does not switch on.
    pub(crate) fn enable(&self) -> Result {
        if !self.disable() {
            pr_err!("the device does not switch off\n");
        }
        let version = self.bar.try_access_with(|bar| {
            bar.write16(registers::VERSION_ONE, VERSION);
            bar.read16(VERSION)
        });
        if version != Some(registers::VERSION_ONE) {
            pr_err!("the device does not speak version {}\n", registers::VERSION_ONE);
            return Err(EIO);
        }
        self.bar.try_access_with(|bar| bar.write8(registers::ENABLED, ENABLE));
        if self.enabled() != Some(registers::ENABLED) {
            pr_err!("the device does not switch on\n");
            return Err(EIO);
        }
        Ok(())
    }
}

/// The registers as the mailbox uses them; its lock serialises that.
pub(crate) struct RegisterPort {
    registers: Arc<Registers>,
    /// May a kill of the waiting process end the wait? Not at the last close.
    killable: bool,
    /// The reply counter when it was first read, and whether it ever moved.
    first: Option<u16>,
    counts: bool,
    /// The command that was submitted last.
    command: Option<Command>,
}

impl Port for RegisterPort {
    fn submit(&mut self, command: Command, request: &[u8]) -> Result<(), PortGone> {
        if self.registers.is_gone() {
            return Err(PortGone);
        }
        statistics::COMMANDS.count();
        self.registers.reply.forget();
        self.command = Some(command);
        let written = self.registers.bar.try_access_with(|bar| {
            let words = request.chunks_exact(4);
            let tail = words.remainder();
            let mut at = REQUEST;
            let mut result = Ok(());
            for word in words {
                let mut bytes = [0; 4];
                bytes.copy_from_slice(word);
                result = result.and(bar.try_write32(u32::from_le_bytes(bytes), at));
                at = at.saturating_add(4);
            }
            for byte in tail {
                result = result.and(bar.try_write8(*byte, at));
                at = at.saturating_add(1);
            }
            // Requests are shorter than the window: nothing above can have failed.
            if result.is_ok() {
                bar.write32(command.number(), COMMAND);
            }
        });
        // Gone between the look above and the writes: a device that is off does nothing with them.
        written.filter(|()| !self.registers.is_gone()).ok_or(PortGone)
    }

    fn wait(&mut self, timeout_ms: u32) -> Result<Option<u32>, PortGone> {
        if self.registers.is_gone() {
            return Err(PortGone);
        }
        // Before the counter is known to move, interrupts alone may count, and a kill must not look like the end of that time.
        let waited = self.registers.reply.wait(timeout_ms, self.killable && self.counts);
        if self.registers.is_gone() {
            return Err(PortGone);
        }
        Ok(match waited {
            Waited::Signalled(left_ms) => Some(left_ms),
            // The reply stays owed, and the mailbox waits for it before the next command.
            Waited::TimeUp | Waited::Killed => None,
        })
    }

    fn counter(&mut self) -> Result<EventCounter, PortGone> {
        let value = self.registers.bar.try_access_with(|bar| bar.read32(EVENT_COUNTER)).unwrap_or(u32::MAX);
        if value == u32::MAX {
            self.registers.look_whether_gone();
        }
        if self.registers.is_gone() {
            return Err(PortGone);
        }
        let counter = EventCounter::from_register(value);
        self.counts |= *self.first.get_or_insert(counter.replies) != counter.replies;
        Ok(counter)
    }

    fn reply(&mut self) -> Result<Reply, PortGone> {
        let mut bytes = [0; Reply::SIZE];
        let read = self.registers.bar.try_access_with(|bar| {
            for at in self.command.map_or(&[][..], words_of_reply) {
                let value = bar.try_read32(REPLY.saturating_add(*at)).unwrap_or(u32::MAX);
                if let Some(word) = bytes.get_mut(*at..at.saturating_add(4)) {
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
        });
        let reply = Reply::from_bytes(&bytes);
        // Gone meanwhile: what was read may be what a missing device reads as, and that is -1.
        if reply.rc == -1 {
            self.registers.look_whether_gone();
        }
        // Looked at after the reading, as the device empties the window only after it was told to.
        self.registers.wait_if_leaving();
        read.filter(|()| !self.registers.is_gone()).ok_or(PortGone)?;
        if reply.rc < 0 {
            statistics::COMMANDS_REFUSED.count();
        }
        Ok(reply)
    }

    fn events_seen(&mut self) -> u64 {
        events_of(&self.registers)
    }

    fn now_ns(&mut self) -> u64 {
        sys::boot_ns()
    }

    fn notice(&mut self, notice: &Notice) {
        match notice {
            Notice::Timeout { .. } => statistics::COMMANDS_TIMED_OUT.count(),
            Notice::LateReply { .. } => statistics::LATE_REPLIES.count(),
            _ => {}
        }
        log::notice(notice);
    }
}

fn events_of(registers: &Registers) -> u64 {
    u64::from_ne_bytes(registers.events.load(Relaxed).to_ne_bytes())
}

/// One device, from its probe until the last enclave that was made on it is closed.
#[pin_data]
pub(crate) struct NitroDevice {
    registers: Arc<Registers>,
    #[pin]
    mailbox: Mutex<Mailbox<RegisterPort>>,
    #[pin]
    work: Work<NitroDevice>,
    #[pin]
    retry: DelayedWork<NitroDevice, RETRY>,
    #[pin]
    retries: Mutex<Retries>,
    home: Arc<Home>,
}

impl_has_work! { impl HasWork<Self> for NitroDevice { self.work } }
impl_has_delayed_work! { impl HasDelayedWork<Self, 1> for NitroDevice { self.retry } }

/// Which of the two works tries again.
const RETRY: u64 = 1;
/// How long after a failure it is tried again, in milliseconds; each further time twice as long.
const FIRST_RETRY_MS: u32 = 1_000;
/// The longest time between two tries; what a killed process had may come back so much later than the device is free again.
const LAST_RETRY_MS: u32 = 8_000;

/// When what the device did not do is tried again.
struct Retries {
    /// Waits the work for its time?
    armed: bool,
    /// The device is gone: nothing is tried on it any more, and the work must not be queued.
    over: bool,
    delay_ms: u32,
}

impl NitroDevice {
    /// A device with these registers, which may be enabled from now on.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub(crate) fn new(registers: Arc<Registers>, home: Arc<Home>) -> Result<Arc<Self>> {
        let port = RegisterPort { registers: registers.clone(), killable: false, first: None, counts: false, command: None };
        Arc::pin_init(
            pin_init!(Self {
                registers,
                mailbox <- new_mutex!(Mailbox::new(port), "nitroxide::mailbox"),
                work <- new_work!("nitroxide::event"),
                retry <- new_delayed_work!("nitroxide::retry"),
                retries <- new_mutex!(Retries { armed: false, over: false, delay_ms: FIRST_RETRY_MS }, "nitroxide::retries"),
                home,
            }),
            GFP_KERNEL,
        )
    }

    /// Was it switched off or pulled out?
    pub(crate) fn is_gone(&self) -> bool {
        self.registers.is_gone()
    }

    /// The way to the device for one call. `killable`: may a kill of the process end it?
    pub(crate) fn link(&self, killable: bool) -> Link<'_> {
        Link { device: self, killable }
    }

    /// Switches the device off for good: its enclaves are gone, and what they had comes back (W4).
    pub(crate) fn switch_off(self: &Arc<Self>) {
        self.home.unpublish(self);
        self.registers.set_leaving();
        if !self.registers.disable() {
            pr_err!("the device does not switch off; what its enclaves have is taken back all the same\n");
        }
        self.registers.set_gone();
        self.end_retries();
        self.home.for_each_on(self, EnclaveFile::device_gone);
    }
}

impl NitroDevice {
    /// Would a command have to wait for another's, or for a reply that is owed? Never if the device is gone.
    pub(crate) fn is_busy(&self) -> bool {
        !self.is_gone() && self.mailbox.try_lock().is_none_or(|mailbox| mailbox.is_stuck())
    }

    /// The device did not do what must be done: that is tried again after a while.
    pub(crate) fn try_again_later(self: &Arc<Self>) {
        let mut retries = self.retries.lock();
        if retries.armed || retries.over {
            return;
        }
        // While the device is not over the module is loaded, and its queue there.
        let Some(queue) = crate::queue() else { return };
        let delay = kernel::time::msecs_to_jiffies(retries.delay_ms);
        retries.armed = queue.queue().enqueue_delayed::<Arc<Self>, RETRY>(self.clone(), delay).is_ok();
    }

    /// Nothing is tried again from now on, and nothing is queued or under way when this returns.
    fn end_retries(&self) {
        self.retries.lock().over = true;
        sys::flush_delayed(&self.retry);
    }
}

impl WorkItem<RETRY> for NitroDevice {
    type Pointer = Arc<Self>;

    /// Time to try again.
    fn run(this: Arc<Self>) {
        {
            let mut retries = this.retries.lock();
            retries.armed = false;
            if retries.over {
                return;
            }
            retries.delay_ms = retries.delay_ms.saturating_mul(2).min(LAST_RETRY_MS);
        }
        // Whatever fails again asks for the next time.
        this.home.for_each_on(&this, EnclaveFile::retry);
        let mut retries = this.retries.lock();
        if !retries.armed {
            retries.delay_ms = FIRST_RETRY_MS;
        }
    }
}

impl WorkItem for NitroDevice {
    type Pointer = Arc<Self>;

    /// After an event every enclave is looked at; one that a slow call has locked is passed over and looks itself (W9).
    fn run(this: Arc<Self>) {
        this.home.for_each_on(&this, EnclaveFile::note_event);
        this.home.retry_closed(&this, None);
    }
}

/// The device as the core uses it.
pub(crate) struct Link<'a> {
    device: &'a NitroDevice,
    killable: bool,
}

impl Device for Link<'_> {
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        let mut mailbox = if self.killable {
            // A process that is killed while another's command is under way has sent nothing, and nobody sees its answer.
            sys::lock_killable(&self.device.mailbox).ok_or(SendError::NotSent)?
        } else {
            self.device.mailbox.lock()
        };
        mailbox.port_mut().killable = self.killable;
        let begun = sys::boot_ns();
        let result = mailbox.send(command, request);
        let rc = match &result {
            Ok(reply) => reply.rc,
            Err(SendError::NotSent) => Code::EBUSY.negative(),
            Err(SendError::NoReply) => Code::ETIMEDOUT.negative(),
            Err(SendError::Gone) => Code::ENODEV.negative(),
        };
        // Requests that are about a slot begin with its number.
        let slot = request.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        trace::command(command, slot, rc, sys::boot_ns().saturating_sub(begun));
        result
    }

    fn events_seen(&mut self) -> u64 {
        events_of(&self.device.registers)
    }

    fn now_ns(&mut self) -> u64 {
        sys::boot_ns()
    }

    fn notice(&mut self, notice: &Notice) {
        log::notice(notice);
    }

    fn refused(&mut self, slot: SlotUid, why: &dyn core::fmt::Display) {
        trace::refused(slot, why);
    }
}

/// Vector 0: a reply.
pub(crate) struct ReplyInterrupt(pub(crate) Arc<Registers>);

impl Handler for ReplyInterrupt {
    fn handle(&self) -> IrqReturn {
        self.0.reply.give();
        IrqReturn::Handled
    }
}

/// Vector 1: some enclave's state may have changed.
pub(crate) struct EventInterrupt {
    pub(crate) device: Arc<NitroDevice>,
    pub(crate) queue: Arc<OrderedQueue>,
}

impl Handler for EventInterrupt {
    fn handle(&self) -> IrqReturn {
        self.device.registers.events.add(1, Relaxed);
        statistics::EVENTS.count();
        trace::event(events_of(&self.device.registers));
        // Refused if it is queued already: it has not begun then, and will see this event too.
        let _ = self.queue.queue().enqueue::<Arc<NitroDevice>, 0>(self.device.clone());
        IrqReturn::Handled
    }
}
