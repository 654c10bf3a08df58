//! What tests see of this process's threads, and how they wait. For test programs with one such test each: the threads are those of the whole process.

use std::time::{Duration, Instant};

/// Only ends a test that hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Names of this process's threads that belong to a device.
pub fn of_devices() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("vsock-") || name == "vring_worker").collect()
}

/// Waits until something is so.
pub fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
