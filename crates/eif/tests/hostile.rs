//! Images that are damaged or made to deceive: an error that says what is wrong, or the reading that was meant; never a panic, never an answer that is wrong.

mod common;

use common::{CMDLINE, build, noise, resealed, signed, signer, small, with_header, with_section};
use nitroxide_eif::format::{HEADER_SIZE, MAX_CMDLINE_BYTES, MAX_METADATA_BYTES, MAX_SIGNATURE_BYTES, SECTION_HEADER_SIZE};
use nitroxide_eif::measure::Threads;
use nitroxide_eif::{Builder, Image, Measurements, Measurer, ReadError, ReadErrorKind, SectionKind, Warning};
use proptest::prelude::*;

fn check_and_measure(image: &[u8]) -> Result<Measurements, ReadError> {
    let image = Image::open(image)?;
    let pass = Measurer::new(&image).threads(Threads::One).run()?;
    pass.checksum.verify()?;
    Ok(pass.measurements)
}

/// Every other value at every byte of the header and of the sections' headers.
#[test]
fn every_changed_byte_of_the_headers_is_noticed() {
    let image = small();
    let headers: Vec<_> = Image::open(&image).unwrap().sections().iter().map(|section| section.header_offset).collect();
    let sections = headers.into_iter().flat_map(|at| {
        let at = usize::try_from(at).unwrap();
        at..at + SECTION_HEADER_SIZE
    });
    let mut damaged = image.clone();
    for at in (0..HEADER_SIZE).chain(sections) {
        for change in 1..=u8::MAX {
            damaged[at] = image[at] ^ change;
            let result = check_and_measure(&damaged);
            assert!(result.is_err(), "byte {at} changed by {change:#04x} gives {result:?}");
        }
        damaged[at] = image[at];
    }
    assert!(check_and_measure(&damaged).is_ok());
}

#[test]
fn every_changed_bit_of_the_content_is_noticed() {
    let image = small();
    let mut damaged = image.clone();
    for at in HEADER_SIZE..image.len() {
        for bit in 0..8 {
            damaged[at] = image[at] ^ 1 << bit;
            assert!(check_and_measure(&damaged).is_err(), "bit {bit} of byte {at}");
        }
        damaged[at] = image[at];
    }
}

#[test]
fn every_truncation_is_noticed() {
    let image = signed(small(), &signer("p384"));
    for size in 0..image.len() {
        let kind = check_and_measure(&image[..size]).unwrap_err().kind();
        let expected = if size < HEADER_SIZE { ReadErrorKind::NotAnImage } else { ReadErrorKind::Malformed };
        assert_eq!(kind, expected, "{size} bytes");
    }
}

#[test]
fn longer_source_gives_the_same_reading_and_a_warning() {
    let image = small();
    let longer = [image.clone(), vec![0xff; 1 << 20]].concat();
    assert_eq!(check_and_measure(&longer).unwrap(), check_and_measure(&image).unwrap());
    let warning = Warning::TrailingBytes { offset: image.len() as u64, size: 1 << 20 };
    assert_eq!(Image::open(&longer).unwrap().warnings(), [warning]);
}

#[test]
fn something_else_is_not_an_image() {
    assert!(matches!(Image::open(&b""[..]), Err(ReadError::TooShort { size: 0 })));
    let elf = [b"\x7fELF".to_vec(), vec![0; 1000]].concat();
    assert!(matches!(Image::open(elf), Err(ReadError::NotAnImage { found: [0x7f, b'E', b'L', b'F'] })));
    assert!(matches!(Image::open(vec![0; HEADER_SIZE]), Err(ReadError::NotAnImage { .. })));
}

