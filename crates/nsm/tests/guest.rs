//! A stock kernel's own NSM driver against our device: boots QEMU and looks at what `nsm-check` printed in the guest.
//!
//! One boot, since a boot costs seconds. The guest's program: `guest/probe/src/bin/nsm-check.rs`. Rules as AWS's client sees them: `guest_client.rs`;
//! a busy and a hostile guest: `guest_stress.rs`.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod boot;

use boot::{Guest, Lines, MODULE_ID, some_pcrs};
use ciborium::Value;
use p384::ecdsa::signature::Verifier as _;
use p384::ecdsa::{Signature, VerifyingKey};
use std::sync::mpsc;
use x509_cert::Certificate;
use x509_cert::der::Decode as _;

const READ_ONLY: &str = "{Error: ReadOnlyIndex}";
const INVALID_INDEX: &str = "{Error: InvalidIndex}";

#[test]
fn a_stock_guest_gets_every_answer_it_should() {
    let (measured, measurements) = mpsc::channel();
    let guest = Guest::boot("nsm-check", false, move || measurements.recv().unwrap());
    assert!(guest.nsm.take_frontend().is_none());

    let pcrs = some_pcrs();
    let lines = guest.lines(|line| {
        // Describing itself and random numbers do not wait for the measurements: they are not there before this line is.
        if line.starts_with("random ") {
            measured.send(pcrs).unwrap();
        }
    });

    let description = |locked: &str| {
        format!(
            "{{DescribeNSM: {{version_major: 1, version_minor: 0, version_patch: 0, module_id: {MODULE_ID}, max_pcrs: 32, \
             locked_pcrs: [{locked}], digest: SHA384}}}}"
        )
    };
    let numbers = |count: u16| (0..count).map(|index| index.to_string()).collect::<Vec<_>>().join(", ");
    answers(&lines, "describe-nsm", &description(&numbers(16)));
    lines.says("random", &format!("{} 278 differ", hex::encode(b"\xa1\x69GetRandom\xa1\x66random\x59\x01\x00")));

    for (index, value) in [(0, [0x11; 48]), (1, [0x22; 48]), (2, [0x33; 48]), (4, pcrs.pcr4), (8, [0x88; 48]), (3, [0; 48]), (15, [0; 48])]
    {
        answers(&lines, &format!("describe-pcr {index}"), &format!("{{DescribePCR: {{lock: true, data: {}}}}}", hex::encode(value)));
    }
    answers(&lines, "describe-pcr 16", &format!("{{DescribePCR: {{lock: false, data: {}}}}}", "00".repeat(48)));
    answers(&lines, "describe-pcr 32", INVALID_INDEX);
    for index in [0, 15] {
        answers(&lines, &format!("lock {index}"), READ_ONLY);
        answers(&lines, &format!("extend {index}"), READ_ONLY);
    }
    answers(&lines, "lock 32", INVALID_INDEX);
    answers(&lines, "extend 32", INVALID_INDEX);
    // sha384(48 zeroes || "abc"), and sha384 of that; made with coreutils' sha384sum.
    let once = "b1c16eb7634112b7c9d5ebd27e62a2d4528bbfcfd68b62d3afd9ecf98e0f413a84314acce78317fb69fd895155343e09";
    answers(&lines, "extend 16", &format!("{{ExtendPCR: {{data: {once}}}}}"));
    let twice = "917afee04fee376dd7bd919468817bde18c38a268113c772b22524195118fb1638577df52676c721d768e2e525a83957";
    answers(&lines, "extend-again 16", &format!("{{ExtendPCR: {{data: {twice}}}}}"));
    assert!(lines.word("extend-much 17").starts_with(&hex::encode(b"\xa1\x69ExtendPCR\xa1\x64data\x58\x30")));
    answers(&lines, "lock 16", "LockPCR");
    answers(&lines, "lock-again 16", READ_ONLY);
    answers(&lines, "extend-locked 16", READ_ONLY);
    answers(&lines, "lock-range 33", INVALID_INDEX);
    answers(&lines, "lock-range 20", "LockPCRs");
    answers(&lines, "describe-nsm-locked", &description(&numbers(20)));

    let document = document(&lines.word("document"));
    assert!(document.ends_with(", public_key: null, user_data: null, nonce: null}"), "{document}");
    assert!(document.starts_with(&format!("{{module_id: {MODULE_ID}, digest: SHA384, timestamp: ")), "{document}");
    for attested in [format!("pcrs: {{0: {}, 1: ", "11".repeat(48)), format!("15: {}, 16: ", "00".repeat(48)), "17: ".into()] {
        assert!(document.contains(&attested), "{document}");
    }
    assert!(!document.contains("18: "), "a register that was not extended is not attested: {document}");
    let full = self::document(&lines.word("document-full"));
    let fields = format!(", public_key: {}, user_data: {}, nonce: {}}}", "03".repeat(1024), "01".repeat(1024), "02".repeat(1024));
    assert!(full.ends_with(&fields), "{full}");
    answers(&lines, "document-too-large", "{Error: InputTooLarge}");

    for number in 0..14 {
        answers(&lines, &format!("broken {number}"), "{Error: InvalidOperation}");
    }
    lines.says("too-long", "90"); // EMSGSIZE, by the driver
    lines.says("threads", "100 of 100");
    lines.says("hwrng", "nsm-hwrng random");
    // The locks are the device's: a driver that is loaded anew finds them closed.
    answers(&lines, "extend-after-reload 16", READ_ONLY);
    answers(&lines, "lock-range 32", "LockPCRs");
    answers(&lines, "extend-locked 31", READ_ONLY);
    answers(&lines, "describe-nsm-last", &description(&numbers(32)));
}

