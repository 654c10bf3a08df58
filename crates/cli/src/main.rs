//! nitroxide: run, inspect and debug Nitro enclaves on any Linux machine.

fn main() {}
