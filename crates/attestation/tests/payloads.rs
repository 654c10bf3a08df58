//! Payloads that break one rule each, properly signed: refused by their form. And any bytes at all: an answer, never a panic.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use ciborium::Value;
use nitroxide_attestation::cose::{Envelope, sign1};
use nitroxide_attestation::{At, Claims, Document, DocumentError, Signer, TrustedRoot, Verifier};
use p384::ecdsa::SigningKey;
use p384::elliptic_curve::Generate as _;
use proptest::prelude::*;

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;

fn good() -> Vec<(Value, Value)> {
    let mut signer = Signer::local("i-0-enc0", NOW_MS).unwrap();
    let claims = Claims { pcrs: &[(0, [1; 48])], public_key: Some(b"k"), user_data: Some(b""), nonce: None };
    let document = signer.document(NOW_MS, &claims).unwrap();
    let payload: Value = ciborium::from_reader(Envelope::open(&document).unwrap().payload).unwrap();
    payload.into_map().unwrap()
}

fn decode(fields: Vec<(Value, Value)>) -> Result<Document, DocumentError> {
    let mut payload = Vec::new();
    ciborium::into_writer(&Value::Map(fields), &mut payload).unwrap();
    Document::of_payload(&payload)
}

/// The good payload with one field of another value.
fn with(field: &str, value: Value) -> Result<Document, DocumentError> {
    let mut fields = good();
    fields.iter_mut().find(|(name, _)| name.as_text() == Some(field)).unwrap().1 = value;
    decode(fields)
}

fn bytes(length: usize) -> Value {
    Value::Bytes(vec![1; length])
}

fn pcrs(registers: impl IntoIterator<Item = (u64, usize)>) -> Value {
    Value::Map(registers.into_iter().map(|(index, length)| (Value::from(index), bytes(length))).collect())
}

#[test]
fn what_the_rules_allow_is_read() {
    decode(good()).unwrap();
    for (field, value) in [
        ("public_key", Value::Null),
        ("public_key", bytes(1024)),
        ("user_data", bytes(1024)),
        ("nonce", bytes(0)),
        ("pcrs", pcrs((0..32).map(|index| (index, 48)))),
        ("pcrs", pcrs([(31, 32), (0, 64)])),
        ("cabundle", Value::Array(vec![bytes(1); 16])),
        ("certificate", bytes(1024)),
        ("timestamp", Value::from(1)),
    ] {
        with(field, value.clone()).unwrap_or_else(|error| panic!("{field} {value:?}: {error}"));
    }
    let optional: Vec<_> =
        good().into_iter().filter(|(name, _)| !["public_key", "user_data", "nonce"].contains(&name.as_text().unwrap())).collect();
    decode(optional).unwrap();
    decode(good().into_iter().rev().collect()).unwrap();
}

#[test]
fn fields_beyond_their_types_and_sizes_are_refused() {
    for (field, value) in [
        ("module_id", Value::Text(String::new())),
        ("module_id", bytes(4)),
        ("digest", Value::Text("SHA256".into())),
        ("digest", Value::Null),
        ("timestamp", Value::from(0)),
        ("timestamp", Value::from(-1)),
        ("timestamp", Value::Text("1".into())),
        ("pcrs", pcrs([])),
        ("pcrs", pcrs((0..33).map(|index| (index, 48)))),
        ("pcrs", pcrs([(32, 48)])),
        ("pcrs", pcrs([(0, 48), (0, 48)])),
        ("pcrs", pcrs([(0, 47)])),
        ("pcrs", Value::Array(vec![bytes(48)])),
        ("pcrs", Value::Map(vec![(Value::Text("0".into()), bytes(48))])),
        ("certificate", bytes(0)),
        ("certificate", bytes(1025)),
        ("certificate", Value::Null),
        ("cabundle", Value::Array(vec![])),
        ("cabundle", Value::Array(vec![bytes(0)])),
        ("cabundle", Value::Array(vec![bytes(1025)])),
        ("cabundle", Value::Array(vec![bytes(1); 17])),
        ("cabundle", Value::Array(vec![Value::Null])),
        ("public_key", bytes(0)),
        ("public_key", bytes(1025)),
        ("user_data", bytes(1025)),
        ("nonce", bytes(1025)),
        ("nonce", Value::Text("text".into())),
        ("nonce", Value::Tag(24, Box::new(bytes(1)))),
    ] {
        assert!(with(field, value.clone()).is_err(), "{field} {value:?}");
    }
}

