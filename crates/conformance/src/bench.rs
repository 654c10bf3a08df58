//! How long each call of the interface takes, from user space: [`run`]. docs/conformance.md, "Benchmark".
//!
//! Each round makes the same enclave: memory of 2 MiB, 64 MiB that lie together in physical memory and 64 MiB in 32 pieces, one core. Nobody else may
//! use the driver meanwhile. Lines that begin with `bench` are for programs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use nitroxide_abi::ioctl;
use nitroxide_abi::limits::{GRANULE, MIN_ENCLAVE_BYTES};

use crate::machine::{DEVICE, POOL, meminfo};
use crate::sys::{self, Backing};

/// Where pages are mapped until their order is known.
const UNSORTED: u64 = 0x3300_0000_0000;
/// 2 MiB; then the pages that lie together; then the pieces.
const ONE: u64 = 0x3400_0000_0000;
const TOGETHER: u64 = 0x3500_0000_0000;
const PIECES: u64 = 0x3600_0000_0000;
/// Pages of the smallest enclave.
const ENOUGH: u64 = MIN_ENCLAVE_BYTES / GRANULE;
/// Huge pages that are needed at least; all that are free are looked through for those that lie together.
const LEAST_PAGES: u64 = 2 * ENOUGH + 1;
/// Calls that are so short that many are timed at once.
const BATCH: u32 = 64;
/// The pool is written once in so many rounds: CPUs are slow to come and go.
const POOL_EVERY: u64 = 10;

/// Times of one kind of call, in nanoseconds.
#[derive(Debug, Clone)]
struct Times {
    name: &'static str,
    values: Vec<u64>,
}

/// What is measured, in the order of the table.
const NAMES: [&str; 11] = [
    "CREATE_VM",
    "ADD_VCPU",
    "LOAD_INFO",
    "SET_MEMORY_2M",
    "SET_MEMORY_64M_1_PIECE",
    "SET_MEMORY_64M_32_PIECES",
    "START",
    "poll",
    "last_close",
    "create_start_close",
    "pool_write",
];

/// Measures and prints.
///
/// # Errors
///
/// What is missing, and calls that fail.
pub fn run(rounds: u64) -> io::Result<()> {
    let device = File::open(DEVICE).map_err(|error| io::Error::new(error.kind(), format!("{DEVICE}: {error}")))?;
    let _pages = map_pages()?;
    let pool = fs::read(POOL)?.strip_suffix(b"\n").unwrap_or_default().to_vec();
    let mut times = NAMES.map(|name| Times { name, values: Vec::new() });
    let mut note = |name: &str, ns: u64| times.iter_mut().filter(|times| times.name == name).for_each(|times| times.values.push(ns));
    // The first one finds everything cold.
    life(&device, &mut |_, _| {})?;
    for round in 0..rounds.max(1) {
        life(&device, &mut note)?;
        note("create_start_close", short_life(&device)?);
        if round % POOL_EVERY == 0 {
            let mut file = OpenOptions::new().write(true).open(POOL)?;
            let (result, ns) = timed(|| file.write(&pool));
            result?;
            note("pool_write", ns);
        }
    }
    println!("{:<26}{:>8}{:>12}{:>12}{:>12}{:>12}", "microseconds", "times", "least", "quarter", "median", "3 quarters");
    let us = |ns: u64| format!("{}.{}", ns / 1000, ns % 1000 / 100);
    for times in &mut times {
        times.values.sort_unstable();
        let [least, first, median, third] = [0, 1, 2, 3].map(|quarter| times.quarter(quarter));
        println!("{:<26}{:>8}{:>12}{:>12}{:>12}{:>12}", times.name, times.values.len(), us(least), us(first), us(median), us(third));
    }
    for times in &times {
        let [least, first, median, third] = [0, 1, 2, 3].map(|quarter| times.quarter(quarter));
        println!("bench {} least_ns={least} q1_ns={first} median_ns={median} q3_ns={third} count={}", times.name, times.values.len());
    }
    Ok(())
}

