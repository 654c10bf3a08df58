//! Signing and what is believed of it: an image's signature vouches for its PCR0, with the key of the certificate that PCR8 measures.

mod common;

use std::time::{Duration, UNIX_EPOCH};

use common::{data, resealed, signed, signer, small, with_header};
use nitroxide_eif::signature::SignatureEntry;
use nitroxide_eif::{Certificate, Image, Pcr, SectionKind, SignError, Signature, SignatureError, Signer, Warning, sign_file};

#[test]
fn signed_images_verify_on_every_curve() {
    for name in ["p256", "p384", "p521"] {
        let signer = signer(name);
        let image = Image::open(signed(small(), &signer)).unwrap();
        let measured = image.check_and_measure().unwrap();
        let unsigned = Image::open(small()).unwrap().measure().unwrap();
        assert_eq!((measured.pcr0, measured.pcr1, measured.pcr2), (unsigned.pcr0, unsigned.pcr1, unsigned.pcr2));
        assert_eq!(measured.pcr8, Some(Pcr::of(signer.certificate().der())));
        assert_eq!(image.sections().last().unwrap().kind, SectionKind::Signature);
        assert_eq!(image.signature().unwrap().unwrap().verify(&measured.pcr0).unwrap(), *signer.certificate());
        assert_eq!(image.warnings(), []);
    }
}

#[test]
fn keys_in_both_pem_forms_are_the_same_key() {
    let signer = Signer::from_pem(&data("p384.pkcs8.pem"), data("p384.cert.pem").as_bytes()).unwrap();
    assert!(Image::open(signed(small(), &signer)).unwrap().signature().unwrap().is_some());
}

#[test]
fn key_without_its_certificate_is_refused() {
    let certificate = data("p384.cert.pem");
    assert!(matches!(Signer::from_pem(&data("other.key.pem"), certificate.as_bytes()), Err(SignError::Mismatch)));
    assert!(matches!(Signer::from_pem(&data("p256.key.pem"), certificate.as_bytes()), Err(SignError::Mismatch)));
    assert!(matches!(Signer::from_pem(&data("p384.key.pem"), data("rsa.cert.pem").as_bytes()), Err(SignError::Mismatch)));
    assert!(matches!(Signer::from_pem("-----BEGIN PRIVATE KEY-----\n", certificate.as_bytes()), Err(SignError::Key)));
    assert!(matches!(Signer::from_pem(&data("p384.key.pem"), b"no certificate"), Err(SignError::Certificate { .. })));
    let padded = [certificate.as_bytes(), &[b'\n'; 31_000]].concat();
    assert!(matches!(Signer::from_pem(&data("p384.key.pem"), &padded), Err(SignError::TooBig { .. })));
}

#[test]
fn signing_again_replaces_the_signature() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.eif");
    std::fs::write(&path, small()).unwrap();
    for name in ["p521", "p256", "p384"] {
        let signer = signer(name);
        let (measured, built) = sign_file(&path, &signer).unwrap();
        let image = Image::open(std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(image.sections().len(), 6);
        assert_eq!(image.warnings(), []);
        assert_eq!(image.check_and_measure().unwrap(), measured);
        assert_eq!((built.size, built.crc32), (image.end(), image.header().crc32));
        assert_eq!(measured.pcr8, Some(signer.certificate().pcr8()));
    }
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1);
}

#[test]
fn refused_signing_leaves_the_file_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.eif");
    let mut damaged = small();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    assert!(matches!(sign_file(&path, &signer("p384")), Err(SignError::Read { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), damaged);
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1);
}

/// A known mistake of AWS's tools: the second signature's size reaches its section header, but not the image's header.
#[test]
fn stale_signature_size_in_the_table_is_tolerated_with_a_warning() {
    let image = signed(small(), &signer("p384"));
    let size = Image::open(&image).unwrap().sections()[5].size;
    for stale in [size - 3, size + 3, u64::MAX] {
        let image = resealed(with_header(image.clone(), |header| header.section_sizes[5] = stale));
        let image = Image::open(&image).unwrap();
        assert_eq!(image.warnings(), [Warning::SignatureSizeDisagrees { in_table: stale, in_section: size }]);
        let measured = image.check_and_measure().unwrap();
        image.signature().unwrap().unwrap().verify(&measured.pcr0).unwrap();
    }
}

#[test]
fn signature_of_another_image_is_not_believed() {
    let image = Image::open(signed(small(), &signer("p384"))).unwrap();
    let signature = image.signature().unwrap().unwrap();
    let result = signature.verify(&Pcr::of(b"another image"));
    assert!(matches!(result, Err(SignatureError::WrongMeasurement { measured, .. }) if measured == Pcr::of(b"another image")));
}