/// That the answer of that name is this, as text of its CBOR.
fn answers(lines: &Lines, name: &str, expected: &str) {
    assert_eq!(text(&decode(&hex::decode(lines.word(name)).unwrap())), expected, "{name}");
}

fn decode(bytes: &[u8]) -> Value {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).unwrap();
    assert!(rest.is_empty(), "bytes behind an answer");
    value
}

/// Something like diagnostic notation: byte strings in hex, text without quotes.
fn text(value: &Value) -> String {
    let join = |parts: Vec<String>| parts.join(", ");
    match value {
        Value::Text(text) => text.clone(),
        Value::Bytes(bytes) => hex::encode(bytes),
        Value::Bool(value) => value.to_string(),
        Value::Null => "null".into(),
        Value::Integer(number) => i128::from(*number).to_string(),
        Value::Array(values) => format!("[{}]", join(values.iter().map(text).collect())),
        Value::Map(entries) => {
            format!("{{{}}}", join(entries.iter().map(|(key, value)| format!("{}: {}", text(key), text(value))).collect()))
        }
        other => panic!("an answer holds {other:?}"),
    }
}

/// Verifies the document of an Attestation answer with the key of its certificate and gives its payload as text.
fn document(answer: &str) -> String {
    let answer = decode(&hex::decode(answer).unwrap()).into_map().unwrap().remove(0).1.into_map().unwrap().remove(0).1;
    let [protected, _, payload, signature]: [Value; 4] = decode(&answer.into_bytes().unwrap()).into_array().unwrap().try_into().unwrap();
    let mut covered = Vec::new();
    let structure = Value::Array(vec![Value::Text("Signature1".into()), protected, Value::Bytes(vec![]), payload.clone()]);
    ciborium::into_writer(&structure, &mut covered).unwrap();
    let payload = decode(payload.as_bytes().unwrap());
    let fields = payload.as_map().unwrap();
    let certificate = fields.iter().find(|(key, _)| key.as_text() == Some("certificate")).unwrap().1.as_bytes().unwrap();
    let certificate = Certificate::from_der(certificate).unwrap();
    let key = certificate.tbs_certificate().subject_public_key_info().subject_public_key.raw_bytes();
    let signature = Signature::from_slice(signature.as_bytes().unwrap()).unwrap();
    VerifyingKey::from_sec1_bytes(key).unwrap().verify(&covered, &signature).unwrap();
    text(&payload)
}
