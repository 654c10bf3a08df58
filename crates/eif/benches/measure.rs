//! How fast an image is measured, beside what can be hoped for: one raw SHA-384 pass by the same library, and beside AWS's library.
//!
//! `cargo bench -p nitroxide-eif`. AWS's figure needs tools/eif-crosscheck, which the test `crosscheck` builds; it includes starting that program.
#![allow(missing_docs, reason = "criterion's macros")]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use nitroxide_eif::measure::Threads;
use nitroxide_eif::{Builder, Image, Measurer};
use sha2::{Digest, Sha384};

const IMAGE_BYTES: usize = 256 << 20;
const CHUNK_BYTES: usize = 128 * 1024;

fn measure(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    // Not zeros: pages of zeros may be cheaper to read than real ones.
    let content = |size: usize| (0..size).map(|at| u8::try_from(at * 31 % 251).expect("below 251")).collect::<Vec<u8>>();
    let built = |name: &str, first: usize, second: usize| {
        let path = directory.path().join(name);
        let builder = Builder::new(content(10 << 20), "console=ttyS0").ramdisk(content(first)).ramdisk(content(second));
        builder.write_file(&path).expect("the image can be written");
        path
    };
    // The application is nearly everything: each byte counts for PCR0 and for PCR2, the most work there can be.
    let application = built("application.eif", 1 << 20, IMAGE_BYTES - (11 << 20));
    // Half and half.
    let balanced = built("balanced.eif", (IMAGE_BYTES >> 1) - (10 << 20), IMAGE_BYTES >> 1);

    let mut group = criterion.benchmark_group("measure");
    group.throughput(Throughput::Bytes(IMAGE_BYTES as u64));
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(8));
    let memory = content(IMAGE_BYTES);
    group.bench_function("raw SHA-384 in memory", |bencher| bencher.iter(|| Sha384::digest(&memory)));
    drop(memory);
    group.bench_function("raw SHA-384 of the file", |bencher| bencher.iter(|| raw(&application)));
    for (name, path) in [("application", &application), ("balanced", &balanced)] {
        let image = Image::open(File::open(path).expect("just built")).expect("just built");
        let run = |threads| Measurer::new(&image).threads(threads).run().expect("the file can be read");
        group.bench_function(format!("two threads, {name}"), |bencher| bencher.iter(|| run(Threads::Two)));
        group.bench_function(format!("one thread, {name}"), |bencher| bencher.iter(|| run(Threads::One)));
        group.bench_function(format!("checksum alone, {name}"), |bencher| bencher.iter(|| image.checksum().expect("the file can be read")));
    }
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/eif-crosscheck/debug/eif-crosscheck");
    if tool.exists() {
        let run = || Command::new(&tool).arg("measure").arg(&application).stdout(Stdio::null()).status().expect("the tool runs");
        group.bench_function("AWS's library, application", |bencher| bencher.iter(run));
    } else {
        eprintln!("AWS's library is left out: run `cargo test -p nitroxide-eif --test crosscheck` first, which builds it");
    }
    group.finish();
}

/// What hashing a file costs at least, done plainly.
fn raw(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).expect("just built");
    let (mut hash, mut buffer) = (Sha384::new(), vec![0; CHUNK_BYTES]);
    loop {
        match file.read(&mut buffer).expect("the file can be read") {
            0 => return hash.finalize().to_vec(),
            count => hash.update(&buffer[..count]),
        }
    }
}

criterion_group!(benches, measure);
criterion_main!(benches);
