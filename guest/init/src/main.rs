//! The init of an enclave: mounts, modules, heartbeat, application, exit status.

fn main() {}
