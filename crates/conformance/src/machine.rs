//! The machine that the program runs on: the driver's files, what the kernel says of memory, and how programs without a transcript print ([`tell`]).

use std::fmt::Display;
use std::fs;
use std::io::{self, Write as _};

pub(crate) const DEVICE: &str = "/dev/nitro_enclaves";
/// The driver's folder, with a link for each device that it has.
pub(crate) const DRIVER: &str = "/sys/bus/pci/drivers/nitro_enclaves";
/// The pool's parameter.
pub(crate) const POOL: &str = "/sys/module/nitro_enclaves/parameters/ne_cpus";

/// The name of the PCI device that the driver has.
pub(crate) fn bound_device() -> Option<String> {
    let entries = fs::read_dir(DRIVER).ok()?.flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).find(|name| name.starts_with("0000:"))
}

/// The value of a line of `/proc/meminfo`, in its own unit; -1 without one.
pub(crate) fn meminfo(name: &str) -> i64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.and_then(|value| value.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(-1)
}

/// Prints one answer at once: the machine may not last.
pub(crate) fn tell(what: &str, answer: impl Display) {
    println!("{what} -> {answer}");
    let _ = io::stdout().flush();
}
