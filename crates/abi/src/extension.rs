//! Our own commands beside mainline's five: what a program can ask for, see and end (docs/abi.md, "The extension").
//!
//! All are `_IO(0xAE, nr)` words that take a pointer to a struct with its size first ([`crate::sized`]), so that growth never
//! changes a word. A driver without them answers ENOTTY, and that is the sign for "only the five". Fields are only appended;
//! an input of zero keeps its old meaning; output fields are ignored on input.

use crate::ioctl::NONE;
use crate::table::{commands, constants};
use crate::wire::wire_struct;

commands! {
    QUERY = NONE, 0x3F, 0, "NE_QUERY", "",
        "On both descriptors, struct ne_query: features, valid flags and limits. No privilege, no device traffic.";
    ENCLAVE_INFO = NONE, 0x3E, 0, "NE_ENCLAVE_INFO", "",
        "On the enclave's descriptor, struct ne_enclave_info: its state and counters. Never waits for the device.";
    LIST = NONE, 0x3D, 0, "NE_LIST", "",
        "On /dev/nitro_enclaves, struct ne_list: one enclave per call, ascending by slot number; ENOENT after the last.";
    STOP = NONE, 0x3C, 0, "NE_STOP", "",
        "On the enclave's descriptor, struct ne_stop: ends a running enclave without closing it.";
    POOL_INFO = NONE, 0x3B, 0, "NE_POOL_INFO", "",
        "On /dev/nitro_enclaves, struct ne_pool_info: the CPU pool, normalised, and what is free of it.";
    GET_API_VERSION = NONE, 0x20, 0, "NE_GET_API_VERSION", "",
        "On both descriptors: returns the version of this interface, as proposed in 2020; the argument is ignored. Informational: decide by NE_QUERY.";
}

/// The version of the extension: +1 with every addition. Only informational; decide by feature bits.
pub const API_VERSION: u32 = 1;

/// Values of [`Query::requested`] and [`Query::provided`].
pub mod group {
    use super::constants;

    constants! { u64:
        IDENTITY = 1, "NE_QUERY_IDENTITY", "api_version, home, backend, isolation, commands, errata, features.";
        FLAGS = 1 << 1, "NE_QUERY_FLAGS", "image_flags, memory_flags, start_flags.";
        LIMITS = 1 << 2, "NE_QUERY_LIMITS", "Everything from granule on.";
        EVERYTHING = IDENTITY | FLAGS | LIMITS, "NE_QUERY_EVERYTHING", "All groups of this version.";
    }
}

/// Values of [`Query::home`]: where the driver lives.
pub mod home {
    use super::constants;

    constants! { u32:
        KERNEL = 1, "NE_HOME_KERNEL", "A Linux kernel module.";
        SUPERVISOR = 2, "NE_HOME_SUPERVISOR", "A supervisor that answers for an unmodified program in user space.";
        LIBRARY = 3, "NE_HOME_LIBRARY", "A library inside the program itself.";
    }
}

/// Values of [`Query::backend`]: what runs the enclaves, as far as the driver knows.
pub mod backend {
    use super::constants;

    constants! { u32:
        UNKNOWN = 0, "NE_BACKEND_UNKNOWN", "Not known, for instance because a kernel module cannot see behind its PCI device.";
        NITRO = 1, "NE_BACKEND_NITRO", "A Nitro card.";
        KVM = 2, "NE_BACKEND_KVM", "A VM with hardware virtualisation.";
        EMULATED = 3, "NE_BACKEND_EMULATED", "A VM whose instructions are emulated.";
        NONE = 4, "NE_BACKEND_NONE", "Nothing: enclaves start and stop but no instruction runs.";
    }
}

/// Values of [`Query::isolation`]: what keeps the parent from reading an enclave.
pub mod isolation {
    use super::constants;

    constants! { u32:
        NONE = 0, "NE_ISOLATION_NONE", "Nothing that holds against the parent's administrator: for development.";
        HYPERVISOR = 1, "NE_ISOLATION_HYPERVISOR", "A hypervisor below parent and enclave.";
        UNKNOWN = 2, "NE_ISOLATION_UNKNOWN", "Not known to the driver.";
    }
}

/// Bits of the first word of [`Query::features`].
pub mod feature {
    use super::constants;

    constants! { u64:
        EXIT_REASON = 1, "NE_FEATURE_EXIT_REASON", "NE_ENCLAVE_INFO and NE_LIST answer exit reasons.";
        RECOVERY = 1 << 1, "NE_FEATURE_RECOVERY", "A failed stop or free is retried and shown, nothing is lost silently.";
    }
}