impl Times {
    /// The value below which so many quarters lie; they are sorted.
    fn quarter(&self, quarter: usize) -> u64 {
        let place = self.values.len().saturating_sub(1) * quarter / 4;
        self.values.get(place).copied().unwrap_or(0)
    }
}

fn timed<T>(act: impl FnOnce() -> T) -> (T, u64) {
    let began = Instant::now();
    let value = act();
    (value, u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

/// One enclave with all kinds of memory, each call timed.
fn life(device: &File, note: &mut impl FnMut(&str, u64)) -> io::Result<()> {
    let (enclave, ns) = timed(|| create(device));
    let enclave = enclave?;
    note("CREATE_VM", ns);
    let fd = enclave.as_raw_fd();
    let (done, ns) = timed(|| (0..BATCH).try_for_each(|_| load_info(fd)));
    done?;
    note("LOAD_INFO", ns / u64::from(BATCH));
    for (name, address, pages) in
        [("SET_MEMORY_2M", ONE, 1), ("SET_MEMORY_64M_1_PIECE", TOGETHER, ENOUGH), ("SET_MEMORY_64M_32_PIECES", PIECES, ENOUGH)]
    {
        let (done, ns) = timed(|| set_memory(fd, address, pages));
        done?;
        note(name, ns);
    }
    add_core(fd, note)?;
    let (done, ns) = timed(|| start(fd));
    done?;
    note("START", ns);
    let (done, ns) = timed(|| (0..BATCH).try_for_each(|_| sys::poll(fd, 0).map(drop)));
    done.map_err(io::Error::from_raw_os_error)?;
    note("poll", ns / u64::from(BATCH));
    let ((), ns) = timed(|| drop(enclave));
    note("last_close", ns);
    Ok(())
}

/// One enclave of 64 MiB in one piece and a core, from creation to close: the whole time.
fn short_life(device: &File) -> io::Result<u64> {
    let (done, ns) = timed(|| {
        let enclave = create(device)?;
        set_memory(enclave.as_raw_fd(), TOGETHER, ENOUGH)?;
        add_core(enclave.as_raw_fd(), &mut |_, _| {})?;
        start(enclave.as_raw_fd())
    });
    done.map(|()| ns)
}

/// Adds CPUs until a start is possible: all threads of the first core.
fn add_core(fd: RawFd, note: &mut impl FnMut(&str, u64)) -> io::Result<()> {
    let mut first = 0_u32.to_le_bytes();
    let (done, ns) = timed(|| ask(fd, ioctl::ADD_VCPU, &mut first));
    done?;
    note("ADD_VCPU", ns);
    let cpu = u32::from_le_bytes(first);
    let siblings = fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).unwrap_or_default();
    // An offline CPU has no topology there; cores are those of the first one, which is online.
    let siblings = if siblings.trim().is_empty() {
        fs::read_to_string("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")?
    } else {
        siblings
    };
    for _ in 1..threads_of(siblings.trim()) {
        let mut next = 0_u32.to_le_bytes();
        let (done, ns) = timed(|| ask(fd, ioctl::ADD_VCPU, &mut next));
        done?;
        note("ADD_VCPU", ns);
    }
    Ok(())
}

/// How many CPUs a list such as `0-1` or `0,4` has.
fn threads_of(list: &str) -> u32 {
    let count = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u32>().unwrap_or(0);
        number(last).saturating_sub(number(first)) + 1
    };
    list.split(',').map(count).sum()
}

fn create(device: &File) -> io::Result<OwnedFd> {
    let fd = sys::ioctl_with(device.as_raw_fd(), ioctl::CREATE_VM, &mut [0; 8]);
    fd.ok()
        .and_then(sys::own)
        .ok_or_else(|| io::Error::other(format!("CREATE_VM fails: {:?}", fd.map_err(|errno| crate::real::code(errno.into())))))
}

