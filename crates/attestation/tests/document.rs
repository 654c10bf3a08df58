//! Documents as a stranger sees them: decoded with another CBOR library, verified with the key of the certificate.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use ciborium::Value;
use nitroxide_attestation::{Claims, LEAF_VALIDITY_MS, Signer};
use p384::ecdsa::signature::Verifier as _;
use p384::ecdsa::{DerSignature, Signature, VerifyingKey};
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage};

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;
const MODULE_ID: &str = "i-0000000000000000-enc00000000000012ab";

fn parts(document: &[u8]) -> [Value; 4] {
    let value: Value = ciborium::from_reader(document).unwrap();
    value.into_array().unwrap().try_into().unwrap()
}

fn payload(document: &[u8]) -> Vec<(String, Value)> {
    let payload = parts(document)[2].clone().into_bytes().unwrap();
    let map: Value = ciborium::from_reader(payload.as_slice()).unwrap();
    map.into_map().unwrap().into_iter().map(|(key, value)| (key.into_text().unwrap(), value)).collect()
}

fn field(document: &[u8], name: &str) -> Value {
    payload(document).into_iter().find(|(key, _)| key == name).unwrap().1
}

fn certificate(document: &[u8]) -> Certificate {
    Certificate::from_der(&field(document, "certificate").into_bytes().unwrap()).unwrap()
}

/// The certificates of the bundle, root first.
fn bundle(document: &[u8]) -> Vec<Certificate> {
    let bundle = field(document, "cabundle").into_array().unwrap();
    bundle.iter().map(|der| Certificate::from_der(der.as_bytes().unwrap()).unwrap()).collect()
}

fn key_of(certificate: &Certificate) -> VerifyingKey {
    VerifyingKey::from_sec1_bytes(certificate.tbs_certificate().subject_public_key_info().subject_public_key.raw_bytes()).unwrap()
}

fn assert_signed_by(certificate: &Certificate, issuer: &Certificate) {
    let signature = DerSignature::from_bytes(certificate.signature().raw_bytes()).unwrap();
    key_of(issuer).verify(&certificate.tbs_certificate().to_der().unwrap(), &signature).unwrap();
    assert_eq!(certificate.tbs_certificate().issuer(), issuer.tbs_certificate().subject());
}

#[test]
fn the_envelope_is_an_untagged_sign1_with_es384() {
    let document = Signer::local(MODULE_ID, NOW_MS).unwrap().document(NOW_MS, &Claims::default()).unwrap();
    assert_eq!(document[..7], [0x84, 0x44, 0xa1, 0x01, 0x38, 0x22, 0xa0]);
    let [protected, unprotected, _, signature] = parts(&document);
    assert_eq!(protected, Value::Bytes(vec![0xa1, 0x01, 0x38, 0x22]));
    assert_eq!(unprotected, Value::Map(vec![]));
    assert_eq!(signature.as_bytes().unwrap().len(), 96);
    assert_eq!(document[document.len() - 98..document.len() - 96], [0x58, 0x60]);
}

#[test]
fn the_signature_verifies_with_the_certificates_key_and_no_changed_payload() {
    let document = Signer::local(MODULE_ID, NOW_MS).unwrap().document(NOW_MS, &Claims::default()).unwrap();
    let [protected, _, payload, signature] = parts(&document);
    let mut covered = Vec::new();
    let structure = Value::Array(vec![Value::Text("Signature1".into()), protected, Value::Bytes(vec![]), payload]);
    ciborium::into_writer(&structure, &mut covered).unwrap();
    let signature = Signature::from_slice(signature.as_bytes().unwrap()).unwrap();
    let key = key_of(&certificate(&document));
    key.verify(&covered, &signature).unwrap();
    *covered.last_mut().unwrap() ^= 1;
    key.verify(&covered, &signature).unwrap_err();
}

