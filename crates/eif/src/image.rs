//! [`Image`]: an enclave image that was opened, its structure checked once and trusted from then on.
//!
//! Opening reads the header, the section headers and the command line, nothing else; everything bigger is streamed. What the header's table says decides where
//! sections are and in which order they count, gaps and bytes after the last section are allowed and reported as [`Warning`]s. docs/eif.md, section 3.
//! Neighbours: [`measure`](crate::measure) runs over an image's sections, [`metadata`](crate::metadata) is one of them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use crate::error::ReadError;
use crate::format::{self, Architecture, HEADER_SIZE, Header, MAX_SECTIONS, SECTION_HEADER_SIZE, SectionHeader, SectionKind};
use crate::measure::{Checksum, Measurements, Measurer, Pass};
use crate::metadata::Metadata;
use crate::read_at::ReadAt;
use crate::signature::{Signature, SignatureError};

const HEADER_BYTES: u64 = HEADER_SIZE as u64;
const SECTION_HEADER_BYTES: u64 = SECTION_HEADER_SIZE as u64;
/// Buffer of [`Image::copy_section`], in bytes.
const COPY_BYTES: usize = 128 * 1024;

/// One section of an opened image: it lies inside the source, overlaps nothing, and its size is the one that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Position in the header's table, from 0.
    pub index: usize,
    /// What it holds.
    pub kind: SectionKind,
    /// Its flags; no meaning is known.
    pub flags: u16,
    /// Where its header begins, in bytes from the start of the image.
    pub header_offset: u64,
    /// Where its payload begins: 12 bytes later.
    pub payload_offset: u64,
    /// Size of the payload in bytes.
    pub size: u64,
}

impl Section {
    /// The first byte after the payload. Cannot overflow: the section lies inside the source.
    pub fn end(&self) -> u64 {
        self.payload_offset + self.size
    }
}

/// Something unusual that does not prevent reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, displaydoc::Display)]
#[non_exhaustive]
pub enum Warning {
    /// The signature section has {in_section} bytes, but the image's header says {in_table}: a known mistake of AWS's tools when they sign an image again; the section's own size is used.
    SignatureSizeDisagrees {
        /// Size in the image's header.
        in_table: u64,
        /// Size in the section's header: the one that counts.
        in_section: u64,
    },
    /// There are {size} bytes at byte {offset} that belong to no section; they are neither checked nor measured.
    Gap {
        /// Where the gap begins.
        offset: u64,
        /// How long it is, in bytes.
        size: u64,
    },
    /// {size} bytes follow the last section at byte {offset}; they are neither checked nor measured.
    TrailingBytes {
        /// Where the image ends.
        offset: u64,
        /// How much follows, in bytes.
        size: u64,
    },
    /// Section {index} lies before its predecessor in the file; sections count in the order of the header's table.
    OutOfOrder {
        /// Position in the header's table.
        index: usize,
    },
    /// The header has the flags {flags:#06x}, of which only bit 0 (aarch64) is known.
    UnknownFlags {
        /// The flags found.
        flags: u16,
    },
    /// Section {index} has the flags {flags:#06x}; none is known.
    UnknownSectionFlags {
        /// Position in the header's table.
        index: usize,
        /// The flags found.
        flags: u16,
    },
}

/// An opened image.
///
/// Having one proves that the structure is sound: one kernel, one command line, at most one signature and one metadata section, everything inside the source,
/// nothing overlapping, known limits kept. It says nothing about the content: see [`check_and_measure`](Image::check_and_measure). If the source changes
/// afterwards, reads may fail or checks may not match; nothing worse.
///
/// `S` may be a `File`, `&File`, `Arc<File>`, a byte slice, a [`Window`](crate::Window): an `Image<Arc<File>>` can be cloned to a thread.
#[derive(Debug, Clone)]
pub struct Image<S> {
    source: S,
    header: Header,
    header_bytes: [u8; HEADER_SIZE],
    sections: Vec<Section>,
    cmdline: Vec<u8>,
    warnings: Vec<Warning>,
}

