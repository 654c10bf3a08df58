//! An image of any bytes: opening, checking and measuring it ends with an answer or an error, and two ways of measuring agree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_eif::measure::Threads;
use nitroxide_eif::{Image, Measurer};

fuzz_target!(|bytes: &[u8]| {
    let Ok(image) = Image::open(bytes) else { return };
    for section in image.sections() {
        assert!(section.end() <= bytes.len() as u64);
    }
    let _ = image.metadata();
    let alone = Measurer::new(&image).threads(Threads::One).run().expect("a slice can be read");
    let together = Measurer::new(&image).threads(Threads::Two).run().expect("a slice can be read");
    assert_eq!(alone, together);
    assert_eq!(alone.checksum, image.checksum().expect("a slice can be read"));
});
