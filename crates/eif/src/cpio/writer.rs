//! [`Writer`]: an archive written entry by entry into any stream.
//!
//! Reproducible: inode numbers count from 1 in the order of writing, owners are 0:0, every entry has the same fixed time. Neighbour: [`Tree`](super::Tree).

use std::io::{self, Read, Write};
use std::path::Path;

use super::{CpioError, HEADER_SIZE, MAX_NAME_BYTES, TRAILER, TYPE_DIRECTORY, TYPE_MASK, TYPE_SYMLINK, padding};

/// Modification time of all entries unless another is set: the start of time, since the real one would make every build differ.
pub const DEFAULT_MTIME: u32 = 0;
/// Archives end at a multiple of this, so that the next ramdisk in memory begins where the kernel looks for it (a multiple of 4).
const BLOCK_BYTES: u64 = 512;
const COPY_BYTES: usize = 128 * 1024;

/// Writes an archive. Nothing is buffered: give it a `BufWriter` if each write is a system call.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    position: u64,
    next_ino: u32,
    mtime: u32,
}

impl<W: Write> Writer<W> {
    /// An archive that begins here.
    pub fn new(out: W) -> Writer<W> {
        Writer { out, position: 0, next_ino: 1, mtime: DEFAULT_MTIME }
    }

    /// Sets the modification time of the entries that follow, in seconds since 1970.
    #[must_use]
    pub fn mtime(mut self, mtime: u32) -> Writer<W> {
        self.mtime = mtime;
        self
    }

    /// Adds a directory. `name` is relative to the root; parents come first (the kernel makes none).
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Write`.
    pub fn directory(&mut self, name: &[u8], permissions: u32) -> Result<(), CpioError> {
        self.header(name, TYPE_DIRECTORY | permissions & !TYPE_MASK, 0, (0, 0))
    }

    /// Adds a regular file with the given content.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `FileTooBig`, `Write`.
    pub fn file(&mut self, name: &[u8], permissions: u32, content: &[u8]) -> Result<(), CpioError> {
        self.file_from(name, permissions, content.len() as u64, &mut &*content, Path::new(&*String::from_utf8_lossy(name)))
    }

    /// Adds a regular file of `size` bytes whose content is read from `content`, which must have exactly that many. `origin` is named in errors.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `FileTooBig`, `Write`; `Source` and `SourceChanged`, after which the archive is of no use.
    pub fn file_from(&mut self, name: &[u8], permissions: u32, size: u64, content: &mut impl Read, origin: &Path) -> Result<(), CpioError> {
        let size32 = u32::try_from(size).map_err(|_| CpioError::FileTooBig { path: origin.into(), size })?;
        self.header(name, super::TYPE_FILE | permissions & !TYPE_MASK, size32, (0, 0))?;
        let source = |source| CpioError::Source { path: origin.into(), source };
        let mut buffer = vec![0; COPY_BYTES.min(size32 as usize)];
        let mut left = u64::from(size32);
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..want).expect("at most the buffer's length");
            content.read_exact(part).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => CpioError::SourceChanged { path: origin.into() },
                _ => source(error),
            })?;
            self.out.write_all(part).map_err(|source| CpioError::Write { offset: self.position, source })?;
            self.position += want as u64;
            left -= want as u64;
        }
        if content.read(&mut [0]).map_err(source)? != 0 {
            return Err(CpioError::SourceChanged { path: origin.into() });
        }
        self.pad()
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    ///
    /// `InvalidName` (for an unusable target too), `Write`.
    pub fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), CpioError> {
        let size = u32::try_from(target.len()).ok().filter(|&size| u64::from(size) <= super::MAX_LINK_BYTES && !target.contains(&0));
        let size = size.ok_or_else(|| invalid(target))?;
        self.header(name, TYPE_SYMLINK | 0o777, size, (0, 0))?;
        self.put(target)?;
        self.pad()
    }

    /// Adds a device or a pipe: `mode` has the type bits, `device` the major and minor number.
    ///
    /// # Errors
    ///
    /// `InvalidName`, `Write`.
    pub fn special(&mut self, name: &[u8], mode: u32, device: (u32, u32)) -> Result<(), CpioError> {
        self.header(name, mode, 0, device)
    }

    /// Ends the archive and fills it up to a multiple of 512 bytes; returns the stream and the archive's size in bytes.
    ///
    /// # Errors
    ///
    /// `Write`.
    pub fn finish(mut self) -> Result<(W, u64), CpioError> {
        self.raw_header(TRAILER, 0, 0, 1, 0, (0, 0), 0)?;
        let rest = usize::try_from(self.position.wrapping_neg() % BLOCK_BYTES).unwrap_or(0);
        self.put([0; 512].get(..rest).expect("the rest is below 512"))?;
        Ok((self.out, self.position))
    }

    fn header(&mut self, name: &[u8], mode: u32, size: u32, device: (u32, u32)) -> Result<(), CpioError> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&0) || name == TRAILER {
            return Err(invalid(name));
        }
        let ino = self.next_ino;
        self.next_ino += 1;
        let nlink = if mode & TYPE_MASK == TYPE_DIRECTORY { 2 } else { 1 };
        self.raw_header(name, ino, mode, nlink, size, device, self.mtime)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one record, used twice above")]
    fn raw_header(
        &mut self,
        name: &[u8],
        ino: u32,
        mode: u32,
        nlink: u32,
        size: u32,
        (major, minor): (u32, u32),
        mtime: u32,
    ) -> Result<(), CpioError> {
        let name_size = name.len() + 1;
        let header = format!(
            "070701{ino:08x}{mode:08x}{uid:08x}{gid:08x}{nlink:08x}{mtime:08x}{size:08x}{zero:08x}{zero:08x}{major:08x}{minor:08x}{name_size:08x}{zero:08x}",
            uid = 0,
            gid = 0,
            zero = 0,
        );
        debug_assert_eq!(header.len(), HEADER_SIZE);
        self.put(header.as_bytes())?;
        self.put(name)?;
        self.put(&[0])?;
        self.pad()
    }

    fn pad(&mut self) -> Result<(), CpioError> {
        self.put([0; 4].get(..padding(self.position)).expect("padding is below 4"))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CpioError> {
        self.out.write_all(bytes).map_err(|source| CpioError::Write { offset: self.position, source })?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}

pub(super) fn invalid(name: &[u8]) -> CpioError {
    CpioError::InvalidName { name: String::from_utf8_lossy(name).into_owned() }
}
