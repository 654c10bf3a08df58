//! A ramdisk of any bytes: its entries can be listed and read, or there is an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_eif::cpio::Reader;

fuzz_target!(|bytes: &[u8]| {
    let mut reader = Reader::new(bytes);
    while let Ok(Some(entry)) = reader.next_entry() {
        if let Some(path) = entry.relative_path() {
            assert!(path.is_relative());
        }
        if entry.mode % 3 != 0 {
            let _ = reader.data(4096);
        }
        assert!(reader.position() <= bytes.len() as u64);
    }
});
