//! Frames: a little-endian 32-bit length and that many bytes.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes one frame.
pub(super) fn write(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // In one piece where it is short: the other end then wakes once.
    if bytes.len() <= 4096 {
        return out.write_all(&[&length.to_le_bytes(), bytes].concat());
    }
    out.write_all(&length.to_le_bytes())?;
    out.write_all(bytes)
}

/// Reads one frame of at most `limit` bytes; a longer one is an error before any memory is asked for.
pub(super) fn read(input: &mut impl Read, limit: u32) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // Grows with what really comes.
    let mut bytes = Vec::new();
    input.take(u64::from(length)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == u64::from(length) { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Writes a value as a frame of JSON.
pub(super) fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    write(out, &serde_json::to_vec(value)?)
}

/// Reads a frame of JSON.
pub(super) fn read_json<T: DeserializeOwned>(input: &mut impl Read, limit: u32) -> io::Result<T> {
    Ok(serde_json::from_slice(&read(input, limit)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_read_back() {
        let mut bytes = Vec::new();
        for content in [&b""[..], b"x", &[7; 10_000]] {
            write(&mut bytes, content).unwrap();
        }
        let mut input = &bytes[..];
        assert_eq!(read(&mut input, 10).unwrap(), b"");
        assert_eq!(read(&mut input, 1).unwrap(), b"x");
        assert_eq!(read(&mut input, 10_000).unwrap(), [7; 10_000]);
        assert!(input.is_empty());
    }

    #[test]
    fn long_and_cut_frames_are_errors() {
        let mut huge = &u32::MAX.to_le_bytes()[..];
        assert_eq!(read(&mut huge, 4096).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut cut = &[5, 0, 0, 0, 1, 2][..];
        assert_eq!(read(&mut cut, 4096).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