/// Bits of [`Query::cid_flags`].
pub mod cid_flag {
    use super::constants;

    constants! { u32:
        UNIQUE = 1, "NE_CID_UNIQUE", "A CID that is in use is refused (EADDRINUSE).";
    }
}

/// Values of [`EnclaveInfo::exit_reason`] and [`List::exit_reason`].
pub mod exit_reason {
    use super::constants;

    constants! { u32:
        NONE = 0, "NE_EXIT_NONE", "It has not ended, or was never started.";
        ENDED = 1, "NE_EXIT_ENDED", "It ended on its own.";
        STOPPED = 2, "NE_EXIT_STOPPED", "NE_STOP ended it.";
        DEVICE_GONE = 3, "NE_EXIT_DEVICE_GONE", "The device was reset or removed.";
    }
}

/// Bits of [`List::trouble`]: an enclave that was closed but could not be given back yet.
pub mod trouble {
    use super::constants;

    constants! { u32:
        CLOSED = 1, "NE_TROUBLE_CLOSED", "Its last descriptor is closed.";
        STOP_FAILED = 1 << 1, "NE_TROUBLE_STOP_FAILED", "The device refused to stop it; this is retried.";
        FREE_FAILED = 1 << 2, "NE_TROUBLE_FREE_FAILED", "The device refused to free its slot; this is retried.";
    }
}

/// Values of [`EnclaveInfo::state`] and [`List::state`]; every other value is the device's own.
pub mod state {
    use super::constants;

    constants! { u32:
        INIT = 0, "NE_STATE_INIT", "Being set up.";
        RUNNING = 2, "NE_STATE_RUNNING", "Started.";
        STOPPED = 0xFFFF, "NE_STATE_STOPPED", "Ended.";
    }
}

wire_struct! {
    /// NE_QUERY: what this driver can do.
    pub struct Query = "ne_query", 152 {
        /// In: bytes of the struct. Out: bytes that were filled.
        pub size: u32,
        /// In: must be 0.
        pub flags: u32,
        /// In: NE_QUERY_* groups that are wanted; 0 for all. Unknown groups are ignored.
        pub requested: u64,
        /// Out: the groups that were filled.
        pub provided: u64,
        /// Out: version of this interface, informational.
        pub api_version: u32,
        /// Out: NE_HOME_*, where the driver lives.
        pub home: u32,
        /// Out: NE_BACKEND_*, what runs the enclaves.
        pub backend: u32,
        /// Out: NE_ISOLATION_*, what protects an enclave from the parent.
        pub isolation: u32,
        /// Out: bit n is set if the command of number 0x20 + n answers.
        pub commands: u64,
        /// Out: bit n is set if weakness W(n+1) of the original driver is mended here.
        pub errata: u64,
        /// Out: NE_FEATURE_* bits.
        pub features: [u64; 2],
        /// Out: valid bits of ne_image_load_info.flags.
        pub image_flags: u64,
        /// Out: valid bits of ne_user_memory_region.flags.
        pub memory_flags: u64,
        /// Out: valid bits of ne_enclave_start_info.flags.
        pub start_flags: u64,
        /// Out: bytes; sizes and addresses of regions are multiples of it.
        pub granule: u64,
        /// Out: bytes; the smallest enclave.
        pub min_memory: u64,
        /// Out: bytes; where the image starts.
        pub eif_offset: u64,
        /// Out: most memory regions of one enclave; 0 where that is not known (no enclave yet).
        pub max_regions: u32,
        /// Out: CPUs in the pool.
        pub max_vcpus: u32,
        /// Out: threads of the pool's first core; 0 without a pool.
        pub threads_per_core: u32,
        /// Out: NUMA node of the pool; -1 without a pool.
        pub numa_node: i32,
        /// Out: lowest CID that an enclave can ask for.
        pub min_cid: u32,
        /// Out: highest CID that an enclave can ask for.
        pub max_cid: u32,
        /// Out: NE_CID_* bits.
        pub cid_flags: u32,
        /// In: must be 0.
        pub reserved: u32,
    }
}

