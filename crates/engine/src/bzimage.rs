//! The version of a Linux kernel, read from the set-up header of a bzImage.
//!
//! Source: Documentation/arch/x86/boot.rst: `boot_flag` 0xAA55 at 0x1FE, `HdrS` at 0x202, `kernel_version` at 0x20E (an offset, 0x200 less than where the
//! text lies, 0 = none). Everything here is the image's claim: it only chooses between two clocks, both of which are safe for us.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// A kernel's version as far as a decision needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KernelVersion {
    pub major: u32,
    pub minor: u32,
}

/// The version the file's set-up header claims; none where it is no bzImage, has no version text, or cannot be read.
pub(crate) fn version(kernel: &File) -> Option<KernelVersion> {
    let mut header = [0; 0x210];
    kernel.read_exact_at(&mut header, 0).ok()?;
    if header[0x1FE..0x200] != [0x55, 0xAA] || header[0x202..0x206] != *b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes([header[0x20E], header[0x20F]]);
    if offset == 0 {
        return None;
    }
    let mut text = [0; 64];
    let length = kernel.read_at(&mut text, u64::from(offset) + 0x200).ok()?;
    parse(&text[..length])
}

/// Reads `6.1.0-13-cloud ...` as 6.1.
fn parse(text: &[u8]) -> Option<KernelVersion> {
    let text: String = text.iter().map_while(|&byte| byte.is_ascii_graphic().then_some(char::from(byte))).collect();
    let mut parts = text.splitn(3, '.');
    let number = |part: &str| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    Some(KernelVersion { major: number(parts.next()?)?, minor: number(parts.next()?)? })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(version_text: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 0x600];
        bytes[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20E..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
        bytes[0x500..0x500 + version_text.len()].copy_from_slice(version_text);
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn versions_of_distributions_are_read() {
        let version = |text: &[u8]| version(&image(text));
        assert_eq!(version(b"7.3.4+deb13-cloud-amd64 (debian) #1"), Some(KernelVersion { major: 7, minor: 3 }));
        assert_eq!(version(b"4.14.256-209.484.amzn2.x86_64 (x)\0"), Some(KernelVersion { major: 4, minor: 14 }));
        assert_eq!(version(b"5.8-rc1"), Some(KernelVersion { major: 5, minor: 8 }));
    }

    #[test]
    fn anything_else_has_no_version() {
        for text in [&b"\0"[..], b"six.one", b"6", b"6.x", b"99999999999.1"] {
            assert_eq!(version(&image(text)), None, "{text:?}");
        }
        let mut elf = tempfile::tempfile().unwrap();
        elf.write_all(&[0x7F; 0x600]).unwrap();
        assert_eq!(version(&elf), None);
        assert_eq!(version(&tempfile::tempfile().unwrap()), None);
    }

    #[test]
    fn a_version_offset_past_the_end_is_no_version() {
        let file = image(b"6.1");
        file.write_all_at(&u16::MAX.to_le_bytes(), 0x20E).unwrap();
        assert_eq!(version(&file), None);
    }
}
