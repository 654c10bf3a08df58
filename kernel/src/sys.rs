// SPDX-License-Identifier: GPL-2.0
//! The kernel's C functions that the `kernel` crate does not wrap, each behind a safe function or an owning type.
//!
//! [`ReplySignal`] wakes the one who waits for the device, [`PinnedPage`] owns a pin, [`LockedPages`] a charge, [`OrderedQueue`] owns a workqueue. What C offers
//! only inline comes from `shim.c`.

use core::ptr::NonNull;

use kernel::bindings;
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::lock::mutex::MutexBackend;
use kernel::sync::lock::Guard;
use kernel::sync::Mutex;
use kernel::types::Opaque;
use kernel::workqueue::DelayedWork;
use nitroxide_abi::{Code, CpuId, Gpa};
use nitroxide_driver::Page;

use crate::statistics;

#[expect(improper_ctypes, reason = "C structs without fields in this configuration are only pointed to")]
mod shim {
    use kernel::bindings;
    use kernel::ffi::{c_int, c_uint, c_ulong};

    extern "C" {
        pub(super) fn nitroxide_cpu_online(cpu: c_uint) -> bool;
        pub(super) fn nitroxide_cpu_node(cpu: c_uint) -> c_int;
        pub(super) fn nitroxide_cpu_first_sibling(cpu: c_uint) -> c_uint;
        pub(super) fn nitroxide_page_is_huge(page: *mut bindings::page) -> bool;
        pub(super) fn nitroxide_page_bytes(page: *mut bindings::page) -> u64;
        pub(super) fn nitroxide_page_address(page: *mut bindings::page) -> u64;
        pub(super) fn nitroxide_page_offset(page: *mut bindings::page) -> u64;
        pub(super) fn nitroxide_page_node(page: *mut bindings::page) -> c_int;
        pub(super) fn nitroxide_access_ok(address: u64, size: u64) -> bool;
        pub(super) fn nitroxide_reinit_completion(completion: *mut bindings::completion);
        pub(super) fn nitroxide_milliseconds(jiffies: c_ulong) -> c_uint;
        pub(super) fn nitroxide_ram_bytes() -> u64;
        pub(super) fn nitroxide_fsuid() -> u32;
        pub(super) fn nitroxide_mutex_lock_killable(lock: *mut bindings::mutex) -> c_int;
        pub(super) fn nitroxide_may_log() -> bool;
    }
}

/// The code of an errno as kernel functions return it, below zero; EIO for what user space must not see.
pub(crate) fn code_of(errno: c_int) -> Code {
    errno.checked_neg().and_then(Code::new).unwrap_or(Code::EIO)
}

/// The code of the kernel crate's error.
pub(crate) fn code(error: Error) -> Code {
    code_of(error.to_errno())
}

/// The kernel crate's error of a code.
pub(crate) fn error(code: Code) -> Error {
    Error::from_errno(code.negative())
}

/// Does the caller have CAP_SYS_ADMIN in the initial user namespace?
pub(crate) fn is_admin() -> bool {
    // CAST: capabilities are small numbers.
    // SAFETY: Looks at the current task only.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as c_int) }
}

/// The file system user id of the caller, of the initial user namespace.
pub(crate) fn fsuid() -> u32 {
    // SAFETY: Looks at the current task only.
    unsafe { shim::nitroxide_fsuid() }
}

/// Is the current task about to end, or a thread of the kernel's?
pub(crate) fn is_nobody_waiting() -> bool {
    // SAFETY: The current task's own flags, which only it changes.
    let flags = unsafe { (*kernel::current!().as_ptr()).flags };
    flags & (bindings::PF_EXITING | bindings::PF_KTHREAD) != 0
}

/// That user id as the caller's user namespace sees it.
pub(crate) fn uid_for_caller(uid: u32) -> u32 {
    kernel::task::Kuid::from_raw(bindings::kuid_t { val: uid }).into_uid_in_current_ns()
}

