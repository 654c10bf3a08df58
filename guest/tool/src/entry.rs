//! Where the program begins: C's own `main`, without Rust's in front of it.
//!
//! Rust's installs a handler for stack overflows, and by that brings glibc's scanf and what reads numbers with it: some 140 KB of 1.2 MB. What is lost
//! are that handler and an ignored SIGPIPE, which suits a tool for scripts: it ends with the reader of its output. The third thing that Rust's does is done
//! here, for 192 bytes: descriptors 0 to 2 are open before anything else is opened.
#![expect(unsafe_code, reason = "the C runtime looks for an unmangled `main`; there is no other in the program")]

use std::ffi::{c_char, c_int};
use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd};

/// What the C runtime calls. The arguments are those of [`std::env::args_os`], which glibc gives to a constructor of the standard library.
#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _words: *const *const c_char) -> c_int {
    open_standard_descriptors();
    c_int::from(crate::run())
}

/// Opens /dev/null for those of the descriptors 0 to 2 that are closed, or a file that is opened later would be standard output.
///
/// A new descriptor is always the lowest that is free (open(2)): so none of the three is when it is above them. Where /dev/null is missing, Rust's `main` would
/// abort; without one there is no /dev/nsm to ask either, and the tool says so itself.
fn open_standard_descriptors() {
    while let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        if null.as_raw_fd() > 2 {
            break;
        }
        // It stays open as long as the program runs.
        let _ = null.into_raw_fd();
    }
}
