//! How fast this host's time stamp counter runs: under TCG the guest's `rdtsc` reads it.
//!
//! Measured against the kernel's clock, since no other source is right everywhere: CPUID leaf 0x15 is Intel's only, `cpu MHz` of /proc/cpuinfo is the
//! core's momentary frequency. The window opens when an engine is discovered and closes at the first launch, so it costs no waiting there.

#![expect(unsafe_code, reason = "reading the time stamp counter is an intrinsic")]

use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;
use std::time::Duration;

/// The shortest window: with readings of 0.2 microseconds this is exact to 10 in a million, as exact as the kernel's own quick calibration.
const WINDOW_NS: u64 = 20_000_000;

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy)]
struct Reading {
    ns: u64,
    ticks: u64,
}

static BEGIN: OnceLock<Reading> = OnceLock::new();
static KHZ: OnceLock<Option<u64>> = OnceLock::new();

/// Opens the measuring window, if this process has not done so before.
pub(crate) fn begin() {
    BEGIN.get_or_init(read_closely);
}

/// The counter's frequency in kHz; none where it does not run at a constant rate (then the guest cannot keep time by it).
///
/// Waits for what is missing of the window, 20 ms at most; every further call answers at once.
pub(crate) fn khz() -> Option<u64> {
    *KHZ.get_or_init(|| {
        if !is_constant() {
            return None;
        }
        let begin = *BEGIN.get_or_init(read_closely);
        let elapsed = read_closely().ns.saturating_sub(begin.ns);
        if let Some(missing) = WINDOW_NS.checked_sub(elapsed) {
            std::thread::sleep(Duration::from_nanos(missing));
        }
        let end = read_closely();
        let ns = end.ns.checked_sub(begin.ns).filter(|&ns| ns > 0)?;
        let ticks = u128::from(end.ticks.checked_sub(begin.ticks)?);
        u64::try_from(ticks * 1_000_000 / u128::from(ns)).ok().filter(|&khz| khz > 0)
    })
}

/// Whether the counter keeps its rate whatever the core's frequency and sleep states (flags `constant_tsc` and `nonstop_tsc`, or a hypervisor's word).
#[cfg(target_arch = "x86_64")]
fn is_constant() -> bool {
    let flags = cpu_flags();
    let has = |name: &str| flags.split_ascii_whitespace().any(|flag| flag == name);
    has("constant_tsc") && (has("nonstop_tsc") || has("hypervisor"))
}

/// Elsewhere QEMU gives the guest nanoseconds (`cpu_get_host_ticks`, include/qemu/timer.h), which are constant.
#[cfg(not(target_arch = "x86_64"))]
fn is_constant() -> bool {
    true
}

/// The first CPU's flags as /proc/cpuinfo shows them; empty where there are none.
pub(crate) fn cpu_flags() -> String {
    // The file has one paragraph per CPU: the first is enough, the whole may be megabytes.
    let mut text = Vec::new();
    if let Ok(file) = File::open("/proc/cpuinfo") {
        let _ = file.take(16 << 10).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    text.lines().find_map(|line| line.strip_prefix("flags")).and_then(|rest| Some(rest.split_once(':')?.1.to_owned())).unwrap_or_default()
}

/// The closest of several readings: the one whose clock call took least time around the counter.
fn read_closely() -> Reading {
    let mut best: Option<(u64, Reading)> = None;
    for _ in 0..8 {
        let before = clock_ns();
        let ticks = ticks();
        let after = clock_ns();
        let width = after.saturating_sub(before);
        if best.is_none_or(|(best_width, _)| width < best_width) {
            best = Some((width, Reading { ns: before + width / 2, ticks }));
        }
    }
    best.map_or(Reading { ns: 0, ticks: 0 }, |(_, reading)| reading)
}

fn clock_ns() -> u64 {
    // The raw clock: NTP does not slew it.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(target_arch = "x86_64")]
fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets user space execute it unless the process itself forbade it (PR_SET_TSC).
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> u64 {
    clock_ns()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_plausible_and_stays() {
        let Some(khz) = khz() else {
            println!("skipped: this host's counter does not keep its rate");
            return;
        };
        assert!((100_000..20_000_000).contains(&khz), "{khz} kHz");
        assert_eq!(super::khz(), Some(khz));
    }
}
