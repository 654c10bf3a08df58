//! Why an operation fails: one enum per operation, and one code per variant.
//!
//! The doc comment of a variant is its message. Codes are those of mainline in its order of checks (docs/driver.md).

use core::fmt;

use nitroxide_abi::{Code, CpuId};

use crate::device::DeviceError;

macro_rules! operation_error {
    ($(#[doc = $doc:literal])* pub enum $name:ident { $( #[doc = $text:literal] $variant:ident => $code:ident, )* }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name {
            $( #[doc = $text] $variant, )*
            /// The home could not do its part; this is its code.
            Home(Code),
            /// The device did not do it.
            Device(DeviceError),
        }

        impl $name {
            /// What the caller gets.
            #[must_use]
            pub fn code(self) -> Code {
                match self {
                    $( Self::$variant => Code::$code, )*
                    Self::Home(code) => code,
                    Self::Device(error) => error.code(),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $( Self::$variant => formatter.write_str(str::trim_ascii($text)), )*
                    Self::Home(code) => formatter.write_str(code.text()),
                    Self::Device(error) => fmt::Display::fmt(error, formatter),
                }
            }
        }

        impl core::error::Error for $name {}

        impl From<DeviceError> for $name {
            fn from(error: DeviceError) -> Self {
                Self::Device(error)
            }
        }

        impl From<$name> for Code {
            fn from(error: $name) -> Self {
                error.code()
            }
        }
    };
}

operation_error! {
    /// Why no slot was made.
    pub enum CreateError {
        /// The CPU pool is not set, or no core of it is free; free a core or enlarge the pool.
        NoCpus => NO_CPUS_AVAIL_IN_POOL,
        /// The device gave a slot number that cannot be used; the slot was refused.
        BadSlotUid => EIO,
    }
}

operation_error! {
    /// Why no vCPU was added.
    pub enum AddVcpuError {
        /// The enclave was already started.
        NotInit => NOT_IN_INIT_STATE,
        /// There is no CPU of this number.
        NoSuchCpu => INVALID_VCPU,
        /// This CPU is already a vCPU of the enclave.
        AlreadyUsed => VCPU_ALREADY_USED,
        /// This CPU is not in the pool, or its core is in use.
        NotInPool => VCPU_NOT_IN_CPU_POOL,
        /// No core of the pool is free.
        NoCpus => NO_CPUS_AVAIL_IN_POOL,
        /// Only the process that created the enclave may add vCPUs.
        NotOwner => EIO,
    }
}

operation_error! {
    /// Why there is no image load information.
    pub enum ImageLoadInfoError {
        /// The enclave was already started.
        NotInit => NOT_IN_INIT_STATE,
        /// The only valid flag is NE_EIF_IMAGE (1).
        BadFlags => INVALID_FLAG_VALUE,
    }
}

operation_error! {
    /// Why no memory was added.
    pub enum SetMemoryError {
        /// The only valid flag is NE_DEFAULT_MEMORY_REGION (0).
        BadFlags => INVALID_FLAG_VALUE,
        /// The enclave was already started.
        NotInit => NOT_IN_INIT_STATE,
        /// Only the process that created the enclave may add memory.
        NotOwner => EIO,
        /// The size is not a multiple of 2 MiB.
        BadSize => INVALID_MEM_REGION_SIZE,
        /// The address is not a multiple of 2 MiB.
        UnalignedAddress => UNALIGNED_MEM_REGION_ADDR,
        /// The range is not in the caller's address space.
        BadAddress => INVALID_MEM_REGION_ADDR,
        /// The range, or a page of it, already belongs to an enclave.
        AlreadyUsed => MEM_REGION_ALREADY_USED,
        /// A region of no size has no pages.
        Empty => ENOMEM,
        /// A page is not a huge page; map the memory with MAP_HUGETLB.
        NotHugePage => MEM_NOT_HUGE_PAGE,
        /// The range is not made of whole huge pages that are multiples of 2 MiB.
        BadPageSize => INVALID_PAGE_SIZE,
        /// A page is on another NUMA node than the CPU pool.
        OtherNode => MEM_DIFFERENT_NUMA_NODE,
        /// A page is not aligned in physical memory.
        UnalignedPage => EINVAL,
        /// The enclave would have more regions than the device takes; use larger or contiguous pages.
        TooManyRegions => MEM_MAX_REGIONS,
        /// The ledger of pages is full.
        LedgerFull => ENOMEM,
    }
}

operation_error! {
    /// Why the enclave did not start.
    pub enum StartError {
        /// The valid flags are NE_ENCLAVE_PRODUCTION_MODE (0) and NE_ENCLAVE_DEBUG_MODE (1).
        BadFlags => INVALID_FLAG_VALUE,
        /// The CID cannot be an enclave's; use 4 to 4294967294, or 0 for any.
        BadCid => INVALID_ENCLAVE_CID,
        /// The enclave was already started.
        NotInit => NOT_IN_INIT_STATE,
        /// The enclave has no memory yet.
        NoMemory => NO_MEM_REGIONS_ADDED,
        /// The enclave has less than 64 MiB of memory.
        TooLittleMemory => ENCLAVE_MEM_MIN_SIZE,
        /// The enclave has no vCPU yet.
        NoVcpus => NO_VCPUS_ADDED,
        /// A core of the enclave has threads that were not added; add all of them.
        HalfCore => FULL_CORES_NOT_USED,
    }
}

operation_error! {
    /// Why NE_STOP did not end the enclave.
    pub enum StopError {
        /// The enclave does not run.
        NotRunning => NOT_IN_RUNNING_STATE,
    }
}

/// Why a text is not a CPU pool. On every variant but [`PoolError::EnclavesExist`] the pool is empty afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PoolError {
    /// The pool cannot change while enclaves exist.
    EnclavesExist,
    /// The text is no cpulist.
    Syntax,
    /// A number does not fit into 32 bits.
    Overflow,
    /// A CPU number is larger than any that can exist.
    NoSuchCpu,
    /// The list names no CPU.
    Empty,
    /// A CPU is offline.
    Offline(CpuId),
    /// A CPU has no NUMA node, or another one than the first.
    OtherNode(CpuId),
    /// CPU 0 stays with the parent.
    CpuZero,
    /// A CPU shares its core with CPU 0.
    SiblingOfCpuZero(CpuId),
    /// A CPU's core is not in the list with all its threads; this thread is missing.
    HalfCore(CpuId),
    /// A CPU could not be taken offline.
    Hotplug(CpuId, Code),
    /// The text has 512 bytes or more.
    TextTooLong,
}

