//! The envelope of a document: COSE_Sign1 with ES384.
//!
//! [`sign1`] writes it, [`Envelope::open`] reads it, and [`signed_bytes`] is what the signature covers (RFC 9052 sections 4.2 and 4.4).
//! What is written has no tag, as documents of AWS's devices have none. Both RFC 9052 and AWS's description of documents allow tag 18
//! (COSE_Sign1) in front, so one is read as well; apart from that there is one encoding of an envelope and no other is taken, because
//! the signature covers neither the lengths nor the unprotected header.

use minicbor::{Decoder, Encoder};
use p384::ecdsa::signature::{Signer as _, Verifier as _};
use p384::ecdsa::{Signature, SigningKey, VerifyingKey};

/// The protected header of every document: `{1: -35}`, the algorithm ES384 (RFC 9053 section 2.1).
pub const PROTECTED_HEADER: [u8; 4] = [0xa1, 0x01, 0x38, 0x22];

/// Bytes in an ES384 signature: r and s, 48 bytes each, big-endian, no DER.
pub const SIGNATURE_BYTES: usize = 96;

/// The longest payload (bytes), as AWS's description of documents has it.
pub const MAX_PAYLOAD_BYTES: usize = 16_384;

/// The longest envelope (bytes) around such a payload: tag, array, headers, two lengths, signature.
pub const MAX_ENVELOPE_BYTES: usize = MAX_PAYLOAD_BYTES + SIGNATURE_BYTES + 13;

/// CBOR tag 18 (COSE_Sign1) in its one-byte form.
const TAG: u8 = 0xd2;

/// Why bytes are not an envelope of a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub enum EnvelopeError {
    /// It is not a COSE_Sign1, which is a CBOR array of four: {0}.
    Structure(String),
    /// It is longer than a document can be, which is 16493 bytes.
    TooLong,
    /// The protected header is `{0}` in hex instead of `a1013822`, which stands for ES384 alone.
    ProtectedHeader(String),
    /// The unprotected header is not empty; a signature does not cover it, so nothing may stand there.
    UnprotectedHeader,
    /// The payload has {0} bytes; 1 to 16384 are allowed.
    PayloadLength(usize),
    /// The signature has {0} bytes instead of 96.
    SignatureLength(usize),
    /// The envelope is not encoded in the shortest form, or bytes follow it.
    Encoding,
}

/// An envelope that was taken apart. Having one says nothing about the signature: [`Envelope::check`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// What is signed: for a document the CBOR of [`crate::Payload`].
    pub payload: &'a [u8],
    /// r and s.
    pub signature: [u8; SIGNATURE_BYTES],
}

impl<'a> Envelope<'a> {
    /// Takes an envelope apart.
    ///
    /// # Errors
    ///
    /// [`EnvelopeError`] for everything but the one encoding of a COSE_Sign1 with ES384, with or without tag 18.
    pub fn open(bytes: &'a [u8]) -> Result<Self, EnvelopeError> {
        if bytes.len() > MAX_ENVELOPE_BYTES {
            return Err(EnvelopeError::TooLong);
        }
        let untagged = bytes.strip_prefix(&[TAG]).unwrap_or(bytes);
        let structure = |error: minicbor::decode::Error| EnvelopeError::Structure(error.to_string());
        let mut cbor = Decoder::new(untagged);
        match cbor.array().map_err(structure)? {
            Some(4) => {}
            Some(length) => return Err(EnvelopeError::Structure(format!("an array of {length}"))),
            None => return Err(EnvelopeError::Encoding),
        }
        let protected = cbor.bytes().map_err(structure)?;
        if protected != PROTECTED_HEADER {
            return Err(EnvelopeError::ProtectedHeader(hex::encode(protected.get(..32).unwrap_or(protected))));
        }
        if cbor.map().map_err(structure)? != Some(0) {
            return Err(EnvelopeError::UnprotectedHeader);
        }
        let payload = cbor.bytes().map_err(structure)?;
        if payload.is_empty() || payload.len() > MAX_PAYLOAD_BYTES {
            return Err(EnvelopeError::PayloadLength(payload.len()));
        }
        let signature = cbor.bytes().map_err(structure)?;
        let signature: [u8; SIGNATURE_BYTES] = signature.try_into().map_err(|_| EnvelopeError::SignatureLength(signature.len()))?;
        if wrap(payload, &signature) != untagged {
            return Err(EnvelopeError::Encoding);
        }
        Ok(Self { payload, signature })
    }

    /// Whether the signature was made over the payload with the private half of `key`.
    ///
    /// ECDSA has two signatures for each: with (r, s) also (r, n − s) is good. Neither lets anybody sign anything else, but the bytes
    /// of a document are no name for it.
    ///
    /// # Errors
    ///
    /// The error of `p384`, which does not say more.
    pub fn check(&self, key: &VerifyingKey) -> Result<(), p384::ecdsa::Error> {
        key.verify(&signed_bytes(self.payload), &Signature::from_slice(&self.signature)?)
    }
}

/// What the signature covers: the Sig_structure of RFC 9052 section 4.4 without external data.
#[must_use]
pub fn signed_bytes(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payload.len() + 32);
    let mut cbor = Encoder::new(&mut bytes);
    cbor.array(4)
        .and_then(|cbor| cbor.str("Signature1"))
        .and_then(|cbor| cbor.bytes(&PROTECTED_HEADER))
        .and_then(|cbor| cbor.bytes(&[]))
        .and_then(|cbor| cbor.bytes(payload))
        .expect("a Vec takes every write");
    bytes
}

/// Signs `payload` and wraps it: `[protected, {}, payload, signature]`. The nonce of the signature is RFC 6979's.
///
/// # Errors
///
/// The signature error of `p384`; it does not happen with a key that was made properly.
pub fn sign1(key: &SigningKey, payload: &[u8]) -> Result<Vec<u8>, p384::ecdsa::Error> {
    let signature: Signature = key.try_sign(&signed_bytes(payload))?;
    Ok(wrap(payload, &signature.to_bytes()))
}

/// How long the envelope of a payload of a document's usual length (256 to 65535 bytes) is.
pub(crate) const fn envelope_bytes(payload_bytes: usize) -> usize {
    payload_bytes + SIGNATURE_BYTES + 12
}

fn wrap(payload: &[u8], signature: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payload.len() + SIGNATURE_BYTES + 16);
    let mut cbor = Encoder::new(&mut bytes);
    cbor.array(4)
        .and_then(|cbor| cbor.bytes(&PROTECTED_HEADER))
        .and_then(|cbor| cbor.map(0))
        .and_then(|cbor| cbor.bytes(payload))
        .and_then(|cbor| cbor.bytes(signature))
        .expect("a Vec takes every write");
    bytes
}
