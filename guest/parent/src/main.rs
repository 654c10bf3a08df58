//! The init of a small parent VM: sets up the driver and runs commands for the host.
#![forbid(unsafe_code)]

fn main() {}