/// Row by row: what is wrong with the header's table, and the error.
#[test]
fn impossible_tables_are_refused_with_the_reason() {
    let size = small().len() as u64;
    let open = |change: &dyn Fn(&mut nitroxide_eif::Header)| Image::open(with_header(small(), change)).unwrap_err();
    for version in [0, 1, 5, u16::MAX] {
        assert!(matches!(open(&|h| h.version = version), ReadError::UnsupportedVersion { version: found } if found == version));
    }
    for count in [0, 1, 33, u16::MAX] {
        assert!(matches!(open(&|h| h.num_sections = count), ReadError::SectionCount { count: found } if found == count));
    }
    for offset in [0, 547, size - 11, size, u64::MAX - 11, u64::MAX] {
        assert!(
            matches!(open(&|h| h.section_offsets[2] = offset), ReadError::SectionOutside { index: 2, offset: found, .. } if found == offset)
        );
    }
    // The second ramdisk where the first one is: the same bytes twice.
    let twice = open(&|h| (h.section_offsets[4], h.section_sizes[4]) = (h.section_offsets[3], h.section_sizes[3]));
    assert!(matches!(twice, ReadError::Overlap { first: 3, second: 4, .. }));
    let sizes = open(&|h| h.section_sizes[3] += 1);
    assert!(matches!(sizes, ReadError::SizesDisagree { index: 3, kind: SectionKind::Ramdisk, in_table: 61, in_section: 60, .. }));
    // Section 5 of the table is not in use and points to byte 0.
    assert!(matches!(open(&|h| h.num_sections = 6), ReadError::SectionOutside { index: 5, offset: 0, .. }));
    assert!(matches!(open(&|h| h.num_sections = 2), ReadError::Missing { kind: SectionKind::Metadata, version: 4 }));
    assert!(matches!(open(&|h| h.section_offsets.swap(0, 3)), ReadError::SizesDisagree { .. }));
    let before = open(&|h| {
        h.section_offsets.swap(0, 3);
        h.section_sizes.swap(0, 3);
    });
    assert!(matches!(before, ReadError::RamdiskBeforeKernel { index: 0, .. }));
}

#[test]
fn impossible_sections_are_refused_with_the_reason() {
    let open = |index, change: &dyn Fn(&mut nitroxide_eif::SectionHeader)| Image::open(with_section(small(), index, change)).unwrap_err();
    for kind in [0, 6, u16::MAX] {
        assert!(matches!(open(1, &|s| s.kind = kind), ReadError::UnknownSection { index: 1, found, .. } if found == kind));
    }
    assert!(matches!(open(3, &|s| s.kind = 1), ReadError::Duplicate { kind: SectionKind::Kernel, first: 0, second: 3, .. }));
    assert!(matches!(open(4, &|s| s.kind = 5), ReadError::Duplicate { kind: SectionKind::Metadata, first: 2, second: 4, .. }));
    assert!(matches!(open(1, &|s| s.kind = 3), ReadError::Missing { kind: SectionKind::Cmdline, .. }));
    assert!(matches!(open(3, &|s| s.size = u64::MAX), ReadError::SizesDisagree { index: 3, in_section: u64::MAX, .. }));
    let huge = |index, size| {
        let image = with_section(small(), index, |section| section.size = size);
        Image::open(with_header(image, |header| header.section_sizes[index] = size)).unwrap_err()
    };
    assert!(matches!(huge(4, u64::MAX), ReadError::SectionCutOff { index: 4, kind: SectionKind::Ramdisk, size: u64::MAX, .. }));
    assert!(matches!(huge(4, 91), ReadError::SectionCutOff { index: 4, size: 91, .. }));
    assert!(matches!(huge(0, 0), ReadError::EmptySection { kind: SectionKind::Kernel, .. }));
    assert!(matches!(huge(0, 101), ReadError::Overlap { first: 0, second: 1, .. }));
    for (index, limit) in [(1, MAX_CMDLINE_BYTES), (2, MAX_METADATA_BYTES)] {
        assert!(matches!(huge(index, limit + 1), ReadError::SectionTooBig { limit: found, .. } if found == limit));
    }
}

#[test]
fn signature_beyond_its_limit_is_refused() {
    let image = signed(small(), &signer("p384"));
    let longer = [image, vec![0; 40_000]].concat();
    let longer = with_section(longer, 5, |section| section.size = MAX_SIGNATURE_BYTES + 1);
    assert!(matches!(Image::open(longer), Err(ReadError::SectionTooBig { kind: SectionKind::Signature, .. })));
}

