//! Why an operation of a client fails: one enum per operation; what the driver refused is a [`Refused`] with its exact code.

use std::fmt;
use std::io;
use std::path::PathBuf;

use displaydoc::Display;
use nitroxide_abi::Code;
use thiserror::Error;

/// A call of the Nitro Enclaves interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// NE_CREATE_VM.
    CreateVm,
    /// NE_ADD_VCPU.
    AddVcpu,
    /// NE_GET_IMAGE_LOAD_INFO.
    GetImageLoadInfo,
    /// NE_SET_USER_MEMORY_REGION.
    SetUserMemoryRegion,
    /// NE_START_ENCLAVE.
    StartEnclave,
}

impl Call {
    /// Its name as in the kernel's header.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CreateVm => "NE_CREATE_VM",
            Self::AddVcpu => "NE_ADD_VCPU",
            Self::GetImageLoadInfo => "NE_GET_IMAGE_LOAD_INFO",
            Self::SetUserMemoryRegion => "NE_SET_USER_MEMORY_REGION",
            Self::StartEnclave => "NE_START_ENCLAVE",
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A call that the driver refused: which, with what code, and what is known about it beyond the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    call: Call,
    code: Code,
    detail: Option<String>,
}

impl Refused {
    pub(crate) fn new(call: Call, code: Code) -> Self {
        Self { call, code, detail: None }
    }

    pub(crate) fn with_detail(self, detail: Option<String>) -> Self {
        Self { detail: detail.filter(|detail| !detail.is_empty()), ..self }
    }

    /// The call.
    #[must_use]
    pub fn call(&self) -> Call {
        self.call
    }

