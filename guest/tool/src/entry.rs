//! Where the program begins: C's own `main`, without Rust's in front of it.
//!
//! Rust's installs a handler for stack overflows, and by that brings glibc's scanf and what reads numbers with it: 1179040 bytes instead of 1038400. What is lost
//! are that handler and an ignored SIGPIPE, which suits a tool for scripts: it ends with the reader of its output.
#![expect(unsafe_code, reason = "the C runtime looks for an unmangled `main`; there is no other in the program")]

use std::ffi::{c_char, c_int};

/// What the C runtime calls. The arguments are those of [`std::env::args_os`], which glibc gives to a constructor of the standard library.
#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _words: *const *const c_char) -> c_int {
    c_int::from(crate::run())
}
