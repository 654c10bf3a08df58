// SPDX-License-Identifier: GPL-2.0
//! The two kinds of files as the VFS sees them: the enclave's descriptor ([`EnclaveDescriptor`]) and `/dev/nitro_enclaves`
//! ([`DeviceNode`]).
//!
//! The operations are written by hand: the kernel crate's `MiscDevice` has no poll, no llseek, no mode, and installs a compat ioctl that
//! mainline does not have (32-bit callers get ENOTTY).

use core::ptr::NonNull;

use kernel::bindings;
use kernel::error::{from_err_ptr, to_result};
use kernel::fs::File;
use kernel::prelude::*;
use kernel::seq_file::{seq_print, SeqFile};
use kernel::sync::aref::ARef;
use kernel::sync::poll::PollTable;
use kernel::sync::{Arc, ArcBorrow};
use kernel::types::{ForeignOwnable, Opaque};
use nitroxide_abi::{extension, ioctl, Code, SlotUid};
use nitroxide_driver::call::{self, Look};

use crate::caller::Caller;
use crate::enclave::{self, EnclaveFile};
use crate::home::FACTS;
use crate::{statistics, trace, NitroEnclaves};

#[expect(improper_ctypes, reason = "C structs without fields in this configuration are only pointed to")]
extern "C" {
    /// fs/anon_inodes.c; exported, but not among the kernel crate's bindings.
    fn anon_inode_getfile(
        name: *const c_char,
        operations: *const bindings::file_operations,
        private: *mut c_void,
        flags: c_int,
    ) -> *mut bindings::file;
}

/// A table of operations that is never written.
struct Operations(bindings::file_operations);

// SAFETY: It is never written.
unsafe impl Sync for Operations {}

/// No operation at all: the VFS answers by itself.
const NONE: bindings::file_operations = {
    // SAFETY: All fields are numbers, pointers or optional functions, for which zeros are valid.
    unsafe { core::mem::zeroed() }
};

static ENCLAVE: Operations = Operations(bindings::file_operations {
    owner: <NitroEnclaves as kernel::ModuleMetadata>::THIS_MODULE.as_ptr(),
    llseek: Some(bindings::noop_llseek),
    poll: Some(enclave_poll),
    unlocked_ioctl: Some(enclave_ioctl),
    release: Some(enclave_release),
    show_fdinfo: Some(enclave_fdinfo),
    ..NONE
});

static NODE: Operations = Operations(bindings::file_operations {
    owner: <NitroEnclaves as kernel::ModuleMetadata>::THIS_MODULE.as_ptr(),
    llseek: Some(bindings::noop_llseek),
    unlocked_ioctl: Some(node_ioctl),
    ..NONE
});

/// The file of an enclave, which nobody can see yet.
///
/// # Invariants
///
/// `file` has the operations [`ENCLAVE`]; its private data is null, or one reference to an [`EnclaveFile`].
pub(crate) struct EnclaveDescriptor {
    file: ARef<File>,
}

impl EnclaveDescriptor {
    /// A file without an enclave.
    ///
    /// # Errors
    ///
    /// ENFILE, ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        // CAST: O_RDWR is 2.
        // SAFETY: Name and operations are static; the file system takes a reference to the module.
        let file = unsafe { anon_inode_getfile(c"ne-vm".as_char_ptr(), &ENCLAVE.0, core::ptr::null_mut(), bindings::O_RDWR as c_int) };
        let file = NonNull::new(from_err_ptr(file)?.cast()).ok_or(ENOMEM)?;
        // INVARIANT: just made so.
        // SAFETY: The one reference to a new file is ours, and no `fdget_pos` can be going on.
        Ok(Self { file: unsafe { ARef::from_raw(file) } })
    }

    /// The same file, which releases the enclave when it is closed.
    pub(crate) fn carry(self, enclave: Arc<EnclaveFile>) -> Self {
        // INVARIANT: one reference goes into the private data.
        // SAFETY: Nobody else can reach the file before it is installed.
        unsafe { (*self.file.as_ptr()).private_data = enclave.into_foreign() };
        self
    }

    /// The file, to be installed.
    pub(crate) fn into_file(self) -> ARef<File> {
        self.file
    }
}

/// The enclave of a file with the operations [`ENCLAVE`].
///
/// # Safety
///
/// `file` is such a file, alive for `'a`, and was installed: its private data is an enclave.
unsafe fn enclave_of<'a>(file: *mut bindings::file) -> ArcBorrow<'a, EnclaveFile> {
    // SAFETY: By this function's contract, and the invariant of `EnclaveDescriptor`.
    unsafe { <Arc<EnclaveFile> as ForeignOwnable>::borrow((*file).private_data) }
}

fn answer(result: Result<u32, Code>) -> c_long {
    match result {
        Ok(value) => c_long::try_from(value).unwrap_or(c_long::MAX),
        Err(code) => c_long::try_from(code.negative()).unwrap_or(-1),
    }
}

