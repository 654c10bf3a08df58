//! What the tests of images share: small images, and ways to damage them.
#![allow(dead_code, clippy::unwrap_used, reason = "every test file uses a part of it; helpers fail as tests do")]

use std::io::Cursor;

use nitroxide_eif::format::{CRC_OFFSET, HEADER_SIZE, SECTION_HEADER_SIZE};
use nitroxide_eif::{Builder, Header, Image, Metadata, SectionHeader, Signer, sign_image};

pub const CMDLINE: &str = "console=ttyS0 reboot=k";

/// Runs a builder.
pub fn build(builder: Builder) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    let built = builder.write_to(&mut out).unwrap();
    assert_eq!(built.size, out.get_ref().len() as u64);
    out.into_inner()
}

/// Bytes that differ from place to place, so that a swapped chunk changes a hash.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        u8::try_from(state >> 56).unwrap()
    };
    (0..size).map(|_| next()).collect()
}

/// An image of five sections and about a kilobyte: kernel, cmdline, metadata, two ramdisks.
pub fn small() -> Vec<u8> {
    build(Builder::new(noise(100, 1), CMDLINE).metadata(Metadata::new("small", "1")).ramdisk(noise(60, 2)).ramdisk(noise(90, 3)))
}

/// A test signer by the name of its files in tests/data.
pub fn signer(name: &str) -> Signer {
    Signer::from_pem(&data(&format!("{name}.key.pem")), data(&format!("{name}.cert.pem")).as_bytes()).unwrap()
}

/// A file of tests/data.
pub fn data(name: &str) -> String {
    std::fs::read_to_string(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Signs an image in memory.
pub fn signed(image: Vec<u8>, signer: &Signer) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    sign_image(&Image::open(image).unwrap(), signer, &mut out).unwrap();
    out.into_inner()
}

/// Changes the header.
pub fn with_header(mut image: Vec<u8>, change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut header = Header::from_bytes(image[..HEADER_SIZE].try_into().unwrap());
    change(&mut header);
    image[..HEADER_SIZE].copy_from_slice(&header.to_bytes());
    image
}

/// Changes the header of the section at `index`.
pub fn with_section(mut image: Vec<u8>, index: usize, change: impl FnOnce(&mut SectionHeader)) -> Vec<u8> {
    let header = Header::from_bytes(image[..HEADER_SIZE].try_into().unwrap());
    let at = usize::try_from(header.section_offsets[index]).unwrap();
    let mut section = SectionHeader::from_bytes(image[at..at + SECTION_HEADER_SIZE].try_into().unwrap());
    change(&mut section);
    image[at..at + SECTION_HEADER_SIZE].copy_from_slice(&section.to_bytes());
    image
}

/// Makes the checksum right again.
pub fn resealed(mut image: Vec<u8>) -> Vec<u8> {
    let computed = Image::open(&image).unwrap().checksum().unwrap().computed;
    image[CRC_OFFSET..HEADER_SIZE].copy_from_slice(&computed.to_be_bytes());
    image
}
