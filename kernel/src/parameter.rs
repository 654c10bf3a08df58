// SPDX-License-Identifier: GPL-2.0
//! The module's parameters: `ne_cpus`, the CPU pool as text, and `account_memlock`; both can be read and written (mode 0644).
//!
//! The kernel crate's parameters are read-only numbers, so these are made by hand, as `module_param_cb` would. At load time `ne_cpus` is
//! set before the module is initialised: the text is kept ([`early`]) and applied by the initialisation.

use core::cell::UnsafeCell;

use kernel::bindings;
use kernel::module_param::KernelParam;
use kernel::prelude::*;
use kernel::str::as_char_ptr_in_const_context;
use kernel::sync::atomic::{Acquire, Atomic, Relaxed, Release};
use nitroxide_abi::limits::POOL_TEXT_BYTES;
use nitroxide_abi::Code;
use nitroxide_driver::Machine;

use crate::home::Home;
use crate::log::Shown;
use crate::{sys, NitroEnclaves};

/// A text that was set before the module was initialised.
struct Early {
    bytes: [u8; POOL_TEXT_BYTES],
    length: usize,
}

/// What the parameter's lock guards.
struct Guarded<T>(UnsafeCell<T>);

// SAFETY: Only used under the module's parameter lock, or never written.
unsafe impl<T> Sync for Guarded<T> {}

static EARLY: Guarded<Early> = Guarded(UnsafeCell::new(Early { bytes: [0; POOL_TEXT_BYTES], length: 0 }));

/// Is the module initialised, so that texts are applied at once?
static READY: Atomic<bool> = Atomic::new(false);

static OPERATIONS: Guarded<bindings::kernel_param_ops> =
    Guarded(UnsafeCell::new(bindings::kernel_param_ops { flags: 0, set: Some(set), get: Some(get), free: None }));

#[link_section = "__param"]
#[used(compiler)]
static PARAMETER: KernelParam = KernelParam::new(bindings::kernel_param {
    name: as_char_ptr_in_const_context(c"ne_cpus"),
    mod_: <NitroEnclaves as kernel::ModuleMetadata>::THIS_MODULE.as_ptr(),
    ops: OPERATIONS.0.get().cast_const(),
    perm: 0o644,
    level: -1,
    flags: 0,
    __bindgen_anon_1: bindings::kernel_param__bindgen_ty_1 { arg: core::ptr::null_mut() },
});

#[link_section = ".modinfo"]
#[used(compiler)]
static DESCRIPTION: [u8; 60] = *b"parm=ne_cpus:<cpu-list> - CPU pool used for Nitro Enclaves \0";

/// Are pinned pages counted against the creator's RLIMIT_MEMLOCK? Mainline never does.
static ACCOUNT_MEMLOCK: Atomic<bool> = Atomic::new(false);

#[link_section = "__param"]
#[used(compiler)]
static ACCOUNT_MEMLOCK_PARAMETER: KernelParam = KernelParam::new(bindings::kernel_param {
    name: as_char_ptr_in_const_context(c"account_memlock"),
    mod_: <NitroEnclaves as kernel::ModuleMetadata>::THIS_MODULE.as_ptr(),
    ops: &raw const bindings::param_ops_bool,
    perm: 0o644,
    level: -1,
    flags: 0,
    // The kernel's own operations write a byte with 0 or 1.
    __bindgen_anon_1: bindings::kernel_param__bindgen_ty_1 { arg: ACCOUNT_MEMLOCK.as_ptr().cast() },
});

#[link_section = ".modinfo"]
#[used(compiler)]
static ACCOUNT_MEMLOCK_DESCRIPTION: [u8; 77] = *b"parm=account_memlock:Count enclave memory against RLIMIT_MEMLOCK (default N)\0";

#[link_section = ".modinfo"]
#[used(compiler)]
static ACCOUNT_MEMLOCK_TYPE: [u8; 30] = *b"parmtype=account_memlock:bool\0";

/// Are pages that are pinned from now on counted against the creator's RLIMIT_MEMLOCK?
pub(crate) fn accounts_memlock() -> bool {
    ACCOUNT_MEMLOCK.load(Relaxed)
}

/// Does something with the module's parameter lock held, as the parameter code does for [`set`] and [`get`].
pub(crate) fn locked<T>(act: impl FnOnce() -> T) -> T {
    let module = <NitroEnclaves as kernel::ModuleMetadata>::THIS_MODULE.as_ptr();
    // SAFETY: The module is this one; process context, and this module takes the lock nowhere else.
    unsafe { bindings::kernel_param_lock(module) };
    let result = act();
    // SAFETY: It was locked above.
    unsafe { bindings::kernel_param_unlock(module) };
    result
}

/// # Safety
///
/// Called by the parameter code with the module's parameter lock held; `text` ends with a NUL.
unsafe extern "C" fn set(text: *const c_char, _parameter: *const bindings::kernel_param) -> c_int {
    // SAFETY: By this function's contract; without the flag for it, the parameter code never gives null.
    let text = unsafe { CStr::from_char_ptr(text) }.to_bytes();
    match set_text(text) {
        Ok(()) => 0,
        Err(code) => code.negative(),
    }
}

fn set_text(text: &[u8]) -> Result<(), Code> {
    if !sys::is_admin() {
        return Err(Code::EPERM);
    }
    if READY.load(Acquire) {
        return apply(&*crate::home().ok_or(Code::ENODEV)?, text);
    }
    // SAFETY: The kernel calls this with the module's parameter lock held, and `start` takes it.
    let early = unsafe { &mut *EARLY.0.get() };
    early.bytes.get_mut(..text.len()).ok_or(Code::ENOSPC)?.copy_from_slice(text);
    early.length = text.len();
    Ok(())
}

/// Makes the pool what the text says.
fn apply(home: &Home, text: &[u8]) -> Result<(), Code> {
    home.with_pool(|pool, cpus| pool.write(text, cpus)).map_err(|error| {
        pr_err!("ne_cpus: {}\n", Shown(&error));
        error.code()
    })
}

/// Applies what was set at load time; from now on a text is applied when it is written.
///
/// # Errors
///
/// What the text gives; the module is not loaded then.
pub(crate) fn start(home: &Home) -> Result {
    let mut text = [0; POOL_TEXT_BYTES];
    let length = locked(|| {
        // SAFETY: The lock is held.
        let early = unsafe { &*EARLY.0.get() };
        text.copy_from_slice(&early.bytes);
        READY.store(true, Release);
        early.length
    });
    match text.get(..length) {
        None | Some([]) => Ok(()),
        Some(text) => apply(home, text).map_err(sys::error),
    }
}

/// # Safety
///
/// Called by the parameter code, with a page at `buffer`.
unsafe extern "C" fn get(buffer: *mut c_char, _parameter: *const bindings::kernel_param) -> c_int {
    // The file is there before the module is initialised, and so before the lock is that `home` takes.
    let Some(home) = READY.load(Acquire).then(crate::home).flatten() else { return ENODEV.to_errno() };
    // SAFETY: The parameter code gives a page; the text has less than 512 bytes, and a newline follows.
    let buffer = unsafe { core::slice::from_raw_parts_mut(buffer.cast::<u8>(), POOL_TEXT_BYTES.saturating_add(1)) };
    let length = home.with_pool(|pool, _| {
        let (text, end) = pool.read();
        for (target, source) in buffer.iter_mut().zip(Iterator::chain(text.iter(), end)) {
            *target = *source;
        }
        text.len().saturating_add(end.len())
    });
    c_int::try_from(length).unwrap_or(0)
}
