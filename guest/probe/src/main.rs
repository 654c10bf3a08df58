//! What tests run inside a guest: vsock load, NSM requests, an init that does only AWS's sequence.

fn main() {}
