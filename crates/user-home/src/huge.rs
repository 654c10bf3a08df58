//! Huge pages that need not be reserved: ordinary memory, remembered as huge ([`HugePages`]).
//!
//! A filter cannot change arguments, and no process can map in another, so mmap(MAP_HUGETLB) is made by the client itself, once more and without the
//! flag: while it waits for its answer it is seized (ptrace), told to make the call again, stopped on the way, and let go after it.
//! memfd_create(MFD_HUGETLB) is answered with a memory file of ours. Nothing tells of munmap, so what was handed out is compared with what is mapped
//! when it is used.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use nitroxide_abi::limits::GRANULE;
use rustix::fs::{MemfdFlags, OFlags, memfd_create};

use crate::answer::Answer;
use crate::caller::Caller;
use crate::donation::{Pages, Whose};
use crate::handed::{Handed, Identity, Watch, identity, is_closed};
use crate::lock;
use crate::paths::{low, low_signed};
use crate::sys::{self, Notification, Seized, Stopped};

/// Where clients get their huge pages: below what the kernel chooses by itself, and above what programs choose.
const FIRST_ADDRESS: u64 = 0x2000_0000_0000;
const LAST_ADDRESS: u64 = 0x6000_0000_0000;

/// `MAP_HUGE_SHIFT`, `MFD_HUGE_SHIFT`: the size's logarithm stands above it.
const SIZE_SHIFT: u32 = 26;
const SIZE_MASK: u32 = 0x3F;

/// What `/proc/PID/maps` says where there is none.
const NO_FILE: Identity = (0, 0);

/// `HUGETLBFS_MAGIC` (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

/// The most ranges that are remembered, of all clients; neighbours count as one. Beyond it mmap is ENOMEM, as it is for a process with as many mappings
/// (`vm.max_map_count`).
const MOST_RANGES: usize = 65_530;

/// What was handed out as huge pages.
#[derive(Debug)]
pub(crate) struct HugePages {
    next: AtomicU64,
    ranges: Mutex<Vec<Range>>,
    files: Mutex<Vec<HugeFile>>,
}

/// A range of a process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    process: i32,
    start: u64,
    end: u64,
}

#[derive(Debug)]
struct HugeFile {
    kept: OwnedFd,
    identity: Identity,
}

impl Default for HugePages {
    fn default() -> Self {
        Self { next: AtomicU64::new(FIRST_ADDRESS), ranges: Mutex::default(), files: Mutex::default() }
    }
}

/// Is it a size that there is: the default, or 2 MiB? The errno if not, as where nothing but pages of 2 MiB is reserved.
fn check_size(flags: u32) -> Result<(), i32> {
    match flags >> SIZE_SHIFT & SIZE_MASK {
        0 | 21 => Ok(()),
        30 => Err(libc::ENOMEM),
        _ => Err(libc::EINVAL),
    }
}

/// How many huge pages clients are told of: all memory, since they take ordinary pages, and those only once they are touched.
pub(crate) fn pages() -> u64 {
    let system = rustix::system::sysinfo();
    system.totalram.saturating_mul(system.mem_unit.into()) / GRANULE
}

fn round_up(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(GRANULE).filter(|rounded| *rounded > 0)
}

impl HugePages {
    /// memfd_create(MFD_HUGETLB).
    pub(crate) fn memory_file(&self, caller: &Caller<'_>, watch: &Watch, notification: &Notification) -> Answer {
        let [name, flags, ..] = notification.arguments;
        let flags = low(flags);
        let known = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB | libc::MFD_NOEXEC_SEAL | libc::MFD_EXEC;
        if flags & !(known | SIZE_MASK << SIZE_SHIFT) != 0 {
            return Answer::Error(libc::EINVAL);
        }
        if let Err(errno) = check_size(flags) {
            return Answer::Error(errno);
        }
        let Ok(name) = caller.path(name) else { return Answer::Error(libc::EFAULT) };
        let Ok(name) = CString::new(name) else { return Answer::Error(libc::EINVAL) };
        let kept_flags = flags & (libc::MFD_ALLOW_SEALING | libc::MFD_NOEXEC_SEAL | libc::MFD_EXEC);
        let made = memfd_create(&*name, MemfdFlags::from_bits_retain(kept_flags) | MemfdFlags::CLOEXEC);
        let handed = made.map_err(Into::into).and_then(|kept| {
            let handed = Handed::new(kept.as_fd(), OFlags::RDWR)?;
            watch.add(kept.as_fd())?;
            lock(&self.files).push(HugeFile { identity: identity(kept.as_fd())?, kept });
            Ok(handed)
        });
        match handed {
            Ok(handed) => Answer::Handed(handed, flags & libc::MFD_CLOEXEC != 0),
            Err(error) => std::io::Error::into(error),
        }
    }

