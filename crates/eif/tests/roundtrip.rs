//! What the builder writes, the reader reads; measurements follow the formula; the same input makes the same bytes.

mod common;

use std::io::{Cursor, Read};

use common::{CMDLINE, build, noise};
use nitroxide_eif::measure::Threads;
use nitroxide_eif::{Architecture, Builder, Image, Measurer, Metadata, Pcr, SectionKind, Warning, cpio};

#[test]
fn built_image_reads_back_section_by_section() {
    let (kernel, first, second) = (noise(300_000, 1), noise(5, 2), noise(140_000, 3));
    let image = build(
        Builder::new(kernel.clone(), CMDLINE)
            .architecture(Architecture::Aarch64)
            .default_cpus(7)
            .default_memory_bytes(123 << 20)
            .metadata(Metadata::new("name", "1.0"))
            .ramdisk(first.clone())
            .ramdisk(second.clone()),
    );
    let image = Image::open(image).unwrap();
    let kinds: Vec<_> = image.sections().iter().map(|section| section.kind).collect();
    assert_eq!(kinds, [SectionKind::Kernel, SectionKind::Cmdline, SectionKind::Metadata, SectionKind::Ramdisk, SectionKind::Ramdisk]);
    assert_eq!(image.warnings(), []);
    assert_eq!(image.architecture(), Architecture::Aarch64);
    assert_eq!((image.header().default_cpus, image.header().default_memory_bytes), (7, 123 << 20));
    assert_eq!(image.cmdline(), CMDLINE.as_bytes());
    assert_eq!(image.metadata().unwrap().unwrap(), Metadata::new("name", "1.0"));
    let mut copy = Vec::new();
    assert_eq!(image.copy_section(image.kernel(), &mut copy).unwrap(), 300_000);
    assert_eq!(copy, kernel);
    let ramdisks: Vec<Vec<u8>> = image
        .ramdisks()
        .map(|section| {
            let mut bytes = Vec::new();
            image.reader(section).read_to_end(&mut bytes).unwrap();
            bytes
        })
        .collect();
    assert_eq!(ramdisks, [first, second]);
    assert!(image.verify_crc().unwrap().matches());
}

#[test]
fn measurements_follow_the_formula_with_one_and_with_two_threads() {
    // Sizes around the size of a chunk (128 KiB), and more chunks than the window between the threads holds.
    for (kernel, first, others) in [
        (131_072 - 12, 131_072, vec![131_072 * 20 + 1]),
        (1, 1, vec![1]),
        (1_000_000, 3_000_000, vec![2_500_000, 0, 131_060]),
        (200_000, 0, vec![]),
    ] {
        let (kernel, first) = (noise(kernel, 1), noise(first, 2));
        let others: Vec<Vec<u8>> = others.into_iter().map(|size| noise(size, 3)).collect();
        let builder = Builder::new(kernel.clone(), CMDLINE).ramdisk(first.clone());
        let image = Image::open(build(others.iter().cloned().fold(builder, Builder::ramdisk))).unwrap();
        let application = others.concat();
        let start = [kernel, CMDLINE.into(), first].concat();
        for threads in [Threads::One, Threads::Two] {
            let pass = Measurer::new(&image).threads(threads).run().unwrap();
            assert_eq!(pass.measurements.pcr0, Pcr::of(&[start.as_slice(), &application].concat()));
            assert_eq!(pass.measurements.pcr1, Pcr::of(&start));
            assert_eq!(pass.measurements.pcr2, Pcr::of(&application));
            assert_eq!(pass.measurements.pcr8, None);
            assert!(pass.checksum.matches());
        }
    }
}

#[test]
fn image_without_ramdisks_is_an_image() {
    let image = Image::open(build(Builder::new(b"k".to_vec(), CMDLINE))).unwrap();
    let measurements = image.check_and_measure().unwrap();
    assert_eq!(measurements.pcr0, measurements.pcr1);
    assert_eq!(measurements.pcr2, Pcr::of(b""));
}

#[test]
fn same_input_makes_the_same_bytes() {
    let tree = || {
        let mut tree = cpio::Tree::new();
        tree.file("init", 0o755, "#!").unwrap();
        tree.device("dev/console", 0o600, cpio::Device::Character, (5, 1)).unwrap();
        tree
    };
    let image = || build(Builder::new(b"kernel".to_vec(), CMDLINE).ramdisk(tree()));
    assert_eq!(image(), image());
}

#[test]
fn image_inside_something_bigger_is_found_whole() {
    let plain = build(Builder::new(b"kernel".to_vec(), CMDLINE).ramdisk(b"disk".to_vec()));
    let memory = [vec![0xff; 4096], plain.clone(), vec![0; 1000]].concat();
    let image = Image::open(nitroxide_eif::Window::new(memory, 4096, u64::MAX)).unwrap();
    assert_eq!(image.end(), plain.len() as u64);
    assert_eq!(image.warnings(), [Warning::TrailingBytes { offset: plain.len() as u64, size: 1000 }]);
    assert_eq!(image.check_and_measure().unwrap(), Image::open(plain).unwrap().measure().unwrap());
}

#[test]
fn image_written_behind_other_bytes_is_the_same() {
    let mut out = Cursor::new(b"before".to_vec());
    out.set_position(6);
    Builder::new(b"kernel".to_vec(), CMDLINE).write_to(&mut out).unwrap();
    let after = out.position();
    let bytes = out.into_inner();
    assert_eq!(after, bytes.len() as u64);
    assert_eq!(bytes[6..], build(Builder::new(b"kernel".to_vec(), CMDLINE)));
}
