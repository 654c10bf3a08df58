//! The envelope of a document: COSE_Sign1 with ES384, written without the tag.
//!
//! [`sign1`] makes it and [`signed_bytes`] is what the signature covers (RFC 9052 sections 4.2 and 4.4). Both sides of a document
//! need the second, so it is public.

use minicbor::Encoder;
use p384::ecdsa::signature::Signer as _;
use p384::ecdsa::{Signature, SigningKey};

/// The protected header of every document: `{1: -35}`, the algorithm ES384 (RFC 9053 section 2.1).
pub const PROTECTED_HEADER: [u8; 4] = [0xa1, 0x01, 0x38, 0x22];

/// Bytes in an ES384 signature: r and s, 48 bytes each, big-endian, no DER.
pub const SIGNATURE_BYTES: usize = 96;

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
    let mut bytes = Vec::with_capacity(payload.len() + SIGNATURE_BYTES + 16);
    let mut cbor = Encoder::new(&mut bytes);
    cbor.array(4)
        .and_then(|cbor| cbor.bytes(&PROTECTED_HEADER))
        .and_then(|cbor| cbor.map(0))
        .and_then(|cbor| cbor.bytes(payload))
        .and_then(|cbor| cbor.bytes(&signature.to_bytes()))
        .expect("a Vec takes every write");
    Ok(bytes)
}
