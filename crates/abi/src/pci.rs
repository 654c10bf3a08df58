//! The PCI device 1d0f:e4c1: what stands in BAR 3, the eleven commands, their requests, and the 72-byte [`Reply`].
//!
//! The driver writes a request to [`REQUEST`], then the command's number to [`COMMAND`]; the device answers in [`REPLY`] and
//! raises vector [`VECTOR_REPLY`]. Events come as vector [`VECTOR_EVENT`] and carry nothing (docs/abi.md, "The PCI device").

use crate::wire::wire_struct;

/// PCI vendor id.
pub const VENDOR_ID: u16 = 0x1d0f;
/// PCI device id.
pub const DEVICE_ID: u16 = 0xe4c1;
/// The BAR that holds the registers.
pub const BAR: u8 = 3;
/// MSI-X vector of replies.
pub const VECTOR_REPLY: u16 = 0;
/// MSI-X vector of events.
pub const VECTOR_EVENT: u16 = 1;
/// Vectors that a device has at least.
pub const MIN_VECTORS: u16 = 2;

/// Register: 1 byte, 0 off, 1 on.
pub const ENABLE: u64 = 0x000;
/// Register: 2 bytes, interface version; only [`VERSION_ONE`] exists.
pub const VERSION: u64 = 0x002;
/// Register: 4 bytes, writing a command's number starts it.
pub const COMMAND: u64 = 0x004;
/// Register: 4 bytes, low half counts replies, high half events ([`EventCounter`]).
pub const EVENT_COUNTER: u64 = 0x00c;
/// Window for requests: [`WINDOW_BYTES`].
pub const REQUEST: u64 = 0x010;
/// Window for replies: [`WINDOW_BYTES`].
pub const REPLY: u64 = 0x100;
/// Bytes of each window.
pub const WINDOW_BYTES: usize = 240;
/// Bytes of the BAR that are in use; a device offers a page.
pub const REGISTER_BYTES: u64 = 0x1f0;
/// Value of [`ENABLE`]: off. Every slot is freed.
pub const DISABLED: u8 = 0;
/// Value of [`ENABLE`]: on.
pub const ENABLED: u8 = 1;
/// The only value of [`VERSION`].
pub const VERSION_ONE: u16 = 1;

/// The two counters of register [`EVENT_COUNTER`]; both wrap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EventCounter {
    /// Replies since the device was made.
    pub replies: u16,
    /// Events since the device was made.
    pub events: u16,
}

impl EventCounter {
    /// The counters as the register holds them.
    #[must_use]
    pub fn to_register(self) -> u32 {
        u32::from(self.events) << 16 | u32::from(self.replies)
    }

    /// The counters of a register value.
    #[must_use]
    pub fn from_register(value: u32) -> Self {
        let [a, b, c, d] = value.to_le_bytes();
        Self { replies: u16::from_le_bytes([a, b]), events: u16::from_le_bytes([c, d]) }
    }
}

/// A command by name; its number is what [`COMMAND`] takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Command {
    /// Starts an enclave ([`EnclaveStart`]).
    EnclaveStart = 1,
    /// Finds a slot by its CID ([`EnclaveGetSlot`]).
    EnclaveGetSlot = 2,
    /// Stops an enclave ([`EnclaveStop`]).
    EnclaveStop = 3,
    /// Makes a slot ([`SlotAlloc`]).
    SlotAlloc = 4,
    /// Frees a slot and everything in it ([`SlotFree`]).
    SlotFree = 5,
    /// Gives one contiguous run of memory to a slot ([`SlotAddMem`]).
    SlotAddMem = 6,
    /// Gives one CPU to a slot ([`SlotAddVcpu`]).
    SlotAddVcpu = 7,
    /// Counts the slots ([`SlotCount`]).
    SlotCount = 8,
    /// Walks over the slots ([`NextSlot`]).
    NextSlot = 9,
    /// Tells a slot's state ([`SlotInfo`]).
    SlotInfo = 10,
    /// Gives several CPUs to a slot ([`SlotAddBulkVcpus`]).
    SlotAddBulkVcpus = 11,
}