    /// The exact code that the driver gave, as a program that makes the ioctl sees it in `errno`.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// What the driver or the device has said beyond the code; a driver in the kernel says nothing.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        self.detail.as_deref()
    }

    /// What the code means for this call and what to do about it; one or two sentences.
    fn meaning(&self) -> &'static str {
        match (self.call, self.code) {
            (Call::CreateVm, Code::NO_CPUS_AVAIL_IN_POOL) => {
                "The CPU pool is not set, or enclaves have all of it. Set it (on EC2: /etc/nitro_enclaves/allocator.yaml), or end an enclave."
            }
            (Call::CreateVm, Code::ENOSPC) => "The device has no slot left; end an enclave.",
            (Call::AddVcpu, Code::EIO) | (Call::SetUserMemoryRegion, Code::EIO) => {
                "The device failed, or this process is not the one that created the enclave."
            }
            (Call::AddVcpu, Code::NO_CPUS_AVAIL_IN_POOL) => {
                "No core of the pool is free; ask for fewer vCPUs, enlarge the pool or end an enclave."
            }
            (Call::SetUserMemoryRegion, Code::MEM_DIFFERENT_NUMA_NODE) => {
                "The huge pages are on another NUMA node than the CPU pool; reserve huge pages on the pool's node, e.g. \
                 /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages."
            }
            (Call::SetUserMemoryRegion, Code::MEM_MAX_REGIONS) => {
                "The memory consists of more contiguous pieces than the device takes; use larger huge pages, or reserve them at boot."
            }
            (Call::StartEnclave, Code::FULL_CORES_NOT_USED) => {
                "A core of the enclave has a thread that was not added; the number of vCPUs must be a multiple of the threads of a core."
            }
            (Call::StartEnclave, Code::EINVAL) => "The device does not accept the image or the settings of the enclave.",
            (_, code) => code.text(),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was refused with {}: {}", self.call, self.code, self.meaning())?;
        match &self.detail {
            Some(detail) => write!(f, " {detail}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refused {}

/// Why there is no device.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no {0}: this machine has no Nitro Enclaves device, or its driver is not loaded. Use a local device instead (`--device local`).
    NoDeviceFile(PathBuf),
    /// {0} cannot be opened by this user; on EC2, become a member of the group `ne`.
    NotAllowed(PathBuf),
    /// {0} cannot be opened.
    OpenDeviceFile(PathBuf, #[source] io::Error),
    /// {0} is not a Nitro Enclaves device.
    NotThisDevice(PathBuf),
    /// A local device needs a world that can be used.
    World(#[from] nitroxide_world::OpenError),
    /// A topology of {cpus} CPUs with {threads} threads per core does not work: CPUs must be 2 to 4096 and a multiple of the threads, which are 1 to 8.
    Topology {
        /// Number of CPUs.
        cpus: u32,
        /// Threads per core.
        threads: u32,
    },
    /// The CPU pool `{pool}` does not work: {reason}
    Pool {
        /// The pool as it was given.
        pool: String,
        /// The driver's sentence about it.
        reason: nitroxide_driver::PoolError,
    },
    /// The local device cannot get descriptors or threads from the system.
    System(#[source] io::Error),
}

/// Why there is no memory to give to an enclave.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum AllocateError {
    /// {0} bytes are not a multiple of 2 MiB, of which an enclave's memory is made.
    NotMultiple(u64),
    /// An enclave cannot have memory of no size.
    Empty,
    /// Of the {wanted_mib} MiB asked for, {missing_mib} MiB cannot be had in free huge pages. Reserve more, e.g. `echo {suggested_pages} | sudo tee /proc/sys/vm/nr_hugepages`, or end an enclave.
    NoHugePages {
        /// What was asked for, in MiB.
        wanted_mib: u64,
        /// What is missing, in MiB.
        missing_mib: u64,
        /// How many pages of 2 MiB there should be in all.
        suggested_pages: u64,
    },
    /// This kernel has no huge pages: /sys/kernel/mm/hugepages cannot be read.
    NoHugePageSizes(#[source] io::Error),
    /// The memory cannot be had from the system.
    System(#[source] io::Error),
}

impl AllocateError {
    /// The code that the interface has for it, where it has one.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::NotMultiple(_) => Some(Code::INVALID_MEM_REGION_SIZE),
            Self::Empty => Some(Code::ENOMEM),
            Self::NoHugePages { .. } => Some(Code::ENOMEM),
            Self::NoHugePageSizes(_) | Self::System(_) => None,
        }
    }
}

/// Why bytes did not get into the memory.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum WriteImageError {
    /// The image has {image_bytes} bytes and begins at offset {offset}, which is more than the {memory_bytes} bytes of memory; give the enclave at least {needed_mib} MiB.
    TooLarge {
        /// Bytes of the image.
        image_bytes: u64,
        /// Where it begins, in bytes.
        offset: u64,
        /// Bytes of the memory.
        memory_bytes: u64,
        /// What would suffice, in MiB.
        needed_mib: u64,
    },
    /// The image ended after {read} of {expected} bytes; it was cut off or changed while it was read.
    TooShort {
        /// Bytes that came.
        read: u64,
        /// Bytes that were announced.
        expected: u64,
    },
    /// The image cannot be read.
    Read(#[source] io::Error),
    /// The memory cannot be written.
    Write(#[source] io::Error),
}

macro_rules! refusable {
    ($name:ident) => {
        impl $name {
            /// The exact code that the driver gave, if it was the driver who refused.
            #[must_use]
            pub fn code(&self) -> Option<Code> {
                self.refused().map(Refused::code)
            }

            /// What was said beyond the code.
            #[must_use]
            pub fn detail(&self) -> Option<&str> {
                self.refused().and_then(Refused::detail)
            }
        }
    };
}

/// Why there is no enclave.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum CreateError {
    /// {0}
    Refused(Refused),
    /// The driver gave the new enclave no number; a device that does so cannot be used.
    NoSlotUid,
    /// The enclave cannot get a descriptor from the system.
    System(#[source] io::Error),
}

impl CreateError {
    fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Refused(refused) => Some(refused),
            Self::NoSlotUid | Self::System(_) => None,
        }
    }
}

/// Why the enclave did not get the memory.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum AddMemoryError {
    /// {0}
    Refused(Refused),
    /// The memory was allocated from another device than the enclave's.
    OtherDevice,
}

impl AddMemoryError {
    fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Refused(refused) => Some(refused),
            Self::OtherDevice => None,
        }
    }
}

/// Why the enclave did not get the vCPU.
#[derive(Debug, Display, Error)]
pub enum AddVcpuError {
    /// {0}
    Refused(Refused),
}

impl AddVcpuError {
    fn refused(&self) -> Option<&Refused> {
        let Self::Refused(refused) = self;
        Some(refused)
    }
}

/// Why the driver does not say where the image belongs.
#[derive(Debug, Display, Error)]
pub enum ImageLoadInfoError {
    /// {0}
    Refused(Refused),
}

impl ImageLoadInfoError {
    fn refused(&self) -> Option<&Refused> {
        let Self::Refused(refused) = self;
        Some(refused)
    }
}

/// Why the enclave did not start.
#[derive(Debug, Display, Error)]
pub enum StartError {
    /// {0}
    Refused(Refused),
}

impl StartError {
    fn refused(&self) -> Option<&Refused> {
        let Self::Refused(refused) = self;
        Some(refused)
    }
}

refusable!(CreateError);
refusable!(AddMemoryError);
refusable!(AddVcpuError);
refusable!(ImageLoadInfoError);
refusable!(StartError);
