//! Requests and answers, byte by byte, and properties that hold for every sequence of them.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use ciborium::Value;
use nitroxide_attestation::Signer;
use nitroxide_nsm::request::{self, Request};
use nitroxide_nsm::response::{self, ErrorCode, Response};
use nitroxide_nsm::{Identity, InitialPcrs, MAX_FIELD_BYTES, Module};
use proptest::prelude::*;

const MODULE_ID: &str = "i-0000000000000000-enc0000000000000001";

fn module() -> Module {
    let signer = Signer::local(MODULE_ID, 1_795_500_000_000).unwrap();
    let pcrs = InitialPcrs::of_image([1; 48], [2; 48], [3; 48], None);
    let mut module = Module::new(MODULE_ID.into(), false);
    module.identify(Some(Identity { signer, pcrs }));
    module
}

fn cbor(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

fn map(entries: &[(&str, Value)]) -> Value {
    Value::Map(entries.iter().map(|(key, value)| (Value::from(*key), value.clone())).collect())
}

#[test]
fn every_request_is_decoded() {
    let bytes = |content: &[u8]| Value::Bytes(content.to_vec());
    let cases = [
        (Value::from("DescribeNSM"), Request::DescribeNsm),
        (Value::from("GetRandom"), Request::GetRandom),
        (map(&[("DescribePCR", map(&[("index", 31.into())]))]), Request::DescribePcr { index: 31 }),
        (map(&[("LockPCR", map(&[("index", 256.into())]))]), Request::LockPcr { index: 256 }),
        (map(&[("LockPCRs", map(&[("range", 70_000.into())]))]), Request::LockPcrs { range: u16::MAX }),
        (map(&[("ExtendPCR", map(&[("data", bytes(b"d")), ("index", 16.into())]))]), Request::ExtendPcr { index: 16, data: b"d".to_vec() }),
        (
            map(&[("Attestation", map(&[("nonce", bytes(b"")), ("user_data", bytes(b"u")), ("public_key", Value::Null)]))]),
            Request::Attestation { user_data: Some(b"u".to_vec()), nonce: Some(vec![]), public_key: None },
        ),
        (map(&[("Attestation", map(&[]))]), Request::Attestation { user_data: None, nonce: None, public_key: None }),
    ];
    for (value, expected) in cases {
        assert_eq!(request::decode(&cbor(&value)), Ok(expected), "{value:?}");
    }
}

#[test]
fn wide_integers_and_indefinite_lengths_are_the_same_request() {
    let expected = Ok(Request::ExtendPcr { index: 16, data: b"abc".to_vec() });
    let cases: [&[u8]; 3] = [
        b"\xa1\x69ExtendPCR\xa2\x65index\x1b\0\0\0\0\0\0\0\x10\x64data\x59\0\x03abc",
        b"\xbf\x69ExtendPCR\xbf\x65index\x10\x64data\x5f\x41a\x40\x42bc\xff\xff\xff",
        b"\xb8\x01\x69ExtendPCR\xb9\0\x02\x64data\x43abc\x65index\x18\x10",
    ];
    for bytes in cases {
        assert_eq!(request::decode(bytes), expected, "{bytes:x?}");
    }
}

#[test]
fn what_is_no_request_is_an_invalid_operation() {
    let cases: [&[u8]; 22] = [
        b"",
        b"\x00",
        b"\xf6",
        b"\x40",
        b"\x80",
        b"\xa0",
        b"\xbf\xff",
        b"\x6bDescribeNS",                                    // cut off
        b"\x6bDescribeNSm",                                   // unknown
        b"\x6bDescribeNSM\x00",                               // trailing
        b"\x7f\x6bDescribeNSM\xff",                           // text in pieces
        b"\xc0\x6bDescribeNSM",                               // a tag
        b"\xa1\x6bDescribeNSM\xf6",                           // a map where a word is right
        b"\xa1\x01\xa1\x65index\x00",                         // a key that is no text
        b"\xa1\x67LockPCR\x00",                               // no map
        b"\xa1\x67LockPCR\x81\x00",                           // an array
        b"\xa1\x67LockPCR\xa1\x65index\xf6",                  // null
        b"\xa1\x67LockPCR\xa1\x65index\xf9\x00\x00",          // 0.0
        b"\xa1\x67LockPCR\xa1\x65index\xc2\x41\x00",          // a big number
        b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x63abc", // text for bytes
        b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x5b\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff\x67LockPCR\xa1\x65index\x10",
    ];
    for bytes in cases {
        assert_eq!(request::decode(bytes), Err(ErrorCode::InvalidOperation), "{bytes:x?}");
    }
}

#[test]
fn nesting_of_any_depth_is_refused_without_recursion() {
    for byte in [0x81, 0x9f, 0xa1, 0xbf, 0xc1, 0x5f] {
        assert_eq!(request::decode(&[byte; request::MAX_BYTES]), Err(ErrorCode::InvalidOperation));
        let within = [b"\xa1\x6bAttestation\xa1\x65nonce".as_slice(), &[byte; 4000]].concat();
        assert_eq!(request::decode(&within), Err(ErrorCode::InvalidOperation));
    }
}

#[test]
fn the_longest_request_is_4096_bytes() {
    let data = |bytes: usize| cbor(&map(&[("ExtendPCR", map(&[("index", 16.into()), ("data", Value::Bytes(vec![0; bytes]))]))]));
    let overhead = data(4000).len() - 4000;
    assert!(request::decode(&data(4096 - overhead)).is_ok());
    assert_eq!(request::decode(&data(4097 - overhead)), Err(ErrorCode::InputTooLarge));
}

#[test]
fn answers_have_the_fields_in_order() {
    let data = [0xcc; 48];
    let long = [b"\x64data\x58\x30".as_slice(), &data].concat();
    let cases = [
        (Response::LockPcr, b"\x67LockPCR".to_vec()),
        (Response::LockPcrs, b"\x68LockPCRs".to_vec()),
        (Response::Error(ErrorCode::InvalidIndex), b"\xa1\x65Error\x6cInvalidIndex".to_vec()),
        (Response::DescribePcr { lock: true, data: &data }, [b"\xa1\x6bDescribePCR\xa2\x64lock\xf5".as_slice(), &long].concat()),
        (Response::ExtendPcr { data: &data }, [b"\xa1\x69ExtendPCR\xa1".as_slice(), &long].concat()),
        (Response::Attestation { document: b"doc" }, b"\xa1\x6bAttestation\xa1\x68document\x43doc".to_vec()),
        (Response::GetRandom { random: &[5; 24] }, [b"\xa1\x69GetRandom\xa1\x66random\x58\x18".as_slice(), &[5; 24]].concat()),
        (
            Response::DescribeNsm { version: [1, 0, 0], module_id: "id", max_pcrs: 32, locked_pcrs: &[0, 30] },
            b"\xa1\x6bDescribeNSM\xa7\x6dversion_major\x01\x6dversion_minor\x00\x6dversion_patch\x00\x69module_id\x62id\
              \x68max_pcrs\x18\x20\x6blocked_pcrs\x82\x00\x18\x1e\x66digest\x66SHA384"
                .to_vec(),
        ),
    ];
    for (response, expected) in cases {
        assert_eq!(hex::encode(response.encode()), hex::encode(expected), "{response:?}");
    }
}

#[test]
fn random_numbers_have_the_prefix_that_the_kernel_compares_and_differ() {
    let mut module = module();
    let first = module.answer(b"\x69GetRandom");
    assert!(first.starts_with(b"\xa1\x69GetRandom\xa1\x66random\x59\x01\x00"));
    assert_eq!(first.len(), 22 + 256);
    assert_ne!(first, module.answer(b"\x69GetRandom"));
}

#[test]
fn each_field_of_an_attestation_may_have_1024_bytes_and_no_more() {
    for name in ["user_data", "nonce", "public_key"] {
        let ask = |bytes: usize| cbor(&map(&[("Attestation", map(&[(name, Value::Bytes(vec![7; bytes]))]))]));
        let mut module = module();
        assert!(module.answer(&ask(MAX_FIELD_BYTES)).starts_with(b"\xa1\x6bAttestation\xa1\x68document\x59"));
        assert_eq!(module.answer(&ask(MAX_FIELD_BYTES + 1)), b"\xa1\x65Error\x6dInputTooLarge");
    }
}

#[test]
fn the_largest_document_fits() {
    let mut module = module();
    for index in 16..32 {
        let request = cbor(&map(&[("ExtendPCR", map(&[("index", index.into()), ("data", Value::Bytes(vec![1]))]))]));
        assert!(module.answer(&request).starts_with(b"\xa1\x69ExtendPCR"));
    }
    let field = || Value::Bytes(vec![7; MAX_FIELD_BYTES]);
    let answer =
        module.answer(&cbor(&map(&[("Attestation", map(&[("user_data", field()), ("nonce", field()), ("public_key", field())]))])));
    assert!(answer.starts_with(b"\xa1\x6bAttestation"));
    assert!(answer.len() < response::MAX_BYTES - 3000, "there is room for AWS's five certificates: {}", answer.len());
}

#[test]
fn an_identity_counts_once() {
    let mut module = module();
    let before = module.pcrs().describe(0);
    module.identify(None);
    assert_eq!(module.pcrs().describe(0), before);
    assert!(module.answer(b"\xa1\x6bDescribePCR\xa1\x65index\x00").starts_with(b"\xa1\x6bDescribePCR"));
}

/// Requests that are mostly right, so that sequences get somewhere.
fn likely_request() -> impl Strategy<Value = Vec<u8>> {
    let field = || prop_oneof![Just(Value::Null), prop::collection::vec(any::<u8>(), 0..1100).prop_map(Value::Bytes)];
    let index = || prop_oneof![4 => 0_u32..40, 1 => any::<u32>()];
    prop_oneof![
        Just(Value::from("DescribeNSM")),
        Just(Value::from("GetRandom")),
        index().prop_map(|index| map(&[("DescribePCR", map(&[("index", index.into())]))])),
        index().prop_map(|index| map(&[("LockPCR", map(&[("index", index.into())]))])),
        (0_u32..40).prop_map(|range| map(&[("LockPCRs", map(&[("range", range.into())]))])),
        (index(), prop::collection::vec(any::<u8>(), 0..100))
            .prop_map(|(index, data)| map(&[("ExtendPCR", map(&[("index", index.into()), ("data", Value::Bytes(data))]))])),
        (field(), field(), field())
            .prop_map(|(user, nonce, key)| { map(&[("Attestation", map(&[("user_data", user), ("nonce", nonce), ("public_key", key)]))]) }),
    ]
    .prop_map(|value| cbor(&value))
}

/// Those, some of them with a byte changed or the end missing, and pure noise.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => likely_request(),
        2 => (likely_request(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(mut bytes, at, byte)| {
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes
        }),
        1 => (likely_request(), any::<prop::sample::Index>()).prop_map(|(mut bytes, at)| {
            bytes.truncate(at.index(bytes.len()));
            bytes
        }),
        1 => prop::collection::vec(any::<u8>(), 0..200),
    ]
}