impl Command {
    /// All commands, ascending.
    pub const ALL: [Self; 11] = [
        Self::EnclaveStart,
        Self::EnclaveGetSlot,
        Self::EnclaveStop,
        Self::SlotAlloc,
        Self::SlotFree,
        Self::SlotAddMem,
        Self::SlotAddVcpu,
        Self::SlotCount,
        Self::NextSlot,
        Self::SlotInfo,
        Self::SlotAddBulkVcpus,
    ];

    /// The command of this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|command| command.number() == number)
    }

    /// The number that the command register takes.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// Bytes of its request; a device reads no more.
    #[must_use]
    pub const fn request_bytes(self) -> usize {
        match self {
            Self::EnclaveStart => EnclaveStart::SIZE,
            Self::EnclaveGetSlot => EnclaveGetSlot::SIZE,
            Self::EnclaveStop => EnclaveStop::SIZE,
            Self::SlotAlloc => SlotAlloc::SIZE,
            Self::SlotFree => SlotFree::SIZE,
            Self::SlotAddMem => SlotAddMem::SIZE,
            Self::SlotAddVcpu => SlotAddVcpu::SIZE,
            Self::SlotCount => SlotCount::SIZE,
            Self::NextSlot => NextSlot::SIZE,
            Self::SlotInfo => SlotInfo::SIZE,
            Self::SlotAddBulkVcpus => SlotAddBulkVcpus::SIZE,
        }
    }

    /// Its name as in the driver's documents, e.g. `SLOT_ADD_MEM`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EnclaveStart => "ENCLAVE_START",
            Self::EnclaveGetSlot => "ENCLAVE_GET_SLOT",
            Self::EnclaveStop => "ENCLAVE_STOP",
            Self::SlotAlloc => "SLOT_ALLOC",
            Self::SlotFree => "SLOT_FREE",
            Self::SlotAddMem => "SLOT_ADD_MEM",
            Self::SlotAddVcpu => "SLOT_ADD_VCPU",
            Self::SlotCount => "SLOT_COUNT",
            Self::NextSlot => "NEXT_SLOT",
            Self::SlotInfo => "SLOT_INFO",
            Self::SlotAddBulkVcpus => "SLOT_ADD_BULK_VCPUS",
        }
    }
}

wire_struct! {
    /// Request of ENCLAVE_START.
    pub struct EnclaveStart = "enclave_start_req", 24 {
        /// The slot.
        pub slot_uid: u64,
        /// The CID wanted; 0 lets the device choose.
        pub enclave_cid: u64,
        /// Start flags, as in the ioctl.
        pub flags: u64,
    }
}

wire_struct! {
    /// Request of ENCLAVE_GET_SLOT.
    pub struct EnclaveGetSlot = "enclave_get_slot_req", 8 {
        /// The CID.
        pub enclave_cid: u64,
    }
}

wire_struct! {
    /// Request of ENCLAVE_STOP.
    pub struct EnclaveStop = "enclave_stop_req", 8 {
        /// The slot.
        pub slot_uid: u64,
    }
}

wire_struct! {
    /// Request of SLOT_ALLOC: one byte. The rest of the window is stale and must not be read.
    pub struct SlotAlloc = "slot_alloc_req", 1 {
        /// 0; the second generation reads it as the version of a longer request.
        pub unused: u8,
    }
}

wire_struct! {
    /// Request of SLOT_FREE.
    pub struct SlotFree = "slot_free_req", 8 {
        /// The slot.
        pub slot_uid: u64,
    }
}

