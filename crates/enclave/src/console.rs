//! An enclave's console: the last mebibyte of what its guest printed, for any number of readers.
//!
//! One thread pushes, so that the guest is never held up; readers take pieces from a position in the stream. A reader that is too slow for
//! the ring loses the oldest bytes and learns so from the position it gets. No reader can make it grow.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nitroxide_engine::PanicWatch;

/// How much of the output is kept, in bytes.
pub const RING_BYTES: usize = 1 << 20;

/// How much of the output an end report quotes, in bytes.
const TAIL_BYTES: usize = 8 << 10;

/// The console's ring.
#[derive(Debug, Default)]
pub struct Console {
    ring: Mutex<Ring>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// How many bytes were ever pushed?
    total: u64,
    /// Is there nothing more to come?
    ended: bool,
    panic: PanicWatch,
}

/// A piece of the output.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// The position of its first byte in the whole output. Later than what was asked for when the ring no longer had that.
    pub position: u64,
    /// The bytes; none when there was nothing new.
    pub bytes: Vec<u8>,
    /// Whether nothing comes after it.
    pub ended: bool,
}

impl Piece {
    /// Where the next piece begins.
    #[must_use]
    pub fn next_position(&self) -> u64 {
        self.position.saturating_add(self.bytes.len() as u64)
    }
}

impl Console {
    /// Adds output.
    pub fn push(&self, output: &[u8]) {
        let mut ring = self.lock();
        ring.panic.feed(output);
        ring.total = ring.total.saturating_add(output.len() as u64);
        // Of a piece larger than the ring only the end would stay.
        let kept = output.get(output.len().saturating_sub(RING_BYTES)..).unwrap_or(output);
        let surplus = (ring.bytes.len() + kept.len()).saturating_sub(RING_BYTES);
        ring.bytes.drain(..surplus);
        ring.bytes.extend(kept);
        self.changed.notify_all();
    }

    /// Says that no more output comes.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Whether the output contains a kernel panic.
    #[must_use]
    pub fn panicked(&self) -> bool {
        self.lock().panic.feed(b"")
    }

    /// Where the output stands now: the position of the next byte.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.lock().total
    }

    /// Waits up to `patience` for output at `position` or its end, and returns up to `limit` bytes of it.
    #[must_use]
    pub fn read(&self, position: u64, limit: usize, patience: Duration) -> Piece {
        let ring = self.lock();
        let waited = self.changed.wait_timeout_while(ring, patience, |ring| ring.total <= position && !ring.ended);
        let ring = waited.unwrap_or_else(PoisonError::into_inner).0;
        let oldest = ring.total - ring.bytes.len() as u64;
        let position = position.clamp(oldest, ring.total);
        // The difference is at most the ring's length.
        let skip = usize::try_from(position - oldest).unwrap_or(ring.bytes.len());
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).take(limit).copied().collect();
        let ended = ring.ended && position + bytes.len() as u64 == ring.total;
        Piece { position, bytes, ended }
    }

    /// Waits up to `patience` until no more output comes.
    pub fn wait_for_end(&self, patience: Duration) {
        let ring = self.lock();
        let _ended = self.changed.wait_timeout_while(ring, patience, |ring| !ring.ended);
    }

    /// The last 8 KiB as text, from the beginning of a line if there is one.
    #[must_use]
    pub fn tail(&self) -> String {
        let ring = self.lock();
        let skip = ring.bytes.len().saturating_sub(TAIL_BYTES);
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).copied().collect();
        let begin = if skip == 0 { 0 } else { bytes.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1) };
        String::from_utf8_lossy(bytes.get(begin..).unwrap_or_default()).into_owned()
    }

    /// Moves everything that `source` gives into the ring, until it ends or fails.
    pub fn drain(&self, mut source: impl Read) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.push(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.end();
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn readers_get_everything_in_order() {
        let console = Console::default();
        console.push(b"abc");
        console.push(b"def");
        let first = console.read(0, 4, NOW);
        assert_eq!(first, Piece { position: 0, bytes: b"abcd".to_vec(), ended: false });
        console.end();
        assert_eq!(console.read(first.next_position(), 9, NOW), Piece { position: 4, bytes: b"ef".to_vec(), ended: true });
        assert_eq!(console.read(6, 9, NOW), Piece { position: 6, bytes: vec![], ended: true });
    }

    #[test]
    fn the_ring_keeps_the_last_mebibyte_and_says_what_is_lost() {
        let console = Console::default();
        console.push(b"lost");
        console.push(&vec![b'x'; RING_BYTES]);
        let piece = console.read(0, RING_BYTES + 1, NOW);
        assert_eq!((piece.position, piece.bytes.len()), (4, RING_BYTES));
        console.push(&vec![b'y'; RING_BYTES + 5]);
        let piece = console.read(4, usize::MAX, NOW);
        assert_eq!((piece.position, piece.bytes.len()), (RING_BYTES as u64 + 9, RING_BYTES));
        assert!(piece.bytes.iter().all(|byte| *byte == b'y'));
    }

    #[test]
    fn a_position_from_the_future_is_brought_back() {
        let console = Console::default();
        console.push(b"abc");
        console.end();
        assert_eq!(console.read(u64::MAX, 9, NOW), Piece { position: 3, bytes: vec![], ended: true });
    }

    #[test]
    fn the_tail_begins_with_a_line() {
        let console = Console::default();
        console.push(b"short\nend");
        assert_eq!(console.tail(), "short\nend");
        console.push(&[b"\n".as_slice(), &vec![b'x'; TAIL_BYTES - 100], b"\nlast \xff\n"].concat());
        assert!(console.tail().ends_with("x\nlast \u{fffd}\n"));
        assert!(console.tail().starts_with("end\nx") || console.tail().starts_with('x') || console.tail().starts_with("short"));
        console.push(&vec![b'z'; TAIL_BYTES]);
        assert_eq!(console.tail().len(), TAIL_BYTES);
    }

    #[test]
    fn a_panic_is_found_across_pushes() {
        let console = Console::default();
        console.push(b"Kernel pan");
        assert!(!console.panicked());
        console.push(b"ic - not syncing: x");
        assert!(console.panicked());
    }
}
