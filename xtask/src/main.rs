//! The project's chores: setup, guest, demo, test, bench.

fn main() {}
