//! The device model behind registers and a virtual clock: [`Registers`], a [`Port`] for the mailbox.

use std::collections::VecDeque;

use nitroxide_abi::pci::{Command, EventCounter, Reply};
use nitroxide_driver::mailbox::PortGone;
use nitroxide_driver::{Notice, Port};

use super::device::{Fault, Model};

/// How the reply to one command comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Delivery {
    /// After so many milliseconds.
    pub delay_ms: u32,
    /// Without its interrupt.
    pub silent: bool,
    /// An interrupt without a reply comes first.
    pub spurious: bool,
}

/// Registers of one device.
#[derive(Debug)]
pub struct Registers {
    pub model: Model,
    pub now_ms: u64,
    /// How the next replies come; prompt when it is empty.
    pub deliveries: VecDeque<Delivery>,
    /// The counter register never moves.
    pub counter_stands_still: bool,
    /// Spurious interrupts may come before the first reply.
    pub spurious_from_the_start: bool,
    /// The next reply is counted so many times too often.
    pub stray_counts: u16,
    /// Interrupts come all the time, so fast that no time passes between two.
    pub storm: bool,
    /// How often the counter was read.
    pub counter_reads: usize,
    counter: EventCounter,
    /// The window.
    reply: Reply,
    /// What the device answered to the last command, whether or not it arrived.
    pub last_made: Option<Reply>,
    /// A reply on its way: when, what, silent.
    coming: Option<(u64, Reply, bool)>,
    interrupt: bool,
    /// Has any reply come?
    replied: bool,
    /// Commands given while a reply was on its way: a real device may do anything then.
    pub overruns: usize,
}

impl Registers {
    pub fn new(model: Model) -> Self {
        Self {
            model,
            now_ms: 0,
            deliveries: VecDeque::new(),
            counter_stands_still: false,
            spurious_from_the_start: false,
            stray_counts: 0,
            storm: false,
            counter_reads: 0,
            counter: EventCounter { replies: u16::MAX - 2, events: 7 },
            reply: Reply::default(),
            last_made: None,
            coming: None,
            interrupt: false,
            replied: false,
            overruns: 0,
        }
    }

    /// Time passes; what is due comes.
    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        if let Some((due, reply, silent)) = self.coming {
            if due <= self.now_ms {
                self.coming = None;
                self.replied = true;
                self.reply = reply;
                self.interrupt |= !silent;
                if !self.counter_stands_still {
                    self.counter.replies = self.counter.replies.wrapping_add(1).wrapping_add(std::mem::take(&mut self.stray_counts));
                }
            }
        }
    }

    /// ENABLE := 0 and on again: no slot is left, nothing is on its way.
    pub fn reset(&mut self) {
        self.model.slots.clear();
        self.coming = None;
        self.interrupt = false;
    }
}

impl Port for Registers {
    fn submit(&mut self, command: Command, request: &[u8]) -> Result<(), PortGone> {
        if self.model.gone {
            return Err(PortGone);
        }
        assert_eq!(request.len(), command.request_bytes());
        self.overruns += usize::from(self.coming.is_some());
        self.interrupt = false;
        self.model.log.push((command, 0));
        let delivery = self.deliveries.pop_front().unwrap_or_default();
        let reply = match self.model.take_fault(command) {
            None => Some(self.model.execute(command, request)),
            Some(Fault::Refuse(rc)) => Some(Reply { rc, ..Reply::default() }),
            Some(Fault::LoseReply) => {
                self.model.execute(command, request);
                None
            }
            Some(Fault::LoseCommand) => None,
        };
        self.last_made = reply;
        // Before its first reply a device is taken at its word (see the mailbox's grace): nothing spurious then.
        self.interrupt |= delivery.spurious && (self.replied || self.spurious_from_the_start);
        self.coming = reply.map(|reply| (self.now_ms + u64::from(delivery.delay_ms), reply, delivery.silent));
        self.pass(0);
        Ok(())
    }

    fn wait(&mut self, timeout_ms: u32) -> Result<Option<u32>, PortGone> {
        if self.model.gone {
            return Err(PortGone);
        }
        if std::mem::take(&mut self.interrupt) || self.storm {
            assert!(self.counter_reads < 1_000_000, "the wait does not end");
            return Ok(Some(timeout_ms));
        }
        let due = self.coming.map(|(due, _, silent)| (due.saturating_sub(self.now_ms), silent));
        match due {
            Some((ms, false)) if ms <= u64::from(timeout_ms) => {
                self.pass(ms);
                self.interrupt = false;
                Ok(Some(timeout_ms - u32::try_from(ms).unwrap()))
            }
            _ => {
                self.pass(timeout_ms.into());
                Ok(None)
            }
        }
    }

    fn counter(&mut self) -> Result<EventCounter, PortGone> {
        self.counter_reads += 1;
        if self.model.gone {
            return Err(PortGone);
        }
        Ok(self.counter)
    }

    fn reply(&mut self) -> Result<Reply, PortGone> {
        if self.model.gone {
            return Err(PortGone);
        }
        Ok(self.reply)
    }

    fn events_seen(&mut self) -> u64 {
        self.model.events
    }

    fn now_ns(&mut self) -> u64 {
        self.now_ms * 1_000_000
    }

    fn notice(&mut self, notice: &Notice) {
        self.model.notices.push(notice.to_string());
    }
}