/// Bytes of memory that the machine has.
pub(crate) fn ram_bytes() -> u64 {
    // SAFETY: Reads a counter.
    unsafe { shim::nitroxide_ram_bytes() }
}

/// Nanoseconds since boot, sleep included.
pub(crate) fn boot_ns() -> u64 {
    // SAFETY: May be called everywhere but in NMIs.
    u64::try_from(unsafe { bindings::ktime_get_boottime() }).unwrap_or(0)
}

/// Can these bytes be user space's?
pub(crate) fn is_user_range(address: u64, size: u64) -> bool {
    // SAFETY: Compares numbers.
    unsafe { shim::nitroxide_access_ok(address, size) }
}

/// Is the CPU online? False for numbers that do not exist.
pub(crate) fn cpu_online(cpu: CpuId) -> bool {
    // SAFETY: The shim checks the number.
    unsafe { shim::nitroxide_cpu_online(cpu.0) }
}

/// The CPU's node; -1 if it has none.
pub(crate) fn cpu_node(cpu: CpuId) -> i32 {
    // SAFETY: The shim checks the number.
    unsafe { shim::nitroxide_cpu_node(cpu.0) }
}

/// The lowest of the CPU's siblings.
pub(crate) fn cpu_first_sibling(cpu: CpuId) -> CpuId {
    // SAFETY: The shim checks the number.
    CpuId(unsafe { shim::nitroxide_cpu_first_sibling(cpu.0) })
}

/// Does something while no CPU comes or goes. It must neither bring one nor take one.
pub(crate) fn without_hotplug<T>(act: impl FnOnce() -> T) -> T {
    // SAFETY: Process context; unlocked below.
    unsafe { bindings::cpus_read_lock() };
    let result = act();
    // SAFETY: Locked above.
    unsafe { bindings::cpus_read_unlock() };
    result
}

/// Brings a CPU online or takes it offline; may sleep. The caller has made sure that the number exists.
pub(crate) fn set_cpu_online(cpu: CpuId, online: bool) -> Result<(), Code> {
    if cpu.0 >= kernel::cpu::nr_cpu_ids() {
        return Err(Code::EINVAL);
    }
    // SAFETY: The number is that of a possible CPU, and this is process context.
    let status = unsafe {
        if online {
            bindings::add_cpu(cpu.0)
        } else {
            bindings::remove_cpu(cpu.0)
        }
    };
    if status < 0 {
        Err(code_of(status))
    } else {
        Ok(())
    }
}

/// A page of user space that is pinned, long-term and writable; dropped it is unpinned.
///
/// # Invariants
///
/// The pointer is that of a page on which this value owns one pin.
pub(crate) struct PinnedPage(NonNull<bindings::page>);

// SAFETY: A pin may be given back by any task.
unsafe impl Send for PinnedPage {}
// SAFETY: A shared reference only reads what does not change while the page is pinned.
unsafe impl Sync for PinnedPage {}

impl PinnedPage {
    /// Faults in and pins the page at `address` of the current process.
    ///
    /// # Errors
    ///
    /// EFAULT without a page or a writable one; what pinning gives.
    pub(crate) fn pin(address: u64) -> Result<Self, Code> {
        let address = usize::try_from(address).map_err(|_| Code::EFAULT)?;
        let mut page: *mut bindings::page = core::ptr::null_mut();
        // Long-term: the page leaves movable memory first. Writable: what the process writes and what the device has stay one page (W13).
        let flags = bindings::FOLL_WRITE | bindings::FOLL_LONGTERM;
        // SAFETY: There is room for the one page that is asked for, and the current task's memory is pinned in process context.
        let pinned = unsafe { bindings::pin_user_pages_unlocked(address, 1, &mut page, flags) };
        if pinned < 0 {
            return Err(c_int::try_from(pinned).map_or(Code::EFAULT, code_of));
        }
        // INVARIANT: one page was pinned for us.
        let page = NonNull::new(page).filter(|_| pinned == 1).map(Self).ok_or(Code::EFAULT)?;
        statistics::BYTES_PINNED.add(page.bytes());
        Ok(page)
    }