impl<S: ReadAt> Image<S> {
    /// Reads and checks the structure of an image; content is not read, apart from the command line.
    ///
    /// Allocates at most for [`MAX_SECTIONS`] sections and [`format::MAX_CMDLINE_BYTES`], whatever the image claims.
    ///
    /// # Errors
    ///
    /// Every [`ReadError`] but `ChecksumMismatch`, `Metadata` and `Cancelled`.
    pub fn open(source: S) -> Result<Image<S>, ReadError> {
        let image_size = source.size().map_err(ReadError::io("the size", 0))?;
        if image_size < HEADER_BYTES {
            return Err(ReadError::TooShort { size: image_size });
        }
        let mut header_bytes = [0; HEADER_SIZE];
        source.read_exact_at(&mut header_bytes, 0).map_err(ReadError::io("the header", 0))?;
        let header = Header::from_bytes(&header_bytes);
        check_header(&header)?;

        let mut warnings = Vec::new();
        if header.flags & !format::FLAG_AARCH64 != 0 {
            warnings.push(Warning::UnknownFlags { flags: header.flags });
        }
        let table = header.section_offsets.into_iter().zip(header.section_sizes).take(usize::from(header.num_sections));
        let mut sections = Vec::with_capacity(MAX_SECTIONS);
        for (index, (offset, in_table)) in table.enumerate() {
            sections.push(read_section(&source, image_size, index, offset, in_table, &mut warnings)?);
        }
        check_order(&sections, header.version)?;
        check_layout(&sections, image_size, &mut warnings)?;
        let cmdline = read_cmdline(&source, &sections)?;
        Ok(Image { source, header, header_bytes, sections, cmdline, warnings })
    }

    /// The source the image was opened from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The header as it stands in the image.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The header's bytes as they were read: what the checksum starts with.
    pub(crate) fn header_bytes(&self) -> &[u8; HEADER_SIZE] {
        &self.header_bytes
    }

    /// The processor the image is for.
    pub fn architecture(&self) -> Architecture {
        self.header.architecture()
    }

    /// All sections in the order of the header's table.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// What was unusual but tolerated.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// The kernel.
    pub fn kernel(&self) -> &Section {
        self.find(SectionKind::Kernel).expect("open() refuses an image without a kernel")
    }

    /// The command line, without a NUL; not necessarily UTF-8.
    pub fn cmdline(&self) -> &[u8] {
        &self.cmdline
    }

    /// The ramdisks in the order of the header's table; their concatenation is the initramfs.
    pub fn ramdisks(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter().filter(|section| section.kind == SectionKind::Ramdisk)
    }

    /// The first section of a kind.
    pub fn find(&self, kind: SectionKind) -> Option<&Section> {
        self.sections.iter().find(|section| section.kind == kind)
    }

    /// Where the image ends: the first byte after its last section. The source may go on (an enclave's memory does).
    pub fn end(&self) -> u64 {
        self.sections.iter().map(Section::end).fold(HEADER_BYTES, u64::max)
    }

    /// A reader over a section's payload.
    pub fn reader(&self, section: &Section) -> SectionReader<'_, S> {
        SectionReader { source: &self.source, offset: section.payload_offset, left: section.size }
    }

    /// Writes a section's payload to `out` and returns its size in bytes; memory does not grow with it.
    ///
    /// # Errors
    ///
    /// What reading or writing said.
    pub fn copy_section(&self, section: &Section, out: &mut impl Write) -> io::Result<u64> {
        let mut reader = self.reader(section);
        let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(section.size).unwrap_or(COPY_BYTES))];
        while reader.left > 0 {
            let count = reader.read(&mut buffer)?;
            out.write_all(buffer.get(..count).expect("read() returns at most the buffer's length"))?;
        }
        Ok(section.size)
    }

    /// The payload of a section in memory, if it is not bigger than `limit` bytes.
    ///
    /// # Errors
    ///
    /// `SectionTooBig`, `Io`.
    pub fn section_bytes(&self, section: &Section, limit: u64) -> Result<Vec<u8>, ReadError> {
        read_payload(&self.source, section, limit)
    }

    /// The metadata, if there is any (version 4 requires it).
    ///
    /// # Errors
    ///
    /// `Io`; `Metadata` if it is not what it should be.
    pub fn metadata(&self) -> Result<Option<Metadata>, ReadError> {
        let Some(section) = self.find(SectionKind::Metadata) else { return Ok(None) };
        let bytes = self.section_bytes(section, format::MAX_METADATA_BYTES)?;
        let parsed = serde_json::from_slice(&bytes);
        Ok(Some(parsed.map_err(|source| ReadError::Metadata { offset: section.payload_offset, source })?))
    }

    /// The signature section, decoded but not verified; `None` if the image is not signed.
    ///
    /// # Errors
    ///
    /// `Read`, `Malformed`, `Empty`.
    pub fn signature(&self) -> Result<Option<Signature>, SignatureError> {
        let Some(section) = self.find(SectionKind::Signature) else { return Ok(None) };
        let bytes = self.section_bytes(section, format::MAX_SIGNATURE_BYTES).map_err(|source| SignatureError::Read { source })?;
        Signature::parse(&bytes).map(Some)
    }

    /// Computes the checksum alone (one quick pass, no hashing) and compares it with the header's.
    ///
    /// # Errors
    ///
    /// `ChecksumMismatch`, `Io`.
    pub fn verify_crc(&self) -> Result<Checksum, ReadError> {
        let checksum = self.checksum()?;
        checksum.verify()?;
        Ok(checksum)
    }

    /// Computes the checksum alone and leaves the comparison to the caller.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn checksum(&self) -> Result<Checksum, ReadError> {
        crate::measure::checksum(self)
    }
}

