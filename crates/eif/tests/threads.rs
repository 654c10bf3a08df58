//! A process that gets no thread measures all the same.

mod common;

use std::process::Command;

use common::small;
use nitroxide_eif::Image;
use nitroxide_eif::measure::{Measurer, Threads};

const CHILD: &str = "NITROXIDE_EIF_THREADS_TEST";

/// Only a child of the other test does something here: a process of its own, whose threads would have stacks larger than the address space.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "a thread came all the same");
    let image = small();
    let image = Image::open(&image).unwrap();
    let one = Measurer::new(&image).threads(Threads::One).run().unwrap();

    let two = Measurer::new(&image).threads(Threads::Two).run().unwrap();

    assert_eq!((two.measurements, two.checksum), (one.measurements, one.checksum));
}

#[test]
fn an_image_is_measured_where_no_second_thread_can_be_had() {
    let huge = (1_u64 << 50).to_string();
    let test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--test-threads=1"])
        .env(CHILD, "1")
        .env("RUST_MIN_STACK", huge)
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&test.stdout);
    assert!(test.status.success() && output.contains("1 passed"), "{output}{}", String::from_utf8_lossy(&test.stderr));
}