    /// Bytes of the whole page, for the statistics.
    fn bytes(&self) -> i64 {
        // SAFETY: By the invariant the page is pinned.
        i64::try_from(unsafe { shim::nitroxide_page_bytes(self.0.as_ptr()) }).unwrap_or(0)
    }

    /// The whole page as the physical machine sees it.
    pub(crate) fn describe(&self) -> Page {
        let page = self.0.as_ptr();
        // SAFETY: By the invariant the page is pinned, so that it belongs to one folio all the while.
        let (gpa, size, offset) =
            unsafe { (shim::nitroxide_page_address(page), shim::nitroxide_page_bytes(page), shim::nitroxide_page_offset(page)) };
        // SAFETY: As above.
        let (huge, node) = unsafe { (shim::nitroxide_page_is_huge(page), shim::nitroxide_page_node(page)) };
        Page { gpa: Gpa(gpa), size, offset, huge, node }
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        statistics::BYTES_PINNED.take(self.bytes());
        // SAFETY: By the invariant the pin is ours.
        unsafe { bindings::unpin_user_page(self.0.as_ptr()) }
    }
}

/// Pages that are counted against an address space's RLIMIT_MEMLOCK; dropped they are given back.
///
/// # Invariants
///
/// `mm` was charged with `pages` pages of this value's.
pub(crate) struct LockedPages {
    mm: ARef<Mm>,
    pages: c_ulong,
}

impl LockedPages {
    /// Charges an address space, whose limit is the calling process's.
    ///
    /// # Errors
    ///
    /// ENOMEM beyond the limit, unless the caller has CAP_IPC_LOCK.
    pub(crate) fn charge(mm: &Mm, bytes: u64) -> Result<Self, Code> {
        let pages = pages_of(bytes);
        // SAFETY: The address space is valid, and its lock is not held: this module never holds it.
        let status = unsafe { bindings::account_locked_vm(mm.as_raw(), pages, true) };
        if status < 0 {
            return Err(code_of(status));
        }
        // INVARIANT: just charged.
        Ok(Self { mm: mm.into(), pages })
    }

    /// Gives back what is more than this.
    pub(crate) fn keep(&mut self, bytes: u64) {
        let kept = pages_of(bytes).min(self.pages);
        self.give_back(self.pages.saturating_sub(kept));
        // INVARIANT: so many are left.
        self.pages = kept;
    }

    fn give_back(&self, pages: c_ulong) {
        // SAFETY: As in `charge`; the address space is there as long as this value, though its process may be gone.
        unsafe { bindings::account_locked_vm(self.mm.as_raw(), pages, false) };
    }
}

impl Drop for LockedPages {
    fn drop(&mut self) {
        self.give_back(self.pages);
    }
}

fn pages_of(bytes: u64) -> c_ulong {
    c_ulong::try_from(bytes >> kernel::page::PAGE_SHIFT).unwrap_or(c_ulong::MAX)
}

/// Locks, unless the waiting process is killed before it has the lock.
pub(crate) fn lock_killable<T>(mutex: &Mutex<T>) -> Option<Guard<'_, T, MutexBackend>> {
    // The kernel crate's lock begins with the kernel's own (`repr(C)`, as its `from_raw` relies on).
    let raw: *mut bindings::mutex = core::ptr::from_ref(mutex).cast_mut().cast();
    // SAFETY: It was initialised when it was made; process context.
    if unsafe { shim::nitroxide_mutex_lock_killable(raw) } != 0 {
        return None;
    }
    // SAFETY: It was locked just now, by this task.
    Some(unsafe { Guard::new(mutex, ()) })
}

