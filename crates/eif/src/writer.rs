//! An image being written: what [`Builder`](crate::Builder) and [`sign_image`](crate::sign_image) have in common.
//!
//! Places are reserved for headers, which are filled in once sizes are known; the checksum is put together from its parts, so nothing is read back.

use std::io::{self, Seek, SeekFrom, Write};

use crate::builder::{BuildError, Built};
use crate::format::{CRC_OFFSET, HEADER_SIZE, Header, SECTION_HEADER_SIZE, SectionHeader, SectionKind};

/// An image being written from the stream's position on.
pub(crate) struct ImageWriter<'a, W> {
    out: &'a mut W,
    /// Where the image begins in the stream, in bytes.
    base: u64,
    /// How much of the image is written, in bytes.
    position: u64,
    /// Offset and payload size of the sections so far.
    sections: Vec<(u64, u64)>,
    crc: crc32fast::Hasher,
}

impl<'a, W: Write + Seek> ImageWriter<'a, W> {
    /// Reserves the header's place.
    pub fn begin(out: &'a mut W) -> Result<ImageWriter<'a, W>, BuildError> {
        let base = out.stream_position().map_err(|source| BuildError::Write { offset: 0, source })?;
        let mut image = ImageWriter { out, base, position: 0, sections: Vec::new(), crc: crc32fast::Hasher::new() };
        image.put(&[0; HEADER_SIZE])?;
        Ok(image)
    }

    /// Writes a section, whose payload is what `copy` puts into its argument, and returns the payload's size in bytes.
    pub fn section<E: From<BuildError>>(
        &mut self,
        kind: SectionKind,
        flags: u16,
        copy: impl FnOnce(&mut Sink<'_, 'a, W>) -> Result<(), E>,
    ) -> Result<u64, E> {
        let offset = self.position;
        self.put(&[0; SECTION_HEADER_SIZE])?;
        let mut sink = Sink { image: self, crc: crc32fast::Hasher::new() };
        copy(&mut sink)?;
        let payload_crc = sink.crc;
        let size = self.position - offset - SECTION_HEADER_SIZE as u64;
        let header = SectionHeader { kind: kind.number(), flags, size }.to_bytes();
        self.put_at(offset, &header)?;
        self.crc.update(&header);
        self.crc.combine(&payload_crc);
        self.sections.push((offset, size));
        Ok(size)
    }

    /// Fills in the header: number and table of the sections and the checksum are ours, the other fields the caller's.
    pub fn finish(mut self, mut header: Header) -> Result<Built, BuildError> {
        header.num_sections = u16::try_from(self.sections.len()).expect("callers write at most as many sections as the table holds");
        (header.section_offsets, header.section_sizes) = Default::default();
        let table = header.section_offsets.iter_mut().zip(&mut header.section_sizes);
        for ((offset, size), section) in table.zip(&self.sections) {
            (*offset, *size) = *section;
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(header.to_bytes().get(..CRC_OFFSET).expect("the checksum field lies inside the header"));
        crc.combine(&self.crc);
        header.crc32 = crc.finalize();
        self.put_at(0, &header.to_bytes())?;
        self.out.flush().map_err(|source| BuildError::Write { offset: self.position, source })?;
        Ok(Built { size: self.position, crc32: header.crc32 })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.out.write_all(bytes).map_err(|source| BuildError::Write { offset: self.position, source })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn put_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), BuildError> {
        let mut write = || {
            self.out.seek(SeekFrom::Start(self.base + offset))?;
            self.out.write_all(bytes)?;
            self.out.seek(SeekFrom::Start(self.base + self.position)).map(drop)
        };
        write().map_err(|source| BuildError::Write { offset, source })
    }
}

/// A payload's way into the image: counted and summed up.
pub(crate) struct Sink<'i, 'a, W> {
    image: &'i mut ImageWriter<'a, W>,
    crc: crc32fast::Hasher,
}

impl<W: Write> Sink<'_, '_, W> {
    /// Writes all of `bytes`.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        let offset = self.image.position;
        self.write_all(bytes).map_err(|source| BuildError::Write { offset, source })
    }
}

impl<W: Write> Write for Sink<'_, '_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.image.out.write(bytes)?;
        self.crc.update(bytes.get(..count).unwrap_or(bytes));
        self.image.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.image.out.flush()
    }
}
