//! What both ends of the vsock tests share: data that can be told from any other, and a digest of it.
//!
//! [`Pattern`] makes bytes from a seed, [`Digest`] makes 128 bits from bytes; both cost a few instructions per 8 bytes, since the guest's
//! CPU is emulated. The digest finds lost, doubled, swapped and changed bytes; it is no protection against an adversary, which a test of a
//! device does not need. Used by `bin/vsock-load.rs` in the guest and by `crates/vsock/tests/guest.rs` outside, which includes this file.

use std::io::{self, Read, Write};

/// The longest write and read of a stream, in bytes.
pub const LONGEST: usize = 1 << 20;

/// Pseudo-random bytes from a seed (xorshift64*).
#[derive(Debug, Clone)]
pub struct Pattern {
    state: u64,
    rest: [u8; 8],
    used: usize,
}

impl Pattern {
    /// The bytes of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, rest: [0; 8], used: 8 }
    }

    /// The next word.
    pub fn word(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Fills `buffer` with the next bytes.
    pub fn fill(&mut self, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            if self.used == 8 {
                let (words, tail) = buffer.as_chunks_mut::<8>();
                for word in words {
                    *word = self.word().to_le_bytes();
                }
                buffer = tail;
                if buffer.is_empty() {
                    return;
                }
                self.rest = self.word().to_le_bytes();
                self.used = 0;
            }
            let count = buffer.len().min(8 - self.used);
            let (now, later) = buffer.split_at_mut(count);
            now.copy_from_slice(&self.rest[self.used..self.used + count]);
            self.used += count;
            buffer = later;
        }
    }

    /// The length of the next write or read: 1 byte to 1 MiB, every magnitude equally often, odd numbers of bytes among them.
    pub fn length(&mut self) -> usize {
        let word = self.word();
        let power = 1usize << (word % 21);
        let extra = usize::try_from(word >> 32).unwrap_or(0) % power;
        (power + if word & (1 << 20) == 0 { 0 } else { extra }).min(LONGEST)
    }
}

/// 128 bits that depend on every byte and its place.
#[derive(Debug, Clone, Default)]
pub struct Digest {
    a: u64,
    b: u64,
    rest: [u8; 8],
    used: usize,
    bytes: u64,
}

impl Digest {
    fn word(&mut self, word: u64) {
        self.a = (self.a ^ word).rotate_left(23).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.b = (self.b.rotate_left(41) ^ word).wrapping_mul(0xc2b2_ae3d_27d4_eb4f).wrapping_add(1);
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.used == 0 {
                let (words, tail) = bytes.as_chunks::<8>();
                for word in words {
                    self.word(u64::from_le_bytes(*word));
                }
                bytes = tail;
            }
            let count = bytes.len().min(8 - self.used);
            let (now, later) = bytes.split_at(count);
            self.rest[self.used..self.used + count].copy_from_slice(now);
            self.used += count;
            bytes = later;
            if self.used == 8 {
                self.used = 0;
                self.word(u64::from_le_bytes(self.rest));
            }
        }
    }

    /// How many bytes came.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The 128 bits.
    pub fn finish(mut self) -> u128 {
        let (used, bytes) = (self.used, self.bytes);
        self.rest[used..].fill(0);
        self.word(u64::from_le_bytes(self.rest));
        self.word(bytes);
        self.word(0);
        u128::from(self.a) << 64 | u128::from(self.b)
    }
}

/// Writes `bytes` bytes of the pattern of `seed` in writes of mixed lengths; returns their digest.
pub fn write_pattern(stream: &mut impl Write, bytes: u64, seed: u64) -> io::Result<u128> {
    let (mut pattern, mut lengths) = (Pattern::new(seed), Pattern::new(seed ^ u64::MAX));
    let mut digest = Digest::default();
    let mut buffer = vec![0; LONGEST];
    let mut left = bytes;
    while left > 0 {
        let length = lengths.length().min(usize::try_from(left).unwrap_or(usize::MAX));
        let part = &mut buffer[..length];
        pattern.fill(part);
        digest.update(part);
        stream.write_all(part)?;
        left -= length as u64;
    }
    Ok(digest.finish())
}

/// Reads to the end in reads of mixed lengths; returns digest and number of the bytes.
pub fn read_pattern(stream: &mut impl Read, seed: u64) -> io::Result<(u128, u64)> {
    let mut lengths = Pattern::new(seed ^ (u64::MAX / 3));
    let mut digest = Digest::default();
    let mut buffer = vec![0; LONGEST];
    loop {
        // Reads of a few bytes only would need hours; every fourth one may be short.
        let length = lengths.length().max(if lengths.word().is_multiple_of(4) { 1 } else { 16384 });
        match stream.read(&mut buffer[..length]) {
            Ok(0) => {
                let bytes = digest.bytes();
                return Ok((digest.finish(), bytes));
            }
            Ok(count) => digest.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