/// May another line be written to the log now? Of many in a short time only the first ones may, and the kernel says how many were not.
pub(crate) fn may_log() -> bool {
    // SAFETY: It has its own lock, and may be called everywhere.
    unsafe { shim::nitroxide_may_log() }
}

/// How a wait ended.
pub(crate) enum Waited {
    /// The signal came; milliseconds that were left.
    Signalled(u32),
    /// The time is up.
    TimeUp,
    /// The waiting process was killed.
    Killed,
}

/// Wakes the one who waits for the device's reply; the kernel crate's `Completion` cannot be used again, nor waited for with a limit.
#[pin_data]
#[repr(transparent)]
pub(crate) struct ReplySignal {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: A completion may be used from every task and interrupt.
unsafe impl Send for ReplySignal {}
// SAFETY: As above; it has its own lock.
unsafe impl Sync for ReplySignal {}

impl ReplySignal {
    /// One that has not been given.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: The place is ours, valid and pinned.
            inner <- Opaque::ffi_init(|place| unsafe { bindings::init_completion(place) }),
        })
    }

    /// Gives the signal; also from interrupts.
    pub(crate) fn give(&self) {
        // SAFETY: It was initialised.
        unsafe { bindings::complete(self.inner.get()) }
    }

    /// Forgets signals that were given before. Only by the one who would wait.
    pub(crate) fn forget(&self) {
        // SAFETY: It was initialised; nobody waits, since the mailbox's lock is held.
        unsafe { shim::nitroxide_reinit_completion(self.inner.get()) }
    }

    /// Sleeps until the signal is given, at most `timeout_ms`.
    pub(crate) fn wait(&self, timeout_ms: u32, killable: bool) -> Waited {
        let limit = kernel::time::msecs_to_jiffies(timeout_ms);
        let left = if killable {
            // SAFETY: It was initialised; process context.
            let left = unsafe { bindings::wait_for_completion_killable_timeout(self.inner.get(), limit) };
            match usize::try_from(left) {
                Ok(left) => left,
                Err(_) => return Waited::Killed,
            }
        } else {
            // SAFETY: As above.
            unsafe { bindings::wait_for_completion_timeout(self.inner.get(), limit) }
        };
        if left == 0 {
            return Waited::TimeUp;
        }
        // SAFETY: Computes.
        Waited::Signalled(unsafe { shim::nitroxide_milliseconds(left) }.min(timeout_ms))
    }
}

/// Makes a work that waits for its time begin now, and waits until it has ended; returns at once if it neither waits nor runs.
///
/// Not to be called by the work itself.
pub(crate) fn flush_delayed<T, const ID: u64>(work: &DelayedWork<T, ID>) {
    // The kernel crate's work is the kernel's own (`repr(transparent)`).
    let raw: *mut bindings::delayed_work = core::ptr::from_ref(work).cast_mut().cast();
    // SAFETY: It was initialised when it was made, and the reference keeps it; process context.
    unsafe { bindings::flush_delayed_work(raw) };
}

/// A workqueue that does one work after the other; dropped, it does what is queued and ends.
///
/// # Invariants
///
/// The pointer is that of a workqueue that this value owns.
pub(crate) struct OrderedQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue may be used and destroyed by any task.
unsafe impl Send for OrderedQueue {}
// SAFETY: As above.
unsafe impl Sync for OrderedQueue {}

impl OrderedQueue {
    /// A new one of this name.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags___WQ_ORDERED;
        // SAFETY: The name has no conversions, so no further arguments are read.
        let queue = unsafe { bindings::alloc_workqueue_noprof(name.as_char_ptr(), flags, 1) };
        // INVARIANT: made for us.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// The queue, to put work into.
    pub(crate) fn queue(&self) -> &kernel::workqueue::Queue {
        // SAFETY: By the invariant it is valid as long as `self`.
        unsafe { kernel::workqueue::Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for OrderedQueue {
    fn drop(&mut self) {
        // SAFETY: By the invariant it is ours, and nobody else can reach it.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) }
    }
}
