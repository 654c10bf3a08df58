//! Where an image comes from: [`ReadAt`], positioned reads that share no cursor, and [`Window`], a part of another source.
//!
//! Files are read with pread, never mapped: a file that shrinks while it is mapped kills the reader with SIGBUS.
//! Neighbours: [`Image`](crate::Image) reads through it; the enclave process implements it for the file ranges that hold an enclave's memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A source of bytes with positions: a file, a byte slice, an enclave's memory.
///
/// Calls take `&self`, so one source may serve several threads. The content should not change between calls; if it does, readers report what they saw
/// (a wrong checksum, for instance) and nothing worse.
pub trait ReadAt {
    /// Fills `buf` with the bytes from `offset` (bytes from the start of the source).
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if the source ends before `buf` is full; otherwise what the system said.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// How many bytes the source holds. An image may be followed by other bytes, so this is an upper bound of its size.
    ///
    /// # Errors
    ///
    /// What the system said.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let found = usize::try_from(offset).ok().and_then(|start| self.get(start..start.checked_add(buf.len())?));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.as_slice().size()
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Box<T> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }
}

/// A part of another source, seen as a source of its own; reads outside of it fail even where the outer source has bytes.
#[derive(Debug, Clone)]
pub struct Window<S> {
    source: S,
    offset: u64,
    size: u64,
}

impl<S: ReadAt> Window<S> {
    /// The `size` bytes of `source` from `offset`. Nothing is read, and the range is not compared with the source yet.
    pub fn new(source: S, offset: u64, size: u64) -> Window<S> {
        Window { source, offset, size }
    }
}

impl<S: ReadAt> ReadAt for Window<S> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inside = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= self.size);
        let start = self.offset.checked_add(offset).filter(|_| inside).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.source.read_exact_at(buf, start)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.source.size()?.saturating_sub(self.offset).min(self.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slice_reads_outside_fail_without_panic() {
        let bytes: &[u8] = b"0123456789";
        let mut buf = [0; 4];
        bytes.read_exact_at(&mut buf, 6).unwrap();
        assert_eq!(&buf, b"6789");
        for offset in [7, 10, 11, u64::MAX - 1, u64::MAX] {
            assert_eq!(bytes.read_exact_at(&mut buf, offset).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn window_hides_what_lies_outside() {
        let window = Window::new(b"0123456789".to_vec(), 3, 4);
        let mut buf = [0; 4];
        window.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"3456");
        assert!(window.read_exact_at(&mut buf, 1).is_err());
        assert_eq!(window.size().unwrap(), 4);
        assert_eq!(Window::new(b"0123456789".to_vec(), 8, 4).size().unwrap(), 2);
        assert_eq!(Window::new(b"0123456789".to_vec(), u64::MAX, 4).size().unwrap(), 0);
        assert!(Window::new(b"0123456789".to_vec(), u64::MAX, u64::MAX).read_exact_at(&mut buf, 2).is_err());
    }
}
