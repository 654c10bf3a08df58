//! The one rule by which the extension's structs grow: size first, as clone3 does it (docs/abi.md, "Growth").
//!
//! A caller says in the first four bytes how large its struct is. Shorter than ours: the rest counts as zero. Longer: what we
//! do not know must be zero, else the caller wants something that we cannot do, and it is told so (E2BIG).

use crate::Code;

/// The largest struct that is looked at, in bytes: one page, as in the kernel's copy_struct_from_user.
pub const MAX_STRUCT_BYTES: usize = 4096;

/// Takes a struct as the caller gave it (all the bytes it declared) into `known`, the struct as this build knows it.
///
/// `given` must be as long as the size that the caller declared; `minimum` is the size of the struct's first version. The size
/// field of the copy is set from the length of `given`, so a caller that rewrites its memory meanwhile gains nothing.
///
/// Returns how many bytes an answer may write back: the shorter of both sizes.
///
/// # Errors
///
/// EINVAL below `minimum`; E2BIG beyond [`MAX_STRUCT_BYTES`], or if a byte beyond `known` is not zero.
pub fn copy_sized(given: &[u8], minimum: usize, known: &mut [u8]) -> Result<usize, Code> {
    let size = u32::try_from(given.len()).map_err(|_| Code::E2BIG)?;
    let length = declared_length(size, minimum)?;
    let shared = length.min(known.len());
    let (head, tail) = given.split_at_checked(shared).ok_or(Code::EINVAL)?;
    if tail.iter().any(|byte| *byte != 0) {
        return Err(Code::E2BIG);
    }
    known.fill(0);
    for (target, source) in known.iter_mut().zip(head) {
        *target = *source;
    }
    for (target, source) in known.iter_mut().zip(size.to_le_bytes()) {
        *target = source;
    }
    Ok(shared)
}

/// How many bytes to read from a caller that declared `size`, before [`copy_sized`] judges them.
///
/// # Errors
///
/// E2BIG beyond [`MAX_STRUCT_BYTES`]; EINVAL below `minimum`.
pub fn declared_length(size: u32, minimum: usize) -> Result<usize, Code> {
    let length = usize::try_from(size).map_err(|_| Code::E2BIG)?;
    if length > MAX_STRUCT_BYTES {
        return Err(Code::E2BIG);
    }
    if length < minimum {
        return Err(Code::EINVAL);
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A struct that this build knows with 16 bytes and that began with 8.
    fn take(given: &[u8]) -> Result<([u8; 16], usize), Code> {
        let mut known = [0xff; 16];
        copy_sized(given, 8, &mut known).map(|length| (known, length))
    }

    #[test]
    fn shorter_struct_is_extended_with_zeroes() {
        let (known, length) = take(&[8, 0, 0, 0, 1, 2, 3, 4]).unwrap();
        assert_eq!(known, [8, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(length, 8);
    }

    #[test]
    fn longer_struct_is_taken_if_the_rest_is_zero() {
        let mut given = [0; 24];
        given[15] = 7;
        assert_eq!(take(&given).unwrap().1, 16);
        given[16] = 1;
        assert_eq!(take(&given), Err(Code::E2BIG));
    }

    #[test]
    fn size_field_is_the_length_that_was_read_not_what_the_memory_says_now() {
        let (known, _) = take(&[0xee; 16]).unwrap();
        assert_eq!(known[..4], [16, 0, 0, 0]);
    }

    #[test]
    fn too_small_and_too_large_are_refused() {
        assert_eq!(take(&[0; 7]), Err(Code::EINVAL));
        assert_eq!(declared_length(4096, 8), Ok(4096));
        assert_eq!(declared_length(4097, 8), Err(Code::E2BIG));
        assert_eq!(declared_length(u32::MAX, 8), Err(Code::E2BIG));
    }
}
