//! What a guest may ask: CBOR bytes become a checked [`Request`], or a defined error.
//!
//! The encoding is that of an externally tagged enumeration: a bare text string for a request without fields, else a map with the
//! one key that names it. Accepted: fields in any order, integers of any width, indefinite-length maps and byte strings. Refused:
//! unknown requests and fields, a field twice, missing required fields, other types, tags, trailing bytes. Nothing is skipped and
//! nothing is recursive, so depth costs nothing. Requests: docs/nsm.md, "Messages".

use crate::response::ErrorCode;
use minicbor::Decoder;
use minicbor::data::Type;
use nitroxide_attestation::Entries;

/// The longest request in bytes, as in Linux `drivers/misc/nsm.c` (NSM_REQUEST_MAX_SIZE).
pub const MAX_BYTES: usize = 0x1000;

/// One request. Having one proves its shape only: indices and lengths are checked by [`Module`](crate::Module).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Value and lock of a register.
    DescribePcr {
        /// Which register; anything beyond a u16 reads as 65535.
        index: u16,
    },
    /// Hash data into a register.
    ExtendPcr {
        /// Which register.
        index: u16,
        /// What to hash, as it is.
        data: Vec<u8>,
    },
    /// Lock one register.
    LockPcr {
        /// Which register.
        index: u16,
    },
    /// Lock all registers below one.
    LockPcrs {
        /// How many.
        range: u16,
    },
    /// Version, name, registers.
    DescribeNsm,
    /// A signed document.
    Attestation {
        /// To be repeated in the document.
        user_data: Option<Vec<u8>>,
        /// To be repeated in the document.
        nonce: Option<Vec<u8>>,
        /// To be repeated in the document.
        public_key: Option<Vec<u8>>,
    },
    /// Random bytes.
    GetRandom,
}

impl Request {
    /// Whether the answer depends on registers, so that it has to wait for the boot measurements and for requests before it.
    #[must_use]
    pub fn concerns_registers(&self) -> bool {
        !matches!(self, Self::DescribeNsm | Self::GetRandom)
    }
}

/// Decodes one request.
///
/// # Errors
///
/// `InputTooLarge` beyond [`MAX_BYTES`]; `InvalidOperation` for anything that is not exactly one known request.
pub fn decode(bytes: &[u8]) -> Result<Request, ErrorCode> {
    if bytes.len() > MAX_BYTES {
        return Err(ErrorCode::InputTooLarge);
    }
    let mut cbor = Decoder::new(bytes);
    let request = whole(&mut cbor).map_err(|Malformed| ErrorCode::InvalidOperation)?;
    if cbor.position() == bytes.len() { Ok(request) } else { Err(ErrorCode::InvalidOperation) }
}

/// The bytes are no request; where and why is of no use to the guest, which gets one code for all of it.
struct Malformed;

impl From<minicbor::decode::Error> for Malformed {
    fn from(_: minicbor::decode::Error) -> Self {
        Self
    }
}

fn whole(cbor: &mut Decoder<'_>) -> Result<Request, Malformed> {
    if cbor.datatype()? == Type::String {
        return match cbor.str()? {
            "DescribeNSM" => Ok(Request::DescribeNsm),
            "GetRandom" => Ok(Request::GetRandom),
            _ => Err(Malformed),
        };
    }
    let mut request = None;
    each(cbor, |name, cbor| {
        let decoded = with_fields(name, cbor)?;
        if request.replace(decoded).is_some() { Err(Malformed) } else { Ok(()) }
    })?;
    request.ok_or(Malformed)
}

fn with_fields(name: &str, cbor: &mut Decoder<'_>) -> Result<Request, Malformed> {
    match name {
        "DescribePCR" => number(cbor, "index").map(|index| Request::DescribePcr { index }),
        "LockPCR" => number(cbor, "index").map(|index| Request::LockPcr { index }),
        "LockPCRs" => number(cbor, "range").map(|range| Request::LockPcrs { range }),
        "ExtendPCR" => {
            let (mut index, mut data) = (None, None);
            each(cbor, |field, cbor| match field {
                "index" => set(&mut index, small(cbor)?),
                "data" => set(&mut data, byte_string(cbor)?),
                _ => Err(Malformed),
            })?;
            Ok(Request::ExtendPcr { index: index.ok_or(Malformed)?, data: data.ok_or(Malformed)? })
        }
        "Attestation" => {
            let (mut user_data, mut nonce, mut public_key) = (None, None, None);
            each(cbor, |field, cbor| match field {
                "user_data" => set(&mut user_data, optional_byte_string(cbor)?),
                "nonce" => set(&mut nonce, optional_byte_string(cbor)?),
                "public_key" => set(&mut public_key, optional_byte_string(cbor)?),
                _ => Err(Malformed),
            })?;
            Ok(Request::Attestation { user_data: user_data.flatten(), nonce: nonce.flatten(), public_key: public_key.flatten() })
        }
        _ => Err(Malformed),
    }
}

/// Reads a map and calls `entry` with each key, standing at its value. Ends at the first error.
fn each<'b>(cbor: &mut Decoder<'b>, mut entry: impl FnMut(&'b str, &mut Decoder<'b>) -> Result<(), Malformed>) -> Result<(), Malformed> {
    let mut entries = Entries::of_map(cbor)?;
    while entries.has_next(cbor)? {
        let key = cbor.str()?;
        entry(key, cbor)?;
    }
    Ok(())
}

fn number(cbor: &mut Decoder<'_>, name: &str) -> Result<u16, Malformed> {
    let mut number = None;
    each(cbor, |field, cbor| if field == name { set(&mut number, small(cbor)?) } else { Err(Malformed) })?;
    number.ok_or(Malformed)
}

fn set<T>(field: &mut Option<T>, value: T) -> Result<(), Malformed> {
    if field.replace(value).is_some() { Err(Malformed) } else { Ok(()) }
}

/// A non-negative integer; one too large for any register is as good as 65535.
fn small(cbor: &mut Decoder<'_>) -> Result<u16, Malformed> {
    Ok(u16::try_from(cbor.u64()?).unwrap_or(u16::MAX))
}

fn byte_string(cbor: &mut Decoder<'_>) -> Result<Vec<u8>, Malformed> {
    let mut bytes = Vec::new();
    for chunk in cbor.bytes_iter()? {
        bytes.extend_from_slice(chunk?);
    }
    Ok(bytes)
}

fn optional_byte_string(cbor: &mut Decoder<'_>) -> Result<Option<Vec<u8>>, Malformed> {
    if cbor.datatype()? == Type::Null {
        cbor.null()?;
        return Ok(None);
    }
    byte_string(cbor).map(Some)
}
