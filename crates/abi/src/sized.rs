//! The one rule by which the extension's structs grow: size first, as clone3 does it (docs/abi.md, "Growth").
//!
//! A caller says in the first four bytes how large its struct is. Shorter than ours: the rest counts as zero. Longer: what we
//! do not know must be zero, else the caller wants something that we cannot do, and it is told so (E2BIG).

use crate::Code;

/// The largest struct that is looked at, in bytes: one page, as in the kernel's copy_struct_from_user.
pub const MAX_STRUCT_BYTES: usize = 4096;

/// Takes a caller's struct into `known`, the struct as this build knows it, whose first four bytes are its size.
///
/// `read(offset, bytes)` copies from the caller's struct; it fails with what the caller then gets (EFAULT). Apart from the size,
/// which comes first, every byte is read once. `minimum` is the size of the struct's first version. The size in the copy is the one that
/// was decided on, so a caller that rewrites its memory meanwhile gains nothing.
///
/// Returns how many bytes an answer may write back: the shorter of both sizes.
///
/// # Errors
///
/// What `read` gives; EINVAL below `minimum`; E2BIG beyond [`MAX_STRUCT_BYTES`], or if a byte beyond `known` is not zero.
pub fn copy_sized(minimum: usize, known: &mut [u8], mut read: impl FnMut(usize, &mut [u8]) -> Result<(), Code>) -> Result<usize, Code> {
    let mut size = [0; 4];
    read(0, &mut size)?;
    let length = usize::try_from(u32::from_le_bytes(size)).map_err(|_| Code::E2BIG)?;
    if length > MAX_STRUCT_BYTES {
        return Err(Code::E2BIG);
    }
    if length < minimum {
        return Err(Code::EINVAL);
    }
    let shared = length.min(known.len());
    let (head, rest) = known.split_at_mut_checked(shared).ok_or(Code::EINVAL)?;
    read(0, head)?;
    rest.fill(0);
    check_tail(shared, length, &mut read)?;
    for (target, source) in known.iter_mut().zip(size) {
        *target = source;
    }
    Ok(shared)
}

/// Everything from `start` to `end` must be zero; read in small pieces, because a kernel stack has no room for a page.
fn check_tail(start: usize, end: usize, read: &mut impl FnMut(usize, &mut [u8]) -> Result<(), Code>) -> Result<(), Code> {
    let mut buffer = [0; 64];
    let mut offset = start;
    while let Some(left) = end.checked_sub(offset).filter(|left| *left > 0) {
        let piece = left.min(buffer.len());
        let bytes = buffer.get_mut(..piece).ok_or(Code::EINVAL)?;
        read(offset, bytes)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Err(Code::E2BIG);
        }
        offset = offset.saturating_add(piece);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A struct that this build knows with 16 bytes and that began with 8.
    fn take(given: &[u8]) -> Result<([u8; 16], usize), Code> {
        let mut known = [0xff; 16];
        let read = |offset: usize, bytes: &mut [u8]| {
            let end = offset.checked_add(bytes.len()).ok_or(Code::EFAULT)?;
            bytes.copy_from_slice(given.get(offset..end).ok_or(Code::EFAULT)?);
            Ok(())
        };
        copy_sized(8, &mut known, read).map(|length| (known, length))
    }

    fn of_size<const N: usize>(size: u32) -> [u8; N] {
        let mut given = [0; N];
        given[..4].copy_from_slice(&size.to_le_bytes());
        given
    }

    #[test]
    fn shorter_struct_is_extended_with_zeroes() {
        let (known, length) = take(&[8, 0, 0, 0, 1, 2, 3, 4]).unwrap();
        assert_eq!(known, [8, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(length, 8);
    }

    #[test]
    fn longer_struct_is_taken_if_the_rest_is_zero() {
        let mut given = of_size::<4096>(4096);
        given[15] = 7;
        let (known, length) = take(&given).unwrap();
        assert_eq!((known[15], length), (7, 16));
        for place in [16, 80, 4095] {
            let mut given = given;
            given[place] = 1;
            assert_eq!(take(&given), Err(Code::E2BIG), "{place}");
        }
    }

    #[test]
    fn size_is_the_one_that_was_decided_on() {
        let mut first = true;
        let mut known = [0; 16];
        let read = |_: usize, bytes: &mut [u8]| {
            bytes.fill(if core::mem::take(&mut first) { 0 } else { 0xee });
            if bytes.len() == 4 {
                bytes[0] = 12;
            }
            Ok(())
        };
        assert_eq!(copy_sized(8, &mut known, read), Ok(12));
        assert_eq!(known, [12, 0, 0, 0, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0, 0, 0, 0]);
    }

    #[test]
    fn too_small_too_large_and_unreadable_are_refused() {
        assert_eq!(take(&of_size::<8>(7)), Err(Code::EINVAL));
        assert_eq!(take(&of_size::<8>(4097)), Err(Code::E2BIG));
        assert_eq!(take(&of_size::<8>(u32::MAX)), Err(Code::E2BIG));
        assert_eq!(take(&of_size::<8>(9)), Err(Code::EFAULT));
        assert_eq!(take(&of_size::<64>(80)), Err(Code::EFAULT));
        assert_eq!(take(&[1, 2, 3]), Err(Code::EFAULT));
    }
}
