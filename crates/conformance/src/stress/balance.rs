//! What the machine has before and after: [`Balance::of`] looks, [`Balance::compare`] says what is missing.
//!
//! Nobody may have an enclave meanwhile. Figures that the kernel itself lets wander have a slack.

use std::fs;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nitroxide_abi::extension::{self, List};
use nitroxide_abi::ioctl;

use super::shared::{Shared, lock};
use crate::control::Control as _;
use crate::machine::{POOL, meminfo};
use crate::sys;

/// Slots that are tried to be made; our device has 64.
const MOST_SLOTS: usize = 100;

/// One figure.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Figure {
    name: &'static str,
    value: String,
    /// How much it may grow, where it moves by itself; less than before is what others had and the kernel has let go since.
    slack: i64,
}

/// All figures at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Balance(Vec<Figure>);

impl Balance {
    /// Looks, at what may wander only if wanted. The pool is cleared for it and set again.
    pub(super) fn of(shared: &Shared, exact_only: bool) -> Self {
        let mut figures = Vec::new();
        let mut add = |name, value: String, slack| figures.push(Figure { name, value, slack });
        add("enclaves by LIST", listed(shared), 0);
        add("slots that can be made", slots(shared).to_string(), 0);
        if let Some(control) = &shared.control {
            add("bytes of memory that slots have", lock(control).memory_bytes().unwrap_or(u64::MAX).to_string(), 0);
        }
        add("clearing the pool", written(b"\n"), 0);
        add("CPUs online without a pool", read("/sys/devices/system/cpu/online"), 0);
        add("setting the pool", written(&shared.pool), 0);
        add("CPUs online with the pool", read("/sys/devices/system/cpu/online"), 0);
        add("pool", format!("{:?}", read(POOL)), 0);
        add("users of the module", read("/sys/module/nitro_enclaves/refcnt"), 0);
        // What is only kept for convenience goes first.
        let _ = fs::write("/proc/sys/vm/drop_caches", "3");
        add("open files of the system", read("/proc/sys/fs/file-nr").split_whitespace().next().unwrap_or_default().to_owned(), 0);
        add(
            "kB neither free, nor on the CPUs' lists, nor of programs",
            (meminfo("MemTotal") - meminfo("MemFree") - on_cpu_lists_kb() - meminfo("AnonPages")).to_string(),
            8 << 10,
        );
        for (name, slack) in [("SUnreclaim", 6 << 10), ("VmallocUsed", 2 << 10), ("Percpu", 1 << 10)] {
            add(name, meminfo(name).to_string(), slack);
        }
        for (name, slack) in [("mm_struct", 60), ("task_struct", 60), ("filp", 600)] {
            add(name, slab_objects(name).to_string(), slack);
        }
        figures.retain(|figure| !exact_only || figure.slack == 0);
        Self(figures)
    }

    /// What is not as `before`, within the slack.
    pub(super) fn compare(&self, before: &Self) -> Vec<String> {
        let differs = |now: &Figure, then: &Figure| match (now.value.parse::<i64>(), then.value.parse::<i64>()) {
            (Ok(now_number), Ok(then_number)) if now.slack > 0 => now_number - then_number > now.slack,
            _ => now.value != then.value,
        };
        let pairs = self.0.iter().zip(&before.0).filter(|(now, then)| differs(now, then));
        pairs.map(|(now, then)| format!("{}: {} before, {} now (slack {})", now.name, then.value, now.value, now.slack)).collect()
    }

    /// A line for each figure.
    pub(super) fn lines(&self, when: &str) -> Vec<String> {
        self.0.iter().map(|figure| format!("{} {when} -> {}", figure.name, figure.value)).collect()
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// How many enclaves there are, or why that cannot be told.
fn listed(shared: &Shared) -> String {
    let mut bytes = List { size: 72, ..List::default() }.to_bytes();
    let mut count = 0;
    loop {
        match sys::ioctl_with(shared.device.as_raw_fd(), extension::LIST, &mut bytes) {
            Ok(_) => count += 1,
            Err(libc::ENOENT) => return count.to_string(),
            Err(errno) => return crate::real::code(errno.into()),
        }
    }
}

/// How many slots the device still has.
fn slots(shared: &Shared) -> usize {
    let make = || sys::own(sys::ioctl_with(shared.device.as_raw_fd(), ioctl::CREATE_VM, &mut [0; 8]).ok()?);
    let made: Vec<OwnedFd> = std::iter::from_fn(make).take(MOST_SLOTS).collect();
    made.len()
}

/// Writes to the pool; the code.
fn written(text: &[u8]) -> String {
    let result = fs::OpenOptions::new().write(true).open(POOL).and_then(|mut file| file.write(text));
    result.map_or_else(|error| crate::real::code(error.raw_os_error().unwrap_or(0).into()), |_| "0".to_owned())
}

/// Free pages that the CPUs keep at hand, in kB: tens of MiB come and go there, and MemFree does not count them.
fn on_cpu_lists_kb() -> i64 {
    let text = fs::read_to_string("/proc/zoneinfo").unwrap_or_default();
    let counts = text.lines().filter_map(|line| line.trim().strip_prefix("count:")?.trim().parse::<i64>().ok());
    counts.sum::<i64>() * 4
}

/// Objects in use of a kind that the kernel keeps apart; -1 where that cannot be seen.
fn slab_objects(name: &str) -> i64 {
    let text = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balance(value: &str, slack: i64) -> Balance {
        Balance(vec![Figure { name: "x", value: value.to_owned(), slack }])
    }

    #[test]
    fn only_what_moves_beyond_its_slack_is_a_difference() {
        assert!(balance("100", 5).compare(&balance("95", 5)).is_empty());
        assert_eq!(balance("101", 5).compare(&balance("95", 5)), ["x: 95 before, 101 now (slack 5)"]);
        assert!(!balance("0-3", 0).compare(&balance("0-5", 0)).is_empty());
        assert!(!balance("EPERM", 0).compare(&balance("EINVAL", 0)).is_empty());
    }
}
