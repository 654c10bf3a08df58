//! [`Reader`]: an archive read entry by entry from any stream; hostile input gets an error, never a panic or an allocation beyond a name.
//!
//! As the kernel does (init/initramfs.c), it goes on after a trailer: zero bytes are skipped and another archive may follow.

use std::io::{self, Read};

use super::{CpioError, Entry, HEADER_SIZE, MAX_NAME_BYTES, TRAILER, padding};

/// Reads an archive. [`next_entry`](Reader::next_entry) moves on; between two calls the reader itself gives the entry's data, as [`Read`].
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    /// Bytes read so far.
    position: u64,
    /// Where the current entry begins, and its size.
    entry: (u64, u64),
    /// How much of the current entry's data has not been read.
    left: u64,
    /// Did the last entry end an archive?
    after_trailer: bool,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// A reader of the archive that begins here. Reads are as small as 110 bytes: give it a `BufReader` if each is a system call.
    pub fn new(inner: R) -> Reader<R> {
        Reader { inner, position: 0, entry: (0, 0), left: 0, after_trailer: false, ended: false }
    }

    /// Skips what is left of the current entry's data and reads the next entry; `None` at the end of the last archive.
    ///
    /// # Errors
    ///
    /// `Read`, `Truncated`, `NotCpio`, `BadNumber`, `BadName`; the reader is at its end after that.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, CpioError> {
        if self.ended {
            return Ok(None);
        }
        let result = self.read_entry();
        self.ended = !matches!(result, Ok(Some(_)));
        result
    }

    /// The current entry's remaining data in memory: a small file, or the target of a symbolic link.
    ///
    /// # Errors
    ///
    /// `DataTooBig` beyond `limit` bytes; `Read`, `Truncated`.
    pub fn data(&mut self, limit: u64) -> Result<Vec<u8>, CpioError> {
        let (offset, size) = self.entry;
        if self.left > limit {
            return Err(CpioError::DataTooBig { offset, size, limit });
        }
        // Grows with what is really there, whatever the entry claims.
        let mut data = Vec::new();
        let result = (&mut *self).take(size).read_to_end(&mut data);
        result.map_err(|source| self.failed(source))?;
        Ok(data)
    }

    /// Bytes read from the stream so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    fn read_entry(&mut self) -> Result<Option<Entry>, CpioError> {
        self.skip_data()?;
        loop {
            let mut header = [0; HEADER_SIZE];
            let start = if self.after_trailer {
                let Some(first) = self.skip_zeros()? else { return Ok(None) };
                header[0] = first;
                self.fill(header.get_mut(1..).unwrap_or_default())?;
                self.after_trailer = false;
                self.position - HEADER_SIZE as u64
            } else {
                self.fill(&mut header)?;
                self.position - HEADER_SIZE as u64
            };
            let (mut entry, name_size) = decode(&header, start)?;
            entry.name = self.read_name(name_size, start)?;
            self.skip(padding(self.position) as u64)?;
            self.entry = (start, u64::from(entry.size));
            self.left = u64::from(entry.size);
            if entry.name != TRAILER {
                return Ok(Some(entry));
            }
            self.skip_data()?;
            self.after_trailer = true;
        }
    }

    fn read_name(&mut self, size: u32, start: u64) -> Result<Vec<u8>, CpioError> {
        let bad = || CpioError::BadName { offset: start, size };
        let size = usize::try_from(size).ok().filter(|size| (2..=MAX_NAME_BYTES + 1).contains(size)).ok_or_else(bad)?;
        let mut name = vec![0; size];
        self.fill(&mut name)?;
        // Exactly one NUL, at the end: a second one would hide the rest of the name from whoever treats it as a C string.
        if name.pop() != Some(0) || name.contains(&0) {
            return Err(bad());
        }
        Ok(name)
    }

    /// The first byte after a run of zeros; `None` at the end of the stream.
    fn skip_zeros(&mut self) -> Result<Option<u8>, CpioError> {
        loop {
            let mut byte = [0];
            match self.inner.read(&mut byte) {
                Ok(0) => return Ok(None),
                Ok(_) => self.position += 1,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(CpioError::Read { offset: self.position, source }),
            }
            let [byte] = byte;
            let start = self.position - 1;
            match byte {
                0 => {}
                b'0' if start.is_multiple_of(4) => return Ok(Some(byte)),
                _ => return Err(CpioError::NotCpio { offset: start }),
            }
        }
    }

    fn skip_data(&mut self) -> Result<(), CpioError> {
        self.skip(self.left)?;
        self.left = 0;
        self.skip(padding(self.position) as u64)
    }

    fn skip(&mut self, mut count: u64) -> Result<(), CpioError> {
        let mut scratch = [0; 8192];
        while count > 0 {
            let part = usize::try_from(count).unwrap_or(usize::MAX).min(scratch.len());
            self.fill(scratch.get_mut(..part).unwrap_or_default())?;
            count -= part as u64;
        }
        Ok(())
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CpioError> {
        self.inner.read_exact(buf).map_err(|source| self.failed(source))?;
        self.position += buf.len() as u64;
        Ok(())
    }

    fn failed(&self, source: io::Error) -> CpioError {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => CpioError::Truncated { offset: self.position },
            _ => CpioError::Read { offset: self.position, source },
        }
    }
}

impl<R: Read> Read for Reader<R> {
    /// Data of the current entry; 0 at its end.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let count = self.inner.read(buf.get_mut(..want).unwrap_or_default())?;
        if count == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        self.position += count as u64;
        Ok(count)
    }
}

/// The fields of a header, and the size of the name that follows, NUL included.
fn decode(header: &[u8; HEADER_SIZE], offset: u64) -> Result<(Entry, u32), CpioError> {
    // 070702 has a checksum in its last field, which the kernel does not look at either.
    let Some(digits) = header.strip_prefix(b"070701").or_else(|| header.strip_prefix(b"070702")) else {
        return Err(CpioError::NotCpio { offset });
    };
    let mut fields = [0_u32; 13];
    for (field, digits) in fields.iter_mut().zip(digits.chunks_exact(8)) {
        *field = number(digits).ok_or(CpioError::BadNumber { offset })?;
    }
    let [ino, mode, uid, gid, nlink, mtime, size, _, _, major, minor, name_size, _] = fields;
    Ok((Entry { name: Vec::new(), ino, mode, uid, gid, nlink, mtime, size, device: (major, minor) }, name_size))
}

fn number(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0_u32, |value, &digit| Some(value << 4 | char::from(digit).to_digit(16)?))
}