    /// Forgets files that nobody has any more.
    pub(crate) fn forget_closed(&self) {
        lock(&self.files).retain(|file| !is_closed(file.kept.as_fd()));
    }

    /// A second descriptor for a file that was handed out.
    pub(crate) fn file(&self, wanted: Identity) -> Option<OwnedFd> {
        let files = lock(&self.files);
        files.iter().find(|file| file.identity == wanted)?.kept.try_clone().ok()
    }

    /// Is all of this range, in this process or one that it was copied from, handed out?
    pub(crate) fn has(&self, process: i32, start: u64, end: u64) -> bool {
        let ranges = lock(&self.ranges);
        let mut family = std::iter::successors(Some(process), |process| parent(*process)).take(16);
        family.any(|process| covers(&ranges, process, start, end))
    }

    /// Is there room for one more range? Those of processes that are gone make some.
    fn has_room(&self) -> bool {
        let mut ranges = lock(&self.ranges);
        if ranges.len().is_multiple_of(64) || ranges.len() >= MOST_RANGES {
            let mut gone: BTreeSet<i32> = ranges.iter().map(|range| range.process).collect();
            gone.retain(|process| !std::path::Path::new(&format!("/proc/{process}")).exists());
            ranges.retain(|range| !gone.contains(&range.process));
        }
        ranges.len() < MOST_RANGES
    }

    fn enter(&self, range: Range) {
        join(&mut lock(&self.ranges), range);
    }

    /// mmap(MAP_HUGETLB). To be called on a thread that may wait for the client; all of it happens on this one. `renewed` is told of pages that no enclave can have
    /// yet, before the client can give them.
    pub(crate) fn map(&self, caller: &Caller<'_>, notification: &Notification, renewed: impl FnOnce(Pages)) -> Answer {
        let [address, length, _, flags, file, _] = notification.arguments;
        let flags = low(flags);
        let is_anonymous = low_signed(flags.into()) & libc::MAP_ANONYMOUS != 0;
        if !is_anonymous && self.file_of(caller, low_signed(file)).is_none() {
            return Answer::GoesOn;
        }
        let asks_for_huge = low_signed(flags.into()) & libc::MAP_HUGETLB != 0;
        if asks_for_huge && let Err(errno) = check_size(flags) {
            return Answer::Error(errno);
        }
        let is_fixed = low_signed(flags.into()) & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) != 0;
        if is_fixed && !asks_for_huge {
            return Answer::GoesOn;
        }
        let Some(length) = round_up(length).filter(|_| !is_fixed || address.is_multiple_of(GRANULE)) else {
            return Answer::Error(libc::EINVAL);
        };
        if length > LAST_ADDRESS - FIRST_ADDRESS {
            return Answer::Error(libc::ENOMEM);
        }
        let wanted = Wanted { address: if is_fixed { address } else { self.place(length) }, length, flags: unlike(flags) };
        let Ok(process) = caller.process() else { return Answer::Error(libc::ENOMEM) };
        if is_anonymous && !self.has_room() {
            return Answer::Error(libc::ENOMEM);
        }
        let enter = |start: u64| {
            if is_anonymous {
                let end = start.saturating_add(length);
                renewed(Pages { whose: Whose::Process(process, NO_FILE), start, end });
                self.enter(Range { process, start, end });
            }
        };
        if let Err(error) = again(caller, notification, wanted, enter) {
            tracing::debug!(%error, "huge pages cannot be mapped for a client; is it traced by something else?");
            return Answer::Error(libc::ENOMEM);
        }
        Answer::Done
    }

    /// fstatfs() of a file of huge pages: its page size is what programs ask for.
    pub(crate) fn file_system(&self, caller: &Caller<'_>, notification: &Notification) -> Answer {
        let [descriptor, to, ..] = notification.arguments;
        if self.file_of(caller, low_signed(descriptor)).is_none() {
            return Answer::GoesOn;
        }
        // `struct statfs`, 64 bits each: type, page size, then numbers without a limit; the length of names and the page size once more.
        let words = [HUGETLBFS_MAGIC, GRANULE, 0, 0, 0, 0, 0, 0, 255, GRANULE, 0, 0, 0, 0, 0];
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        caller.write(to, &bytes).into()
    }

    fn file_of(&self, caller: &Caller<'_>, number: i32) -> Option<OwnedFd> {
        let stat = rustix::fs::stat(format!("/proc/{}/fd/{number}", caller.thread)).ok()?;
        self.file((stat.st_dev, stat.st_ino))
    }

    /// An address that no client was given before.
    fn place(&self, length: u64) -> u64 {
        let advance = |next: u64| {
            let end = next.saturating_add(length);
            Some(if end > LAST_ADDRESS { FIRST_ADDRESS.saturating_add(length) } else { end })
        };
        let next = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).unwrap_or(FIRST_ADDRESS);
        if next.saturating_add(length) > LAST_ADDRESS { FIRST_ADDRESS } else { next }
    }
}