fn load_info(fd: RawFd) -> io::Result<()> {
    ask(fd, ioctl::GET_IMAGE_LOAD_INFO, &mut ioctl::ImageLoadInfo { flags: 1, memory_offset: 0 }.to_bytes())
}

fn set_memory(fd: RawFd, address: u64, pages: u64) -> io::Result<()> {
    let region = ioctl::UserMemoryRegion { flags: 0, memory_size: pages * GRANULE, userspace_addr: address };
    ask(fd, ioctl::SET_USER_MEMORY_REGION, &mut region.to_bytes())
}

fn start(fd: RawFd) -> io::Result<()> {
    ask(fd, ioctl::START_ENCLAVE, &mut ioctl::EnclaveStartInfo { flags: 0, enclave_cid: 0 }.to_bytes())
}

fn ask(fd: RawFd, word: u32, argument: &mut [u8]) -> io::Result<()> {
    let result = sys::ioctl_with(fd, word, argument);
    result.map(drop).map_err(|errno| io::Error::other(format!("ioctl {word:#x}: {}", crate::real::code(errno.into()))))
}

/// Maps 65 huge pages: one, 32 that lie together in physical memory, and 32 of which each lies before the one before it.
fn map_pages() -> io::Result<OwnedFd> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let free = u64::try_from(meminfo("HugePages_Free")).unwrap_or(0);
    if free < LEAST_PAGES {
        return Err(io::Error::other(format!("{LEAST_PAGES} free huge pages of 2 MiB are needed, and there are {free}.")));
    }
    let all = usize::try_from(free * GRANULE).unwrap_or(0);
    let file = sys::huge_file(i64::try_from(free * GRANULE).unwrap_or(0))?;
    sys::map(UNSORTED, all, protection, Backing::Shared(file.as_raw_fd(), 0))?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut pages = Vec::new();
    for index in 0..free {
        let address = UNSORTED + index * GRANULE;
        sys::poke(address, &[1]);
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, address / 4096 * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        pages.push((frame, index * GRANULE));
    }
    sys::unmap(UNSORTED, all);
    pages.sort_unstable();
    let enough = usize::try_from(ENOUGH).unwrap_or(32);
    let neighbours = |run: &[(u64, u64)]| run.windows(2).all(|pair| matches!(pair, [a, b] if b.0 == a.0 + GRANULE / 4096));
    let at = pages.windows(enough).position(neighbours).ok_or_else(|| io::Error::other("No 64 MiB lie together in physical memory."))?;
    let together: Vec<_> = pages.drain(at..at + enough).collect();
    let one = pages.pop();
    pages.reverse();
    let places = [(ONE, one.as_slice()), (TOGETHER, &together), (PIECES, pages.get(..enough).unwrap_or_default())];
    for (base, list) in places {
        for (index, (_, offset)) in (0..).zip(list) {
            let size = usize::try_from(GRANULE).unwrap_or(0);
            sys::map(base + index * GRANULE, size, protection, Backing::Shared(file.as_raw_fd(), i64::try_from(*offset).unwrap_or(0)))?;
            // The page's entry in this process is there before the driver looks for it.
            sys::poke(base + index * GRANULE, &[1]);
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters_are_those_of_the_sorted_values() {
        let times = Times { name: "x", values: (1..=101).collect() };
        assert_eq!([0, 1, 2, 3, 4].map(|quarter| times.quarter(quarter)), [1, 26, 51, 76, 101]);
        assert_eq!(Times { name: "x", values: Vec::new() }.quarter(2), 0);
    }

    #[test]
    fn siblings_are_counted_in_every_form() {
        assert_eq!([threads_of("0"), threads_of("0-1"), threads_of("0,4"), threads_of("0-2,7")], [1, 2, 2, 4]);
    }
}
