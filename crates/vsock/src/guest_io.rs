//! Bytes between guest memory and a host socket, without a copy in between.
//!
//! The safe ways either copy (`vm_memory::ReadVolatile` needs one system call per piece) or would need a `&[u8]` of memory that the guest
//! writes at the same time, which Rust forbids. So `sendmsg` and `recvmsg` get raw pointers here, and nowhere else.
#![expect(unsafe_code, reason = "sendmsg and recvmsg on guest memory: references to memory that the guest changes are not allowed")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::chain::Segments;

/// Pieces per system call; a packet of 64 KiB in pages needs 17.
const PIECES: usize = 64;

const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Sends up to `length` bytes of `segments`, beginning after `skip`, without waiting; returns how many went.
///
/// # Errors
///
/// What the socket says if nothing went at all: `WouldBlock` when it is full, `BrokenPipe` when nobody reads any more.
pub fn send(stream: BorrowedFd<'_>, segments: &Segments<'_>, skip: usize, length: usize) -> io::Result<usize> {
    transfer(segments, skip, length, |message| {
        // SAFETY: the message points to an array of pieces that lives during the call; each piece is mapped guest RAM (see `transfer`),
        // which the call only reads. The descriptor is borrowed, so it is open.
        unsafe { libc::sendmsg(stream.as_raw_fd(), message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
    })
}

/// Receives up to `length` bytes into `segments`, beginning after `skip`, without waiting; returns how many came, 0 at the end.
///
/// # Errors
///
/// What the socket says if nothing came at all: `WouldBlock` when it is empty.
pub fn receive(stream: BorrowedFd<'_>, segments: &Segments<'_>, skip: usize, length: usize) -> io::Result<usize> {
    transfer(segments, skip, length, |message| {
        // SAFETY: as in `send`; the call writes into the pieces, which are the guest's writable RAM and which no Rust reference covers.
        unsafe { libc::recvmsg(stream.as_raw_fd(), message, libc::MSG_DONTWAIT) }
    })
}

/// Builds messages of at most [`PIECES`] pieces and hands them to `call` until the range is done or the socket takes or gives less.
fn transfer(segments: &Segments<'_>, skip: usize, length: usize, mut call: impl FnMut(*mut libc::msghdr) -> isize) -> io::Result<usize> {
    let mut done = 0;
    while done < length {
        let mut pieces = [EMPTY; PIECES];
        let (mut count, mut wanted) = (0, 0);
        for (piece, slice) in pieces.iter_mut().zip(segments.range(skip + done, length - done)) {
            // The slice's lifetime is that of the mapping, so the address stays valid; the guard matters only for Xen's mappings.
            *piece = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
            count += 1;
            wanted += slice.len();
        }
        if count == 0 {
            break;
        }
        // SAFETY: all-zero bytes are a valid msghdr: null pointers and lengths of 0.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = count;
        match usize::try_from(call(&raw mut message)) {
            Ok(bytes) => {
                done += bytes;
                if bytes < wanted {
                    break;
                }
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return if done > 0 { Ok(done) } else { Err(error) };
            }
        }
    }
    Ok(done)
}
