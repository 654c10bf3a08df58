//! A document of any bytes, or a genuine one with some bytes changed: read or refused, and believed only if it is the genuine one. The same bytes as a certificate
//! and as PEM text of a root.
#![no_main]

#[path = "edits.rs"]
mod edits;

use libfuzzer_sys::fuzz_target;
use nitroxide_attestation::cose::{Envelope, signed_bytes};
use nitroxide_attestation::{At, Certificate, Document, TrustedRoot, Verifier};

const GENUINE: &[u8] = include_bytes!("../../crates/attestation/tests/data/aws-ap-south-1-2024-12-13.cbor");
const ROOT: &[u8] = include_bytes!("../../crates/attestation/tests/data/aws-nitro-enclaves-root.der");
/// CBOR tag 18, which may stand before a document.
const TAG: u8 = 0xd2;

fuzz_target!(|input: &[u8]| {
    let bytes = edits::apply(input, GENUINE);
    if let Ok(verified) = Verifier::new([TrustedRoot::AWS]).verify(&bytes, At::Document) {
        assert_eq!(bytes.strip_prefix(&[TAG]).unwrap_or(&bytes), GENUINE);
        assert_eq!(verified.chain.len(), 5);
    }
    if let Ok(envelope) = Envelope::open(&bytes) {
        assert!(bytes.ends_with(&envelope.signature) && signed_bytes(envelope.payload).len() > envelope.payload.len());
    }
    if let Ok(document) = Document::decode(&bytes).or_else(|_| Document::of_payload(&bytes)) {
        assert!(!document.pcrs.is_empty() && !document.cabundle.is_empty() && document.timestamp_ms > 0);
        let _ = document.is_debug();
    }
    let certificate = edits::apply(input, ROOT);
    if let Ok(read) = Certificate::from_der(&certificate) {
        assert_eq!(read.der(), certificate.as_ref());
        let _ = (read.subject(), read.issuer(), read.common_name(), read.begins().to_string(), read.ends().to_string());
    }
    let _ = TrustedRoot::read(&bytes);
});
