//! How long the NSM takes: each request, a document, the launch of an identity, and a round through the queue.
//!
//! `cargo bench -p nitroxide-nsm`. A guest waits for all of this in one ioctl, so what counts is the time of one, not throughput.
#![expect(clippy::unwrap_used, reason = "a benchmark ends where something unexpected happens")]

#[path = "../tests/driver/mod.rs"]
mod driver;

use criterion::{Criterion, criterion_group, criterion_main};
use driver::{DESCRIBE_NSM, Driver};
use nitroxide_attestation::Signer;
use nitroxide_nsm::virtqueue::Exchange;
use nitroxide_nsm::{Identity, InitialPcrs, Module};
use std::hint::black_box;

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;

fn module() -> Module {
    let signer = Signer::local("i-0-enc0", NOW_MS).unwrap();
    let mut module = Module::new("i-0-enc0".into(), false);
    module.identify(Some(Identity { signer, pcrs: InitialPcrs::of_image([1; 48], [2; 48], [3; 48], None) }));
    module
}

fn requests(criterion: &mut Criterion) {
    let mut module = module();
    let full = [
        b"\xa1\x6bAttestation\xa3\x69user_data\x59\x04\x00".as_slice(),
        &[1; 1024],
        b"\x65nonce\x59\x04\x00",
        &[2; 1024],
        b"\x6apublic_key\x59\x04\x00",
        &[3; 1024],
    ]
    .concat();
    let requests: [(&str, &[u8]); 7] = [
        ("DescribeNSM", DESCRIBE_NSM),
        ("GetRandom", b"\x69GetRandom"),
        ("DescribePCR", b"\xa1\x6bDescribePCR\xa1\x65index\x00"),
        ("ExtendPCR", b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x43abc"),
        ("LockPCRs, refused", b"\xa1\x68LockPCRs\xa1\x65range\x18\x21"),
        ("Attestation", b"\xa1\x6bAttestation\xa0"),
        ("Attestation, 3 KiB of fields", &full),
    ];
    for (name, request) in requests {
        criterion.bench_function(name, |bencher| bencher.iter(|| module.answer(black_box(request))));
    }
}

fn queue(criterion: &mut Criterion) {
    let mut driver = Driver::simple();
    let mut queue = driver.queue();
    let (mut exchange, mut module) = (Exchange::default(), module());
    criterion.bench_function("DescribeNSM through the queue", |bencher| {
        bencher.iter(|| {
            driver.exchange(0, DESCRIBE_NSM);
            assert!(exchange.advance(&mut queue, &driver.memory, &mut module).unwrap().used);
            driver.used()
        });
    });
}

fn launch(criterion: &mut Criterion) {
    criterion.bench_function("keys and certificates", |bencher| bencher.iter(|| Signer::local("i-0-enc0", NOW_MS).unwrap()));
}

criterion_group!(benches, requests, queue, launch);
criterion_main!(benches);
