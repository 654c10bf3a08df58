//! The way to the device: [`Device`], what can go wrong on it, and the one place where device codes are made safe ([`sanitise`]).
//!
//! Over registers, [`crate::mailbox`] implements this trait; in process, the device model does.

use core::fmt;

use nitroxide_abi::pci::{Command, Reply};
use nitroxide_abi::{Code, SlotUid};

/// One device that takes one command at a time, and the home's clock and log beside it.
pub trait Device {
    /// Sends one command and waits for its own reply.
    ///
    /// The reply is given as the device made it, refusals (`rc` below zero) included. Called with the enclave locked (or none),
    /// never under the list, pool or ledger lock; may sleep as long as the device's time limit.
    ///
    /// # Errors
    ///
    /// See [`SendError`]: what is known about a command whose reply is missing.
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError>;

    /// How many events the device has raised so far; only differences count. Must not wait.
    fn events_seen(&mut self) -> u64;

    /// Nanoseconds since the machine booted.
    fn now_ns(&mut self) -> u64;

    /// Something that the machine's owner should find in the log.
    fn notice(&mut self, notice: &Notice);

    /// A call about this slot is refused, and why: several reasons share a code. For who traces calls; nothing depends on it.
    fn refused(&mut self, slot: SlotUid, why: &dyn fmt::Display) {
        let _ = (slot, why);
    }
}

/// Why there is no reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendError {
    /// The command was not given to the device: an earlier one is still unanswered. Nothing happened.
    NotSent,
    /// The device took the command and did not answer in time. It may have done it, or do it later.
    NoReply,
    /// The device was switched off or removed, so that it holds nothing any more: no slot, no page, no CPU.
    Gone,
}

/// Why a command did not succeed, with what reaches the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceError {
    /// The device refused it and did nothing.
    Refused {
        /// The device's own value, below zero.
        rc: i32,
        /// What the caller gets.
        code: Code,
    },
    /// See [`SendError::NotSent`].
    NotSent,
    /// See [`SendError::NoReply`].
    NoReply,
    /// See [`SendError::Gone`].
    Gone,
}

impl DeviceError {
    /// What the caller gets.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::Refused { code, .. } => code,
            Self::NotSent | Self::NoReply => Code::ETIMEDOUT,
            Self::Gone => Code::ENODEV,
        }
    }

    /// Is it certain that the device did nothing and will do nothing?
    #[must_use]
    pub fn is_definite(self) -> bool {
        !matches!(self, Self::NoReply)
    }

    /// Does this answer say that the device knows no such slot? Which value means it is not established, so several do.
    pub(crate) fn says_no_such_slot(self) -> bool {
        const UNKNOWN_SLOT: i32 = 279; // the second generation's own code for it
        match self {
            Self::Refused { rc, .. } => {
                [Code::EINVAL.negative(), Code::ENOENT.negative(), Code::ENXIO.negative(), -UNKNOWN_SLOT].contains(&rc)
            }
            Self::NotSent | Self::NoReply | Self::Gone => false,
        }
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { rc, code } => write!(formatter, "The device refused the command with {rc}: {code}"),
            Self::NotSent => formatter.write_str("The device still owes an earlier reply; the command was not sent"),
            Self::NoReply => formatter.write_str("The device did not answer in time"),
            Self::Gone => formatter.write_str("The device is gone"),
        }
    }
}

impl core::error::Error for DeviceError {}

/// Makes a device's refusal safe for user space (W5): Linux errnos 1 to 133 but EINTR and ERESTART, and 256 to 275, pass;
/// everything else becomes EIO, because user space would misread it or the C library would not see an error at all.
///
/// `rc` is below zero.
#[must_use]
pub fn sanitise(rc: i32) -> Code {
    const HIGHEST_ERRNO: i32 = 133;
    let number = rc.checked_neg().unwrap_or(i32::MAX);
    let passes = matches!(number, 1..=HIGHEST_ERRNO | 256..=275);
    Code::new(number).filter(|code| passes && *code != Code::EINTR && *code != Code::ERESTART).unwrap_or(Code::EIO)
}