fn parent(process: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok().filter(|parent| *parent > 1)
}

/// Adds a range to those of its process; neighbours become one.
fn join(ranges: &mut Vec<Range>, mut new: Range) {
    ranges.retain(|old| {
        let touches = old.process == new.process && old.start <= new.end && new.start <= old.end;
        if touches {
            new = Range { process: new.process, start: new.start.min(old.start), end: new.end.max(old.end) };
        }
        !touches
    });
    ranges.push(new);
}

fn covers(ranges: &[Range], process: i32, start: u64, end: u64) -> bool {
    ranges.iter().any(|range| range.process == process && range.start <= start && end <= range.end)
}

/// The flags with which the call is let through.
fn unlike(flags: u32) -> u32 {
    let (all, shared) = (libc::MAP_TYPE.cast_unsigned(), libc::MAP_SHARED.cast_unsigned());
    let flags = (flags & !(libc::MAP_HUGETLB.cast_unsigned() | SIZE_MASK << SIZE_SHIFT)) | libc::MAP_NORESERVE.cast_unsigned();
    // Which knows no MAP_FIXED_NOREPLACE; with that, and at a fixed place at all, the call is let through when it comes again.
    let is_fixed = flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE).cast_unsigned() != 0;
    let is_shared_file = !is_fixed && flags & (all | libc::MAP_ANONYMOUS.cast_unsigned()) == shared;
    if is_shared_file { flags & !all | libc::MAP_SHARED_VALIDATE.cast_unsigned() } else { flags }
}

/// What the call is to be instead.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    address: u64,
    length: u64,
    flags: u32,
}