#[test]
fn nul_in_the_command_line_is_refused_with_its_place() {
    let mut image = small();
    let cmdline = usize::try_from(Image::open(&image).unwrap().sections()[1].payload_offset).unwrap();
    image[cmdline + 7] = 0;
    assert!(matches!(Image::open(image), Err(ReadError::CmdlineHasNul { offset }) if offset == cmdline as u64 + 7));
}

#[test]
fn older_versions_need_no_metadata() {
    for version in [2, 3] {
        let image = with_header(small(), |header| {
            header.version = version;
            // Metadata leaves the table; its bytes stay as a gap.
            header.section_offsets.copy_within(3..5, 2);
            header.section_sizes.copy_within(3..5, 2);
            header.num_sections = 4;
        });
        let image = resealed(image);
        let opened = Image::open(&image).unwrap();
        assert_eq!(opened.metadata().unwrap(), None);
        assert!(matches!(opened.warnings(), [Warning::Gap { .. }]));
        assert_eq!(check_and_measure(&image).unwrap(), check_and_measure(&small()).unwrap());
    }
}

#[test]
fn damaged_metadata_does_not_hide_the_rest() {
    let mut image = small();
    let metadata = usize::try_from(Image::open(&image).unwrap().sections()[2].payload_offset).unwrap();
    image[metadata] = b'[';
    let image = resealed(image);
    assert!(matches!(Image::open(&image).unwrap().metadata(), Err(ReadError::Metadata { offset, .. }) if offset == metadata as u64));
    assert_eq!(check_and_measure(&image).unwrap(), check_and_measure(&small()).unwrap());
}

/// The header's table is the authority: sections in another place, with gaps between them, are the same image.
#[test]
fn sections_in_any_place_and_with_gaps_measure_the_same() {
    let image = small();
    let sections: Vec<_> = Image::open(&image).unwrap().sections().to_vec();
    let mut moved = image[..HEADER_SIZE].to_vec();
    let mut offsets = [0; 5];
    for (gap, &index) in [4, 2, 0, 3, 1].iter().enumerate() {
        moved.extend(vec![0xaa; gap * 7]);
        offsets[index] = moved.len() as u64;
        let section = &sections[index];
        moved.extend(&image[usize::try_from(section.header_offset).unwrap()..usize::try_from(section.end()).unwrap()]);
    }
    let moved = resealed(with_header(moved, |header| header.section_offsets[..5].copy_from_slice(&offsets)));
    assert_eq!(check_and_measure(&moved).unwrap(), check_and_measure(&image).unwrap());
    let opened = Image::open(&moved).unwrap();
    assert_eq!(opened.warnings().iter().filter(|warning| matches!(warning, Warning::Gap { .. })).count(), 4);
    assert_eq!(opened.warnings().iter().filter(|warning| matches!(warning, Warning::OutOfOrder { .. })).count(), 2);
}

#[test]
fn late_command_line_counts_where_the_table_has_it() {
    // Kernel, ramdisk, ramdisk, metadata, cmdline: PCR1 goes on after the second ramdisk has begun.
    let image = with_header(small(), |header| {
        let order = [0, 3, 4, 2, 1];
        let (offsets, sizes) = (header.section_offsets, header.section_sizes);
        header.section_offsets[..5].copy_from_slice(&order.map(|index| offsets[index]));
        header.section_sizes[..5].copy_from_slice(&order.map(|index| sizes[index]));
    });
    let image = resealed(image);
    let measured = check_and_measure(&image).unwrap();
    let (kernel, first, second) = (noise(100, 1), noise(60, 2), noise(90, 3));
    let pcr = |parts: &[&[u8]]| nitroxide_eif::Pcr::of(&parts.concat());
    assert_eq!(measured.pcr0, pcr(&[&kernel, &first, &second, CMDLINE.as_bytes()]));
    assert_eq!(measured.pcr1, pcr(&[&kernel, &first, CMDLINE.as_bytes()]));
    assert_eq!(measured.pcr2, pcr(&[&second]));
    assert_eq!(Image::open(&image).unwrap().check_and_measure().unwrap(), measured);
}

