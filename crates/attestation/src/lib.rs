//! Attestation documents: made, signed and verified. A library of its own, without a device or an enclave.
//!
//! A document is a COSE_Sign1 (RFC 9052 section 4.2) with ES384 (RFC 9053 section 2.1) around a CBOR map of nine fields. [`Payload`] writes
//! that map and [`Document`] reads it, [`cose`] is the envelope. [`Signer`] signs below the user's local [`Pki`], whose names say "not
//! AWS" in a chain of AWS's shape; [`Verifier`] tells whose a document is, AWS's own included.
//!
//! Used by `nitroxide-nsm` (signing) and `nitroxide attestation` (the rest). Description: docs/attestation.md.

#![forbid(unsafe_code)]

mod authority;
mod certificate;
mod chain;
pub mod cose;
mod document;
mod entries;
mod import;
mod issue;
mod keyfile;
mod level;
mod payload;
mod pki;
mod signer;
mod verify;

pub use certificate::{Certificate, CertificateFault, NoTimestamp, Timestamp, printable};
pub use chain::Place;
pub use document::{Document, DocumentError, MAX_FIELD_BYTES, MAX_PCRS};
pub use entries::Entries;
pub use import::{ImportError, MAX_RESPONSE_BYTES};
pub use issue::CertificateError;
pub use keyfile::{KeyFileError, MAX_PEM_BYTES, to_pem};
pub use level::LEAF_VALIDITY_MS;
pub use payload::{DIGEST_NAME, PCR_BYTES, Payload, Pcr};
pub use pki::{Pki, PkiError, in_one_line};
pub use signer::{Claims, Signer, SignerError};
pub use verify::{AWS_ROOT_FINGERPRINT, At, RootKind, TrustedRoot, Verified, Verifier, VerifyError};
