//! Attestation documents as a guest gets them through `/dev/nsm`, and how much of that is ours: latency, documents per second, our processor time.
//!
//! The guest's program is `guest/probe/src/bin/nsm-load.rs`; it times itself. Our share is the processor time of the thread that serves the device
//! (`/proc/self/task/*/schedstat`), the rest is the guest, QEMU and waking each other. Results: docs/benchmarks.md.
#![expect(clippy::unwrap_used, reason = "a benchmark ends where something unexpected happens")]

#[path = "../tests/boot/mod.rs"]
mod boot;

use boot::{Guest, some_pcrs};
use std::fs;

fn main() {
    // `cargo test --benches` only asks whether it builds.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let mut served_ns = 0;
    println!("{:<18}{:>9}{:>9}{:>9}{:>9}{:>12}", "", "least", "median", "most", "ours", "per second");
    Guest::boot("nsm-load", false, some_pcrs).lines(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.first() == Some(&"begin") {
            served_ns = serving_ns();
        } else if let [name, count, "requests,", least, median, most, "us", "each,", total, "us"] = words[..] {
            let number = |word: &str| word.parse::<u64>().unwrap();
            let ours_us = (serving_ns() - served_ns) / 1000 / number(count);
            let rate = number(count) * 1_000_000 / number(total).max(1);
            println!("{name:<18}{least:>6} us{median:>6} us{most:>6} us{ours_us:>6} us{rate:>12}");
        } else {
            println!("{line}");
        }
    });
}

/// The processor time that the NSM's serving thread has used, in nanoseconds.
fn serving_ns() -> u64 {
    let serving = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path()).find(|task| {
        // A thread may end meanwhile.
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "nsm")
    });
    let schedstat = serving.and_then(|task| fs::read_to_string(task.join("schedstat")).ok()).unwrap_or_default();
    schedstat.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}