#[test]
fn source_that_shrinks_while_it_is_read_is_an_error_on_both_threads() {
    struct Shrinking(Vec<u8>);
    impl nitroxide_eif::ReadAt for Shrinking {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.0.read_exact_at(buf, offset)
        }
        fn size(&self) -> std::io::Result<u64> {
            Ok(self.0.len() as u64 + 1_000_000)
        }
    }
    // The last section is said to reach beyond what can be read.
    let image = build(Builder::new(noise(5_000_000, 1), CMDLINE).ramdisk(noise(3_000_000, 2)).ramdisk(noise(3_000_000, 3)));
    let claim = |size: u64| {
        let image = with_section(image.clone(), 4, |section| section.size = size);
        with_header(image, |header| header.section_sizes[4] = size)
    };
    let image = Image::open(Shrinking(claim(3_500_000))).unwrap();
    for threads in [Threads::One, Threads::Two] {
        assert_eq!(Measurer::new(&image).threads(threads).run().unwrap_err().kind(), ReadErrorKind::Io);
    }
}

/// A source that panics takes the call down, and with it both threads: nobody waits for a chunk that will not come.
#[test]
fn source_that_panics_ends_both_threads() {
    struct Panicking(Vec<u8>, std::sync::atomic::AtomicUsize);
    impl nitroxide_eif::ReadAt for Panicking {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            if buf.len() > 100_000 && self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 5 {
                panic!("as the test wants it");
            }
            self.0.read_exact_at(buf, offset)
        }
        fn size(&self) -> std::io::Result<u64> {
            self.0.size()
        }
    }
    let image = build(Builder::new(noise(5_000_000, 1), CMDLINE).ramdisk(noise(9, 2)).ramdisk(noise(9_000_000, 3)));
    let image = Image::open(Panicking(image, Default::default())).unwrap();
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| image.measure())).is_err());
}

#[test]
fn cancelled_measuring_ends_on_both_threads() {
    let image = Image::open(build(Builder::new(noise(5_000_000, 1), CMDLINE).ramdisk(noise(9, 2)).ramdisk(noise(9_000_000, 3)))).unwrap();
    for threads in [Threads::One, Threads::Two] {
        let stop = |done| if done > 6_000_000 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) };
        let error = Measurer::new(&image).threads(threads).progress(stop).run().unwrap_err();
        assert!(matches!(error, ReadError::Cancelled { done: 6_000_001..7_000_000 }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Bytes of any kind after a right beginning: whatever opens, lies inside and measures the same on one thread and on two.
    #[test]
    fn any_table_opens_soundly_or_not_at_all(
        version in 0_u16..6,
        count in 0_u16..6,
        table in prop::collection::vec((prop_oneof![500_u64..1200, any::<u64>()], prop_oneof![0_u64..300, any::<u64>()]), 6),
        kinds in prop::collection::vec(0_u16..7, 6),
        tail in prop::collection::vec(any::<u8>(), 0..700),
    ) {
        let mut bytes = vec![0; HEADER_SIZE];
        bytes.extend(tail);
        let mut bytes = with_header(bytes, |header| {
            header.magic = *b".eif";
            header.version = version;
            header.num_sections = count;
            for (index, &(offset, size)) in table.iter().enumerate() {
                (header.section_offsets[index], header.section_sizes[index]) = (offset, size);
            }
        });
        for (&(offset, size), &kind) in table.iter().zip(&kinds) {
            let header = nitroxide_eif::SectionHeader { kind, flags: 0, size }.to_bytes();
            let place = usize::try_from(offset).ok().and_then(|at| bytes.get_mut(at..at.checked_add(SECTION_HEADER_SIZE)?));
            if let Some(place) = place {
                place.copy_from_slice(&header);
            }
        }
        if let Ok(image) = Image::open(&bytes) {
            for section in image.sections() {
                prop_assert!(section.header_offset >= HEADER_SIZE as u64 && section.end() <= bytes.len() as u64);
            }
            let _ = image.metadata();
            let _ = image.signature();
            let alone = Measurer::new(&image).threads(Threads::One).run().unwrap();
            prop_assert_eq!(alone, Measurer::new(&image).threads(Threads::Two).run().unwrap());
        }
    }
}
