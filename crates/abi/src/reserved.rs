//! Numbers that others use or used, recorded so that we never give them a second meaning.
//!
//! Most belong to a second generation of the driver that ships in one vendor's kernels (commands 0x25 to 0x30). This project
//! does not implement it: its words answer ENOTTY. The words of 2020's drafts are here too, so that `doctor` can name an old
//! binary. The range and who has what of it: docs/ioctl-number.md.

/// A command word of someone else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Word {
    /// The full 32-bit word.
    pub word: u32,
    /// Its name where it comes from.
    pub name: &'static str,
}

/// A numbered thing of someone else: a code, a register, a device command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Number {
    /// The number.
    pub number: u32,
    /// Its name where it comes from.
    pub name: &'static str,
}

const fn word(word: u32, name: &'static str) -> Word {
    Word { word, name }
}

const fn number(number: u32, name: &'static str) -> Number {
    Number { number, name }
}

/// The second generation's ioctl words.
pub const SECOND_GENERATION_WORDS: [Word; 10] = [
    word(0x4010_AE25, "NE_SET_INFO_PAGE"),
    word(0xC368_AE26, "NE_ADD_DEVICE"),
    word(0x4010_AE27, "NE_SET_VRING_CALL"),
    word(0x4010_AE28, "NE_SET_VRING_KICK"),
    word(0x8004_AE29, "NE_GET_SUPPORTED_FLAGS"),
    word(0x4008_AE2A, "NE_ACCOUNT_VCPU"),
    word(0x4008_AE2B, "NE_SET_INFO_EVENT_FD"),
    word(0x4050_AE2C, "NE_UPDATE_DEVICE_CONFIG"),
    word(0x4004_AE2D, "NE_ADD_ANY_VCPU"),
    word(0xC010_AE30, "NE_CREATE_VM2"),
];

/// Words of the drafts of 2020, before the numbers were settled.
pub const DRAFT_WORDS: [Word; 12] = [
    word(0xC020_4201, "loader ioctl of driver 0.2, with token"),
    word(0xC018_4201, "loader ioctl of driver 0.2"),
    word(0x0000_AE01, "KVM_CREATE_VM (v3)"),
    word(0x0000_AE41, "KVM_CREATE_VCPU (v3)"),
    word(0x4020_AE46, "KVM_SET_USER_MEMORY_REGION (v3)"),
    word(0xC010_AE20, "NE_GET_IMAGE_LOAD_METADATA (v3)"),
    word(0xC018_AE21, "NE_START_ENCLAVE (v3)"),
    word(0x8008_AE21, "NE_CREATE_VM (v4, v5)"),
    word(0xC004_AE22, "NE_CREATE_VCPU, NE_ADD_VCPU (v4, v5)"),
    word(0xC010_AE23, "NE_GET_IMAGE_LOAD_INFO (v4, v5)"),
    word(0x4018_AE24, "NE_SET_USER_MEMORY_REGION (v4, v5)"),
    word(0xC010_AE25, "NE_START_ENCLAVE (v4, v5)"),
];

/// Command numbers that belong to the second generation or are left to it and to mainline; ours are 0x3B and up.
pub const NUMBERS_LEFT_TO_OTHERS: core::ops::RangeInclusive<u8> = 0x25..=0x3A;

/// Launch flags of the second generation (bits of a u32; bit 0 is debug mode as everywhere).
pub const SECOND_GENERATION_FLAGS: [Number; 10] = [
    number(0, "DEBUG_MODE"),
    number(1, "DIRECT_MODE"),
    number(6, "PCIE_MODE"),
    number(7, "PCIE_VSOCK_MODE"),
    number(8, "PCIE_HOTPLUG_MODE"),
    number(9, "PCIE_VIRTIO_MODE"),
    number(10, "PCIE_ASSIGN_MODE"),
    number(11, "CPU_OVERCOMMIT_MODE"),
    number(12, "CPU_ACCOUNTING_MODE"),
    number(13, "PCIE_NUMA_MODE"),
];

/// The second generation's codes as its device answers them; its driver adds 256 to all but 276 of its own.
pub const SECOND_GENERATION_CODES: [Number; 23] = [
    number(276, "INVALID_FLAGS"),
    number(277, "INVALID_ALIGNMENT"),
    number(278, "INVALID_SIZE"),
    number(279, "INVALID_SLOT"),
    number(280, "INVALID_DEVICE"),
    number(281, "TOO_MANY_DEVICES"),
    number(282, "TOO_MANY_VQS"),
    number(283, "NO_RESOURCES"),
    number(284, "ALREADY_EXISTS"),
    number(285, "MISSING_INFO_PAGE"),
    number(286, "INVALID_FLAG"),
    number(287, "RESERVED_FLAG"),
    number(288, "MISSING_PCIE"),
    number(289, "INCOMPATIBLE_FLAGS"),
    number(290, "EIF_FLAG_MISMATCH"),
    number(291, "DEVICE_DISALLOWED"),
    number(292, "HOTPLUG_DISABLED"),
    number(293, "BAD_EIF"),
    number(294, "MISSING_PCIE_VIRTIO"),
    number(295, "BAD_PAYLOAD_VERSION"),
    number(296, "INFO_VECTORS_EXHAUSTED"),
    number(297, "ENCLAVE_LIMIT"),
    number(298, "NO_MEM_SLOTS_ON_NODE"),
];