wire_struct! {
    /// NE_ENCLAVE_INFO: one enclave's state and counters.
    pub struct EnclaveInfo = "ne_enclave_info", 120 {
        /// In: bytes of the struct. Out: bytes that were filled.
        pub size: u32,
        /// In: must be 0.
        pub flags: u32,
        /// Out: the slot's number.
        pub slot_uid: u64,
        /// Out: the CID; 0 before the start.
        pub enclave_cid: u64,
        /// Out: flags it was started with.
        pub start_flags: u64,
        /// Out: NE_STATE_*, or the device's own value.
        pub state: u32,
        /// Out: NE_EXIT_*, why it ended.
        pub exit_reason: u32,
        /// Out: the device's last refusal as it came (negative); 0 if there was none.
        pub device_rc: i32,
        /// Out: vCPUs added.
        pub vcpus: u32,
        /// Out: bytes given to the enclave.
        pub memory_size: u64,
        /// Out: physically contiguous runs given to the device.
        pub regions: u32,
        /// Out: most runs that the device takes.
        pub max_regions: u32,
        /// Out: nanoseconds since boot when it was created.
        pub created_ns: u64,
        /// Out: nanoseconds since boot when it was started; 0 before.
        pub started_ns: u64,
        /// Out: nanoseconds since boot when its end was noticed; 0 before.
        pub ended_ns: u64,
        /// Out: commands sent to the device for it.
        pub device_commands: u64,
        /// Out: commands that the device refused.
        pub device_refusals: u64,
        /// Out: commands that the device did not answer in time.
        pub device_timeouts: u64,
        /// Out: device events that this enclave looked at.
        pub events: u64,
    }
}

wire_struct! {
    /// NE_LIST: one enclave of the caller (of everyone, with CAP_SYS_ADMIN).
    pub struct List = "ne_list", 72 {
        /// In: bytes of the struct. Out: bytes that were filled.
        pub size: u32,
        /// In: must be 0.
        pub flags: u32,
        /// In: slot uid of the enclave before; 0 for the first. Out: slot_uid, ready for the next call.
        pub cursor: u64,
        /// Out: the slot's number.
        pub slot_uid: u64,
        /// Out: the CID; 0 before the start.
        pub enclave_cid: u64,
        /// Out: flags it was started with.
        pub start_flags: u64,
        /// Out: NE_STATE_*, or the device's own value.
        pub state: u32,
        /// Out: NE_EXIT_*, why it ended.
        pub exit_reason: u32,
        /// Out: bytes given to the enclave.
        pub memory_size: u64,
        /// Out: vCPUs added.
        pub vcpus: u32,
        /// Out: user id of the creator, as the caller's user namespace sees it.
        pub owner_uid: u32,
        /// Out: process id of the creator, as the caller's pid namespace sees it; 0 if it cannot.
        pub owner_pid: u32,
        /// Out: NE_TROUBLE_* bits.
        pub trouble: u32,
    }
}

wire_struct! {
    /// NE_STOP: ends a running enclave; its descriptor stays and reports POLLHUP.
    pub struct Stop = "ne_stop", 8 {
        /// In: bytes of the struct. Out: bytes that were filled.
        pub size: u32,
        /// In: must be 0.
        pub flags: u32,
    }
}

wire_struct! {
    /// NE_POOL_INFO: the CPU pool through a window of 1024 CPUs.
    pub struct PoolInfo = "ne_pool_info", 296 {
        /// In: bytes of the struct. Out: bytes that were filled.
        pub size: u32,
        /// In: must be 0.
        pub flags: u32,
        /// Out: NUMA node of the pool; -1 without a pool.
        pub numa_node: i32,
        /// Out: threads of the pool's first core; 0 without a pool.
        pub threads_per_core: u32,
        /// Out: cores in the pool.
        pub cores: u32,
        /// Out: cores that no enclave has.
        pub free_cores: u32,
        /// Out: CPUs in the pool.
        pub cpus: u32,
        /// Out: CPUs of free cores.
        pub free_cpus: u32,
        /// In: the CPU that bit 0 of the masks stands for, a multiple of 64.
        pub first_cpu: u32,
        /// In: must be 0.
        pub reserved: u32,
        /// Out: bit n of word w is set if CPU first_cpu + 64w + n is in the pool.
        pub pool_mask: [u64; 16],
        /// Out: the same for CPUs that no enclave has.
        pub free_mask: [u64; 16],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_documented_ones() {
        assert_eq!([QUERY, ENCLAVE_INFO, LIST, STOP, POOL_INFO], [0xAE3F, 0xAE3E, 0xAE3D, 0xAE3C, 0xAE3B]);
        assert_eq!(GET_API_VERSION, 0xAE20);
    }

    #[test]
    fn every_struct_begins_with_size_and_flags() {
        for fields in [Query::FIELDS, EnclaveInfo::FIELDS, List::FIELDS, Stop::FIELDS, PoolInfo::FIELDS] {
            assert_eq!((fields[0].name, fields[0].offset, fields[0].size), ("size", 0, 4));
            assert_eq!((fields[1].name, fields[1].offset, fields[1].size), ("flags", 4, 4));
        }
    }
}
