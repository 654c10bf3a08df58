//! The bytes of an image: header, section headers, and every limit we set.
//!
//! Pure data: encoding and decoding of fixed-size structures, all integers big endian; what a structure may contain is judged by
//! [`Image::open`](crate::Image::open). Layout: docs/eif.md, sections 1 and 2.

use std::fmt;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b".eif";
/// Size of the header in bytes.
pub const HEADER_SIZE: usize = 548;
/// Offset of the checksum field, the last of the header; the checksum covers the header up to here.
pub const CRC_OFFSET: usize = 544;
/// Size of a section header in bytes.
pub const SECTION_HEADER_SIZE: usize = 12;
/// How many sections the header's table has room for.
pub const MAX_SECTIONS: usize = 32;
/// The fewest sections an image has: a kernel and a command line.
pub const MIN_SECTIONS: usize = 2;
/// The version that [`Builder`](crate::Builder) writes.
pub const CURRENT_VERSION: u16 = 4;
/// The oldest version that is read: before it there was no checksum.
pub const OLDEST_VERSION: u16 = 2;
/// Header flag bit 0: the image is for aarch64.
pub const FLAG_AARCH64: u16 = 1;
/// Memory an image asks for when nobody says otherwise, in bytes (what AWS's builder writes).
pub const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;
/// vCPUs an image asks for when nobody says otherwise (what AWS's builder writes).
pub const DEFAULT_CPUS: u64 = 2;

/// Limit of the signature section in bytes (the format's own).
pub const MAX_SIGNATURE_BYTES: u64 = 32_768;
/// Limit of the command line in bytes. Ours: Linux takes 2047 (x86_64 and aarch64), other kernels may take more.
pub const MAX_CMDLINE_BYTES: u64 = 65_536;
/// Limit of the metadata section in bytes. Ours: nitro-cli limits the user's part to 4096, the description of a container image comes on top.
pub const MAX_METADATA_BYTES: u64 = 1 << 20;

const VERSION: usize = 4;
const FLAGS: usize = 6;
const DEFAULT_MEMORY: usize = 8;
const DEFAULT_CPUS_AT: usize = 16;
const RESERVED: usize = 24;
const NUM_SECTIONS: usize = 26;
const OFFSETS: usize = 28;
const SIZES: usize = 284;
const UNUSED: usize = 540;

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SectionKind {
    /// The kernel: a bzImage (x86_64) or an uncompressed Image (aarch64).
    Kernel,
    /// The kernel's command line, without a NUL.
    Cmdline,
    /// A part of the initramfs; the first one starts the enclave (PCR1), the others are the application (PCR2).
    Ramdisk,
    /// Who vouches for PCR0; CBOR.
    Signature,
    /// Name, version and origin of the image; JSON, not measured.
    Metadata,
}

impl SectionKind {
    /// The number that stands for the kind in a section header, 1 to 5.
    pub fn number(self) -> u16 {
        match self {
            SectionKind::Kernel => 1,
            SectionKind::Cmdline => 2,
            SectionKind::Ramdisk => 3,
            SectionKind::Signature => 4,
            SectionKind::Metadata => 5,
        }
    }

    /// The kind with a number; `None` for 0 ("invalid" in the format) and everything above 5.
    pub fn from_number(number: u16) -> Option<SectionKind> {
        match number {
            1 => Some(SectionKind::Kernel),
            2 => Some(SectionKind::Cmdline),
            3 => Some(SectionKind::Ramdisk),
            4 => Some(SectionKind::Signature),
            5 => Some(SectionKind::Metadata),
            _ => None,
        }
    }

    /// Is the section's content part of PCR0?
    pub fn is_measured(self) -> bool {
        matches!(self, SectionKind::Kernel | SectionKind::Cmdline | SectionKind::Ramdisk)
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SectionKind::Kernel => "kernel",
            SectionKind::Cmdline => "cmdline",
            SectionKind::Ramdisk => "ramdisk",
            SectionKind::Signature => "signature",
            SectionKind::Metadata => "metadata",
        })
    }
}

/// The processor an image is for (bit 0 of the header's flags).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Flag clear.
    X86_64,
    /// Flag set.
    Aarch64,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Architecture::X86_64 => "x86_64",
            Architecture::Aarch64 => "aarch64",
        })
    }
}

/// The header as it stands in the file. Having one proves only that 548 bytes were there: no field has been judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// [`MAGIC`], if this is an image.
    pub magic: [u8; 4],
    /// Version of the format.
    pub version: u16,
    /// Bit 0: aarch64; the others have no meaning yet.
    pub flags: u16,
    /// Memory the image would like to have, in bytes. Advice only.
    pub default_memory_bytes: u64,
    /// vCPUs the image would like to have. Advice only.
    pub default_cpus: u64,
    /// Written as 0, ignored when read.
    pub reserved: u16,
    /// How many entries of the two tables are in use.
    pub num_sections: u16,
    /// Where each section's header starts, in bytes from the start of the image.
    pub section_offsets: [u64; MAX_SECTIONS],
    /// Size of each section's payload (without its header), in bytes.
    pub section_sizes: [u64; MAX_SECTIONS],
    /// Written as 0, ignored when read.
    pub unused: u32,
    /// CRC-32 (ISO-HDLC) of the header before this field and of all sections.
    pub crc32: u32,
}