/// # Safety
///
/// Called by the VFS, on an installed file with the operations [`ENCLAVE`] that stays alive meanwhile.
unsafe extern "C" fn enclave_ioctl(file: *mut bindings::file, word: c_uint, argument: c_ulong) -> c_long {
    // SAFETY: By this function's contract.
    let enclave = unsafe { enclave_of(file) };
    answer(enclave.ioctl(word, u64::try_from(argument).unwrap_or(u64::MAX)))
}

/// # Safety
///
/// As for [`enclave_ioctl`], with a valid table or null.
unsafe extern "C" fn enclave_poll(file: *mut bindings::file, table: *mut bindings::poll_table) -> bindings::__poll_t {
    // SAFETY: By this function's contract.
    let enclave = unsafe { enclave_of(file) };
    // SAFETY: As above.
    let is_to_wait = unsafe { table.as_ref() }.is_some_and(|table| table._qproc.is_some());
    // Whoever only looks, or is woken and looks again, is spared the call: it would do nothing, by the same test (poll_wait() in linux/poll.h).
    if is_to_wait {
        // SAFETY: As above.
        let (table, file) = unsafe { (PollTable::from_raw(table), File::from_raw_file(file)) };
        table.register_wait(file, enclave.ended());
    }
    if enclave.has_hung_up() {
        bindings::POLLHUP as bindings::__poll_t
    } else {
        0
    }
}

/// # Safety
///
/// Called by the VFS once for a file with the operations [`ENCLAVE`], when its last reference is gone.
unsafe extern "C" fn enclave_release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: By this function's contract the file is still there.
    let private = unsafe { (*file).private_data };
    if !private.is_null() {
        // SAFETY: By the invariant of `EnclaveDescriptor` this is the file's own reference.
        let enclave = unsafe { <Arc<EnclaveFile> as ForeignOwnable>::from_foreign(private) };
        enclave.close();
    }
    0
}

/// # Safety
///
/// As for [`enclave_ioctl`], with a valid file of lines.
unsafe extern "C" fn enclave_fdinfo(lines: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: By this function's contract.
    let summary = unsafe { enclave_of(file) }.summary();
    // SAFETY: As above.
    let lines = unsafe { SeqFile::from_raw(lines) };
    let info = summary.to_info();
    seq_print!(lines, "ne_slot_uid:\t{:#x}\nne_state:\t{}\nne_cid:\t{}\n", info.slot_uid, info.state, info.enclave_cid);
    seq_print!(
        lines,
        "ne_vcpus:\t{}\nne_memory_bytes:\t{}\nne_regions:\t{}/{}\n",
        info.vcpus,
        info.memory_size,
        info.regions,
        info.max_regions
    );
    seq_print!(lines, "ne_exit_reason:\t{}\nne_device_rc:\t{}\n", info.exit_reason, info.device_rc);
}

/// # Safety
///
/// None: it does not look at the file.
unsafe extern "C" fn node_ioctl(_file: *mut bindings::file, word: c_uint, argument: c_ulong) -> c_long {
    let result = node_call(word, u64::try_from(argument).unwrap_or(u64::MAX));
    trace::ioctl(word, SlotUid(0), result);
    answer(result)
}

fn node_call(word: u32, argument: u64) -> Result<u32, Code> {
    // Whoever has the node open may outlive the device (W4).
    let home = crate::home().ok_or(Code::ENODEV)?;
    let device = home.device().ok_or(Code::ENODEV)?;
    let mut caller = Caller { owner: None };
    match word {
        ioctl::CREATE_VM => enclave::create(&home, &device, argument),
        extension::LIST => nitroxide_driver::extension::list(&mut caller, argument, |cursor| home.next_after(cursor)).map(|()| 0),
        _ => call::device_call(&*home, &mut caller, &FACTS, word, argument),
    }
}

/// `/dev/nitro_enclaves`, mode 0660, as long as this value lives.
#[pin_data(PinnedDrop)]
pub(crate) struct DeviceNode {
    #[pin]
    inner: Opaque<bindings::miscdevice>,
}

// SAFETY: Registering and deregistering may be done by any task.
unsafe impl Send for DeviceNode {}
// SAFETY: A shared reference gives nothing.
unsafe impl Sync for DeviceNode {}

impl DeviceNode {
    /// Makes the node.
    pub(crate) fn register() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- Opaque::try_ffi_init(|place: *mut bindings::miscdevice| {
                let device = bindings::miscdevice {
                    minor: bindings::MISC_DYNAMIC_MINOR as c_int,
                    name: c"nitro_enclaves".as_char_ptr(),
                    fops: &NODE.0,
                    groups: statistics::GROUPS,
                    mode: 0o660,
                    // SAFETY: Zeros are valid for the lists and pointers that are left.
                    ..unsafe { core::mem::zeroed() }
                };
                // SAFETY: The place is ours, valid and pinned.
                unsafe { place.write(device) };
                // SAFETY: It is filled, and pinned until `drop` deregisters it.
                to_result(unsafe { bindings::misc_register(place) })
            }),
        }? Error)
    }
}

#[pinned_drop]
impl PinnedDrop for DeviceNode {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It was registered, or this value would not be.
        unsafe { bindings::misc_deregister(self.inner.get()) }
    }
}
