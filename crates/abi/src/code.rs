//! Every code that a call of this interface can answer: [`Code`], its name and a text that says what to do.
//!
//! 256 to 275 are mainline's, 276 is the second generation's and ours in the same meaning. New codes of ours would lie in 300 to
//! 511 (docs/ioctl-number.md); there are none yet. Below 134 are Linux' own errnos, of which only those used here have a constant.

use core::fmt;

/// A code as user space sees it in `errno`: positive, 1 to 511.
///
/// Having one proves that it is in that range, not that it has a name: a device may answer any Linux errno.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(i32);

/// One row of the table: the number, its C name, and what it means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The code.
    pub code: Code,
    /// Its C name.
    pub name: &'static str,
    /// One sentence: what happened, and what to do where that is not obvious.
    pub text: &'static str,
}

macro_rules! codes {
    ($table:ident, $table_doc:literal: $( $name:ident = $number:literal, $c_name:literal, $text:literal; )*) => {
        impl Code {
            $( #[doc = concat!($c_name, " (", $number, "): ", $text)] pub const $name: Self = Self($number); )*
        }
        #[doc = $table_doc]
        pub const $table: &[Entry] = &[ $( Entry { code: Code::$name, name: $c_name, text: $text }, )* ];
    };
}

codes! { NE_CODES, "The codes of the Nitro Enclaves interface, ascending.":
    VCPU_ALREADY_USED = 256, "NE_ERR_VCPU_ALREADY_USED", "This CPU is already a vCPU of the enclave.";
    VCPU_NOT_IN_CPU_POOL = 257, "NE_ERR_VCPU_NOT_IN_CPU_POOL", "This CPU is not in the pool, or another enclave has its core.";
    VCPU_INVALID_CPU_CORE = 258, "NE_ERR_VCPU_INVALID_CPU_CORE", "The core of this CPU is not one that the pool knows.";
    INVALID_MEM_REGION_SIZE = 259, "NE_ERR_INVALID_MEM_REGION_SIZE", "The size of a memory region must be a multiple of 2 MiB.";
    INVALID_MEM_REGION_ADDR = 260, "NE_ERR_INVALID_MEM_REGION_ADDR", "The memory region is not in the caller's address space.";
    UNALIGNED_MEM_REGION_ADDR = 261, "NE_ERR_UNALIGNED_MEM_REGION_ADDR", "The address of a memory region must be a multiple of 2 MiB.";
    MEM_REGION_ALREADY_USED = 262, "NE_ERR_MEM_REGION_ALREADY_USED", "This memory already belongs to an enclave.";
    MEM_NOT_HUGE_PAGE = 263, "NE_ERR_MEM_NOT_HUGE_PAGE", "The memory is not made of huge pages; map it with MAP_HUGETLB.";
    MEM_DIFFERENT_NUMA_NODE = 264, "NE_ERR_MEM_DIFFERENT_NUMA_NODE", "The memory is on another NUMA node than the CPU pool.";
    MEM_MAX_REGIONS = 265, "NE_ERR_MEM_MAX_REGIONS", "The enclave has as many memory regions as the device allows; use larger pages.";
    NO_MEM_REGIONS_ADDED = 266, "NE_ERR_NO_MEM_REGIONS_ADDED", "The enclave has no memory yet.";
    NO_VCPUS_ADDED = 267, "NE_ERR_NO_VCPUS_ADDED", "The enclave has no vCPU yet.";
    ENCLAVE_MEM_MIN_SIZE = 268, "NE_ERR_ENCLAVE_MEM_MIN_SIZE", "The enclave has less than 64 MiB of memory.";
    FULL_CORES_NOT_USED = 269, "NE_ERR_FULL_CORES_NOT_USED", "A core of the enclave has threads that were not added; add all of them.";
    NOT_IN_INIT_STATE = 270, "NE_ERR_NOT_IN_INIT_STATE", "The enclave was already started.";
    INVALID_VCPU = 271, "NE_ERR_INVALID_VCPU", "There is no CPU of this number.";
    NO_CPUS_AVAIL_IN_POOL = 272, "NE_ERR_NO_CPUS_AVAIL_IN_POOL", "The CPU pool is not set, or all of it is in use.";
    INVALID_PAGE_SIZE = 273, "NE_ERR_INVALID_PAGE_SIZE", "The region is not made of whole huge pages that are multiples of 2 MiB.";
    INVALID_FLAG_VALUE = 274, "NE_ERR_INVALID_FLAG_VALUE", "A flag has no meaning here.";
    INVALID_ENCLAVE_CID = 275, "NE_ERR_INVALID_ENCLAVE_CID", "This CID cannot be an enclave's; use 4 to 4294967294, or 0 for any.";
    NOT_IN_RUNNING_STATE = 276, "NE_ERR_NOT_IN_RUNNING_STATE", "The enclave does not run.";
}

codes! { ERRNOS, "The Linux errnos that this project answers or explains, ascending.":
    EPERM = 1, "EPERM", "This is not permitted, or enclaves exist that forbid it now.";
    ENOENT = 2, "ENOENT", "There is nothing of this name or number.";
    EINTR = 4, "EINTR", "The call was interrupted.";
    EIO = 5, "EIO", "The device failed, or another process than the enclave's creator calls.";
    ENXIO = 6, "ENXIO", "There is no such device or address.";
    E2BIG = 7, "E2BIG", "The struct asks for more than this implementation knows.";
    EBADF = 9, "EBADF", "The descriptor is not open.";
    EAGAIN = 11, "EAGAIN", "The device is busy; try again.";
    ENOMEM = 12, "ENOMEM", "There is not enough memory, or none was asked for.";
    EACCES = 13, "EACCES", "Access is denied.";
    EFAULT = 14, "EFAULT", "An address is not the caller's, or its memory has the wrong protection.";
    EBUSY = 16, "EBUSY", "It is in use.";
    EEXIST = 17, "EEXIST", "It exists already.";
    ENODEV = 19, "ENODEV", "The Nitro Enclaves device is gone.";
    EINVAL = 22, "EINVAL", "An argument is not valid.";
    ENFILE = 23, "ENFILE", "The system has too many open files.";
    EMFILE = 24, "EMFILE", "The process has too many open files.";
    ENOTTY = 25, "ENOTTY", "This descriptor has no such command.";
    ENOSPC = 28, "ENOSPC", "The device has no room left, or the text is too long.";
    ERANGE = 34, "ERANGE", "A number is too large here.";
    ENOSYS = 38, "ENOSYS", "There is no such function.";
    EOVERFLOW = 75, "EOVERFLOW", "A number does not fit.";
    ERESTART = 85, "ERESTART", "The call should be restarted.";
    EOPNOTSUPP = 95, "EOPNOTSUPP", "This is known but not supported here.";
    EADDRINUSE = 98, "EADDRINUSE", "The CID is in use; choose another or 0.";
    ETIMEDOUT = 110, "ETIMEDOUT", "The device did not answer in time.";
}

impl Code {
    /// The code of this number, if it lies in 1 to 511.
    #[must_use]
    pub const fn new(number: i32) -> Option<Self> {
        if number >= 1 && number <= 511 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The positive number, as in `errno`.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }

    /// The negative number, as a kernel function or the device returns it.
    #[must_use]
    #[inline]
    pub const fn negative(self) -> i32 {
        -self.0
    }

    /// The C name (`NE_ERR_...` or `E...`), or `"unknown"`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.entry().map_or("unknown", |entry| entry.name)
    }

    /// What it means and, where that is not obvious, what to do: one sentence.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.entry().map_or("An error that this interface has no text for.", |entry| entry.text)
    }

    fn entry(self) -> Option<&'static Entry> {
        NE_CODES.iter().chain(ERRNOS).find(|entry| entry.code == self)
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({})", self.name(), self.0)
    }
}

impl core::error::Error for Code {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ne_codes_are_256_to_276_without_a_gap() {
        assert!(NE_CODES.iter().map(|entry| entry.code.number()).eq(256..=276));
    }

    #[test]
    fn errnos_are_ascending_and_linux_errnos() {
        assert!(ERRNOS.windows(2).all(|pair| pair[0].code < pair[1].code));
        assert!(ERRNOS.iter().all(|entry| entry.code.number() <= 133));
    }

    #[test]
    fn every_text_is_a_sentence() {
        for entry in NE_CODES.iter().chain(ERRNOS) {
            assert!(entry.text.ends_with('.') && entry.text.starts_with(char::is_uppercase), "{}", entry.name);
        }
    }

    #[test]
    fn only_1_to_511_is_a_code() {
        assert_eq!(Code::new(0), None);
        assert_eq!(Code::new(512), None);
        assert_eq!(Code::new(-22), None);
        assert_eq!(Code::new(22), Some(Code::EINVAL));
        assert_eq!(Code::new(400).map(Code::name), Some("unknown"));
    }
}
