//! What host and guest of a parent VM agree on: [`frame`], the messages on the serial port; [`plan`], the file that says how to set the VM up.
//!
//! The program of the same package is the VM's init; `nitroxide_testkit::parent_vm` is the host's side.
#![forbid(unsafe_code)]

pub mod frame;
pub mod plan;

/// The name of the virtio serial port between init and the host (`/sys/class/virtio-ports/*/name`).
pub const PORT_NAME: &str = "nitroxide.control";
