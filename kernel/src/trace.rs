// SPDX-License-Identifier: GPL-2.0
//! The tracepoints `nitro_enclaves:ne_*` (trace.h; docs/kernel.md, "Tracing"). Off, each costs a jump that is not taken.

use core::fmt::Write;

use kernel::prelude::*;
use nitroxide_abi::pci::Command;
use nitroxide_abi::{Code, SlotUid};

mod shim {
    use kernel::ffi::{c_char, c_int};

    extern "C" {
        pub(super) fn nitroxide_trace_ioctl(word: u32, slot: u64, result: c_int);
        pub(super) fn nitroxide_trace_refused(slot: u64, why: *const c_char);
        pub(super) fn nitroxide_traces_refused() -> bool;
        pub(super) fn nitroxide_trace_command(command: u32, slot: u64, rc: c_int, ns: u64);
        pub(super) fn nitroxide_trace_event(events: u64);
        pub(super) fn nitroxide_trace_state(slot: u64, old_state: u32, new_state: u32);
    }
}

/// A call of a client's, and its answer.
pub(crate) fn ioctl(word: u32, slot: SlotUid, result: Result<u32, Code>) {
    let result = result.map_or_else(Code::negative, |value| c_int::try_from(value).unwrap_or(c_int::MAX));
    // SAFETY: A tracepoint may be called anywhere; it copies numbers.
    unsafe { shim::nitroxide_trace_ioctl(word, slot.0, result) };
}

/// Why a call is refused.
pub(crate) fn refused(slot: SlotUid, why: &dyn core::fmt::Display) {
    // SAFETY: Looks at a static key.
    if !unsafe { shim::nitroxide_traces_refused() } {
        return;
    }
    let mut line = Line { bytes: [0; LONGEST + 1], length: 0 };
    // What does not fit is left out.
    let _ = write!(line, "{why}");
    // SAFETY: The last byte is never written and is a NUL; the tracepoint copies the text.
    unsafe { shim::nitroxide_trace_refused(slot.0, line.bytes.as_ptr().cast()) };
}

/// Bytes of a reason that are shown.
const LONGEST: usize = 159;

/// A text with a NUL behind it.
struct Line {
    bytes: [u8; LONGEST + 1],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for (place, byte) in self.bytes.iter_mut().take(LONGEST).skip(self.length).zip(text.bytes()) {
            *place = byte;
        }
        self.length = self.length.saturating_add(text.len()).min(LONGEST);
        Ok(())
    }
}

/// A command of the device, what it answered (a negative errno if nothing), and how long that took.
pub(crate) fn command(command: Command, slot: u64, rc: i32, ns: u64) {
    // SAFETY: As for `ioctl`.
    unsafe { shim::nitroxide_trace_command(command.number(), slot, rc, ns) };
}

/// An event interrupt, with the number of events so far.
pub(crate) fn event(events: u64) {
    // SAFETY: As for `ioctl`, interrupts included.
    unsafe { shim::nitroxide_trace_event(events) };
}

/// An enclave's state is another than before.
pub(crate) fn state(slot: SlotUid, old: u32, new: u32) {
    // SAFETY: As for `ioctl`.
    unsafe { shim::nitroxide_trace_state(slot.0, old, new) };
}
