//! Why an image cannot be read: [`ReadError`], and [`ReadErrorKind`] for callers that map errors to codes of their own.
//!
//! One enum for the one operation "take this image seriously". Messages say what is wrong, at which byte, and what to do; the source error is not repeated.

use std::io;

use crate::format::SectionKind;

/// Why an image cannot be read or fails a check. Offsets are bytes from the start of the image; sections are numbered as in the header's table, from 0.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum ReadError {
    /// Could not read {what} at byte {offset} of the image; check that the file is readable and that nothing is changing it.
    Io {
        /// What was being read.
        what: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image is {size} bytes long, shorter than the 548-byte header; it is empty, cut off or not an enclave image.
    TooShort {
        /// Size of the source in bytes.
        size: u64,
    },
    /// The first four bytes are {found:02x?} instead of ".eif"; this is not an enclave image (build-enclave makes one from a container image or a directory).
    NotAnImage {
        /// What stands there.
        found: [u8; 4],
    },
    /// The header (byte 4) says version {version}, but 2, 3 and 4 are what can be read; build the image again with a current tool.
    UnsupportedVersion {
        /// The version found.
        version: u16,
    },
    /// The header (byte 26) announces {count} sections, but an image has 2 to 32; the header is damaged.
    SectionCount {
        /// The number found.
        count: u16,
    },
    /// Section {index} should start at byte {offset}, which lies inside the header or beyond the image's {image_size} bytes; the image is damaged or cut off.
    SectionOutside {
        /// Position in the header's table.
        index: usize,
        /// Where its header should be.
        offset: u64,
        /// Size of the source in bytes.
        image_size: u64,
    },
    /// Section {index} ({kind}) at byte {offset} claims {size} bytes, more than the image's {image_size} bytes leave for it; the image is damaged or cut off.
    SectionCutOff {
        /// Position in the header's table.
        index: usize,
        /// What it holds.
        kind: SectionKind,
        /// Where its header is.
        offset: u64,
        /// Payload size it claims.
        size: u64,
        /// Size of the source in bytes.
        image_size: u64,
    },
    /// Section {index} at byte {offset} has the unknown type {found}; the header's table points to a wrong place or the image is damaged.
    UnknownSection {
        /// Position in the header's table.
        index: usize,
        /// Where its header is.
        offset: u64,
        /// The type found.
        found: u16,
    },
    /// Section {index} ({kind}) at byte {offset} has {in_section} bytes by its own header but {in_table} by the image's; build the image again.
    SizesDisagree {
        /// Position in the header's table.
        index: usize,
        /// What it holds.
        kind: SectionKind,
        /// Where its header is.
        offset: u64,
        /// Size in the image's header.
        in_table: u64,
        /// Size in the section's header.
        in_section: u64,
    },
    /// Sections {first} and {second} overlap from byte {offset} on; no correct tool writes this: do not use the image.
    Overlap {
        /// The one that begins first.
        first: usize,
        /// The one that begins inside it.
        second: usize,
        /// Where the second begins.
        offset: u64,
    },
    /// The image has more than one {kind} section: {first} and {second} (byte {offset}); it is ambiguous, build it again.
    Duplicate {
        /// What there must be one of.
        kind: SectionKind,
        /// The first.
        first: usize,
        /// The second.
        second: usize,
        /// Where the second begins.
        offset: u64,
    },
    /// The image has no {kind} section, which version {version} requires; build it again.
    Missing {
        /// What is missing.
        kind: SectionKind,
        /// Version of the image.
        version: u16,
    },
    /// Ramdisk section {index} (byte {offset}) comes before the kernel; build the image again with the kernel first.
    RamdiskBeforeKernel {
        /// Position in the header's table.
        index: usize,
        /// Where it begins.
        offset: u64,
    },
    /// The {kind} section at byte {offset} is empty; build the image again with one.
    EmptySection {
        /// What is empty.
        kind: SectionKind,
        /// Where its header is.
        offset: u64,
    },
    /// The {kind} section at byte {offset} has {size} bytes, more than the limit of {limit}; make it smaller.
    SectionTooBig {
        /// What is too big.
        kind: SectionKind,
        /// Where its header is.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The command line has a NUL at byte {offset} of the image; a kernel would ignore the rest: build the image with a plain line of text.
    CmdlineHasNul {
        /// Where the NUL is.
        offset: u64,
    },
    /// The checksum of the content is {computed:08x}, but the header (byte 544) says {stored:08x}; the image was changed or damaged after it was built: fetch or build it again.
    ChecksumMismatch {
        /// What the header says.
        stored: u32,
        /// What the content has.
        computed: u32,
    },
    /// The metadata section at byte {offset} is not the JSON object it should be; the image boots without it, but its name and origin are unknown.
    Metadata {
        /// Where the payload begins.
        offset: u64,
        /// What the JSON parser said.
        #[source]
        source: serde_json::Error,
    },
    /// Measuring was cancelled after {done} bytes.
    Cancelled {
        /// How far it came, in bytes.
        done: u64,
    },
}

/// The kinds of [`ReadError`], coarse and stable: for exit codes and for deciding what to tell the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReadErrorKind {
    /// The source could not be read: a matter of files, not of images.
    Io,
    /// Not an enclave image at all.
    NotAnImage,
    /// An enclave image of a version that is not read.
    Unsupported,
    /// An enclave image whose structure is wrong.
    Malformed,
    /// The structure is right, the content is not what was built.
    Checksum,
    /// The caller gave up.
    Cancelled,
}

impl ReadError {
    /// The error's kind.
    pub fn kind(&self) -> ReadErrorKind {
        match self {
            ReadError::Io { .. } => ReadErrorKind::Io,
            ReadError::TooShort { .. } | ReadError::NotAnImage { .. } => ReadErrorKind::NotAnImage,
            ReadError::UnsupportedVersion { .. } => ReadErrorKind::Unsupported,
            ReadError::ChecksumMismatch { .. } => ReadErrorKind::Checksum,
            ReadError::Cancelled { .. } => ReadErrorKind::Cancelled,
            ReadError::SectionCount { .. }
            | ReadError::SectionOutside { .. }
            | ReadError::SectionCutOff { .. }
            | ReadError::UnknownSection { .. }
            | ReadError::SizesDisagree { .. }
            | ReadError::Overlap { .. }
            | ReadError::Duplicate { .. }
            | ReadError::Missing { .. }
            | ReadError::RamdiskBeforeKernel { .. }
            | ReadError::EmptySection { .. }
            | ReadError::SectionTooBig { .. }
            | ReadError::CmdlineHasNul { .. }
            | ReadError::Metadata { .. } => ReadErrorKind::Malformed,
        }
    }

    /// Wraps what the system said while reading `what` at `offset`.
    pub(crate) fn io(what: &'static str, offset: u64) -> impl FnOnce(io::Error) -> ReadError {
        move |source| ReadError::Io { what, offset, source }
    }
}
