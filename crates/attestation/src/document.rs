//! Reading a document: bytes become a [`Document`], whose fields have the types and sizes that AWS's description demands.
//!
//! [`Document::decode`] opens the envelope of [`crate::cose`] and reads the map that [`crate::Payload`] writes. Nothing is believed
//! here: [`crate::Verifier`] looks at signatures and certificates. Limits: AWS's `nsm-api`, docs/attestation_process.md, 3.2.2.

use crate::cose::{Envelope, EnvelopeError};
use crate::entries::Entries;
use crate::payload::DIGEST_NAME;
use minicbor::Decoder;
use minicbor::data::Type;
use std::collections::BTreeMap;

/// The longest certificate, public key, user data or nonce (bytes).
pub const MAX_FIELD_BYTES: usize = 1024;

/// How many certificates a bundle may hold. AWS names no limit and uses four; more than this is refused before it is looked at.
pub const MAX_BUNDLE: usize = 16;

/// PCRs are numbered from 0 to one less than this.
pub const MAX_PCRS: u16 = 32;

/// Why bytes are not a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub enum DocumentError {
    /// The envelope of the document is not as it must be.
    Envelope(#[from] EnvelopeError),
    /// The payload is not one CBOR map: {0}.
    Structure(String),
    /// The payload has the field `{0}` twice.
    Repeated(&'static str),
    /// The payload lacks the field `{0}`.
    Missing(&'static str),
    /// The field `{field}` is not of its type: {reason}.
    Type {
        /// Which.
        field: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// The field `{field}` has a length of {length}, not {allowed}.
    Length {
        /// Which.
        field: &'static str,
        /// Bytes or entries that it has.
        length: u64,
        /// What it may have.
        allowed: &'static str,
    },
    /// The field `digest` is `{0}` instead of `SHA384`.
    Digest(String),
    /// The field `timestamp` is 0.
    Timestamp,
    /// The field `pcrs` has an index {0}; indexes are 0 to 31, each once.
    PcrIndex(u64),
}

/// What a document says. Having one proves nothing: anybody can write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Which NSM says to have signed; not empty.
    pub module_id: String,
    /// When, in milliseconds since 1970-01-01 UTC; not 0.
    pub timestamp_ms: u64,
    /// 1 to 32 registers by their index (0 to 31); each has 32, 48 or 64 bytes.
    pub pcrs: BTreeMap<u8, Vec<u8>>,
    /// The certificate (DER) of the key that signed; 1 to 1024 bytes.
    pub certificate: Vec<u8>,
    /// The certificates (DER) above it, root first; at least one, of 1 to 1024 bytes each.
    pub cabundle: Vec<Vec<u8>>,
    /// A key of the application; 1 to 1024 bytes.
    pub public_key: Option<Vec<u8>>,
    /// Data of the application; up to 1024 bytes.
    pub user_data: Option<Vec<u8>>,
    /// What the asker sent; up to 1024 bytes.
    pub nonce: Option<Vec<u8>>,
}

impl Document {
    /// Reads a document (envelope and payload).
    ///
    /// # Errors
    ///
    /// [`DocumentError`] says which rule is broken.
    pub fn decode(bytes: &[u8]) -> Result<Self, DocumentError> {
        Self::of_payload(Envelope::open(bytes)?.payload)
    }

    /// Reads the payload of an envelope.
    ///
    /// Fields may come in any order, and an optional one may be null or left out. Fields of other names are passed over. Maps and the array may have an indefinite length
    /// (RFC 8949 section 3.2): AWS's devices wrote the payload's map with a definite one at first and write it with an indefinite one since.
    ///
    /// # Errors
    ///
    /// As [`Self::decode`].
    pub fn of_payload(payload: &[u8]) -> Result<Self, DocumentError> {
        let mut fields = Fields::default();
        let mut cbor = Decoder::new(payload);
        let structure = |error: minicbor::decode::Error| DocumentError::Structure(error.to_string());
        let mut entries = Entries::of_map(&mut cbor).map_err(structure)?;
        while entries.has_next(&mut cbor).map_err(structure)? {
            let name = cbor.str().map_err(structure)?;
            fields.read(name, &mut cbor)?;
        }
        if cbor.position() != payload.len() {
            return Err(DocumentError::Structure("bytes follow it".into()));
        }
        fields.finish()
    }

    /// Whether the measurements of the image (PCR0, PCR1 and PCR2) are all zero or absent, as in debug mode: such a document says
    /// nothing about what runs.
    #[must_use]
    pub fn is_debug(&self) -> bool {
        (0..=2).all(|index| self.pcrs.get(&index).is_none_or(|value| value.iter().all(|byte| *byte == 0)))
    }
}

/// How deep containers and tags of an unknown field may stand in each other.
const MAX_DEPTH: u8 = 16;

/// Reads one data item of any kind. Unlike [`Decoder::skip`] it takes nothing but well-formed ones (RFC 8949 appendix C): no break in
/// place of a value, and no simple value below 32 in two bytes.
fn pass_over(cbor: &mut Decoder<'_>, depth: u8) -> Result<(), minicbor::decode::Error> {
    let deeper = || depth.checked_sub(1).ok_or_else(|| minicbor::decode::Error::message("more than 16 levels"));
    match cbor.datatype()? {
        Type::Array | Type::ArrayIndef => {
            let depth = deeper()?;
            let mut entries = Entries::of_array(cbor)?;
            while entries.has_next(cbor)? {
                pass_over(cbor, depth)?;
            }
            Ok(())
        }
        Type::Map | Type::MapIndef => {
            let depth = deeper()?;
            let mut entries = Entries::of_map(cbor)?;
            while entries.has_next(cbor)? {
                pass_over(cbor, depth)?;
                pass_over(cbor, depth)?;
            }
            Ok(())
        }
        Type::Tag => {
            let depth = deeper()?;
            cbor.tag()?;
            pass_over(cbor, depth)
        }
        Type::Break => Err(minicbor::decode::Error::message("a break where a value must be")),
        Type::Simple if cbor.input().get(cbor.position()..).is_some_and(|rest| matches!(rest, [0xf8, ..=31, ..])) => {
            Err(minicbor::decode::Error::message("a simple value below 32 in two bytes"))
        }
        Type::Unknown(_) => Err(minicbor::decode::Error::message("a reserved kind of value")),
        _ => cbor.skip(),
    }
}

/// The fields read so far; the outer Option says whether a field was there.
#[derive(Default)]
struct Fields {
    module_id: Option<String>,
    digest: Option<()>,
    timestamp: Option<u64>,
    pcrs: Option<BTreeMap<u8, Vec<u8>>>,
    certificate: Option<Vec<u8>>,
    cabundle: Option<Vec<Vec<u8>>>,
    public_key: Option<Option<Vec<u8>>>,
    user_data: Option<Option<Vec<u8>>>,
    nonce: Option<Option<Vec<u8>>>,
}

impl Fields {
    fn read(&mut self, name: &str, cbor: &mut Decoder<'_>) -> Result<(), DocumentError> {
        match name {
            "module_id" => once(&mut self.module_id, "module_id", module_id(cbor)?),
            "digest" => once(&mut self.digest, "digest", digest(cbor)?),
            "timestamp" => once(&mut self.timestamp, "timestamp", timestamp(cbor)?),
            "pcrs" => once(&mut self.pcrs, "pcrs", pcrs(cbor)?),
            "certificate" => once(&mut self.certificate, "certificate", bytes(cbor, "certificate", 1)?),
            "cabundle" => once(&mut self.cabundle, "cabundle", cabundle(cbor)?),
            "public_key" => once(&mut self.public_key, "public_key", optional(cbor, "public_key", 1)?),
            "user_data" => once(&mut self.user_data, "user_data", optional(cbor, "user_data", 0)?),
            "nonce" => once(&mut self.nonce, "nonce", optional(cbor, "nonce", 0)?),
            // Signed with the rest, and of a device that says more than those of today.
            _ => pass_over(cbor, MAX_DEPTH).map_err(|error| DocumentError::Structure(error.to_string())),
        }
    }

    fn finish(self) -> Result<Document, DocumentError> {
        self.digest.ok_or(DocumentError::Missing("digest"))?;
        Ok(Document {
            module_id: self.module_id.ok_or(DocumentError::Missing("module_id"))?,
            timestamp_ms: self.timestamp.ok_or(DocumentError::Missing("timestamp"))?,
            pcrs: self.pcrs.ok_or(DocumentError::Missing("pcrs"))?,
            certificate: self.certificate.ok_or(DocumentError::Missing("certificate"))?,
            cabundle: self.cabundle.ok_or(DocumentError::Missing("cabundle"))?,
            public_key: self.public_key.flatten(),
            user_data: self.user_data.flatten(),
            nonce: self.nonce.flatten(),
        })
    }
}

fn once<T>(place: &mut Option<T>, field: &'static str, value: T) -> Result<(), DocumentError> {
    if place.replace(value).is_some() { Err(DocumentError::Repeated(field)) } else { Ok(()) }
}

fn of_type(field: &'static str) -> impl Fn(minicbor::decode::Error) -> DocumentError {
    move |error| DocumentError::Type { field, reason: error.to_string() }
}

fn module_id(cbor: &mut Decoder<'_>) -> Result<String, DocumentError> {
    let text = cbor.str().map_err(of_type("module_id"))?;
    if text.is_empty() || text.len() > MAX_FIELD_BYTES {
        return Err(DocumentError::Length { field: "module_id", length: text.len() as u64, allowed: "1 to 1024 bytes" });
    }
    Ok(text.to_owned())
}

fn digest(cbor: &mut Decoder<'_>) -> Result<(), DocumentError> {
    match cbor.str().map_err(of_type("digest"))? {
        DIGEST_NAME => Ok(()),
        other => Err(DocumentError::Digest(other.chars().take(64).flat_map(char::escape_default).collect())),
    }
}

fn timestamp(cbor: &mut Decoder<'_>) -> Result<u64, DocumentError> {
    match cbor.u64().map_err(of_type("timestamp"))? {
        0 => Err(DocumentError::Timestamp),
        timestamp => Ok(timestamp),
    }
}

fn pcrs(cbor: &mut Decoder<'_>) -> Result<BTreeMap<u8, Vec<u8>>, DocumentError> {
    let of_length = |length| DocumentError::Length { field: "pcrs", length, allowed: "1 to 32 registers" };
    let mut entries = Entries::of_map(cbor).map_err(of_type("pcrs"))?;
    if let Some(length) = entries.left().filter(|length| *length > MAX_PCRS.into()) {
        return Err(of_length(length));
    }
    let mut pcrs = BTreeMap::new();
    while entries.has_next(cbor).map_err(of_type("pcrs"))? {
        let number = cbor.u64().map_err(of_type("pcrs"))?;
        let index = u8::try_from(number).ok().filter(|_| number < MAX_PCRS.into()).ok_or(DocumentError::PcrIndex(number))?;
        let value = cbor.bytes().map_err(of_type("pcrs"))?;
        if ![32, 48, 64].contains(&value.len()) {
            return Err(DocumentError::Length { field: "pcrs", length: value.len() as u64, allowed: "32, 48 or 64 bytes a register" });
        }
        if pcrs.insert(index, value.to_vec()).is_some() {
            return Err(DocumentError::PcrIndex(number));
        }
    }
    if pcrs.is_empty() { Err(of_length(0)) } else { Ok(pcrs) }
}

fn cabundle(cbor: &mut Decoder<'_>) -> Result<Vec<Vec<u8>>, DocumentError> {
    let of_length = |length| DocumentError::Length { field: "cabundle", length, allowed: "1 to 16 certificates" };
    let mut entries = Entries::of_array(cbor).map_err(of_type("cabundle"))?;
    if let Some(length) = entries.left().filter(|length| *length > MAX_BUNDLE as u64) {
        return Err(of_length(length));
    }
    let mut bundle = Vec::new();
    while entries.has_next(cbor).map_err(of_type("cabundle"))? {
        bundle.push(bytes(cbor, "cabundle", 1)?);
        if bundle.len() > MAX_BUNDLE {
            return Err(of_length(bundle.len() as u64));
        }
    }
    if bundle.is_empty() { Err(of_length(0)) } else { Ok(bundle) }
}

fn optional(cbor: &mut Decoder<'_>, field: &'static str, least: usize) -> Result<Option<Vec<u8>>, DocumentError> {
    if cbor.datatype().map_err(of_type(field))? == Type::Null {
        cbor.null().map_err(of_type(field))?;
        return Ok(None);
    }
    bytes(cbor, field, least).map(Some)
}

fn bytes(cbor: &mut Decoder<'_>, field: &'static str, least: usize) -> Result<Vec<u8>, DocumentError> {
    let bytes = cbor.bytes().map_err(of_type(field))?;
    if bytes.len() < least || bytes.len() > MAX_FIELD_BYTES {
        let allowed = if least == 0 { "0 to 1024 bytes" } else { "1 to 1024 bytes" };
        return Err(DocumentError::Length { field, length: bytes.len() as u64, allowed });
    }
    Ok(bytes.to_vec())
}
