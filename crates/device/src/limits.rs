//! How much the device lets a driver have.

/// What one device gives away at most. All numbers are freely configurable; the defaults suit a development machine.
///
/// The figures that a real Nitro device has are not public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Slots that may be allocated at one time; SLOT_ALLOC beyond it gives ENOSPC.
    pub max_slots: u32,
    /// Pieces of memory one slot may have, told to the driver in the reply to SLOT_ALLOC; SLOT_ADD_MEM beyond it gives
    /// `NE_ERR_MEM_MAX_REGIONS`.
    pub max_regions: u32,
    /// vCPUs one slot may have; SLOT_ADD_VCPU and SLOT_ADD_BULK_VCPUS beyond it give ENOSPC.
    pub max_vcpus: u32,
    /// Bytes of memory that all slots together may have; SLOT_ADD_MEM beyond it gives ENOMEM.
    pub max_memory_bytes: u64,
}

impl Default for Limits {
    /// 64 slots, 4096 regions, 256 vCPUs, memory without a limit of its own.
    ///
    /// 4096 regions are 8 GiB of 2 MiB pages of which no two are adjacent. That is no rare case: pages that were in use before come back in
    /// descending order, which Linux' driver does not merge (96 MiB were 48 regions when measured, with kernel 7.3.4), and the kernel's own sample
    /// client adds 256 regions in any case. A region costs the device some tens of bytes, so the limit bounds bookkeeping, not memory. 256
    /// vCPUs: more than that no VM that the engine starts can have.
    fn default() -> Self {
        Self { max_slots: 64, max_regions: 4096, max_vcpus: 256, max_memory_bytes: u64::MAX }
    }
}