proptest! {
    #[test]
    fn every_answer_is_one_cbor_value_that_fits_and_locks_only_close(requests in prop::collection::vec(any_request(), 1..40)) {
        let mut module = module();
        for request in requests {
            let before = module.pcrs().clone();
            let answer = module.answer(&request);
            prop_assert!(answer.len() <= response::MAX_BYTES);
            let mut rest = answer.as_slice();
            let value: Value = ciborium::from_reader(&mut rest).unwrap();
            prop_assert!(rest.is_empty());
            let refused = value.as_map().is_some_and(|map| map[0].0.as_text() == Some("Error"));
            for index in 0..32 {
                let ((was_locked, was), (is_locked, is)) = (before.describe(index).unwrap(), module.pcrs().describe(index).unwrap());
                prop_assert!(is_locked || !was_locked, "lock {} opened", index);
                prop_assert!(!was_locked || was == is, "locked register {} changed", index);
                prop_assert!(!refused || (was_locked, was) == (is_locked, is), "an error changed register {}", index);
            }
        }
    }

    #[test]
    fn decoding_noise_gives_a_request_or_one_of_two_errors(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        match request::decode(&bytes) {
            Ok(_) | Err(ErrorCode::InvalidOperation) => prop_assert!(bytes.len() <= request::MAX_BYTES),
            Err(code) => {
                prop_assert_eq!(code, ErrorCode::InputTooLarge);
                prop_assert!(bytes.len() > request::MAX_BYTES);
            }
        }
    }
}
