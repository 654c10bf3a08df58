//! How bytes are shown: as they are, in base64 (RFC 4648, with padding), or in hex; the last two on one line.

use std::ffi::OsString;

use nitroxide_guest_sys::requests::hex;

use crate::failure::Failure;

/// The choice of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Raw,
    /// One line of base64.
    Base64,
    /// One line of hex.
    Hex,
}

impl Format {
    /// Reads its name.
    pub fn parse(word: &OsString) -> Result<Self, Failure> {
        match word.as_encoded_bytes() {
            b"raw" => Ok(Self::Raw),
            b"base64" => Ok(Self::Base64),
            b"hex" => Ok(Self::Hex),
            _ => Err(Failure::Usage(format!("`{}` is no format; write raw, base64 or hex", word.to_string_lossy().escape_debug()))),
        }
    }

    /// A piece of a longer output; each but the last is a multiple of 3 bytes.
    pub fn piece(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Raw => bytes.to_vec(),
            Self::Base64 => base64(bytes).into_bytes(),
            Self::Hex => hex(bytes).into_bytes(),
        }
    }

    /// What comes behind the last piece.
    pub const fn end(self) -> &'static [u8] {
        match self {
            Self::Raw => b"",
            Self::Base64 | Self::Hex => b"\n",
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let letter = |bits: u32| LETTERS.get(bits as usize & 63).copied().map_or('A', char::from);
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        text.extend([letter(bits >> 18), letter(bits >> 12)]);
        text.push(if group.len() > 1 { letter(bits >> 6) } else { '=' });
        text.push(if group.len() > 2 { letter(bits) } else { '=' });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        // The test vectors of its section 10, and the letters at the end of the alphabet.
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn raw_bytes_get_no_line_end() {
        assert_eq!((Format::Raw.piece(b"\xff"), Format::Raw.end()), (b"\xff".to_vec(), b"".as_slice()));
        assert_eq!((Format::Hex.piece(b"\xff"), Format::Hex.end()), (b"ff".to_vec(), b"\n".as_slice()));
    }
}
