//! Our documents beside a genuine one, field by field: only names, keys, numbers and times may differ.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use nitroxide_attestation::{Claims, Signer};
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode as _, Encode as _, Tagged as _};

const GENUINE: &[u8] = include_bytes!("data/aws-ap-south-1-2024-12-13.cbor");
/// The genuine document's time and module id.
const NOW_MS: u64 = 1_734_075_478_960;
const MODULE_ID: &str = "i-0f1cd77d37fd8bcc9-enc018e7aa61e2040ff";

/// A document that claims what the genuine one does.
fn ours() -> Vec<u8> {
    let pcrs: Vec<(u16, [u8; 48])> = (0..16).map(|index| (index, [0; 48])).collect();
    let claims = Claims { pcrs: &pcrs, public_key: Some(&[7; 64]), ..Claims::default() };
    Signer::local(MODULE_ID, NOW_MS).unwrap().document(NOW_MS, &claims).unwrap()
}

/// The heads of all CBOR items in order: type, how the length or number is written, and the number unless it is the length of a
/// certificate or a time.
fn heads(bytes: &[u8], found: &mut Vec<String>) {
    let mut at = 0;
    while at < bytes.len() {
        let (kind, short) = (bytes[at] >> 5, bytes[at] & 31);
        let width = match short {
            24 => 1,
            25 => 2,
            26 => 4,
            27 => 8,
            _ => 0,
        };
        let number = match width {
            0 => u64::from(short),
            _ => bytes[at + 1..=at + width].iter().fold(0, |number, byte| number << 8 | u64::from(*byte)),
        };
        at += 1 + width;
        let length = if kind == 2 || kind == 3 { usize::try_from(number).unwrap() } else { 0 };
        let content = &bytes[at..at + length];
        at += length;
        let told = if (500..1024).contains(&number) || width == 8 || length > 2000 { "n".into() } else { number.to_string() };
        let text = if kind == 3 { String::from_utf8(content.to_vec()).unwrap() } else { String::new() };
        found.push(format!("type {kind} width {width} {told} {text}"));
        if length > 2000 {
            heads(content, found);
        }
    }
}

fn decoded(document: &[u8]) -> nitroxide_attestation::Document {
    nitroxide_attestation::Document::decode(document).unwrap()
}

fn chain(document: &[u8]) -> Vec<Certificate> {
    let document = decoded(document);
    document.cabundle.iter().chain([&document.certificate]).map(|der| Certificate::from_der(der).unwrap()).collect()
}

/// Attribute types and string types of a name, in order.
fn shape_of_name(name: &x509_cert::name::Name) -> Vec<(ObjectIdentifier, String)> {
    assert!(name.iter_rdn().all(|part| part.len() == 1));
    name.iter().map(|part| (part.oid, part.value.tag().to_string())).collect()
}

/// An identifier's encoding but for the 20 bytes of the identifier.
fn without_key(extension: &x509_cert::ext::Extension) -> &[u8] {
    let bytes = extension.extn_value.as_bytes();
    &bytes[..bytes.len() - 20]
}

#[test]
fn map_order_nulls_and_widths_are_those_of_a_genuine_document() {
    let (mut theirs, mut own) = (Vec::new(), Vec::new());
    heads(GENUINE, &mut theirs);
    heads(&ours(), &mut own);
    assert_eq!(own, theirs);
    assert!(own.len() >= 60, "the payload was not looked into");
}