/// Has the client make its call again with other arguments, of which it sees nothing. `done` is told the address of the mapping before the client goes on; it is not
/// called if a signal came first, after which the call comes again, or if the call failed.
///
/// # Errors
///
/// If it cannot be seized; then it still waits for its answer.
#[cfg(target_arch = "x86_64")]
fn again(caller: &Caller<'_>, notification: &Notification, wanted: Wanted, done: impl FnOnce(u64)) -> std::io::Result<()> {
    let mut client = Seized::interrupt(caller.thread)?;
    // With the stop pending, the kernel never shows this number to the program.
    caller.answer(Err(sys::RESTART_ALWAYS));
    let mut original = match client.wait() {
        Ok(Stopped::Interrupted) => match client.registers() {
            Ok(registers) => registers,
            Err(_) => return Ok(()),
        },
        Ok(Stopped::Signal(signal)) => {
            client.let_go(Some(signal));
            return Ok(());
        }
        _ => return Ok(()),
    };
    let restarts = [sys::RESTART_ALWAYS, sys::RESTART_BY_HANDLER].map(|number| u64::from(number.unsigned_abs()).wrapping_neg());
    if original.orig_rax != u64::try_from(notification.call).unwrap_or(0) || !restarts.contains(&original.rax) {
        // Not where it was expected: it gets an error, or it would come again for ever.
        original.rax = u64::from(libc::ENOMEM.unsigned_abs()).wrapping_neg();
        original.orig_rax = u64::MAX;
        let _ = client.set_registers(&original);
        client.let_go(None);
        return Ok(());
    }
    let changed = libc::user_regs_struct { rdi: wanted.address, rsi: wanted.length, r10: wanted.flags.into(), ..original };
    let result = carry_out(&mut client, &original, &changed);
    let signal = match result {
        Ok(Done::Interrupted(signal)) => signal,
        Ok(Done::Returned(value)) if !is_errno(value) => {
            done(value);
            None
        }
        _ => None,
    };
    client.let_go(signal);
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn again(_caller: &Caller<'_>, _notification: &Notification, _wanted: Wanted, _done: impl FnOnce(u64)) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(target_arch = "x86_64")]
enum Done {
    Returned(u64),
    /// By a signal, or because its process is to stop.
    Interrupted(Option<i32>),
}

/// From the stop before the call to the one after it.
#[cfg(target_arch = "x86_64")]
fn carry_out(client: &mut Seized, original: &libc::user_regs_struct, changed: &libc::user_regs_struct) -> std::io::Result<Done> {
    client.set_registers(changed)?;
    for _entry_and_exit in 0..2 {
        client.run_to_call()?;
        match client.wait()? {
            Stopped::AtCall => {}
            // Before the call: it is made again afterwards, and trapped as it was.
            stopped => {
                client.set_registers(original)?;
                let signal = if let Stopped::Signal(signal) = stopped { Some(signal) } else { None };
                return Ok(Done::Interrupted(signal));
            }
        }
    }
    let after = client.registers()?;
    client.set_registers(&libc::user_regs_struct { rdi: original.rdi, rsi: original.rsi, r10: original.r10, ..after })?;
    Ok(Done::Returned(after.rax))
}

/// Is it one of the last 4095 numbers?
#[cfg(target_arch = "x86_64")]
fn is_errno(value: u64) -> bool {
    value > u64::MAX - 4095
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn neighbouring_ranges_become_one_and_a_gap_is_not_covered() {
        let mut ranges = Vec::new();
        for start in [8, 2, 4, 12] {
            join(&mut ranges, Range { process: 7, start: start * MIB, end: (start + 2) * MIB });
        }
        join(&mut ranges, Range { process: 8, start: 6 * MIB, end: 8 * MIB });
        assert!(covers(&ranges, 7, 2 * MIB, 6 * MIB) && covers(&ranges, 8, 6 * MIB, 8 * MIB));
        assert!(!covers(&ranges, 7, 2 * MIB, 8 * MIB), "6 to 8 is another process's");
        assert!(!covers(&ranges, 7, 8 * MIB, 14 * MIB), "10 to 12 is nobody's");
        join(&mut ranges, Range { process: 7, start: 6 * MIB, end: 8 * MIB });
        assert!(covers(&ranges, 7, 2 * MIB, 10 * MIB));
        assert_eq!(ranges.len(), 3);
    }

    #[test]
    fn places_are_aligned_apart_and_begin_again_at_the_end() {
        let pages = HugePages::default();
        assert_eq!((pages.place(2 * MIB), pages.place(4 * MIB)), (FIRST_ADDRESS, FIRST_ADDRESS + 2 * MIB));
        assert_eq!(pages.place(LAST_ADDRESS - FIRST_ADDRESS), FIRST_ADDRESS);
        assert_eq!(pages.place(2 * MIB), FIRST_ADDRESS);
    }

    #[test]
    fn ranges_are_bounded_and_those_of_processes_that_are_gone_make_room() {
        let fill = |process: i32| {
            let pages = HugePages::default();
            *lock(&pages.ranges) =
                (0..MOST_RANGES as u64).map(|at| Range { process, start: at * 4 * MIB, end: (at * 4 + 2) * MIB }).collect();
            pages
        };
        assert!(HugePages::default().has_room());
        assert!(!fill(std::process::id().cast_signed()).has_room());
        // No process has the highest number that fits.
        assert!(fill(i32::MAX).has_room());
    }

    #[test]
    fn sizes_are_those_of_a_machine_with_pages_of_2_mib() {
        for (logarithm, result) in [(0, Ok(())), (21, Ok(())), (30, Err(libc::ENOMEM)), (25, Err(libc::EINVAL)), (34, Err(libc::EINVAL))] {
            assert_eq!(check_size(libc::MFD_HUGETLB | logarithm << SIZE_SHIFT), result, "{logarithm}");
        }
        assert_eq!((round_up(1), round_up(2 * MIB), round_up(0), round_up(u64::MAX)), (Some(2 * MIB), Some(2 * MIB), None, None));
    }
}