wire_struct! {
    /// Request of SLOT_ADD_MEM.
    pub struct SlotAddMem = "slot_add_mem_req", 24 {
        /// The slot.
        pub slot_uid: u64,
        /// Physical address of the run, a multiple of 2 MiB.
        pub paddr: u64,
        /// Bytes of the run, a multiple of 2 MiB.
        pub size: u64,
    }
}

wire_struct! {
    /// Request of SLOT_ADD_VCPU.
    pub struct SlotAddVcpu = "slot_add_vcpu_req", 16 {
        /// The slot.
        pub slot_uid: u64,
        /// The Linux CPU number.
        pub vcpu_id: u32,
        /// 0.
        pub padding: u32,
    }
}

wire_struct! {
    /// Request of SLOT_COUNT.
    pub struct SlotCount = "slot_count_req", 1 {
        /// 0.
        pub unused: u8,
    }
}

wire_struct! {
    /// Request of NEXT_SLOT.
    pub struct NextSlot = "next_slot_req", 8 {
        /// The slot before; 0 for the first.
        pub slot_uid: u64,
    }
}

wire_struct! {
    /// Request of SLOT_INFO.
    pub struct SlotInfo = "slot_info_req", 8 {
        /// The slot.
        pub slot_uid: u64,
    }
}

wire_struct! {
    /// Request of SLOT_ADD_BULK_VCPUS.
    pub struct SlotAddBulkVcpus = "slot_add_bulk_vcpus_req", 16 {
        /// The slot.
        pub slot_uid: u64,
        /// How many.
        pub nr_vcpus: u64,
    }
}

wire_struct! {
    /// The device's answer to any command.
    pub struct Reply = "ne_pci_dev_cmd_reply", 72 {
        /// 0 or positive: done; negative: refused.
        pub rc: i32,
        /// 0.
        pub padding: u32,
        /// The slot; all commands but SLOT_COUNT.
        pub slot_uid: u64,
        /// The CID; ENCLAVE_START.
        pub enclave_cid: u64,
        /// Slots; SLOT_COUNT.
        pub slot_count: u64,
        /// Memory regions: SLOT_ALLOC how many there may be, SLOT_INFO how many there are.
        pub mem_regions: u64,
        /// Bytes of memory; SLOT_INFO.
        pub mem_size: u64,
        /// vCPUs; SLOT_INFO.
        pub nr_vcpus: u64,
        /// Start flags; SLOT_INFO.
        pub flags: u64,
        /// The enclave's state, one of [`state`]; SLOT_INFO.
        pub state: u16,
        /// 0.
        pub padding_end: [u8; 6],
    }
}

/// Values of [`Reply::state`]; others may occur.
pub mod state {
    /// Being set up.
    pub const INIT: u16 = 0;
    /// Started.
    pub const RUNNING: u16 = 2;
    /// Ended.
    pub const STOPPED: u16 = 0xFFFF;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_fields_are_where_the_device_puts_them() {
        let offsets: [usize; 9] = [0, 8, 16, 24, 32, 40, 48, 56, 64];
        let named = ["rc", "slot_uid", "enclave_cid", "slot_count", "mem_regions", "mem_size", "nr_vcpus", "flags", "state"];
        for (name, offset) in named.into_iter().zip(offsets) {
            assert!(Reply::FIELDS.iter().any(|field| field.name == name && field.offset == offset), "{name}");
        }
    }

    #[test]
    fn requests_have_the_documented_sizes() {
        assert_eq!(Command::ALL.map(Command::request_bytes), [24, 8, 8, 1, 8, 24, 16, 1, 8, 8, 16]);
        assert_eq!(Command::ALL.map(Command::number), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(Command::from_number(0), None);
        assert_eq!(Command::from_number(12), None);
    }

    #[test]
    fn counters_are_two_halves() {
        let counter = EventCounter { replies: 0x1234, events: 0xabcd };
        assert_eq!(counter.to_register(), 0xabcd_1234);
        assert_eq!(EventCounter::from_register(0xabcd_1234), counter);
    }
}
