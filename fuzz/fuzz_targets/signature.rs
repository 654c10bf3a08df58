//! A signature section or a certificate of any bytes, or a good one with some bytes changed: decoded or refused, and nothing is believed that was not signed with
//! the one key there is.
#![no_main]

#[path = "edits.rs"]
mod edits;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nitroxide_eif::certificate::Certificate;
use nitroxide_eif::{Pcr, Signature, Signer};

static SIGNER: LazyLock<Signer> = LazyLock::new(|| {
    let key = include_str!("../../crates/eif/tests/data/p256.key.pem");
    Signer::from_pem(key, include_bytes!("../../crates/eif/tests/data/p256.cert.pem")).expect("a pair")
});
static SECTION: LazyLock<Vec<u8>> = LazyLock::new(|| SIGNER.signature_section(&Pcr::ZERO));

fuzz_target!(|input: &[u8]| {
    if let Ok(signature) = Signature::parse(&edits::apply(input, &SECTION)) {
        assert!(!signature.entries().is_empty());
        if let Ok(certificate) = signature.verify(&Pcr::ZERO) {
            assert_eq!(certificate.public_key(), SIGNER.certificate().public_key());
        }
    }
    let bytes = edits::apply(input, SIGNER.certificate().der());
    if let Ok(certificate) = Certificate::from_der(bytes.as_ref()).or_else(|_| Certificate::from_pem(&bytes)) {
        let _ = (certificate.issuer(), certificate.algorithm(), certificate.not_before(), certificate.not_after(), certificate.pcr8());
    }
});
