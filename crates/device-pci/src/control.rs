//! The test control: lines of text that a program in the guest writes into configuration space, and what became of them.
//!
//! Pure: [`Control`] takes and gives bytes, [`Line`] is a line understood. Offered only when asked for (`--test-control`). Layout and lines:
//! docs/device-pci.md, "Test control".

use nitroxide_abi::SlotUid;
use nitroxide_device::Faults;

use crate::addresses;
use crate::config::{CONTROL, CONTROL_BYTES};

/// The longest line in bytes.
const MAX_LINE: usize = 4096;

/// Registers, from the capability's first byte.
const DATA: usize = 4;
const EXECUTE: usize = 8;
const STATUS: usize = 12;
const EXECUTIONS: usize = 16;
const REPLIES: usize = 20;
const MEMORY: usize = 24;

/// An errno of Linux that says that a line was not understood.
pub(crate) const EINVAL: i32 = 22;

/// What a line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// `faults RULES`: these rules instead of those before.
    Faults(Faults),
    /// `event`: an event although nothing has happened.
    Event,
    /// `end UID`: the slot's enclave has ended by itself.
    End(SlotUid),
    /// `max-regions N`: how many pieces of memory slots made from now on may have.
    MaxRegions(u32),
    /// `trace on` or `trace off`: every command in the log, or not.
    Trace(bool),
    /// `usage`: nothing is done, as the figures are always the present ones.
    Usage,
    /// `early-interrupts`: both vectors are raised in the middle of the next driver's handshake.
    EarlyInterrupts,
}

impl Line {
    /// Understands a line.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        match word {
            "faults" => rest.parse().ok().map(Self::Faults),
            "event" if rest.is_empty() => Some(Self::Event),
            "end" => {
                let uid = rest.strip_prefix("0x").map_or_else(|| rest.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
                uid.map(|uid| Self::End(SlotUid(uid)))
            }
            "trace" if rest == "on" => Some(Self::Trace(true)),
            "trace" if rest == "off" => Some(Self::Trace(false)),
            "usage" if rest.is_empty() => Some(Self::Usage),
            "early-interrupts" if rest.is_empty() => Some(Self::EarlyInterrupts),
            "max-regions" => rest.parse().ok().map(Self::MaxRegions),
            _ => None,
        }
    }
}

/// The registers of the control.
#[derive(Debug, Clone, Default)]
pub(crate) struct Control {
    text: Vec<u8>,
    status: i32,
    executions: u32,
}

/// What the control shows of the device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shown {
    /// Replies given, wrapping.
    pub(crate) replies: u16,
    /// Bytes of memory that slots have.
    pub(crate) memory_bytes: u64,
}

impl Control {
    /// Takes a write into configuration space; gives the text that is to be executed, if it was told to.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<String> {
        let at = usize::try_from(offset).ok()?.checked_sub(CONTROL)?;
        match at {
            DATA => {
                let free = MAX_LINE.saturating_sub(self.text.len());
                self.text.extend(data.iter().filter(|byte| **byte != 0).take(free));
                None
            }
            EXECUTE => {
                let text = std::mem::take(&mut self.text);
                (data.first() == Some(&1)).then(|| String::from_utf8_lossy(&text).into_owned())
            }
            _ => None,
        }
    }

    /// What became of the line: 0, or an errno.
    pub(crate) fn executed(&mut self, outcome: Result<(), i32>) {
        self.status = outcome.map_or_else(i32::wrapping_neg, |()| 0);
        self.executions = self.executions.wrapping_add(1);
    }

    /// Puts its registers over what was read of configuration space.
    pub(crate) fn overlay(&self, offset: u64, data: &mut [u8], shown: Shown) {
        let mut registers = [0_u8; CONTROL_BYTES];
        let fields: [(usize, &[u8]); 4] = [
            (STATUS, &self.status.to_le_bytes()),
            (EXECUTIONS, &self.executions.to_le_bytes()),
            (REPLIES, &u32::from(shown.replies).to_le_bytes()),
            (MEMORY, &shown.memory_bytes.to_le_bytes()),
        ];
        for (at, bytes) in fields {
            for (place, byte) in registers.iter_mut().skip(at).zip(bytes) {
                *place = *byte;
            }
        }
        for (byte, at) in data.iter_mut().zip(addresses(offset)) {
            let at = usize::try_from(at).ok().and_then(|at| at.checked_sub(CONTROL)).filter(|at| *at >= STATUS);
            if let Some(value) = at.and_then(|at| registers.get(at)) {
                *byte = *value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(control: &mut Control, text: &str) -> Option<String> {
        for piece in text.as_bytes().chunks(4) {
            let mut word = [0; 4];
            word[..piece.len()].copy_from_slice(piece);
            assert_eq!(control.write(0x64, &word), None);
        }
        control.write(0x68, &[1, 0, 0, 0])
    }

    #[test]
    fn a_line_is_sent_in_words_and_executed_once() {
        let mut control = Control::default();
        assert_eq!(send(&mut control, "faults start=-EIO").as_deref(), Some("faults start=-EIO"));
        assert_eq!(control.write(0x68, &[1, 0, 0, 0]).as_deref(), Some(""));
        assert_eq!(control.write(0x64, b"abc"), None);
        assert_eq!(control.write(0x68, &[0; 4]), None);
        assert_eq!(send(&mut control, "event").as_deref(), Some("event"));
    }

    #[test]
    fn outcome_and_figures_are_read_at_any_width() {
        let mut control = Control::default();
        control.executed(Err(EINVAL));
        let mut data = [0xAA; 24];
        control.overlay(0x68, &mut data, Shown { replies: 7, memory_bytes: 0x0102_0304_0506 });
        assert_eq!(data[..4], [0xAA; 4]);
        assert_eq!(data[4..8], (-22_i32).to_le_bytes());
        assert_eq!(data[8..16], [1, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(data[16..24], [6, 5, 4, 3, 2, 1, 0, 0]);
    }

    #[test]
    fn lines_are_understood_or_refused() {
        assert_eq!(Line::parse("event"), Some(Line::Event));
        assert_eq!(Line::parse("end 0x10"), Some(Line::End(SlotUid(16))));
        assert_eq!(Line::parse("max-regions 4"), Some(Line::MaxRegions(4)));
        assert_eq!(Line::parse("faults "), Some(Line::Faults(Faults::none())));
        assert_eq!(Line::parse("faults"), Some(Line::Faults(Faults::none())));
        assert_eq!(Line::parse("trace on"), Some(Line::Trace(true)));
        assert_eq!(Line::parse("trace off"), Some(Line::Trace(false)));
        assert_eq!(Line::parse("usage"), Some(Line::Usage));
        assert_eq!(Line::parse("early-interrupts"), Some(Line::EarlyInterrupts));
        for bad in [
            "",
            "trace",
            "trace 1",
            "usage 1",
            "early-interrupts 1",
            "event 1",
            "end",
            "end 0xg",
            "max-regions -1",
            "faults start=",
            "more",
        ] {
            assert_eq!(Line::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_endless_line_is_cut() {
        let mut control = Control::default();
        for _ in 0..10_000 {
            assert_eq!(control.write(0x64, b"aaaa"), None);
        }
        assert_eq!(control.write(0x68, &[1]).map(|text| text.len()), Some(MAX_LINE));
    }
}
