//! What is to be run: the memory, vCPUs, image parts and device sockets of one enclave VM.
//!
//! [`VmSpec::check`] is the door: past it, sizes add up and the memory fits QEMU's limits. Neighbours: `arguments` turns it into QEMU's command line.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use displaydoc::Display;
use thiserror::Error;

/// The most memory runs one VM takes: QEMU gives each a NUMA node of its own and knows 128 (`MAX_NODES`, include/system/numa.h).
pub const MAX_MEMORY_RUNS: usize = 128;

/// The granule of enclave memory in bytes (2 MiB); every run is a whole number of them.
pub(crate) const GRANULE_BYTES: u64 = 2 << 20;

/// The longest kernel command line in bytes: Linux on x86 takes 2047 and a NUL (`COMMAND_LINE_SIZE`, arch/x86/include/asm/setup.h).
pub(crate) const MAX_COMMAND_LINE_BYTES: usize = 2047;

/// The most vCPUs of one VM: what QEMU's microvm machine takes.
pub(crate) const MAX_VCPUS: u32 = 255;

/// A piece of a file that becomes guest memory, shared with whoever else maps it.
#[derive(Debug, Clone)]
pub struct FileRange {
    /// The file: open for reading and writing, sealed against shrinking where others could truncate it (QEMU would die of SIGBUS).
    pub file: Arc<OwnedFd>,
    /// Where the piece begins: bytes, a multiple of the page size.
    pub offset: u64,
    /// How long it is: bytes, a multiple of 2 MiB, not 0.
    pub size: u64,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accelerator {
    /// KVM where it truly works, else TCG.
    #[default]
    Auto,
    /// KVM, or an error that says why not.
    Kvm,
    /// QEMU's translator, on any host.
    Tcg,
}

/// How the guest kernel learns of its virtio-mmio devices. Never both ways at once: a kernel that knows both would find every device twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VirtioDiscovery {
    /// ACPI tables. Debian's cloud kernel knows only these; AWS's image kernels know them too.
    #[default]
    Acpi,
    /// `virtio_mmio.device=` on the kernel's command line, without ACPI: one vCPU on kernels that find CPUs only by ACPI.
    Cmdline,
}

/// One enclave VM to launch. Holds file descriptors, never paths: nobody can swap a file between the check of the image and the boot.
#[derive(Debug)]
pub struct VmSpec {
    /// Guest memory, first address first: 1 to [`MAX_MEMORY_RUNS`] pieces.
    pub memory: Vec<FileRange>,
    /// How many vCPUs: 1 to 255.
    pub vcpus: u32,
    /// The kernel: a file with a bzImage, read from its beginning.
    pub kernel: OwnedFd,
    /// The ramdisks, concatenated in one file; none boots without.
    pub initrd: Option<OwnedFd>,
    /// The kernel's command line as the image says it: no NUL, at most 2047 bytes with what [`Engine::launch`](crate::Engine::launch) adds.
    pub cmdline: Vec<u8>,
    /// A connected vhost-user socket whose other end serves virtio-vsock; its backend must be running before the launch.
    pub vsock: Option<OwnedFd>,
    /// A connected vhost-user socket whose other end serves virtio-nsm; needs [`Engine::has_nsm_device`](crate::Engine::has_nsm_device).
    pub nsm: Option<OwnedFd>,
    /// What executes the guest.
    pub accelerator: Accelerator,
    /// How the guest finds its devices.
    pub discovery: VirtioDiscovery,
}

/// A VM that cannot be launched as specified.
#[derive(Debug, Display, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// The VM has no memory; give it at least one range.
    NoMemory,
    /// The VM's memory consists of {0} ranges, QEMU takes at most 128; use larger pages or copy the memory into one file.
    TooManyRuns(usize),
    /// Memory range {index} is {size} bytes long; it must be a multiple of 2 MiB and not empty.
    OddSize {
        /// Which range, from 0.
        index: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// Memory range {index} begins at byte {offset} of its file; it must begin on a page.
    OddOffset {
        /// Which range, from 0.
        index: usize,
        /// Its offset in bytes.
        offset: u64,
    },
    /// The memory ranges do not fit into 64 bits.
    TooLarge,
    /// Memory range {index} ends at byte {end} of its file, which is {file_size} bytes long.
    PastEnd {
        /// Which range, from 0.
        index: usize,
        /// Where it ends, in bytes from the file's beginning.
        end: u64,
        /// The file's size in bytes.
        file_size: u64,
    },
    /// Memory ranges {first} and {second} share pages of one file; a page can be guest memory only once.
    Overlap {
        /// The range that begins first in the file, counted from 0.
        first: usize,
        /// The other one.
        second: usize,
    },
    /// The VM has {0} vCPUs; it can have 1 to 255.
    Vcpus(u32),
    /// The kernel's command line contains a NUL byte at position {0}.
    NulInCommandLine(usize),
    /// The kernel's command line is {0} bytes long with what the VM needs; Linux takes at most 2047.
    LongCommandLine(usize),
}

/// Checks that each range lies in its file and that no page is given twice, which a guest would take for two.
///
/// A file that cannot be asked is left to QEMU. For ranges that passed [`VmSpec::check`].
pub(crate) fn check_files(memory: &[FileRange]) -> Result<(), SpecError> {
    let mut places = Vec::with_capacity(memory.len());
    for (index, FileRange { file, offset, size }) in memory.iter().enumerate() {
        let Ok(status) = rustix::fs::fstat(file) else { continue };
        let end = offset.saturating_add(*size);
        let file_size = u64::try_from(status.st_size).unwrap_or(0);
        if end > file_size {
            return Err(SpecError::PastEnd { index, end, file_size });
        }
        places.push((status.st_dev, status.st_ino, *offset, end, index));
    }
    places.sort_unstable();
    for (&(device, inode, _, end, first), &(next_device, next_inode, offset, _, second)) in places.iter().zip(places.iter().skip(1)) {
        if (device, inode) == (next_device, next_inode) && offset < end {
            return Err(SpecError::Overlap { first, second });
        }
    }
    Ok(())
}

impl VmSpec {
    /// Checks what can be checked without a system call.
    pub(crate) fn check(&self) -> Result<(), SpecError> {
        if self.memory.is_empty() {
            return Err(SpecError::NoMemory);
        }
        if self.memory.len() > MAX_MEMORY_RUNS {
            return Err(SpecError::TooManyRuns(self.memory.len()));
        }
        let mut total: u64 = 0;
        for (index, &FileRange { offset, size, .. }) in self.memory.iter().enumerate() {
            if size == 0 || size % GRANULE_BYTES != 0 {
                return Err(SpecError::OddSize { index, size });
            }
            if offset % 4096 != 0 {
                return Err(SpecError::OddOffset { index, offset });
            }
            offset.checked_add(size).ok_or(SpecError::TooLarge)?;
            total = total.checked_add(size).ok_or(SpecError::TooLarge)?;
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(SpecError::Vcpus(self.vcpus));
        }
        if let Some(position) = self.cmdline.iter().position(|&byte| byte == 0) {
            return Err(SpecError::NulInCommandLine(position));
        }
        Ok(())
    }
}