impl Header {
    /// Reads the fields; every byte string is a header as far as this function is concerned.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Header {
        Header {
            magic: array(bytes, 0),
            version: u16::from_be_bytes(array(bytes, VERSION)),
            flags: u16::from_be_bytes(array(bytes, FLAGS)),
            default_memory_bytes: u64::from_be_bytes(array(bytes, DEFAULT_MEMORY)),
            default_cpus: u64::from_be_bytes(array(bytes, DEFAULT_CPUS_AT)),
            reserved: u16::from_be_bytes(array(bytes, RESERVED)),
            num_sections: u16::from_be_bytes(array(bytes, NUM_SECTIONS)),
            section_offsets: std::array::from_fn(|i| u64::from_be_bytes(array(bytes, OFFSETS + 8 * i))),
            section_sizes: std::array::from_fn(|i| u64::from_be_bytes(array(bytes, SIZES + 8 * i))),
            unused: u32::from_be_bytes(array(bytes, UNUSED)),
            crc32: u32::from_be_bytes(array(bytes, CRC_OFFSET)),
        }
    }

    /// Writes the fields.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        put(&mut bytes, 0, &self.magic);
        put(&mut bytes, VERSION, &self.version.to_be_bytes());
        put(&mut bytes, FLAGS, &self.flags.to_be_bytes());
        put(&mut bytes, DEFAULT_MEMORY, &self.default_memory_bytes.to_be_bytes());
        put(&mut bytes, DEFAULT_CPUS_AT, &self.default_cpus.to_be_bytes());
        put(&mut bytes, RESERVED, &self.reserved.to_be_bytes());
        put(&mut bytes, NUM_SECTIONS, &self.num_sections.to_be_bytes());
        for (i, (offset, size)) in self.section_offsets.iter().zip(&self.section_sizes).enumerate() {
            put(&mut bytes, OFFSETS + 8 * i, &offset.to_be_bytes());
            put(&mut bytes, SIZES + 8 * i, &size.to_be_bytes());
        }
        put(&mut bytes, UNUSED, &self.unused.to_be_bytes());
        put(&mut bytes, CRC_OFFSET, &self.crc32.to_be_bytes());
        bytes
    }

    /// The processor the image is for.
    pub fn architecture(&self) -> Architecture {
        if self.flags & FLAG_AARCH64 == 0 { Architecture::X86_64 } else { Architecture::Aarch64 }
    }
}

/// A section's header as it stands in the file; no field has been judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionHeader {
    /// See [`SectionKind::from_number`].
    pub kind: u16,
    /// Written as 0; no meaning is known.
    pub flags: u16,
    /// Size of the payload that follows, in bytes.
    pub size: u64,
}

impl SectionHeader {
    /// Reads the fields.
    pub fn from_bytes(bytes: &[u8; SECTION_HEADER_SIZE]) -> SectionHeader {
        SectionHeader {
            kind: u16::from_be_bytes(array(bytes, 0)),
            flags: u16::from_be_bytes(array(bytes, 2)),
            size: u64::from_be_bytes(array(bytes, 4)),
        }
    }

    /// Writes the fields.
    pub fn to_bytes(self) -> [u8; SECTION_HEADER_SIZE] {
        let mut bytes = [0; SECTION_HEADER_SIZE];
        put(&mut bytes, 0, &self.kind.to_be_bytes());
        put(&mut bytes, 2, &self.flags.to_be_bytes());
        put(&mut bytes, 4, &self.size.to_be_bytes());
        bytes
    }
}

/// `N` bytes from a constant position of a structure whose size is constant too: positions never come from a file.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|found| found.try_into().ok()).expect("the field lies inside its structure")
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes.get_mut(at..at + field.len()).expect("the field lies inside its structure").copy_from_slice(field);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_lie_where_the_format_says() {
        let mut bytes = [0; HEADER_SIZE];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(i % 251).unwrap(); // 251: a prime, so that no two fields look alike
        }
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.version, 0x0405);
        assert_eq!(header.flags, 0x0607);
        assert_eq!(header.num_sections, 0x1a1b);
        assert_eq!(header.section_offsets[0].to_be_bytes(), bytes[28..36]);
        assert_eq!(header.section_offsets[31].to_be_bytes(), bytes[276..284]);
        assert_eq!(header.section_sizes[0].to_be_bytes(), bytes[284..292]);
        assert_eq!(header.section_sizes[31].to_be_bytes(), bytes[532..540]);
        assert_eq!(header.crc32.to_be_bytes(), bytes[544..548]);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn section_header_round_trip() {
        let header = SectionHeader { kind: 3, flags: 0x0102, size: 0x0304_0506_0708_090a };
        assert_eq!(header.to_bytes(), [0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(SectionHeader::from_bytes(&header.to_bytes()), header);
    }

    #[test]
    fn kinds_have_the_numbers_one_to_five() {
        for number in 0..=u16::MAX {
            let kind = SectionKind::from_number(number);
            assert_eq!(kind.is_some(), (1..=5).contains(&number));
            assert!(kind.is_none_or(|kind| kind.number() == number));
        }
    }
}
