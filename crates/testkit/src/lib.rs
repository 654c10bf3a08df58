//! What tests share: the unpacked kernel and QEMU, static guest programs, initramfs images.
//!
//! Only tests and chores use it, so it may panic: a missing part is a failed test with a message that says what to run.

#![forbid(unsafe_code)]

pub mod images;
mod programs;
mod setup;

pub use programs::guest_program;
pub use setup::Setup;
