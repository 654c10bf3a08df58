//! Reading a document for a command: from a file or standard input; raw, or as text in base64 or hex.

use std::{
    io::{self, Read},
    path::Path,
};

use base64ct::{Base64, Base64Unpadded, Base64Url, Base64UrlUnpadded, Encoding};
use nitroxide_attestation::cose::MAX_ENVELOPE_BYTES;

use crate::{codes::ErrorCode, failure::Failure, image};

/// Hex of the longest document, with line ends.
const MAX_INPUT_BYTES: u64 = 3 * MAX_ENVELOPE_BYTES as u64;

/// A COSE_Sign1 begins with the head of an array of four, or with tag 18; neither is a character of base64 or hex.
const RAW_STARTS: [u8; 2] = [0x84, 0xd2];

/// Reads a document's bytes. What they say is not looked at.
pub fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let content = if path == Path::new("-") { standard_input()? } else { image::read_small(path, MAX_INPUT_BYTES)? };
    decode(content).ok_or_else(|| {
        no_document(path).help("A document is a CBOR array that begins with the byte 84 (hex), or the base64 or hex of one.")
    })
}

/// What was read has not the form of a document; what a document says is another matter ([`ErrorCode::ATTESTATION`]).
pub fn no_document(path: &Path) -> Failure {
    Failure::new(ErrorCode::SERDE, format!("{} is no attestation document", name(path)))
}

/// What a document is called in messages.
pub fn name(path: &Path) -> String {
    if path == Path::new("-") { "The document on standard input".to_owned() } else { path.display().to_string() }
}

fn standard_input() -> Result<Vec<u8>, Failure> {
    let mut content = Vec::new();
    let read = io::stdin().lock().take(MAX_INPUT_BYTES + 1).read_to_end(&mut content);
    read.map_err(|error| Failure::new(ErrorCode::FILE_OPERATION, "Standard input cannot be read").because(error))?;
    Ok(content)
}

fn decode(content: Vec<u8>) -> Option<Vec<u8>> {
    if content.first().is_some_and(|first| RAW_STARTS.contains(first)) {
        return Some(content);
    }
    let text: String = String::from_utf8(content).ok()?.split_whitespace().collect();
    // Base64 of a document never reads as hex, since it begins with `h` (or, with a tag, `0o`).
    let bytes = hex::decode(&text).ok().or_else(|| base64(&text))?;
    (!bytes.is_empty()).then_some(bytes)
}

/// Both alphabets, with and without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let padded = Base64::decode_vec(text).or_else(|_| Base64Unpadded::decode_vec(text));
    padded.or_else(|_| Base64Url::decode_vec(text)).or_else(|_| Base64UrlUnpadded::decode_vec(text)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_hex_and_every_base64_are_the_same_document() {
        let document = [0x84, 0xff, 0xfe, 0x01, 0x02];
        assert_eq!(decode(document.to_vec()).unwrap(), document);
        for text in ["84fffe0102", "84FF FE01\n02\n", "hP/+AQI=", "hP/+\nAQI=\n", "hP/+AQI", "hP_-AQI=", "hP_-AQI"] {
            assert_eq!(decode(text.as_bytes().to_vec()).unwrap(), document, "{text}");
        }
    }

    #[test]
    fn other_things_are_no_document() {
        for content in [&b""[..], b"\n", b"{\"a\": 1}", b"\x00\x01", b"\xff\xff"] {
            assert_eq!(decode(content.to_vec()), None, "{content:?}");
        }
    }
}
