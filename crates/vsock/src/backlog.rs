//! Data of the guest that the host's socket did not take yet.
//!
//! Bounded by the connection's receive credit; asks for storage only when a host is slow, and gives it back when it has caught up.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::chain::Segments;

/// Bytes copied from guest memory at once.
const COPY_BYTES: usize = 4096;

/// Storage of at most this many bytes is kept while empty.
const KEEP_BYTES: usize = 16 * 1024;

/// A bounded queue of bytes.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
}

impl Backlog {
    /// How many bytes wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Copies `length` bytes of `segments` after the first `skip`; never more than `limit` bytes of storage are asked for.
    pub fn append(&mut self, segments: &Segments<'_>, skip: usize, length: usize, limit: usize) {
        let needed = self.bytes.len() + length;
        if needed > self.bytes.capacity() {
            let target = needed.max((2 * self.bytes.capacity()).min(limit));
            self.bytes.reserve_exact(target - self.bytes.len());
        }
        let mut part = [0; COPY_BYTES];
        let mut done = 0;
        while done < length {
            let wanted = COPY_BYTES.min(length - done);
            let Some(target) = part.get_mut(..wanted) else { break };
            let copied = segments.copy_out(skip + done, target);
            if copied == 0 {
                break;
            }
            self.bytes.extend(target.iter().take(copied));
            done += copied;
        }
    }

    /// Sends what the socket takes without waiting; returns how many bytes went.
    ///
    /// # Errors
    ///
    /// What the socket says, `WouldBlock` excepted.
    pub fn flush(&mut self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        let mut done = 0;
        while !self.bytes.is_empty() {
            let (front, back) = self.bytes.as_slices();
            let pieces = [IoSlice::new(front), IoSlice::new(back)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(stream, &pieces, &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => {
                    self.bytes.drain(..sent);
                    done += sent;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP_BYTES {
            self.bytes = VecDeque::new();
        }
        Ok(done)
    }

    /// Throws everything away, storage included.
    pub fn clear(&mut self) {
        self.bytes = VecDeque::new();
    }
}
