//! Attestation documents: COSE_Sign1 over CBOR, ES384.