/// Sends one command and turns every way to fail into a [`DeviceError`].
pub(crate) fn exchange(device: &mut impl Device, command: Command, request: &[u8]) -> Result<Reply, DeviceError> {
    let reply = device.send(command, request).map_err(|error| match error {
        SendError::NotSent => DeviceError::NotSent,
        SendError::NoReply => DeviceError::NoReply,
        SendError::Gone => DeviceError::Gone,
    })?;
    if reply.rc >= 0 {
        return Ok(reply);
    }
    let code = sanitise(reply.rc);
    if code.negative() != reply.rc {
        device.notice(&Notice::OddReturnCode { command, rc: reply.rc });
    }
    Err(DeviceError::Refused { rc: reply.rc, code })
}

/// Something for the log; its [`fmt::Display`] is one line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The device answered a value that is no errno; the caller got EIO.
    OddReturnCode {
        /// The command it answered.
        command: Command,
        /// Its value.
        rc: i32,
    },
    /// A reply did not come in time.
    Timeout {
        /// The command without a reply.
        command: Command,
    },
    /// A reply that nobody waits for any more came and was thrown away.
    LateReply {
        /// The command that it belongs to.
        command: Command,
    },
    /// Replies are not counted by this device; its interrupts are counted instead.
    CounterStandsStill,
    /// A slot whose creation was given up was found in a late reply and freed.
    OrphanFreed {
        /// The slot.
        slot: SlotUid,
    },
    /// The device gave a slot the number 0, or one that is in use; the slot was refused.
    BadSlotUid {
        /// The number.
        slot: SlotUid,
    },
    /// The state of a running enclave could not be asked for after an event.
    StateUnknown {
        /// The slot.
        slot: SlotUid,
        /// Why.
        error: DeviceError,
    },
    /// A closed enclave could not be stopped; its memory and CPUs stay with it, and this is tried again.
    StopFailed {
        /// The slot.
        slot: SlotUid,
        /// Why.
        error: DeviceError,
    },
    /// A closed enclave's slot could not be freed; its memory and CPUs stay with it, and this is tried again.
    FreeFailed {
        /// The slot.
        slot: SlotUid,
        /// Why.
        error: DeviceError,
    },
    /// A closed enclave's slot is gone after all: a free without a reply had been done.
    FreedAfterAll {
        /// The slot.
        slot: SlotUid,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OddReturnCode { command, rc } => {
                write!(formatter, "{}: the device answered {rc}, which is no errno; EIO is reported", command.name())
            }
            Self::Timeout { command } => write!(formatter, "{}: no reply in time", command.name()),
            Self::LateReply { command } => write!(formatter, "{}: the reply came too late and is ignored", command.name()),
            Self::CounterStandsStill => formatter.write_str("the device does not count its replies; interrupts are counted instead"),
            Self::OrphanFreed { slot } => write!(formatter, "slot {slot}: allocated too late for its caller, freed"),
            Self::BadSlotUid { slot } => write!(formatter, "slot {slot}: the device chose a number that cannot be used"),
            Self::StateUnknown { slot, error } => write!(formatter, "slot {slot}: state unknown after an event: {error}"),
            Self::StopFailed { slot, error } => write!(formatter, "slot {slot}: not stopped, everything is kept: {error}"),
            Self::FreeFailed { slot, error } => write!(formatter, "slot {slot}: not freed, everything is kept: {error}"),
            Self::FreedAfterAll { slot } => write!(formatter, "slot {slot}: was freed by a command that had no reply"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w5_device_rc_is_made_a_valid_errno() {
        for (rc, number) in [
            (-22, 22),
            (-28, 28),
            (-133, 133),
            (-256, 256),
            (-275, 275),
            (-4, 5),
            (-85, 5),
            (-134, 5),
            (-255, 5),
            (-276, 5),
            (-512, 5),
            (-515, 5),
            (-5000, 5),
            (i32::MIN, 5),
        ] {
            assert_eq!(sanitise(rc).number(), number, "{rc}");
        }
    }
}