#[test]
fn the_payload_says_what_was_claimed() {
    let pcrs = [(0, [1; 48]), (4, [2; 48]), (16, [3; 48])];
    let claims = Claims { pcrs: &pcrs, public_key: Some(b"key"), user_data: Some(b""), nonce: None };
    let document = Signer::local(MODULE_ID, NOW_MS).unwrap().document(NOW_MS, &claims).unwrap();
    let names: Vec<String> = payload(&document).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce"]);
    assert_eq!(field(&document, "module_id"), Value::Text(MODULE_ID.into()));
    assert_eq!(field(&document, "digest"), Value::Text("SHA384".into()));
    assert_eq!(field(&document, "timestamp"), Value::from(NOW_MS));
    assert_eq!(field(&document, "public_key"), Value::Bytes(b"key".to_vec()));
    assert_eq!(field(&document, "user_data"), Value::Bytes(vec![]));
    assert_eq!(field(&document, "nonce"), Value::Null);
    let expected = pcrs.iter().map(|(index, value)| (Value::from(*index), Value::Bytes(value.to_vec()))).collect();
    assert_eq!(field(&document, "pcrs"), Value::Map(expected));
}

#[test]
fn the_chain_leads_from_a_root_that_says_it_is_not_aws_to_the_leaf() {
    let mut signer = Signer::local(MODULE_ID, NOW_MS).unwrap();
    let document = signer.document(NOW_MS, &Claims::default()).unwrap();
    let (leaf, bundle) = (certificate(&document), bundle(&document));
    assert_eq!(bundle.len(), 4);
    let root = &bundle[0];
    assert_signed_by(root, root);
    for pair in bundle.windows(2) {
        assert_signed_by(&pair[1], &pair[0]);
    }
    assert_signed_by(&leaf, &bundle[3]);
    assert_eq!(root.to_der().unwrap(), signer.root());
    for certificate in bundle.iter().chain([&leaf]) {
        let subject = certificate.tbs_certificate().subject().to_string();
        assert!(subject.contains("not AWS") && subject.contains("Nitroxide"), "{subject}");
        assert!(!subject.contains("Amazon") && !subject.contains("nitro-enclaves"), "{subject}");
    }
    assert!(leaf.tbs_certificate().subject().to_string().contains(MODULE_ID));
    let (critical, constraints) = root.tbs_certificate().get_extension::<BasicConstraints>().unwrap().unwrap();
    assert!(critical && constraints.ca);
    let (_, usage) = root.tbs_certificate().get_extension::<KeyUsage>().unwrap().unwrap();
    assert!(usage.key_cert_sign());
    let (_, constraints) = leaf.tbs_certificate().get_extension::<BasicConstraints>().unwrap().unwrap();
    assert!(!constraints.ca);
    let (_, usage) = leaf.tbs_certificate().get_extension::<KeyUsage>().unwrap().unwrap();
    assert!(usage.digital_signature() && !usage.key_cert_sign());
}

#[test]
fn the_leaf_covers_every_documents_time_under_the_same_key() {
    let mut signer = Signer::local(MODULE_ID, NOW_MS).unwrap();
    let first = certificate(&signer.document(NOW_MS, &Claims::default()).unwrap());
    for now_ms in [NOW_MS, NOW_MS + LEAF_VALIDITY_MS, NOW_MS + 1000 * LEAF_VALIDITY_MS, NOW_MS - 10 * LEAF_VALIDITY_MS] {
        let leaf = certificate(&signer.document(now_ms, &Claims::default()).unwrap());
        let validity = leaf.tbs_certificate().validity();
        assert!(validity.not_before.to_unix_duration().as_secs() <= now_ms / 1000, "{now_ms}");
        assert!(validity.not_after.to_unix_duration().as_secs() > now_ms / 1000, "{now_ms}");
        assert_eq!(key_of(&leaf), key_of(&first));
    }
}

#[test]
fn two_signers_share_neither_key_nor_root() {
    let documents = [(); 2].map(|()| Signer::local(MODULE_ID, NOW_MS).unwrap().document(NOW_MS, &Claims::default()).unwrap());
    assert_ne!(key_of(&certificate(&documents[0])), key_of(&certificate(&documents[1])));
    assert_ne!(bundle(&documents[0])[0], bundle(&documents[1])[0]);
}

#[test]
fn names_that_cannot_stand_in_a_certificate_are_refused() {
    for module_id in ["", "a,O=Amazon", "CN=x", "a b", "\u{e9}", &"x".repeat(65)] {
        let error = Signer::local(module_id, NOW_MS).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("cannot be the name"), "{module_id}: {error}");
    }
}

#[test]
fn a_date_beyond_certificates_is_an_error() {
    assert!(Signer::local(MODULE_ID, u64::MAX).is_err());
}
