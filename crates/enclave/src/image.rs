//! The image in an enclave's memory: copied out, checked, and only then believed.
//!
//! First the parts are copied into sealed memory files, then everything is decided on that copy: so even a parent that shares the pages
//! can change nothing between the check and the boot. Kernel and ramdisks get files of their own, which QEMU loads; the small rest
//! (headers, command line, metadata, signature) a third. The three together read as the image again, for its checksum and its measurements.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nitroxide_abi::limits::EIF_OFFSET;
use nitroxide_eif::{Image, Measurements, ReadAt, ReadError, SectionKind, SignatureError, Window};
use rustix::fs::{SealFlags, fcntl_add_seals};

use crate::memory::{LinearMemory, read_all_at, sealable_memory, write_all_at};

/// Bytes of the header of an image.
const HEADER_BYTES: u64 = nitroxide_eif::format::HEADER_SIZE as u64;

/// Bytes before each section's payload.
const SECTION_HEADER_BYTES: u64 = nitroxide_eif::format::SECTION_HEADER_SIZE as u64;

/// Ramdisks begin at a multiple of this in the file they share: the kernel looks for the next archive only there
/// (unpack_to_rootfs() in init/initramfs.c) and skips zeros.
const RAMDISK_ALIGNMENT: u64 = 4;

