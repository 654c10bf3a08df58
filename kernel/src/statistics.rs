// SPDX-License-Identifier: GPL-2.0
//! What the module counts: [`Counter`]s, shown as one file each in `/sys/class/misc/nitro_enclaves/statistics` (docs/kernel.md, "Statistics").
//!
//! They belong to the module, not to a device: a read needs no lock and no reference, and a device that goes takes only the files with it.

use core::ptr::null;

use kernel::bindings;
use kernel::prelude::*;
use kernel::str::as_char_ptr_in_const_context;
use kernel::sync::atomic::{Atomic, Relaxed};

/// A number that is counted by anybody at any time, interrupts included.
pub(crate) struct Counter(Atomic<i64>);

impl Counter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// One more.
    pub(crate) fn count(&self) {
        self.add(1);
    }

    /// More by `number`, or less.
    pub(crate) fn add(&self, number: i64) {
        self.0.add(number, Relaxed);
    }

    /// Less by `number`.
    pub(crate) fn take(&self, number: i64) {
        self.add(number.wrapping_neg());
    }
}

/// A file of a counter.
///
/// # Invariants
///
/// The kernel's attribute comes first, so that a pointer to it is one to the whole.
#[repr(C)]
struct Attribute {
    inner: bindings::device_attribute,
    counter: &'static Counter,
}

// SAFETY: It is never written.
unsafe impl Sync for Attribute {}

impl Attribute {
    #[allow(clippy::needless_update, reason = "a kernel with lockdep has fields of its own there")]
    const fn new(name: &'static CStr, counter: &'static Counter) -> Self {
        let attr = bindings::attribute {
            name: as_char_ptr_in_const_context(name),
            mode: 0o444,
            // SAFETY: What other configurations add to it are numbers and pointers, for which zeros are valid.
            ..unsafe { core::mem::zeroed() }
        };
        // INVARIANT: by the order of the fields.
        Self {
            inner: bindings::device_attribute {
                attr,
                __bindgen_anon_1: bindings::device_attribute__bindgen_ty_1 { show: Some(show) },
                __bindgen_anon_2: bindings::device_attribute__bindgen_ty_2 { store: None },
            },
            counter,
        }
    }
}

/// Makes the counters, and a file for each.
macro_rules! counters {
    ($( #[doc = $text:literal] $name:ident = $file:literal, )*) => {
        $( #[doc = $text] pub(crate) static $name: Counter = Counter::new(); )*
        const FILES: usize = [$($file),*].len();
        static ATTRIBUTES: [Attribute; FILES] = [$( Attribute::new($file, &$name) ),*];
    };
}

counters! {
    /// Commands that were given to the device.
    COMMANDS = c"commands",
    /// Replies of the device that refused.
    COMMANDS_REFUSED = c"commands_refused",
    /// Commands whose reply nobody waited for any longer: it took two minutes, or the waiting process was killed.
    COMMANDS_TIMED_OUT = c"commands_timed_out",
    /// Replies that came after all to such commands, and were thrown away.
    LATE_REPLIES = c"late_replies",
    /// Event interrupts.
    EVENTS = c"events",
    /// Enclaves that were created.
    ENCLAVES_CREATED = c"enclaves_created",
    /// Enclaves that were started.
    ENCLAVES_STARTED = c"enclaves_started",
    /// Started enclaves that have ended, in whatever way.
    ENCLAVES_ENDED = c"enclaves_ended",
    /// Lines for the log, those included that were too many to be written.
    NOTICES = c"notices",
    /// CPUs that enclaves have now.
    CPUS_DONATED = c"cpus_donated",
    /// Bytes that are pinned for enclaves now.
    BYTES_PINNED = c"bytes_pinned",
}

/// Pointers to the files, and null.
#[repr(transparent)]
struct Pointers<T, const N: usize>([*const T; N]);

// SAFETY: It is never written, and what it points to is never written.
unsafe impl<T, const N: usize> Sync for Pointers<T, N> {}

static FILE_POINTERS: Pointers<bindings::attribute, { FILES + 1 }> = {
    let mut pointers = [null(); FILES + 1];
    let mut index = 0;
    while index < FILES {
        pointers[index] = &raw const ATTRIBUTES[index].inner.attr;
        index += 1;
    }
    Pointers(pointers)
};

/// The folder.
struct Group(bindings::attribute_group);

// SAFETY: It is never written.
unsafe impl Sync for Group {}

static GROUP: Group = Group(bindings::attribute_group {
    name: as_char_ptr_in_const_context(c"statistics"),
    __bindgen_anon_2: bindings::attribute_group__bindgen_ty_2 { attrs_const: FILE_POINTERS.0.as_ptr() },
    // SAFETY: Zeros are valid for optional functions and pointers.
    ..unsafe { core::mem::zeroed() }
});

static GROUP_POINTERS: Pointers<bindings::attribute_group, 2> = Pointers([&GROUP.0, null()]);

/// The groups of the misc device; never written through.
pub(crate) const GROUPS: *mut *const bindings::attribute_group = GROUP_POINTERS.0.as_ptr().cast_mut();

/// # Safety
///
/// Called by sysfs for one of [`ATTRIBUTES`], with a page at `buffer`.
unsafe extern "C" fn show(_device: *mut bindings::device, attribute: *mut bindings::device_attribute, buffer: *mut c_char) -> isize {
    // SAFETY: By this function's contract, and by the invariant of `Attribute`.
    let counter = unsafe { &*attribute.cast::<Attribute>() }.counter;
    // SAFETY: By this function's contract; the format wants one long long.
    let length = unsafe { bindings::sysfs_emit(buffer, c"%lld\n".as_char_ptr(), counter.0.load(Relaxed)) };
    isize::try_from(length).unwrap_or(0)
}
