//! What tests share: the unpacked kernel and QEMU, static guest programs, enclave images, and a parent VM ([`parent_vm`]).
//!
//! Only tests and chores use it, so it may panic: a missing part is a failed test with a message that says what to run.

#![forbid(unsafe_code)]

pub mod images;
pub mod parent_vm;
mod programs;
mod setup;

pub use programs::{guest_program, kernel_module, ne_ioctl_sample};
pub use setup::Setup;
