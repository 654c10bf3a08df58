//! The sample enclave application: prints, echoes over vsock, asks /dev/nsm.

fn main() {}