#[test]
fn signature_under_another_certificate_is_not_believed() {
    let section = |name| Signature::parse(&signer(name).signature_section(&Pcr::ZERO)).unwrap().entries()[0].clone();
    let swapped = |certificate: SignatureEntry, signature: SignatureEntry| {
        let mut encoder = minicbor::Encoder::new(Vec::new());
        encoder.array(1).unwrap().map(2).unwrap();
        encoder.str("signing_certificate").unwrap().bytes(&certificate.certificate).unwrap();
        encoder.str("signature").unwrap().bytes(&signature.cose_sign1).unwrap();
        Signature::parse(&encoder.into_writer()).unwrap().verify(&Pcr::ZERO)
    };
    assert!(swapped(section("p384"), section("p384")).is_ok());
    assert!(matches!(swapped(section("p384"), section("p256")), Err(SignatureError::WrongKey { algorithm: -7 })));
    assert!(matches!(swapped(section("p521"), section("p384")), Err(SignatureError::WrongKey { algorithm: -35 })));
    let rsa = SignatureEntry { certificate: data("rsa.cert.pem").into(), cose_sign1: vec![] };
    assert!(matches!(swapped(rsa, section("p384")), Err(SignatureError::WrongKey { algorithm: -35 })));
}

#[test]
fn unknown_algorithms_and_critical_headers_are_named() {
    let section = signer("p384").signature_section(&Pcr::ZERO);
    let certificate = Signature::parse(&section).unwrap().entries()[0].certificate.clone();
    let verify = |protected: &[u8]| {
        let mut cose = minicbor::Encoder::new(Vec::new());
        cose.array(4).unwrap().bytes(protected).unwrap().map(0).unwrap().bytes(b"payload").unwrap().bytes(&[0; 96]).unwrap();
        let mut encoder = minicbor::Encoder::new(Vec::new());
        encoder.array(1).unwrap().map(2).unwrap();
        encoder.str("signing_certificate").unwrap().bytes(&certificate).unwrap();
        encoder.str("signature").unwrap().bytes(&cose.into_writer()).unwrap();
        Signature::parse(&encoder.into_writer()).unwrap().verify(&Pcr::ZERO).unwrap_err()
    };
    assert!(matches!(verify(b"\xa1\x01\x38\x24"), SignatureError::UnsupportedAlgorithm { algorithm: -37 })); // PS256
    assert!(matches!(verify(b"\xa2\x01\x38\x22\x02\x81\x18\x63"), SignatureError::UnsupportedHeader)); // crit: [99]
    assert!(matches!(verify(b"\xa0"), SignatureError::UnsupportedHeader));
    assert!(matches!(verify(b""), SignatureError::Malformed { what: "protected headers", .. }));
    assert!(matches!(verify(b"\xa2\x01\x38\x22\x01\x26"), SignatureError::Malformed { .. })); // the algorithm twice
    assert!(matches!(verify(b"\xa1\x01\x38\x22"), SignatureError::Invalid));
}

/// A change at every byte of a signature section: refused, or the same key vouches for the same measurement. (The certificate's own signature is nobody's
/// business here: another certificate for the same key gives another PCR8, and that is what peers compare.)
#[test]
fn no_changed_byte_of_a_signature_changes_whose_key_vouches() {
    let signer = signer("p256");
    let section = signer.signature_section(&Pcr::ZERO);
    for at in 0..section.len() {
        let mut damaged = section.clone();
        damaged[at] ^= 0x15; // changes letters into other letters, and lengths into others
        if let Ok(certificate) = Signature::parse(&damaged).and_then(|signature| signature.verify(&Pcr::ZERO)) {
            assert_eq!(certificate.public_key(), signer.certificate().public_key(), "byte {at}");
        }
    }
    for size in 0..section.len() {
        assert!(Signature::parse(&section[..size]).is_err());
    }
}

#[test]
fn announced_lengths_are_not_believed() {
    // An array of 2^63 entries; an entry with a certificate of 2^32 bytes; nesting without end.
    assert!(Signature::parse(b"\x9b\x80\0\0\0\0\0\0\0").is_err());
    assert!(Signature::parse(b"\x81\xa2\x73signing_certificate\x9a\xff\xff\xff\xff\x01").is_err());
    assert!(Signature::parse(&[0x81; 32_768]).is_err());
    let unknown_key = [b"\x81\xa1\x61x".to_vec(), vec![0x81; 32_000]].concat();
    assert!(Signature::parse(&unknown_key).is_err());
    assert!(matches!(Signature::parse(b"\x80"), Err(SignatureError::Empty)));
}

#[test]
fn certificate_facts_are_those_openssl_prints() {
    let certificate = Certificate::from_pem(data("p384.cert.pem").as_bytes()).unwrap();
    let issuer: Vec<_> = certificate.issuer();
    let issuer: Vec<_> = issuer.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(issuer, [("countryName", "DE"), ("organizationName", "Nitroxide tests"), ("commonName", "test signer p384")]);
    assert_eq!(certificate.algorithm(), "ecdsa-with-SHA384");
    assert!(certificate.not_before().ends_with(" 2026 GMT"), "{}", certificate.not_before());
    assert!(certificate.check_validity(UNIX_EPOCH + Duration::from_secs(2_000_000_000)).is_ok());
    assert!(certificate.check_validity(UNIX_EPOCH).is_err());
    assert!(certificate.check_validity(UNIX_EPOCH + Duration::from_secs(10_000_000_000)).is_err());
}

#[test]
fn pem_is_found_among_other_text() {
    let pem = data("p384.cert.pem");
    let plain = Certificate::from_pem(pem.as_bytes()).unwrap();
    let decorated = format!("Certificate:\n    Data: \u{e9}\n{}more", pem.replace('\n', "\r\n"));
    assert_eq!(Certificate::from_pem(decorated.as_bytes()).unwrap(), plain);
}
