//! What a document costs beside the one signature in it, and what verifying one and making certificates cost.
//!
//! `cargo bench -p nitroxide-attestation`. "bare signature" is P-384 over the same bytes with the same library; the goal is that it is
//! over 80 % of a document.
#![expect(clippy::unwrap_used, reason = "a benchmark ends where something unexpected happens")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use nitroxide_attestation::cose::{Envelope, signed_bytes};
use nitroxide_attestation::{At, Claims, Pki, Signer, TrustedRoot, Verifier};
use p384::ecdsa::signature::Signer as _;
use p384::ecdsa::{Signature, SigningKey};
use p384::elliptic_curve::Generate as _;

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;
const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";
const GENUINE: &[u8] = include_bytes!("../tests/data/aws-ap-south-1-2024-12-13.cbor");

fn documents(criterion: &mut Criterion) {
    let pcrs: Vec<(u16, [u8; 48])> = (0..16).map(|index| (index, [7; 48])).collect();
    let claims = Claims { pcrs: &pcrs, nonce: Some(&[1; 32]), ..Claims::default() };
    let mut signer = Signer::local(MODULE_ID, NOW_MS).unwrap();
    let document = signer.document(NOW_MS, &claims).unwrap();
    let bytes = signed_bytes(Envelope::open(&document).unwrap().payload);
    let key = SigningKey::generate();
    criterion.bench_function("bare signature", |bencher| {
        bencher.iter(|| {
            let signature: Signature = key.sign(black_box(&bytes));
            signature
        });
    });
    criterion.bench_function("document", |bencher| bencher.iter(|| signer.document(NOW_MS, black_box(&claims)).unwrap()));
    let ours = Verifier::new([TrustedRoot::local(signer.root())]);
    criterion.bench_function("verifying", |bencher| bencher.iter(|| ours.verify(black_box(&document), At::Document).unwrap()));
    let aws = Verifier::new([TrustedRoot::AWS]);
    criterion.bench_function("verifying AWS's", |bencher| bencher.iter(|| aws.verify(black_box(GENUINE), At::Document).unwrap()));
}

fn launch(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::at(folder.path().join("pki"));
    pki.signer(MODULE_ID, NOW_MS).unwrap();
    criterion.bench_function("a launch's key and leaf", |bencher| bencher.iter(|| pki.signer(MODULE_ID, NOW_MS).unwrap()));
    criterion.bench_function("a fresh PKI", |bencher| {
        bencher.iter_with_large_drop(|| {
            let folder = tempfile::tempdir().unwrap();
            let signer = Pki::at(folder.path().join("pki")).signer(MODULE_ID, NOW_MS).unwrap();
            (folder, signer)
        });
    });
}

criterion_group!(benches, documents, launch);
criterion_main!(benches);