/// Why an image is not started.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub(crate) enum ImageError {
    /// There is no usable enclave image at offset 8 MiB of the memory
    Unreadable(#[source] ReadError),
    /// The image was changed while it was read
    Changed,
    /// The image cannot be copied out of the memory
    Copy(#[source] io::Error),
    /// The image's signature does not hold
    Signature(#[source] SignatureError),
    /// The memory of {0} bytes ends before offset 8 MiB, where the image must be
    NoRoom(u64),
}

/// An image that was copied out of an enclave's memory.
pub(crate) type ExtractedImage = Image<Arc<Parts>>;

/// An image's parts in memory files, readable as the image.
#[derive(Debug)]
pub(crate) struct Parts {
    kernel: OwnedFd,
    ramdisks: OwnedFd,
    rest: OwnedFd,
    pieces: Vec<Piece>,
    size: u64,
}

/// Where a stretch of the image is.
#[derive(Clone, Copy, Debug)]
struct Piece {
    begin: u64,
    end: u64,
    place: Place,
    /// Where it begins in that file.
    offset: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Kernel,
    Ramdisks,
    Rest,
}

impl Parts {
    fn file(&self, place: Place) -> &OwnedFd {
        match place {
            Place::Kernel => &self.kernel,
            Place::Ramdisks => &self.ramdisks,
            Place::Rest => &self.rest,
        }
    }

    /// The kernel's file.
    pub(crate) fn kernel(&self) -> io::Result<OwnedFd> {
        self.kernel.try_clone()
    }

    /// The file with all ramdisks, one after the other; none if there is none.
    pub(crate) fn ramdisks(&self) -> io::Result<Option<OwnedFd>> {
        let has_any = self.pieces.iter().any(|piece| piece.place == Place::Ramdisks);
        has_any.then(|| self.ramdisks.try_clone()).transpose()
    }
}

impl ReadAt for Parts {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            // Only what was copied can be read; a gap between sections belongs to nobody.
            let piece = self.pieces.iter().find(|piece| (piece.begin..piece.end).contains(&at)).ok_or(io::ErrorKind::UnexpectedEof)?;
            let count = usize::try_from(piece.end - at).map_or(rest.len(), |left| left.min(rest.len()));
            let (now, later) = std::mem::take(&mut rest).split_at_mut_checked(count).ok_or(io::ErrorKind::UnexpectedEof)?;
            read_all_at(self.file(piece.place), now, piece.offset + (at - piece.begin))?;
            rest = later;
            at += count as u64;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

/// Copies the image at 8 MiB of `memory` out; nothing but its structure is checked.
pub(crate) fn extract(memory: &LinearMemory) -> Result<ExtractedImage, ImageError> {
    let room = memory.size().checked_sub(EIF_OFFSET).filter(|room| *room > 0).ok_or(ImageError::NoRoom(memory.size()))?;
    let original = Image::open(Window::new(memory, EIF_OFFSET, room)).map_err(ImageError::Unreadable)?;
    let parts = copy_parts(&original).map_err(ImageError::Copy)?;
    let copy = Image::open(Arc::new(parts)).map_err(ImageError::Unreadable)?;
    if copy.sections() == original.sections() { Ok(copy) } else { Err(ImageError::Changed) }
}

/// Checks an extracted image: its checksum and, if it is signed, its signature, for which it is measured first.
///
/// # Errors
///
/// Why it is not to be started.
pub(crate) fn verify(image: &ExtractedImage) -> Result<Option<Measurements>, ImageError> {
    image.verify_crc().map_err(ImageError::Unreadable)?;
    let Some(signature) = image.signature().map_err(ImageError::Signature)? else { return Ok(None) };
    let measurements = image.measure().map_err(ImageError::Unreadable)?;
    signature.verify(&measurements.pcr0).map_err(ImageError::Signature)?;
    Ok(Some(measurements))
}

/// Takes the image out of the memory it was found in, which the guest then finds empty.
pub(crate) fn punch_out(memory: &LinearMemory, image: &ExtractedImage) -> io::Result<()> {
    memory.punch(EIF_OFFSET, image.end())
}

fn copy_parts<S: ReadAt>(image: &Image<S>) -> io::Result<Parts> {
    let [kernel, ramdisks, rest] = ["enclave-kernel", "enclave-ramdisks", "enclave-image"].map(sealable_memory);
    let mut parts = Parts { kernel: kernel?, ramdisks: ramdisks?, rest: rest?, pieces: Vec::new(), size: image.end() };
    let (mut ramdisk_end, mut rest_end) = (0, 0);
    let mut plan = vec![(0, HEADER_BYTES, Place::Rest)];
    for section in image.sections() {
        plan.push((section.header_offset, SECTION_HEADER_BYTES, Place::Rest));
        let place = match section.kind {
            SectionKind::Kernel => Place::Kernel,
            SectionKind::Ramdisk => Place::Ramdisks,
            _ => Place::Rest,
        };
        plan.push((section.payload_offset, section.size, place));
    }
    for (begin, size, place) in plan {
        let offset = match place {
            Place::Kernel => 0,
            Place::Ramdisks => take_space(&mut ramdisk_end, size, RAMDISK_ALIGNMENT),
            Place::Rest => take_space(&mut rest_end, size, 1),
        };
        copy_stretch(image.source(), begin, size, &mut FileWriter { file: parts.file(place), offset })?;
        // An opened image's sections lie inside its source, so no sum here overflows.
        parts.pieces.push(Piece { begin, end: begin + size, place, offset });
    }
    for place in [Place::Kernel, Place::Ramdisks, Place::Rest] {
        fcntl_add_seals(parts.file(place), SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
    }
    Ok(parts)
}

/// Reserves `size` bytes behind `end`, aligned.
fn take_space(end: &mut u64, size: u64, alignment: u64) -> u64 {
    let begin = end.next_multiple_of(alignment);
    *end = begin + size;
    begin
}

fn copy_stretch(source: &impl ReadAt, begin: u64, size: u64, out: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < size {
        let count = usize::try_from(size - done).map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = buffer.get_mut(..count).unwrap_or_default();
        source.read_exact_at(piece, begin + done)?;
        out.write_all(piece)?;
        done += count as u64;
    }
    Ok(())
}

/// Writes into a file from an offset on, without using the file's own.
struct FileWriter<'f> {
    file: &'f OwnedFd,
    offset: u64,
}

impl Write for FileWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        write_all_at(self.file, buffer, self.offset)?;
        self.offset += buffer.len() as u64;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nitroxide_eif::Builder;
    use nitroxide_engine::FileRange;
    use rustix::fs::ftruncate;

    /// Memory of 16 MiB with an image at 8 MiB, and the image's own bytes.
    fn memory() -> (LinearMemory, Vec<u8>) {
        let mut bytes = io::Cursor::new(Vec::new());
        let builder = Builder::new(b"kernel".repeat(1000), "console=ttyS0").ramdisk(b"first".to_vec()).ramdisk(b"second disk".to_vec());
        builder.write_to(&mut bytes).unwrap();
        let bytes = bytes.into_inner();
        let file = sealable_memory("test").unwrap();
        ftruncate(&file, 16 << 20).unwrap();
        write_all_at(&file, &bytes, EIF_OFFSET).unwrap();
        (LinearMemory::new([FileRange { file: Arc::new(file), offset: 0, size: 16 << 20 }]).unwrap(), bytes)
    }

    #[test]
    fn the_copy_measures_as_the_original() {
        let (memory, bytes) = memory();
        let image = extract(&memory).unwrap();
        assert_eq!(verify(&image).unwrap(), None, "an unsigned image is not measured before it boots");
        assert_eq!(image.measure().unwrap(), Image::open(bytes).unwrap().measure().unwrap());
    }

    #[test]
    fn ramdisks_share_a_file_at_aligned_places() {
        let (memory, _) = memory();
        let image = extract(&memory).unwrap();
        let file = image.source().ramdisks().unwrap().unwrap();
        let mut bytes = [0; 19];
        read_all_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"first\0\0\0second disk");
        assert!(write_all_at(&file, b"x", 0).is_err(), "sealed");
        assert_eq!(rustix::fs::fstat(image.source().kernel().unwrap()).unwrap().st_size, 6000);
    }

    #[test]
    fn the_copy_does_not_follow_the_memory() {
        let (memory, bytes) = memory();
        let image = extract(&memory).unwrap();
        punch_out(&memory, &image).unwrap();
        verify(&image).unwrap();
        let mut left = vec![1; bytes.len()];
        memory.read_exact_at(&mut left, EIF_OFFSET).unwrap();
        assert!(left.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_flipped_bit_is_found_before_the_boot() {
        let (memory, bytes) = memory();
        let at = bytes.windows(6).position(|window| window == b"second").unwrap() as u64;
        write_all_at(&memory.ranges()[0].file, b"S", EIF_OFFSET + at).unwrap();
        let image = extract(&memory).unwrap();
        assert!(matches!(verify(&image), Err(ImageError::Unreadable(_))));
    }

    #[test]
    fn memory_without_an_image_says_so() {
        let file = Arc::new(sealable_memory("test").unwrap());
        ftruncate(&*file, 16 << 20).unwrap();
        let memory = |size| LinearMemory::new([FileRange { file: Arc::clone(&file), offset: 0, size }]).unwrap();
        assert!(matches!(extract(&memory(16 << 20)), Err(ImageError::Unreadable(_))));
        assert!(matches!(extract(&memory(8 << 20)), Err(ImageError::NoRoom(_))));
    }
}
