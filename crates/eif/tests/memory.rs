//! Memory does not grow with the image: describing one of 2 GiB stays under 16 MiB.
#![expect(clippy::unwrap_used, reason = "test helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use common::{small, with_header, with_section};
use nitroxide_eif::Image;
use nitroxide_eif::format::HEADER_SIZE;

const IMAGE_BYTES: u64 = 2 << 30;
const LIMIT_KIB: u64 = 16 << 10;
const CHILD: &str = "NITROXIDE_EIF_MEMORY_TEST_IMAGE";

/// The image's last section, the application's ramdisk, is stretched to 2 GiB of nothing. Its checksum is wrong, which describing does not mind.
fn write_sparse_image(path: &Path) {
    let image = small();
    let last = *Image::open(&image).unwrap().sections().last().unwrap();
    let size = IMAGE_BYTES - last.payload_offset;
    let image = with_section(image, last.index, |section| section.size = size);
    let image = with_header(image, |header| header.section_sizes[last.index] = size);
    let mut file = File::create_new(path).unwrap();
    file.write_all(&image).unwrap();
    file.set_len(IMAGE_BYTES).unwrap();
    file.seek(SeekFrom::Start(HEADER_SIZE as u64)).unwrap();
}

/// Only a child of the other test does something here: a process of its own, whose peak is nobody else's.
#[test]
fn child() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let image = Image::open(File::open(path).unwrap()).unwrap();
    assert!(image.metadata().unwrap().is_some());
    let pass = image.measure_pass().unwrap();
    assert!(!pass.checksum.matches());
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("peak:{}", peak.trim().trim_end_matches(" kB"));
}

#[test]
fn describing_two_gibibytes_stays_under_sixteen_mebibytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sparse.eif");
    write_sparse_image(&path);
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", "child", "--nocapture"]).env(CHILD, &path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let peak: u64 = text.lines().find_map(|line| line.split_once("peak:")).unwrap().1.parse().unwrap();
    println!("peak of describing 2 GiB: {peak} KiB");
    assert!(peak < LIMIT_KIB, "{peak} KiB");
}