#[test]
fn fields_missing_or_twice_are_refused_by_name_and_unknown_ones_passed_over() {
    for name in ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"] {
        let rest = good().into_iter().filter(|(field, _)| field.as_text() != Some(name)).collect();
        let error = decode(rest).unwrap_err();
        assert!(matches!(error, DocumentError::Missing(missing) if missing == name), "{error}");
    }
    for (name, value) in good() {
        let mut fields = good();
        fields.push((name.clone(), value));
        let error = decode(fields).unwrap_err();
        assert!(matches!(error, DocumentError::Repeated(twice) if Some(twice) == name.as_text()), "{error}");
    }
    let fields = good();
    let mut more = fields.clone();
    more.insert(3, (Value::Text("extra".into()), Value::Array(vec![Value::Map(good()), Value::Null])));
    assert!(decode(more).unwrap() == decode(fields).unwrap());
}

fn encoded(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

/// A payload with its maps and its array of indefinite length; AWS's devices write the outer one so since 2026 at the latest.
fn of_indefinite_length(fields: &[(Value, Value)]) -> Vec<u8> {
    const BREAK: &[u8] = &[0xff];
    let value = |value: &Value| match value {
        Value::Map(entries) => {
            let entries: Vec<u8> = entries.iter().flat_map(|(key, value)| [encoded(key), encoded(value)].concat()).collect();
            [&[0xbf], entries.as_slice(), BREAK].concat()
        }
        Value::Array(entries) => [&[0x9f], entries.iter().flat_map(encoded).collect::<Vec<_>>().as_slice(), BREAK].concat(),
        other => encoded(other),
    };
    let fields: Vec<u8> = fields.iter().flat_map(|(name, content)| [encoded(name), value(content)].concat()).collect();
    [&[0xbf], fields.as_slice(), BREAK].concat()
}

#[test]
fn containers_of_indefinite_length_say_the_same_and_must_end() {
    let fields = good();
    let payload = of_indefinite_length(&fields);
    assert!(Document::of_payload(&payload).unwrap() == decode(fields.clone()).unwrap());
    for length in 0..payload.len() {
        assert!(Document::of_payload(&payload[..length]).is_err(), "{length} of {} bytes", payload.len());
    }
    let too_many = |field: &str, value: Value| {
        let mut fields = fields.clone();
        fields.iter_mut().find(|(name, _)| name.as_text() == Some(field)).unwrap().1 = value;
        Document::of_payload(&of_indefinite_length(&fields))
    };
    for (field, value) in [
        ("pcrs", pcrs([])),
        ("pcrs", pcrs((0..33).map(|index| (index, 48)))),
        ("cabundle", Value::Array(vec![])),
        ("cabundle", Value::Array(vec![bytes(1); 17])),
    ] {
        assert!(too_many(field, value).is_err(), "{field}");
    }
}

#[test]
fn bytes_behind_a_payload_are_refused() {
    for mut payload in [encoded(&Value::Map(good())), of_indefinite_length(&good())] {
        payload.push(0xf6);
        assert!(matches!(Document::of_payload(&payload), Err(DocumentError::Structure(_))));
    }
    assert!(Document::of_payload(&[]).is_err());
}

/// The good payload with an unknown field of these bytes, in a map of definite length.
fn with_unknown(item: &[u8]) -> Result<Document, DocumentError> {
    let payload = encoded(&Value::Map(good()));
    Document::of_payload(&[&[0xaa], &payload[1..], b"\x65extra", item].concat())
}

#[test]
fn unknown_fields_must_be_well_formed() {
    for item in [
        &b"\x00"[..],
        b"\x3a\x00\x01\x02\x03",
        b"\x43abc",
        b"\x5f\x41a\xff",
        b"\x7f\x61a\xff",
        b"\x82\x01\x02",
        b"\x9f\x01\xff",
        b"\xbf\x01\x02\xff",
        b"\xc1\x01",
        b"\xf4",
        b"\xf6",
        b"\xf7",
        b"\xf8\x20",
        b"\xf9\x00\x00",
        b"\xfb\x00\x00\x00\x00\x00\x00\x00\x00",
        &[&[0x81; 16][..], &[0]].concat(),
    ] {
        with_unknown(item).unwrap_or_else(|error| panic!("{item:02x?}: {error}"));
    }
    for item in [
        &b"\xff"[..],
        b"\x81\xff",
        b"\xa1\x01\xff",
        b"\xa1\xff\x01",
        b"\xbf\x01\xff",
        b"\xc1\xff",
        b"\x9f\xc1\xff",
        b"\xf8\x00",
        b"\xf8\x14",
        b"\xf8\x1f",
        b"\xfc",
        b"\x1c",
        b"\x5f\x61a\xff",
        b"\x5f\x5f\xff\xff",
        b"\x9f\x01",
        b"\x82\x01",
        b"\x00\x00",
        b"",
        &[&[0x81; 17][..], &[0]].concat(),
    ] {
        assert!(with_unknown(item).is_err(), "{item:02x?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_and_any_changed_document_give_an_answer(noise in proptest::collection::vec(any::<u8>(), 0..400), at in any::<prop::sample::Index>()) {
        let _ = Document::decode(&noise);
        let _ = Document::of_payload(&noise);
        let mut document = include_bytes!("data/aws-ap-south-1-2024-12-13.cbor").to_vec();
        let from = at.index(document.len());
        let until = (from + noise.len()).min(document.len());
        let before = document.clone();
        document[from..until].copy_from_slice(&noise[..until - from]);
        let verified = Verifier::new([TrustedRoot::AWS]).verify(&document, At::Document);
        prop_assert_eq!(verified.is_ok(), document == before);
    }

    /// A payload of any bytes under a good signature is a payload or none, and never a panic.
    #[test]
    fn any_signed_payload_is_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 1..200)) {
        let key = SigningKey::generate();
        let document = sign1(&key, &payload).unwrap();
        Envelope::open(&document).unwrap().check(key.verifying_key()).unwrap();
        prop_assert!(Verifier::new([TrustedRoot::AWS]).verify(&document, At::Document).is_err());
    }

    /// What a signer claims is what a verifier reads.
    #[test]
    fn claims_come_back(
        registers in proptest::collection::btree_map(0_u16..32, proptest::array::uniform32(any::<u8>()), 1..32),
        nonce in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..1024)),
        user_data in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..1024)),
        public_key in proptest::option::of(proptest::collection::vec(any::<u8>(), 1..1024)),
    ) {
        let pcrs: Vec<(u16, [u8; 48])> = registers.iter().map(|(index, half)| {
            let mut value = [0x5a; 48];
            value[..32].copy_from_slice(half);
            (*index, value)
        }).collect();
        let mut signer = Signer::local("i-0-enc0", NOW_MS).unwrap();
        let claims = Claims { pcrs: &pcrs, nonce: nonce.as_deref(), user_data: user_data.as_deref(), public_key: public_key.as_deref() };
        let document = signer.document(NOW_MS, &claims).unwrap();
        let verifier = Verifier::new([TrustedRoot::local(signer.root())]).allow_debug(true);
        let read = verifier.verify(&document, At::Document).unwrap().document;
        prop_assert_eq!(read.pcrs.into_iter().map(|(index, value)| (u16::from(index), value)).collect::<Vec<_>>(), pcrs.iter().map(|(index, value)| (*index, value.to_vec())).collect::<Vec<_>>());
        prop_assert_eq!((read.nonce, read.user_data, read.public_key), (nonce, user_data, public_key));
    }
}
