//! A genuine document of AWS's (ap-south-1, 2024-12-13), and what becomes of it when anything is changed.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use std::error::Error as _;

use nitroxide_attestation::{At, RootKind, Timestamp, TrustedRoot, Verifier, VerifyError};

const DOCUMENT: &[u8] = include_bytes!("data/aws-ap-south-1-2024-12-13.cbor");
const ROOT: &[u8] = include_bytes!("data/aws-nitro-enclaves-root.der");

/// PCR0 of the document.
const PCR0: &str = "189038eccf28a3a098949e402f3b3d86a876f4915c5b02d546abb5d8c507ceb1755b8192d8cfca66e8f226160ca4c7a6";

fn aws() -> Verifier {
    Verifier::new([TrustedRoot::AWS])
}

fn at(time: &str) -> At {
    let time: x509_cert::der::DateTime = time.parse().unwrap();
    At::Time(Timestamp(time.unix_duration().as_secs() * 1000))
}

/// Message and causes.
fn whole(error: &VerifyError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(" {error}");
        cause = error.source();
    }
    text
}

#[test]
fn genuine_document_verifies_with_aws_root_at_its_own_time() {
    let verified = aws().pcr(0, hex::decode(PCR0).unwrap()).verify(DOCUMENT, At::Document).unwrap();
    assert_eq!(verified.root, RootKind::Aws);
    assert_eq!(verified.chain.len(), 5);
    assert_eq!(verified.chain[0].der(), ROOT);
    assert_eq!(verified.at, Timestamp(1_734_075_478_960));
    assert_eq!(verified.document.module_id, "i-0f1cd77d37fd8bcc9-enc018e7aa61e2040ff");
    assert_eq!(verified.document.public_key.unwrap().len(), 64);
    assert_eq!((verified.document.user_data, verified.document.nonce), (None, None));
    assert_eq!(Verifier::new([TrustedRoot::given(ROOT)]).verify(DOCUMENT, At::Document).unwrap().root, RootKind::Aws);
}

#[test]
fn genuine_document_has_expired_today_and_the_certificate_is_named() {
    let error = whole(&aws().verify(DOCUMENT, At::now()).unwrap_err());
    assert!(error.contains("cabundle[1]") && error.contains("aea2dd81900f360c.ap-south-1") && error.contains("expired"), "{error}");
    let leaf = whole(&aws().verify(DOCUMENT, at("2024-12-13T08:57:46Z")).unwrap_err());
    assert!(leaf.contains("certificate (") && leaf.contains("enc018e7aa61e2040ff") && leaf.contains("expired"), "{leaf}");
    aws().verify(DOCUMENT, at("2024-12-13T08:57:45Z")).unwrap();
    let early = whole(&aws().verify(DOCUMENT, at("2024-12-13T05:57:41Z")).unwrap_err());
    assert!(early.contains("not yet valid: it begins on 2024-12-13T05:57:42Z"), "{early}");
}

#[test]
fn genuine_document_is_refused_by_whoever_does_not_trust_aws() {
    let error = Verifier::new([TrustedRoot::local(b"another")]).verify(DOCUMENT, At::Document).unwrap_err();
    assert!(matches!(&error, VerifyError::UnknownRoot { subject, .. } if subject.contains("aws.nitro-enclaves")), "{error}");
    assert!(Verifier::new([]).verify(DOCUMENT, At::Document).is_err());
}

/// Every byte: one bit, all bits, one more.
#[test]
fn genuine_document_with_any_byte_changed_fails() {
    let changes: [fn(u8) -> u8; 3] = [|byte| byte ^ 1, |byte| !byte, |byte| byte.wrapping_add(1)];
    std::thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || {
                for position in (half..DOCUMENT.len()).step_by(2) {
                    for change in changes {
                        let mut bytes = DOCUMENT.to_vec();
                        bytes[position] = change(bytes[position]);
                        assert!(aws().verify(&bytes, At::Document).is_err(), "byte {position} may be {:#04x}", bytes[position]);
                    }
                }
            });
        }
    });
}

#[test]
fn other_encodings_of_a_genuine_document_fail_but_for_tag_18() {
    let with = |position: usize, removed: usize, inserted: &[u8]| {
        let mut bytes = DOCUMENT.to_vec();
        bytes.splice(position..position + removed, inserted.iter().copied());
        aws().verify(&bytes, At::Document)
    };
    with(0, 0, &[0xd2]).unwrap();
    for (what, result) in [
        ("a longer tag 18", with(0, 0, &[0xd8, 18])),
        ("tag 18 twice", with(0, 0, &[0xd2, 0xd2])),
        ("another tag", with(0, 0, &[0xd1])),
        ("a longer array head", with(0, 1, &[0x98, 4])),
        ("an array of indefinite length", with(0, 1, &[0x9f])),
        ("a longer length of the header", with(1, 1, &[0x58, 4])),
        ("a header encoded otherwise", with(1, 5, &[0x45, 0xa1, 0x18, 0x01, 0x38, 0x22])),
        ("an unprotected header", with(6, 1, &[0xa1, 0x04, 0x41, 0x00])),
        ("an unprotected header of indefinite length", with(6, 1, &[0xbf, 0xff])),
        ("a longer length of the payload", with(7, 3, &[0x5a, 0, 0, 0x11, 0x4b])),
        ("a longer length of the signature", with(DOCUMENT.len() - 98, 2, &[0x59, 0, 0x60])),
        ("a byte more", with(DOCUMENT.len(), 0, &[0])),
        ("a byte less", with(DOCUMENT.len() - 1, 1, &[])),
    ] {
        assert!(result.is_err(), "{what}");
    }
    assert!(aws().verify(&[], At::Document).is_err());
}

#[test]
fn expectations_that_a_genuine_document_does_not_meet_are_named() {
    let pcr = aws().pcr(0, [7; 48]).verify(DOCUMENT, At::Document).unwrap_err();
    assert!(matches!(&pcr, VerifyError::Pcr { index: 0, found, .. } if found == PCR0), "{pcr}");
    let absent = aws().pcr(16, [7; 48]).verify(DOCUMENT, At::Document).unwrap_err();
    assert!(matches!(&absent, VerifyError::Pcr { index: 16, found, .. } if found == "absent"), "{absent}");
    let nonce = aws().nonce(b"1").verify(DOCUMENT, At::Document).unwrap_err();
    assert_eq!(nonce, VerifyError::Field { field: "nonce", found: "absent" });
    let key = aws().public_key(b"1").verify(DOCUMENT, At::Document).unwrap_err();
    assert_eq!(key, VerifyError::Field { field: "public_key", found: "another value" });
}
