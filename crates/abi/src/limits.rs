//! The numbers behind the interface that no struct carries (docs/abi.md, "Limits").

use crate::Cid;

/// Where the image starts in the enclave's memory, in bytes: 8 MiB.
pub const EIF_OFFSET: u64 = 8 << 20;
/// The smallest enclave, in bytes: 64 MiB.
pub const MIN_ENCLAVE_BYTES: u64 = 64 << 20;
/// Regions, addresses and pages are whole multiples of this many bytes: 2 MiB.
pub const GRANULE: u64 = 2 << 20;
/// The parent's vsock CID.
pub const PARENT_CID: Cid = Cid::PARENT;
/// The lowest CID an enclave can have: 0 to 3 mean other parties.
pub const MIN_ENCLAVE_CID: Cid = Cid(4);
/// The highest CID an enclave can have: the next one is vsock's "any".
pub const MAX_ENCLAVE_CID: Cid = Cid(u32::MAX - 1);
/// Bytes kept of the text written to `ne_cpus`, its closing NUL included.
pub const POOL_TEXT_BYTES: usize = 512;
/// How long a driver waits for the device's reply, in milliseconds.
pub const DEVICE_TIMEOUT_MS: u32 = 120_000;
