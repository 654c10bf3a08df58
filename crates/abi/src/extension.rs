//! Our own commands beside mainline's five: what a program can ask for, see and end (docs/abi.md, "The extension").
//!
//! All are `_IO(0xAE, nr)` words that take a pointer to a struct with its size first ([`crate::sized`]), so that growth never
//! changes a word. A driver without them answers ENOTTY, and that is the sign for "only the five". Fields are only appended;
//! an input of zero keeps its old meaning; output fields are ignored on input.

use crate::ioctl::{word, NONE};
use crate::wire::wire_struct;

/// NE_QUERY, on both descriptors: features, valid flags and limits ([`Query`]). No privilege, no device traffic.
pub const QUERY: u32 = word(NONE, 0x3F, 0);
/// NE_ENCLAVE_INFO, on the enclave's descriptor: its state and counters ([`EnclaveInfo`]).
pub const ENCLAVE_INFO: u32 = word(NONE, 0x3E, 0);
/// NE_LIST, on `/dev/nitro_enclaves`: one enclave per call, ascending by slot uid ([`List`]); ENOENT after the last.
pub const LIST: u32 = word(NONE, 0x3D, 0);
/// NE_STOP, on the enclave's descriptor: ends the enclave without closing it ([`Stop`]).
pub const STOP: u32 = word(NONE, 0x3C, 0);
/// NE_POOL_INFO, on `/dev/nitro_enclaves`: the CPU pool, normalised, and what is free of it ([`PoolInfo`]).
pub const POOL_INFO: u32 = word(NONE, 0x3B, 0);
/// NE_GET_API_VERSION as it was proposed in 2020, on both descriptors: returns [`API_VERSION`]; the argument is ignored.
pub const GET_API_VERSION: u32 = word(NONE, 0x20, 0);

/// The version of the extension: +1 with every addition. Only informational; decide by feature bits.
pub const API_VERSION: u32 = 1;

/// Values of [`Query::requested`] and [`Query::provided`].
pub mod group {
    /// `api_version`, `home`, `backend`, `isolation`, `commands`, `errata`, `features`.
    pub const IDENTITY: u64 = 1;
    /// `image_flags`, `memory_flags`, `start_flags`.
    pub const FLAGS: u64 = 1 << 1;
    /// Everything from `granule` on.
    pub const LIMITS: u64 = 1 << 2;
    /// All groups of this version.
    pub const ALL: u64 = IDENTITY | FLAGS | LIMITS;
}

/// Values of [`Query::home`]: where the driver lives.
pub mod home {
    /// A Linux kernel module.
    pub const KERNEL: u32 = 1;
    /// A supervisor that answers for an unmodified program in user space.
    pub const SUPERVISOR: u32 = 2;
    /// A library inside the program itself.
    pub const LIBRARY: u32 = 3;
}

/// Values of [`Query::backend`]: what runs the enclaves, as far as the driver knows.
pub mod backend {
    /// Not known, for instance because a kernel module cannot see behind its PCI device.
    pub const UNKNOWN: u32 = 0;
    /// A Nitro card.
    pub const NITRO: u32 = 1;
    /// A VM with hardware virtualisation.
    pub const KVM: u32 = 2;
    /// A VM whose instructions are emulated.
    pub const EMULATED: u32 = 3;
    /// Nothing: enclaves start and stop but no instruction runs.
    pub const NONE: u32 = 4;
}

/// Values of [`Query::isolation`]: what keeps the parent from reading an enclave.
pub mod isolation {
    /// Nothing that holds against the parent's administrator: for development.
    pub const NONE: u32 = 0;
    /// A hypervisor below parent and enclave.
    pub const HYPERVISOR: u32 = 1;
    /// Not known to the driver.
    pub const UNKNOWN: u32 = 2;
}

/// Bits of the first word of [`Query::features`].
pub mod feature {
    /// NE_ENCLAVE_INFO and NE_LIST answer exit reasons.
    pub const EXIT_REASON: u64 = 1;
    /// A failed stop or free is retried and shown, nothing is lost silently.
    pub const RECOVERY: u64 = 1 << 1;
}

/// Bits of [`Query::cid_flags`].
pub mod cid_flag {
    /// A CID that is in use is refused (EADDRINUSE).
    pub const UNIQUE: u32 = 1;
}

/// Values of [`EnclaveInfo::exit_reason`] and [`List::exit_reason`].
pub mod exit_reason {
    /// It has not ended, or was never started.
    pub const NONE: u32 = 0;
    /// It ended on its own.
    pub const ENDED: u32 = 1;
    /// NE_STOP ended it.
    pub const STOPPED: u32 = 2;
    /// The device was reset or removed.
    pub const DEVICE_GONE: u32 = 3;
}

/// Bits of [`List::trouble`]: an enclave that was closed but could not be given back yet.
pub mod trouble {
    /// Its last descriptor is closed.
    pub const CLOSED: u32 = 1;
    /// The device refused to stop it; this is retried.
    pub const STOP_FAILED: u32 = 1 << 1;
    /// The device refused to free its slot; this is retried.
    pub const FREE_FAILED: u32 = 1 << 2;
}

/// Values of [`EnclaveInfo::state`] and [`List::state`]; every other value is the device's own.
pub mod state {
    /// Being set up.
    pub const INIT: u32 = 0;
    /// Started.
    pub const RUNNING: u32 = 2;
    /// Ended.
    pub const STOPPED: u32 = 0xFFFF;
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
