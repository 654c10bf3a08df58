//! The platform configuration registers: 32 SHA-384 values that only grow, and locks that only close.
//!
//! [`PcrBank`] is the state of one enclave's NSM; [`InitialPcrs`] is what its image and instance put into it at boot.
//! [`Module`](crate::Module) is the only writer. Rules: docs/nsm.md, "Registers".

use crate::response::ErrorCode;
use nitroxide_attestation::{MAX_PCRS, PCR_BYTES, Pcr};
use sha2::{Digest as _, Sha384};

/// Registers below this one are written at boot and locked from then on.
pub const BOOT_LOCKED_PCRS: u16 = 16;

/// Which registers read zero in an enclave that was started in debug mode.
///
/// AWS documents 0, 1 and 2. Whether the others are zero too is not established, so this is the one place to change it:
/// PCR8 is the image's signer and therefore treated like the image's measurements; 3 and 4 speak of the parent and stay.
pub const DEBUG_ZEROED_PCRS: [u16; 4] = [0, 1, 2, 8];

const ZERO: Pcr = [0; PCR_BYTES];

/// The values that are in the registers when the enclave boots; everything not named is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitialPcrs {
    /// The whole image.
    pub pcr0: Pcr,
    /// Kernel and boot ramdisk.
    pub pcr1: Pcr,
    /// The application.
    pub pcr2: Pcr,
    /// The parent's IAM role; zero where there is none.
    pub pcr3: Pcr,
    /// The parent's instance id.
    pub pcr4: Pcr,
    /// The image's signing certificate; zero for an unsigned image.
    pub pcr8: Pcr,
}

impl InitialPcrs {
    /// The registers of an image, without a parent: PCR3 and PCR4 are zero.
    #[must_use]
    pub const fn of_image(pcr0: Pcr, pcr1: Pcr, pcr2: Pcr, pcr8: Option<Pcr>) -> Self {
        let pcr8 = match pcr8 {
            Some(value) => value,
            None => ZERO,
        };
        Self { pcr0, pcr1, pcr2, pcr3: ZERO, pcr4: ZERO, pcr8 }
    }

    /// Sets PCR4 to the id of the parent instance, e.g. `i-0000000000000000`: zeroes extended with its characters.
    #[must_use]
    pub fn with_instance_id(self, instance_id: &str) -> Self {
        Self { pcr4: extended(&ZERO, instance_id.as_bytes()), ..self }
    }

    /// Sets PCR3 to an IAM role (its ARN), the same way.
    #[must_use]
    pub fn with_role(self, role_arn: &str) -> Self {
        Self { pcr3: extended(&ZERO, role_arn.as_bytes()), ..self }
    }

    const fn by_index(&self) -> [(u16, Pcr); 6] {
        [(0, self.pcr0), (1, self.pcr1), (2, self.pcr2), (3, self.pcr3), (4, self.pcr4), (8, self.pcr8)]
    }
}

#[derive(Debug, Clone, Copy)]
struct Register {
    value: Pcr,
    /// Will extending it be refused for ever?
    locked: bool,
    /// Did the guest ever extend it? (Decides whether a document mentions a register above 15.)
    extended: bool,
}

/// The registers of one NSM. A lock never opens and a locked value never changes.
#[derive(Debug, Clone)]
pub struct PcrBank {
    registers: [Register; MAX_PCRS as usize],
}

impl Default for PcrBank {
    fn default() -> Self {
        Self::new()
    }
}

impl PcrBank {
    /// A bank of zeroes with 0 to 15 locked, before the boot measurements are known.
    #[must_use]
    pub const fn new() -> Self {
        let mut registers = [Register { value: ZERO, locked: false, extended: false }; MAX_PCRS as usize];
        let mut index = 0;
        while index < BOOT_LOCKED_PCRS as usize {
            registers[index].locked = true;
            index += 1;
        }
        Self { registers }
    }

    /// Puts the boot measurements in. In debug mode those of [`DEBUG_ZEROED_PCRS`] stay zero.
    pub fn measure(&mut self, initial: &InitialPcrs, debug: bool) {
        for (index, value) in initial.by_index() {
            let hidden = debug && DEBUG_ZEROED_PCRS.contains(&index);
            if let Some(register) = self.registers.get_mut(usize::from(index)) {
                register.value = if hidden { ZERO } else { value };
            }
        }
    }

    /// Whether register `index` is locked, and its value.
    ///
    /// # Errors
    ///
    /// `InvalidIndex` from 32 on.
    pub fn describe(&self, index: u16) -> Result<(bool, Pcr), ErrorCode> {
        let register = self.registers.get(usize::from(index)).ok_or(ErrorCode::InvalidIndex)?;
        Ok((register.locked, register.value))
    }

    /// Replaces register `index` by SHA-384 of its old value and `data`, and returns the new value.
    ///
    /// # Errors
    ///
    /// `InvalidIndex` from 32 on, `ReadOnlyIndex` if it is locked.
    pub fn extend(&mut self, index: u16, data: &[u8]) -> Result<Pcr, ErrorCode> {
        let register = self.unlocked(index)?;
        register.value = extended(&register.value, data);
        register.extended = true;
        Ok(register.value)
    }

    /// Locks register `index`.
    ///
    /// # Errors
    ///
    /// `InvalidIndex` from 32 on, `ReadOnlyIndex` if it already is.
    pub fn lock(&mut self, index: u16) -> Result<(), ErrorCode> {
        self.unlocked(index)?.locked = true;
        Ok(())
    }

