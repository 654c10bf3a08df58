//! A ramdisk of any bytes, or a good one with some bytes changed: its entries can be listed and read, or there is an error.
#![no_main]

#[path = "edits.rs"]
mod edits;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nitroxide_eif::cpio::{Reader, Tree};

static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut tree = Tree::new();
    tree.file("init", 0o755, "#!/bin/sh").expect("a good name");
    tree.symlink("usr/bin", "/bin").expect("a good name");
    tree.to_bytes().expect("memory takes all")
});

fuzz_target!(|input: &[u8]| {
    let bytes = edits::apply(input, &GOOD);
    let mut reader = Reader::new(bytes.as_ref());
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
