//! Streaming an image into an enclave's memory: constant memory however large it is.

use std::io::{self, Read};

use nitroxide_abi::limits::EIF_OFFSET;

use crate::WriteImageError;

/// How much is in hand at a time, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// Copies `image_bytes` bytes of `image` to offset 8 MiB of a memory of `memory_bytes`, through `write_at(offset, bytes)`.
pub(crate) fn write_image(
    image: &mut impl Read,
    image_bytes: u64,
    memory_bytes: u64,
    mut write_at: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<(), WriteImageError> {
    let end = image_bytes.checked_add(EIF_OFFSET).filter(|end| *end <= memory_bytes);
    if end.is_none() {
        let needed_mib = image_bytes.saturating_add(EIF_OFFSET).div_ceil(2 << 20).saturating_mul(2);
        return Err(WriteImageError::TooLarge { image_bytes, offset: EIF_OFFSET, memory_bytes, needed_mib });
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut done = 0;
    while done < image_bytes {
        let wanted = usize::try_from(image_bytes - done).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        let read = match image.read(&mut chunk[..wanted]) {
            Ok(0) => return Err(WriteImageError::TooShort { read: done, expected: image_bytes }),
            Ok(read) => read.min(wanted),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(WriteImageError::Read(error)),
        };
        write_at(EIF_OFFSET + done, &chunk[..read]).map_err(WriteImageError::Write)?;
        done += u64::try_from(read).unwrap_or(u64::MAX);
    }
    Ok(())
}

/// Splits a write at the borders of regions: calls `write(region, offset in it, bytes)` for each part.
///
/// `sizes` are the regions' sizes in linear order, in bytes.
pub(crate) fn split(
    sizes: impl IntoIterator<Item = u64>,
    offset: u64,
    mut bytes: &[u8],
    mut write: impl FnMut(usize, u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut skip = offset;
    for (region, size) in sizes.into_iter().enumerate() {
        if bytes.is_empty() {
            break;
        }
        let Some(room) = size.checked_sub(skip).filter(|room| *room > 0) else {
            skip -= size;
            continue;
        };
        let (part, rest) = bytes.split_at(usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len()));
        write(region, skip, part)?;
        bytes = rest;
        skip = 0;
    }
    if bytes.is_empty() { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "the write goes beyond the memory's end")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn parts(sizes: &[u64], offset: u64, length: usize) -> io::Result<Vec<(usize, u64, usize)>> {
        let mut parts = Vec::new();
        split(sizes.iter().copied(), offset, &vec![0; length], |region, at, bytes| {
            parts.push((region, at, bytes.len()));
            Ok(())
        })?;
        Ok(parts)
    }

    #[test]
    fn write_is_split_where_regions_meet() {
        assert_eq!(parts(&[10, 4, 10], 8, 8).unwrap(), [(0, 8, 2), (1, 0, 4), (2, 0, 2)]);
        assert_eq!(parts(&[10, 4, 10], 10, 4).unwrap(), [(1, 0, 4)]);
        assert_eq!(parts(&[10, 4, 10], 23, 1).unwrap(), [(2, 9, 1)]);
        assert_eq!(parts(&[10], 10, 0).unwrap(), []);
    }

    #[test]
    fn write_beyond_the_end_is_an_error() {
        assert!(parts(&[10, 4], 12, 3).is_err());
        assert!(parts(&[], 0, 1).is_err());
        assert!(parts(&[10], u64::MAX, 1).is_err());
    }

    #[test]
    fn image_goes_to_8_mib_in_pieces() {
        let image: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let mut memory = vec![0; 16 << 20];
        let written = write_image(&mut &image[..], 3_000_000, 16 * MIB, |offset, bytes| {
            let start = usize::try_from(offset).unwrap();
            memory[start..start + bytes.len()].copy_from_slice(bytes);
            Ok(())
        });
        assert!(written.is_ok());
        assert_eq!(memory[8 << 20..(8 << 20) + 3_000_000], image);
        assert!(memory[..8 << 20].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn image_that_does_not_fit_says_how_much_memory_it_needs() {
        let error = write_image(&mut io::empty(), 57 * MIB, 64 * MIB, |_, _| Ok(())).unwrap_err();
        assert!(matches!(error, WriteImageError::TooLarge { needed_mib: 66, .. }), "{error}");
        assert!(write_image(&mut io::empty(), u64::MAX, 64 * MIB, |_, _| Ok(())).is_err());
    }

    #[test]
    fn image_that_ends_early_says_where() {
        let error = write_image(&mut &[1, 2, 3][..], 4, 64 * MIB, |_, _| Ok(())).unwrap_err();
        assert!(matches!(error, WriteImageError::TooShort { read: 3, expected: 4 }));
    }
}