    /// Locks registers 0 to `range` - 1; those that already are stay so.
    ///
    /// # Errors
    ///
    /// `InvalidIndex` if `range` is beyond 32; then nothing is locked.
    pub fn lock_below(&mut self, range: u16) -> Result<(), ErrorCode> {
        let registers = self.registers.get_mut(..usize::from(range)).ok_or(ErrorCode::InvalidIndex)?;
        for register in registers {
            register.locked = true;
        }
        Ok(())
    }

    /// The indices of the locked registers, ascending.
    pub fn locked(&self) -> impl Iterator<Item = u16> + '_ {
        self.numbered().filter(|(_, register)| register.locked).map(|(index, _)| index)
    }

    /// What an attestation document lists: 0 to 15 always, the others once they were extended; ascending.
    #[must_use]
    pub fn attested(&self) -> Vec<(u16, Pcr)> {
        let attested = |(index, register): &(u16, &Register)| *index < BOOT_LOCKED_PCRS || register.extended;
        self.numbered().filter(attested).map(|(index, register)| (index, register.value)).collect()
    }

    fn unlocked(&mut self, index: u16) -> Result<&mut Register, ErrorCode> {
        let register = self.registers.get_mut(usize::from(index)).ok_or(ErrorCode::InvalidIndex)?;
        if register.locked { Err(ErrorCode::ReadOnlyIndex) } else { Ok(register) }
    }

    fn numbered(&self) -> impl Iterator<Item = (u16, &Register)> + '_ {
        (0..).zip(&self.registers)
    }
}

fn extended(old: &Pcr, data: &[u8]) -> Pcr {
    Sha384::new().chain_update(old).chain_update(data).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY_FREE: u16 = 20; // arbitrary, 16 to 31

    #[test]
    fn a_new_bank_locks_0_to_15_and_nothing_else() {
        assert!(PcrBank::new().locked().eq(0..16));
    }

    #[test]
    fn extend_hashes_old_value_and_raw_data() {
        let mut bank = PcrBank::new();
        let once = bank.extend(ANY_FREE, b"abc").unwrap();
        assert_eq!(once, <Pcr>::from(Sha384::digest([&[0; 48], b"abc".as_slice()].concat())));
        let twice = bank.extend(ANY_FREE, b"").unwrap();
        assert_eq!(twice, <Pcr>::from(Sha384::digest(once)));
        assert_eq!(bank.describe(ANY_FREE), Ok((false, twice)));
    }

    #[test]
    fn a_locked_register_is_read_only_to_extend_and_to_lock() {
        let mut bank = PcrBank::new();
        bank.lock(ANY_FREE).unwrap();
        for index in (0..16).chain([ANY_FREE]) {
            let before = bank.describe(index);
            assert_eq!(bank.extend(index, b"x"), Err(ErrorCode::ReadOnlyIndex));
            assert_eq!(bank.lock(index), Err(ErrorCode::ReadOnlyIndex));
            assert_eq!(bank.describe(index), before);
        }
    }

    #[test]
    fn indices_from_32_on_are_invalid_everywhere() {
        let mut bank = PcrBank::new();
        for index in [32, 33, u16::MAX] {
            assert_eq!(bank.describe(index), Err(ErrorCode::InvalidIndex));
            assert_eq!(bank.extend(index, b""), Err(ErrorCode::InvalidIndex));
            assert_eq!(bank.lock(index), Err(ErrorCode::InvalidIndex));
        }
    }

    #[test]
    fn lock_below_takes_0_to_32_and_locks_nothing_beyond() {
        for range in [0, 15, 16] {
            let mut bank = PcrBank::new();
            bank.lock_below(range).unwrap();
            assert!(bank.locked().eq(0..16));
        }
        let mut bank = PcrBank::new();
        assert_eq!(bank.lock_below(33), Err(ErrorCode::InvalidIndex));
        assert!(bank.locked().eq(0..16));
        bank.lock_below(20).unwrap();
        assert!(bank.locked().eq(0..20));
        bank.lock_below(32).unwrap();
        bank.lock_below(32).unwrap();
        assert!(bank.locked().eq(0..32));
    }

    #[test]
    fn attested_are_0_to_15_and_what_was_extended() {
        let mut bank = PcrBank::new();
        bank.lock(17).unwrap();
        bank.extend(31, b"x").unwrap();
        assert!(bank.attested().iter().map(|(index, _)| *index).eq((0..16).chain([31])));
    }

    #[test]
    fn measurements_stand_in_their_registers() {
        let mut bank = PcrBank::new();
        let initial = InitialPcrs::of_image([1; 48], [2; 48], [3; 48], Some([9; 48])).with_instance_id("i-1").with_role("arn");
        bank.measure(&initial, false);
        let values: Vec<Pcr> = (0..9).map(|index| bank.describe(index).unwrap().1).collect();
        assert_eq!(values[..3], [[1; 48], [2; 48], [3; 48]]);
        assert_eq!(values[3], <Pcr>::from(Sha384::digest([&[0; 48], b"arn".as_slice()].concat())));
        assert_eq!(values[4], <Pcr>::from(Sha384::digest([&[0; 48], b"i-1".as_slice()].concat())));
        assert_eq!(values[5..8], [ZERO; 3]);
        assert_eq!(values[8], [9; 48]);
    }

    #[test]
    fn debug_mode_hides_the_image_but_not_the_parent() {
        let mut bank = PcrBank::new();
        let initial = InitialPcrs::of_image([1; 48], [2; 48], [3; 48], Some([9; 48])).with_instance_id("i-1").with_role("arn");
        bank.measure(&initial, true);
        let zero: Vec<u16> = bank.attested().into_iter().filter(|(_, value)| *value == ZERO).map(|(index, _)| index).collect();
        assert_eq!(zero, (0..16).filter(|index| ![3, 4].contains(index)).collect::<Vec<u16>>());
    }
}
