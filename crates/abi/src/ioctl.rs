//! The five commands of mainline's driver: their words and structs, bit for bit (linux/nitro_enclaves.h of Linux 5.10 and later).
//!
//! Commands are recognised by the full 32-bit word, never by number alone: other drivers use the same numbers with other
//! sizes ([`crate::reserved`]). Our own commands are in [`crate::extension`].

use crate::table::commands;
use crate::wire::wire_struct;

/// The ioctl type byte of every command.
pub const MAGIC: u8 = 0xAE;

/// `_IOC_NONE`: no struct in the word.
pub(crate) const NONE: u32 = 0;
/// `_IOC_WRITE`: the kernel reads the argument.
pub(crate) const WRITE: u32 = 1;
/// `_IOC_READ`: the kernel writes the argument.
pub(crate) const READ: u32 = 2;

/// The asm-generic ioctl encoding, which x86-64 and arm64 share: direction, size, type, number.
pub(crate) const fn word(direction: u32, number: u8, size: u32) -> u32 {
    direction << 30 | size << 16 | (MAGIC as u32) << 8 | number as u32
}

commands! {
    CREATE_VM = READ, 0x20, 8, "NE_CREATE_VM", "__u64",
        "On /dev/nitro_enclaves: makes a slot, writes its number and returns the enclave's descriptor.";
    ADD_VCPU = READ | WRITE, 0x21, 4, "NE_ADD_VCPU", "__u32",
        "On the enclave's descriptor: adds the CPU that is given (0 for any of the pool) and writes which one it was.";
    GET_IMAGE_LOAD_INFO = READ | WRITE, 0x22, 16, "NE_GET_IMAGE_LOAD_INFO", "struct ne_image_load_info",
        "On the enclave's descriptor: tells where in the enclave's memory the image starts.";
    SET_USER_MEMORY_REGION = WRITE, 0x23, 24, "NE_SET_USER_MEMORY_REGION", "struct ne_user_memory_region",
        "On the enclave's descriptor: gives memory to the enclave.";
    START_ENCLAVE = READ | WRITE, 0x24, 16, "NE_START_ENCLAVE", "struct ne_enclave_start_info",
        "On the enclave's descriptor: starts the enclave and writes the CID that it has.";
}

wire_struct! {
    /// What kind of image is to be loaded, and where it has to be placed.
    pub struct ImageLoadInfo = "ne_image_load_info", 16 {
        /// In: the kind of image; only NE_EIF_IMAGE is valid.
        pub flags: u64,
        /// Out: bytes from the start of the enclave's memory to the start of the image.
        pub memory_offset: u64,
    }
}

wire_struct! {
    /// A range of the caller's memory that becomes the enclave's.
    pub struct UserMemoryRegion = "ne_user_memory_region", 24 {
        /// In: only NE_DEFAULT_MEMORY_REGION is valid.
        pub flags: u64,
        /// In: bytes, a multiple of 2 MiB.
        pub memory_size: u64,
        /// In: where the range starts in the caller's address space, a multiple of 2 MiB.
        pub userspace_addr: u64,
    }
}

wire_struct! {
    /// How the enclave is to be started.
    pub struct EnclaveStartInfo = "ne_enclave_start_info", 16 {
        /// In: NE_ENCLAVE_PRODUCTION_MODE or NE_ENCLAVE_DEBUG_MODE.
        pub flags: u64,
        /// In: the vsock CID wanted, 4 to 0xfffffffe, or 0 for any. Out: the CID that the enclave has.
        pub enclave_cid: u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words as a C compiler makes them from mainline's header.
    #[test]
    fn words_are_those_of_mainline() {
        assert_eq!(CREATE_VM, 0x8008_AE20);
        assert_eq!(ADD_VCPU, 0xC004_AE21);
        assert_eq!(GET_IMAGE_LOAD_INFO, 0xC010_AE22);
        assert_eq!(SET_USER_MEMORY_REGION, 0x4018_AE23);
        assert_eq!(START_ENCLAVE, 0xC010_AE24);
    }

    #[test]
    fn structs_survive_the_way_to_bytes_and_back() {
        let region = UserMemoryRegion { flags: 1, memory_size: 0x0020_0000, userspace_addr: 0x7fff_0000_0000 };
        let bytes = region.to_bytes();
        assert_eq!(bytes[8..16], [0, 0, 0x20, 0, 0, 0, 0, 0]);
        assert_eq!(UserMemoryRegion::from_bytes(&bytes), region);
        assert_eq!(UserMemoryRegion::from_prefix(&bytes[..23]), None);
    }
}
