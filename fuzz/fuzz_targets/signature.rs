//! A signature section of any bytes: it is decoded or refused, and never vouches for a measurement that nobody signed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_eif::certificate::Certificate;
use nitroxide_eif::{Pcr, Signature};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(signature) = Signature::parse(bytes) {
        // Nobody has signed this value, so whatever is believed here is a forgery.
        assert!(signature.verify(&Pcr([0x5a; 48])).is_err());
        assert!(!signature.entries().is_empty());
    }
    let certificate = Certificate::from_der(bytes).or_else(|_| Certificate::from_pem(bytes));
    if let Ok(certificate) = certificate {
        let _ = (certificate.issuer(), certificate.algorithm(), certificate.not_before(), certificate.not_after(), certificate.pcr8());
    }
});
