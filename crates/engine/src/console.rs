//! What the serial console says about the guest kernel: a panic.
//!
//! A panicked kernel reboots (`panic=`) and QEMU only sees a reset, as stock kernels bring no panic device into early boot. So the owner of the console
//! feeds what it reads to a [`PanicWatch`] and corrects the exit reason by it. The text is the guest's: it can pretend to panic, to nobody's harm.

/// The line that `panic()` prints first (kernel/panic.c).
const MARK: &[u8] = b"Kernel panic - not syncing";

/// Looks for a kernel panic in a stream of console output, across the borders of its pieces.
#[derive(Debug, Clone, Default)]
pub struct PanicWatch {
    /// How many bytes of the mark did the stream end with?
    matched: usize,
    /// Was the mark seen?
    seen: bool,
}

impl PanicWatch {
    /// Takes the next piece of output; returns whether a panic was seen so far.
    pub fn feed(&mut self, output: &[u8]) -> bool {
        for &byte in output {
            if self.seen {
                break;
            }
            // The mark's first letter occurs in it only once, so a mismatch can restart only with this very byte.
            let continues = MARK.get(self.matched) == Some(&byte);
            self.matched = if continues { self.matched + 1 } else { usize::from(MARK.first() == Some(&byte)) };
            self.seen = self.matched == MARK.len();
        }
        self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_seen_in_one_piece_and_in_single_bytes() {
        let text = b"[ 1.0] Kernel panic - not syncing: Attempted to kill init!\r\n";
        assert!(PanicWatch::default().feed(text));
        let mut watch = PanicWatch::default();
        for byte in text {
            watch.feed(&[*byte]);
        }
        assert!(watch.feed(b""));
    }

    #[test]
    fn a_false_start_before_the_mark_does_not_hide_it() {
        assert!(PanicWatch::default().feed(b"Kernel Kernel panic - KKernel panic - not syncing: x"));
    }

    #[test]
    fn other_text_is_no_panic() {
        assert!(!PanicWatch::default().feed(b"Kernel panic - not syn"));
        assert!(!PanicWatch::default().feed(b"reboot: Power down"));
    }

    #[test]
    fn the_marks_first_letter_occurs_once() {
        assert_eq!(MARK.iter().filter(|byte| **byte == MARK[0]).count(), 1);
    }
}