/// What the second generation's driver adds to its device's codes before user space sees them.
pub const SECOND_GENERATION_CODE_SHIFT: u32 = 256;

/// Codes that the kernel keeps to itself and that must never reach user space.
pub const KERNEL_INTERNAL_CODES: core::ops::RangeInclusive<u32> = 512..=531;

/// Where codes of ours may lie.
pub const OUR_CODES: core::ops::RangeInclusive<u32> = 300..=511;

/// Registers of BAR 3 that only the second generation has; a device of the first answers 0 and ignores writes.
pub const SECOND_GENERATION_REGISTERS: [Number; 13] = [
    number(0x008, "first vector of the pool"),
    number(0x1F0, "number of pooled vectors"),
    number(0x1F2, "most PCIe slots"),
    number(0x1F4, "error of the last bitmap donation"),
    number(0x1F6, "usable PCIe slots"),
    number(0x1F8, "forget donated bitmap pages"),
    number(0x1FC, "supported launch flags"),
    number(0x200, "size of a slot donation"),
    number(0x204, "alignment of a slot donation"),
    number(0x208, "size of the base donation"),
    number(0x20E, "most devices per enclave"),
    number(0x210, "isolation engine present"),
    number(0x214, "pages the isolation engine needs"),
];

/// Where the second generation's table of bitmap pages starts in BAR 3.
pub const SECOND_GENERATION_BITMAP_TABLE: u32 = 0x800;

/// Device commands that only the second generation has.
pub const SECOND_GENERATION_COMMANDS: [Number; 11] = [
    number(13, "SLOT_ADD_INFO_PAGE"),
    number(14, "SLOT_ADD_DEVICE"),
    number(16, "PCIE_SLOT_DONATE"),
    number(17, "PCIE_SLOT_SHUTDOWN"),
    number(18, "SLOT_VCPU_TIME"),
    number(21, "SM_CLAIM_FROM_PARENT"),
    number(22, "SM_RELEASE_TO_PARENT"),
    number(24, "SLOT_UPDATE_DEVICE_CONFIG"),
    number(25, "PCIE_BASE_DONATE"),
    number(26, "SYSTEM_RAM_DONATE"),
    number(27, "GET_SLOT_LIMITS"),
];

/// The highest device command number that anyone uses.
pub const HIGHEST_FOREIGN_COMMAND: u32 = 27;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{code, extension, ioctl, pci, Code};

    #[test]
    fn no_word_of_ours_is_anyone_elses() {
        let ours = || ioctl::COMMANDS.iter().chain(extension::COMMANDS);
        assert_eq!(ours().count(), 11);
        for theirs in SECOND_GENERATION_WORDS.iter().chain(&DRAFT_WORDS) {
            assert!(ours().all(|one| one.word != theirs.word), "{}", theirs.name);
        }
        for (index, one) in ours().enumerate() {
            assert!(ours().skip(index + 1).all(|other| other.word != one.word), "{}", one.name);
        }
    }

    #[test]
    fn no_new_number_of_ours_lies_in_what_is_left_to_others() {
        for word in [extension::QUERY, extension::ENCLAVE_INFO, extension::LIST, extension::STOP, extension::POOL_INFO] {
            assert!(!NUMBERS_LEFT_TO_OTHERS.contains(&word.to_le_bytes()[0]));
        }
    }

    /// 276 is shared on purpose: NOT_IN_RUNNING_STATE is what their driver says, and what NE_STOP says.
    #[test]
    fn no_code_of_ours_is_theirs_but_276() {
        for entry in code::NE_CODES.iter().filter(|entry| entry.code != Code::NOT_IN_RUNNING_STATE) {
            let ours = entry.code.number().unsigned_abs();
            for theirs in SECOND_GENERATION_CODES {
                assert_ne!(ours, theirs.number, "{}", theirs.name);
                assert_ne!(ours, theirs.number + SECOND_GENERATION_CODE_SHIFT, "{}", theirs.name);
            }
            assert!(!KERNEL_INTERNAL_CODES.contains(&ours));
        }
        assert!(SECOND_GENERATION_CODES.iter().all(|theirs| !OUR_CODES.contains(&theirs.number)));
    }

    #[test]
    fn no_register_or_command_of_ours_is_theirs() {
        let registers = [pci::ENABLE, pci::VERSION, pci::COMMAND, pci::EVENT_COUNTER];
        for theirs in SECOND_GENERATION_REGISTERS {
            let offset = u64::from(theirs.number);
            assert!(!registers.contains(&offset) && !(pci::REQUEST..pci::REGISTER_BYTES).contains(&offset), "{}", theirs.name);
        }
        for theirs in SECOND_GENERATION_COMMANDS {
            assert_eq!(pci::Command::from_number(theirs.number), None, "{}", theirs.name);
        }
    }
}
