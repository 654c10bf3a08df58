//! How bytes are shown: as they are, in base64 (RFC 4648, with padding), or in hex; the last two on one line.

use std::ffi::OsString;

use base64ct::{Base64, Encoding};

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
            Self::Base64 => Base64::encode_string(bytes).into_bytes(),
            Self::Hex => hex::encode(bytes).into_bytes(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        // The test vectors of its section 10, and the letters at the end of the alphabet.
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(Format::Base64.piece(bytes.as_bytes()), text.as_bytes());
        }
        assert_eq!(Format::Base64.piece(&[0xfb, 0xff, 0xfe]), b"+//+");
    }

    #[test]
    fn raw_bytes_get_no_line_end() {
        assert_eq!((Format::Raw.piece(b"\xff"), Format::Raw.end()), (b"\xff".to_vec(), b"".as_slice()));
        assert_eq!((Format::Hex.piece(b"\xff"), Format::Hex.end()), (b"ff".to_vec(), b"\n".as_slice()));
    }
}