impl<S: ReadAt + Sync> Image<S> {
    /// PCR0, PCR1 and PCR2 in one pass on two threads; PCR8 too if the image is signed.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn measure(&self) -> Result<Measurements, ReadError> {
        Ok(self.measure_pass()?.measurements)
    }

    /// Checksum and measurements in one pass on two threads; the checksum must match.
    ///
    /// # Errors
    ///
    /// `ChecksumMismatch`, `Io`.
    pub fn check_and_measure(&self) -> Result<Measurements, ReadError> {
        let pass = self.measure_pass()?;
        pass.checksum.verify()?;
        Ok(pass.measurements)
    }

    /// Checksum and measurements in one pass on two threads, nothing judged: for describing an image even if it is damaged.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn measure_pass(&self) -> Result<Pass, ReadError> {
        Measurer::new(self).run()
    }
}

/// The PCR of a plain file: PCR's formula over all of its bytes (`nitroxide pcr --input`).
///
/// # Errors
///
/// `Io`.
pub fn measure_file(path: impl AsRef<Path>) -> Result<crate::measure::Pcr, ReadError> {
    let mut file = File::open(path).map_err(ReadError::io("the file", 0))?;
    crate::measure::Pcr::of_reader(&mut file).map_err(ReadError::io("the file", 0))
}

/// Reads a section's payload from front to back.
#[derive(Debug)]
pub struct SectionReader<'a, S> {
    source: &'a S,
    offset: u64,
    left: u64,
}