#[test]
fn every_certificate_has_the_shape_of_its_genuine_counterpart() {
    let (theirs, own) = (chain(GENUINE), chain(&ours()));
    assert_eq!((theirs.len(), own.len()), (5, 5));
    for (level, (theirs, own)) in theirs.iter().zip(&own).enumerate() {
        let (theirs, own) = (theirs.tbs_certificate(), own.tbs_certificate());
        assert_eq!(own.version(), theirs.version());
        assert_eq!(own.signature(), theirs.signature());
        assert_eq!(own.subject_public_key_info().algorithm, theirs.subject_public_key_info().algorithm);
        assert_eq!(shape_of_name(own.subject()), shape_of_name(theirs.subject()), "subject of level {level}");
        assert_eq!(shape_of_name(own.issuer()), shape_of_name(theirs.issuer()), "issuer of level {level}");
        let (own_extensions, extensions) = (own.extensions().unwrap(), theirs.extensions().unwrap());
        let order =
            |extensions: &[x509_cert::ext::Extension]| -> Vec<_> { extensions.iter().map(|one| (one.extn_id, one.critical)).collect() };
        assert_eq!(order(own_extensions), order(extensions), "extensions of level {level}");
        for (own, theirs) in own_extensions.iter().zip(extensions) {
            // Basic constraints and key usages word for word; of identifiers the length; the list's address is ours.
            match theirs.extn_id.to_string().as_str() {
                "2.5.29.19" | "2.5.29.15" => assert_eq!(own.extn_value, theirs.extn_value, "level {level}"),
                "2.5.29.14" | "2.5.29.35" => assert_eq!(without_key(own), without_key(theirs), "level {level}"),
                "2.5.29.31" => assert!(own.extn_value.as_bytes().windows(18).any(|part| part == b".nitroxide.invalid")),
                other => panic!("genuine certificates have {other} now"),
            }
        }
    }
}

#[test]
fn periods_are_the_genuine_ones_and_begin_as_long_before() {
    const YEAR_S: u64 = 365 * 86_400 + 86_400 / 4;
    let period = |certificate: &Certificate| {
        let validity = certificate.tbs_certificate().validity();
        let (begins, ends) = (validity.not_before.to_unix_duration().as_secs(), validity.not_after.to_unix_duration().as_secs());
        (begins, ends - begins)
    };
    let (theirs, own) = (chain(GENUINE), chain(&ours()));
    for level in 1..5 {
        assert_eq!(period(&own[level]).1, period(&theirs[level]).1, "level {level}");
    }
    for root in [period(&theirs[0]), period(&own[0])] {
        assert!(root.1.abs_diff(30 * YEAR_S + 3600) < 86_400, "{root:?}");
    }
    // A leaf's serial number ends in the second in which it was made, which is 3 seconds after it begins.
    for leaf in [&theirs[4], &own[4]] {
        let serial = leaf.tbs_certificate().serial_number().as_bytes();
        assert_eq!(serial.len(), 16);
        assert_eq!(serial[..8], 0x018e_7aa6_1e20_40ff_u64.to_be_bytes());
        assert_eq!(u64::from_be_bytes(serial[8..].try_into().unwrap()), period(leaf).0 + 3);
    }
}

#[test]
fn serial_numbers_are_as_long_as_genuine_ones_and_positive() {
    for _ in 0..20 {
        let own = chain(&ours());
        let lengths: Vec<usize> = own.iter().map(|one| one.tbs_certificate().serial_number().to_der().unwrap().len() - 2).collect();
        // 16 bytes, and a leading zero where the first bit is set; 20 for the instance, which is as much as RFC 5280 allows.
        assert!(lengths[..3].iter().all(|length| [16, 17].contains(length)), "{lengths:?}");
        assert_eq!(lengths[3..], [20, 16]);
    }
}

#[test]
fn common_names_are_built_like_genuine_ones() {
    let names = |document: &[u8]| -> Vec<String> {
        let document = decoded(document);
        let all = document.cabundle.iter().chain([&document.certificate]);
        all.map(|der| nitroxide_attestation::Certificate::from_der(der).unwrap().common_name()).collect()
    };
    let hidden = |name: String| -> String {
        let name = name.replace("ap-south-1", "REGION").replace("aws.nitro-enclaves", "PARTITION.SERVICE");
        name.strip_suffix(".aws").map_or_else(|| name.clone(), |name| format!("{name}.PARTITION"))
    };
    let own_hidden = |name: String| -> String {
        let name = name.replace(".local.", ".REGION.").replace("not-aws.nitroxide", "PARTITION.SERVICE");
        name.strip_suffix(".not-aws").map_or_else(|| name.clone(), |name| format!("{name}.PARTITION"))
    };
    // Region and zone begin with 16 hex digits.
    let masked = |name: String| match name.split_once('.') {
        Some((own, rest)) if own.len() == 16 && own.bytes().all(|byte| byte.is_ascii_hexdigit()) => format!("HEX.{rest}"),
        _ => name,
    };
    let theirs: Vec<String> = names(GENUINE).into_iter().map(hidden).map(masked).collect();
    let own: Vec<String> = names(&ours()).into_iter().map(own_hidden).map(masked).collect();
    assert_eq!(own, theirs);
}
