//! Attestation documents: made, signed and (later) verified. A library of its own, without a device or an enclave.
//!
//! A document is an untagged COSE_Sign1 (RFC 9052 section 4.2) with ES384 (RFC 9053 section 2.1) around a CBOR map of nine
//! fields. [`Payload`] is that map, [`cose`] the envelope, [`Signer`] a P-384 key made at launch together with the certificate
//! chain that vouches for it. The chain is local: its names say "not AWS", and no verifier that trusts only AWS's root accepts it.
//!
//! Used by `nitroxide-nsm`. A local PKI with AWS's five levels and a verifier will stand beside these modules. Description: docs/nsm.md.

#![forbid(unsafe_code)]

mod certificate;
pub mod cose;
mod payload;
mod signer;

pub use certificate::CertificateError;
pub use payload::{DIGEST_NAME, PCR_BYTES, Payload, Pcr};
pub use signer::{Claims, LEAF_VALIDITY_MS, Signer, SignerError};