impl PoolError {
    /// What the writer of `ne_cpus` gets.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::EnclavesExist => Code::EPERM,
            Self::Overflow => Code::EOVERFLOW,
            Self::NoSuchCpu => Code::ERANGE,
            Self::Hotplug(_, code) => code,
            Self::TextTooLong => Code::ENOSPC,
            Self::Syntax
            | Self::Empty
            | Self::Offline(_)
            | Self::OtherNode(_)
            | Self::CpuZero
            | Self::SiblingOfCpuZero(_)
            | Self::HalfCore(_) => Code::EINVAL,
        }
    }
}

impl fmt::Display for PoolError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnclavesExist => formatter.write_str("Enclaves exist; end them before the pool is changed."),
            Self::Syntax => formatter.write_str("This is no CPU list; write it like `2-3,6-7`."),
            Self::Overflow => formatter.write_str("A CPU number does not fit into 32 bits."),
            Self::NoSuchCpu => formatter.write_str("A CPU number is larger than this machine can have."),
            Self::Empty => formatter.write_str("The list is empty: the pool is cleared, and no enclave can be created."),
            Self::Offline(cpu) => write!(formatter, "CPU {cpu} is offline; bring it online or leave it out."),
            Self::OtherNode(cpu) => write!(formatter, "CPU {cpu} is on another NUMA node; a pool has CPUs of one node."),
            Self::CpuZero => formatter.write_str("CPU 0 stays with the parent; leave it out."),
            Self::SiblingOfCpuZero(cpu) => {
                write!(formatter, "CPU {cpu} shares its core with CPU 0, which stays with the parent; leave it out.")
            }
            Self::HalfCore(cpu) => write!(formatter, "CPU {cpu} shares a core with a CPU of the list; add it, a pool has whole cores."),
            Self::Hotplug(cpu, code) => write!(formatter, "CPU {cpu} could not be taken offline: {code}."),
            Self::TextTooLong => formatter.write_str("The list has 512 bytes or more; write ranges."),
        }
    }
}

impl core::error::Error for PoolError {}

impl From<PoolError> for Code {
    fn from(error: PoolError) -> Self {
        error.code()
    }
}
