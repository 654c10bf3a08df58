//! The system calls of the host path that Rust cannot check: the ioctls, and memory of huge pages.
//!
//! Everything unsafe of this crate is here. What leaves this module is safe: descriptors that are owned, and [`Mapping`]s that are
//! written only while nobody else has them.

#![expect(unsafe_code, reason = "ioctl takes a pointer, mmap gives one, and the descriptor in an ioctl's result is nobody's yet")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nitroxide_abi::Code;
use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// One call of the interface: a full 32-bit command word and the bytes of its argument, which the driver reads and writes.
struct NeIoctl<'a, const SIZE: usize> {
    word: u32,
    argument: &'a mut [u8; SIZE],
}

// SAFETY: `as_ptr` points to SIZE bytes that are borrowed for as long as the call lasts, and `call` is only given words whose argument has
// exactly that size, since the word itself contains the size and `call` compares it.
unsafe impl<const SIZE: usize> Ioctl for NeIoctl<'_, SIZE> {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.word as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<Self::Output> {
        Ok(output)
    }
}

/// Makes one call and gives its result, which is zero or positive.
///
/// # Errors
///
/// The exact code. A result below zero that is no errno (drivers pass on what a device says) is EIO; a word whose size is not SIZE, EINVAL.
pub(super) fn call<const SIZE: usize>(fd: impl AsFd, word: u32, argument: &mut [u8; SIZE]) -> Result<i32, Code> {
    // Bits 16 to 29 of a word are the size of its argument (include/uapi/asm-generic/ioctl.h).
    if usize::try_from(word >> 16 & 0x3FFF) != Ok(SIZE) {
        return Err(Code::EINVAL);
    }
    // SAFETY: all commands of this interface copy at most the size in their word from and to the argument; that size is SIZE. On a descriptor
    // of something else a word of this interface is ENOTTY or that thing's own command with an argument of the same size.
    let result = unsafe { ioctl::ioctl(fd, NeIoctl { word, argument }) };
    match result {
        Ok(value) if value >= 0 => Ok(value),
        Ok(_) => Err(Code::EIO),
        Err(errno) => Err(Code::new(errno.raw_os_error()).unwrap_or(Code::EIO)),
    }
}

/// As [`call`], for the call whose result is a new descriptor.
pub(super) fn call_for_descriptor<const SIZE: usize>(fd: impl AsFd, word: u32, argument: &mut [u8; SIZE]) -> Result<OwnedFd, Code> {
    let descriptor: RawFd = call(fd, word, argument)?;
    // SAFETY: the driver has just installed this descriptor for us; nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Anonymous private memory of this process, made of huge pages. Dropping it unmaps it.
///
/// # Invariants
///
/// `start` and `bytes` are what mmap was asked for and gave; nothing else unmaps or remaps it.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory belongs to the value alone, as a Box<[u8]>'s does; it can be moved to and read from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference gives no access to the bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps and populates `bytes` of huge pages of 2^`page_shift` bytes; `bytes` is a multiple of that above zero.
    ///
    /// # Errors
    ///
    /// ENOMEM if there are not as many free pages; others as mmap and madvise give them.
    pub(super) fn new(bytes: usize, page_shift: u32) -> io::Result<Self> {
        // MAP_HUGE_SHIFT is 26 (include/uapi/asm-generic/hugetlb_encode.h).
        let size_flag = MapFlags::from_bits_retain(page_shift << 26);
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | size_flag;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory that anything else uses.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // INVARIANT: as mmap gave it.
        let mapping = Self { start, bytes };
        mapping.populate()?;
        Ok(mapping)
    }

    /// Gets all pages now, so that a lack of pages (a cgroup's limit, another node) is an error here and not a SIGBUS at the first write.
    fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping; populating changes no byte of it.
        let populated = unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.bytes, Advice::LinuxPopulateWrite) };
        match populated {
            Ok(()) => Ok(()),
            // Kernels before 5.14 do not know it; mmap has reserved the pages, which nearly always suffices.
            Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Bytes of it.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its address, as the driver wants it.
    pub(super) fn address(&self) -> u64 {
        u64::try_from(self.start.as_ptr().addr()).unwrap_or(u64::MAX)
    }

    /// Its content. Must not be used any more once the memory was given to an enclave, when its pages may be another's: the callers give
    /// the whole mapping away by value then ([`Donated`]).
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `bytes` bytes from `start` are mapped readable and writable, zero-filled by the kernel, and exclusively ours while `self` is
        // borrowed; a length beyond isize::MAX cannot be mapped.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// Gives up access to the content.
    pub(super) fn donate(self) -> Donated {
        Donated(self)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is our own mapping, and no reference to it can outlive `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        if let Err(errno) = unmapped {
            tracing::warn!(%errno, "huge pages cannot be unmapped");
        }
    }
}

/// Memory that an enclave has: it stays mapped until the enclave is closed, and nothing in this process can look at it.
#[derive(Debug)]
pub(super) struct Donated(#[expect(dead_code, reason = "kept for its drop")] Mapping);