impl<S: ReadAt> Read for SectionReader<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let part = buf.get_mut(..count).expect("the count is at most the buffer's length");
        self.source.read_exact_at(part, self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

fn check_header(header: &Header) -> Result<(), ReadError> {
    if header.magic != format::MAGIC {
        return Err(ReadError::NotAnImage { found: header.magic });
    }
    if !(format::OLDEST_VERSION..=format::CURRENT_VERSION).contains(&header.version) {
        return Err(ReadError::UnsupportedVersion { version: header.version });
    }
    if !(format::MIN_SECTIONS..=MAX_SECTIONS).contains(&usize::from(header.num_sections)) {
        return Err(ReadError::SectionCount { count: header.num_sections });
    }
    Ok(())
}

/// Reads and judges one section's header: place, kind, size.
fn read_section(
    source: &impl ReadAt,
    image_size: u64,
    index: usize,
    offset: u64,
    in_table: u64,
    warnings: &mut Vec<Warning>,
) -> Result<Section, ReadError> {
    let payload_offset = offset
        .checked_add(SECTION_HEADER_BYTES)
        .filter(|&payload| offset >= HEADER_BYTES && payload <= image_size)
        .ok_or(ReadError::SectionOutside { index, offset, image_size })?;
    let mut bytes = [0; SECTION_HEADER_SIZE];
    source.read_exact_at(&mut bytes, offset).map_err(ReadError::io("a section header", offset))?;
    let header = SectionHeader::from_bytes(&bytes);
    let kind = SectionKind::from_number(header.kind).ok_or(ReadError::UnknownSection { index, offset, found: header.kind })?;
    let size = header.size;
    // The section's own size is what AWS's reader walks by and computes checksum and signature from. For a signature, which nobody boots, a stale size in the
    // table is a known mistake of its signer; for anything else the two readings would be two different enclaves.
    if size != in_table {
        if kind != SectionKind::Signature {
            return Err(ReadError::SizesDisagree { index, kind, offset, in_table, in_section: size });
        }
        warnings.push(Warning::SignatureSizeDisagrees { in_table, in_section: size });
    }
    let limit = match kind {
        SectionKind::Cmdline => format::MAX_CMDLINE_BYTES,
        SectionKind::Signature => format::MAX_SIGNATURE_BYTES,
        SectionKind::Metadata => format::MAX_METADATA_BYTES,
        SectionKind::Kernel | SectionKind::Ramdisk => u64::MAX,
    };
    if size > limit {
        return Err(ReadError::SectionTooBig { kind, offset, size, limit });
    }
    if payload_offset.checked_add(size).is_none_or(|end| end > image_size) {
        return Err(ReadError::SectionCutOff { index, kind, offset, size, image_size });
    }
    if size == 0 && kind == SectionKind::Kernel {
        return Err(ReadError::EmptySection { kind, offset });
    }
    if header.flags != 0 {
        warnings.push(Warning::UnknownSectionFlags { index, flags: header.flags });
    }
    Ok(Section { index, kind, flags: header.flags, header_offset: offset, payload_offset, size })
}

/// One kernel, one command line, at most one of signature and metadata, ramdisks after the kernel, what the version requires.
fn check_order(sections: &[Section], version: u16) -> Result<(), ReadError> {
    for kind in [SectionKind::Kernel, SectionKind::Cmdline, SectionKind::Signature, SectionKind::Metadata] {
        let mut found = sections.iter().filter(|section| section.kind == kind);
        let first = found.next();
        if let (Some(first), Some(second)) = (first, found.next()) {
            return Err(ReadError::Duplicate { kind, first: first.index, second: second.index, offset: second.header_offset });
        }
        let required = match kind {
            SectionKind::Kernel | SectionKind::Cmdline => true,
            SectionKind::Metadata => version >= 4,
            SectionKind::Signature | SectionKind::Ramdisk => false,
        };
        if first.is_none() && required {
            return Err(ReadError::Missing { kind, version });
        }
    }
    let before_kernel = sections.iter().take_while(|section| section.kind != SectionKind::Kernel);
    match before_kernel.into_iter().find(|section| section.kind == SectionKind::Ramdisk) {
        Some(ramdisk) => Err(ReadError::RamdiskBeforeKernel { index: ramdisk.index, offset: ramdisk.header_offset }),
        None => Ok(()),
    }
}

/// No overlaps; notes gaps, trailing bytes and an order of places that is not the table's.
fn check_layout(sections: &[Section], image_size: u64, warnings: &mut Vec<Warning>) -> Result<(), ReadError> {
    for pair in sections.windows(2) {
        if let [before, after] = pair
            && after.header_offset < before.header_offset
        {
            warnings.push(Warning::OutOfOrder { index: after.index });
        }
    }
    let mut by_place: Vec<&Section> = sections.iter().collect();
    by_place.sort_by_key(|section| section.header_offset);
    let mut end = HEADER_BYTES;
    let mut previous = None;
    for section in by_place {
        match previous {
            Some(first) if section.header_offset < end => {
                return Err(ReadError::Overlap { first, second: section.index, offset: section.header_offset });
            }
            _ if section.header_offset > end => warnings.push(Warning::Gap { offset: end, size: section.header_offset - end }),
            _ => {}
        }
        end = section.end();
        previous = Some(section.index);
    }
    if end < image_size {
        warnings.push(Warning::TrailingBytes { offset: end, size: image_size - end });
    }
    Ok(())
}

fn read_cmdline(source: &impl ReadAt, sections: &[Section]) -> Result<Vec<u8>, ReadError> {
    let section = sections.iter().find(|section| section.kind == SectionKind::Cmdline).expect("check_order() has found one");
    let cmdline = read_payload(source, section, format::MAX_CMDLINE_BYTES)?;
    match cmdline.iter().position(|&byte| byte == 0) {
        Some(at) => Err(ReadError::CmdlineHasNul { offset: section.payload_offset + at as u64 }),
        None => Ok(cmdline),
    }
}

fn read_payload(source: &impl ReadAt, section: &Section, limit: u64) -> Result<Vec<u8>, ReadError> {
    let too_big = ReadError::SectionTooBig { kind: section.kind, offset: section.header_offset, size: section.size, limit };
    let size = usize::try_from(section.size).ok().filter(|_| section.size <= limit).ok_or(too_big)?;
    let mut bytes = vec![0; size];
    source.read_exact_at(&mut bytes, section.payload_offset).map_err(ReadError::io("a section", section.payload_offset))?;
    Ok(bytes)
}
