//! An image of any bytes, or a good image with some bytes changed: opening, checking and measuring it ends with an answer or an error, the answer lies inside the
//! file, and two ways of measuring agree.
#![no_main]

#[path = "edits.rs"]
mod edits;

use std::io::Cursor;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nitroxide_eif::measure::Threads;
use nitroxide_eif::{Builder, Image, Measurer, Signer, sign_image};

/// Kernel, cmdline, metadata, two ramdisks and a signature.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut image = Cursor::new(Vec::new());
    let builder = Builder::new(b"kernel".to_vec(), "console=ttyS0").ramdisk(b"first".to_vec()).ramdisk(b"second".to_vec());
    builder.write_to(&mut image).expect("memory takes all");
    let signer = Signer::from_pem(include_str!("../../crates/eif/tests/data/p256.key.pem"), include_bytes!("../../crates/eif/tests/data/p256.cert.pem"));
    let mut signed = Cursor::new(Vec::new());
    sign_image(&Image::open(image.into_inner()).expect("just built"), &signer.expect("a pair"), &mut signed).expect("memory takes all");
    signed.into_inner()
});

fuzz_target!(|input: &[u8]| {
    let bytes = edits::apply(input, &GOOD);
    let Ok(image) = Image::open(bytes.as_ref()) else { return };
    for section in image.sections() {
        assert!(section.end() <= bytes.len() as u64);
    }
    let _ = image.metadata();
    let alone = Measurer::new(&image).threads(Threads::One).run().expect("a slice can be read");
    let together = Measurer::new(&image).threads(Threads::Two).run().expect("a slice can be read");
    assert_eq!(alone, together);
    assert_eq!(alone.checksum, image.checksum().expect("a slice can be read"));
    let _ = image.signature(); // believing it is the target `signature`'s matter, and slow
});
