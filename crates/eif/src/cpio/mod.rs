//! cpio archives in the "newc" format: what an image's ramdisks are.
//!
//! [`Tree`] describes a file tree and writes it, the same bytes for the same tree; [`Writer`] writes entry by entry; [`Reader`] reads what others wrote and
//! trusts nothing. Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst; what the kernel makes of it: init/initramfs.c.

mod reader;
mod tree;
mod writer;

use std::io;
use std::path::PathBuf;

pub use reader::Reader;
pub use tree::{Content, Device, Node, Tree};
pub use writer::{DEFAULT_MTIME, Writer};

/// Size of an entry's header in bytes: the magic and 13 numbers of eight hexadecimal digits.
pub(crate) const HEADER_SIZE: usize = 110;
/// Longest name that is read or written, in bytes, without the NUL. The kernel's PATH_MAX (4096) counts it.
pub const MAX_NAME_BYTES: usize = 4095;
/// Longest target of a symbolic link, in bytes. Same limit.
pub const MAX_LINK_BYTES: u64 = 4095;
/// The name that ends an archive.
pub(crate) const TRAILER: &[u8] = b"TRAILER!!!";

/// Bits of [`Entry::mode`] that say what an entry is.
pub const TYPE_MASK: u32 = 0o170_000;
/// A regular file.
pub const TYPE_FILE: u32 = 0o100_000;
/// A directory.
pub const TYPE_DIRECTORY: u32 = 0o040_000;
/// A symbolic link; its data is the target.
pub const TYPE_SYMLINK: u32 = 0o120_000;
/// A character device.
pub const TYPE_CHARACTER: u32 = 0o020_000;
/// A block device.
pub const TYPE_BLOCK: u32 = 0o060_000;
/// A named pipe.
pub const TYPE_FIFO: u32 = 0o010_000;

/// One entry of an archive, without its data.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// Path as it stands in the archive, without the NUL. Foreign: may be absolute, contain `..` or anything else; see [`Entry::relative_path`].
    pub name: Vec<u8>,
    /// Inode number; only tells hard links apart.
    pub ino: u32,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of links.
    pub nlink: u32,
    /// Modification time in seconds since 1970.
    pub mtime: u32,
    /// Size of the data in bytes.
    pub size: u32,
    /// Major and minor number, if it is a device.
    pub device: (u32, u32),
}

impl Entry {
    /// The type bits of the mode, one of the `TYPE_` constants in a well-formed archive.
    pub fn file_type(&self) -> u32 {
        self.mode & TYPE_MASK
    }

    /// The permission bits of the mode, set-user-id and the like included.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// The name as a path that stays below where it is joined: leading `/` and `.` components are dropped.
    ///
    /// `None` if it has a `..` component. The empty path is the root itself. This does not protect from symbolic links that were extracted before.
    pub fn relative_path(&self) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStrExt;
        let mut path = PathBuf::new();
        for component in self.name.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => return None,
                name => path.push(std::ffi::OsStr::from_bytes(name)),
            }
        }
        Some(path)
    }
}

/// Why an archive cannot be read or written. Offsets are bytes from the start of the archive.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum CpioError {
    /// Could not read the archive at byte {offset}; check that the file is readable and complete.
    Read {
        /// How far the reader had come.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The archive ends at byte {offset}, in the middle of an entry or before its trailer; it was cut off.
    Truncated {
        /// Where it ends.
        offset: u64,
    },
    /// There is no cpio entry (newc) at byte {offset}; if the ramdisk is compressed, decompress it first.
    NotCpio {
        /// Where one should be.
        offset: u64,
    },
    /// The entry at byte {offset} has a malformed number; the archive is damaged.
    BadNumber {
        /// Where the entry begins.
        offset: u64,
    },
    /// The entry at byte {offset} has a name of {size} bytes, where 1 to 4095 and a NUL are allowed; the archive is damaged.
    BadName {
        /// Where the entry begins.
        offset: u64,
        /// Size it claims, with the NUL.
        size: u32,
    },
    /// The entry at byte {offset} has {size} bytes of data, more than the limit of {limit} here.
    DataTooBig {
        /// Where the entry begins.
        offset: u64,
        /// Size of its data.
        size: u64,
        /// The caller's limit.
        limit: u64,
    },
    /// Could not write the archive at byte {offset}; check the space and the permissions of the place it is written to.
    Write {
        /// How far the writer had come.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `{path}` has {size} bytes; a file in a ramdisk can have 4294967295 at most: leave it out or split it.
    FileTooBig {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Could not read `{path}`, which is to go into the ramdisk; check that it exists and is readable.
    Source {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `{path}` changed its size while it was being read; build again when nothing writes to it.
    SourceChanged {
        /// The file.
        path: PathBuf,
    },
    /// `{path}` is a socket or something else a ramdisk cannot hold; leave it out.
    UnsupportedFile {
        /// The file.
        path: PathBuf,
    },
    /// `{name}` cannot be a name in a ramdisk: it must be relative, not empty, without `..` or NUL, and at most 4095 bytes long.
    InvalidName {
        /// The name.
        name: String,
    },
    /// `{name}` cannot be added, because `{obstacle}` is already there and is not a directory (or is one that is not empty).
    Obstacle {
        /// What was to be added.
        name: String,
        /// What is in the way.
        obstacle: String,
    },
}

/// How many bytes are missing to a multiple of four.
pub(crate) fn padding(position: u64) -> usize {
    // The remainder is 0 to 3.
    usize::try_from(position.wrapping_neg() % 4).unwrap_or(0)
}
