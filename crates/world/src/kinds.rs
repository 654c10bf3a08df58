//! The five kinds of claims and their rules: slot uids, CIDs, CPUs, memory, names.
//!
//! Each of these looks and takes under the lock of its directory, so that two processes that ask at once never get the same thing.

use rustix::fs::{AtFlags, FileType, statat};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::claim::{Claim, ClaimError, Kind};
use crate::dir::World;

/// The first CID that is given to an enclave that did not ask for one. Lower ones, from [`LOWEST_CID`], must be asked for.
pub const FIRST_AUTO_CID: u32 = 16;

/// The lowest CID an enclave can have: 0 is the hypervisor, 1 local, 2 the host, 3 the parent.
pub const LOWEST_CID: u32 = 4;

/// How many CIDs are tried before a world counts as full. A bound on work, far above what one machine can run.
const AUTO_CIDS: u32 = 65_536;

/// The longest name, in bytes after escaping: a file name has 255, and `_` with a number must fit behind it.
const LONGEST_NAME: usize = 240;

/// A slot uid that nobody else in this world has.
#[derive(Debug)]
pub struct SlotClaim {
    /// Random and not 0.
    pub slot_uid: u64,
    /// Keeps it.
    pub claim: Claim,
}

/// A CID that nobody else in this world has.
#[derive(Debug)]
pub struct CidClaim {
    /// [`LOWEST_CID`] and up, never `u32::MAX`.
    pub cid: u32,
    /// Keeps it.
    pub claim: Claim,
}

/// An enclave's name that nobody else in this world has.
#[derive(Debug)]
pub struct NameClaim {
    /// The name as it is shown: the wanted one, or that with `_1`, `_2`, ... behind it.
    pub name: String,
    /// Keeps it.
    pub claim: Claim,
}

impl World {
    /// Claims a random slot uid.
    ///
    /// # Errors
    ///
    /// [`ClaimError`], but never `Taken`.
    pub fn claim_slot(&self) -> Result<SlotClaim, ClaimError> {
        let held = self.lock_claims(Kind::Slot)?;
        loop {
            let mut bytes = [0; 8];
            getrandom(&mut bytes, GetRandomFlags::empty())
                .map_err(|errno| ClaimError::from_errno(self.display(Kind::Slot.room(), ""), errno))?;
            let slot_uid = u64::from_ne_bytes(bytes);
            if slot_uid == 0 {
                continue;
            }
            match self.claim_entry(&held, Kind::Slot, &format!("{slot_uid:x}")) {
                Ok(claim) => return Ok(SlotClaim { slot_uid, claim }),
                Err(ClaimError::Taken(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Claims a CID: the wanted one, or the lowest free one from [`FIRST_AUTO_CID`] up.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Taken`] (EADDRINUSE) when the wanted one is in use, [`ClaimError::Invalid`] below [`LOWEST_CID`] and for `u32::MAX`.
    pub fn claim_cid(&self, wanted: Option<u32>) -> Result<CidClaim, ClaimError> {
        if let Some(cid) = wanted {
            if cid < LOWEST_CID || cid == u32::MAX {
                return Err(ClaimError::Invalid(format!("CID {cid}"), "4 to 4294967294"));
            }
            let held = self.lock_claims(Kind::Cid)?;
            return Ok(CidClaim { cid, claim: self.claim_entry(&held, Kind::Cid, &cid.to_string())? });
        }
        let held = self.lock_claims(Kind::Cid)?;
        for cid in FIRST_AUTO_CID..FIRST_AUTO_CID + AUTO_CIDS {
            match self.claim_entry(&held, Kind::Cid, &cid.to_string()) {
                Ok(claim) => return Ok(CidClaim { cid, claim }),
                // What is no claim is not ours to remove, and another CID is as good.
                Err(ClaimError::Taken(_) | ClaimError::Foreign(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ClaimError::Exhausted(self.display(Kind::Cid.room(), "")))
    }

    /// Claims a CPU by its Linux number.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Taken`] when another process has it.
    pub fn claim_cpu(&self, cpu: u32) -> Result<Claim, ClaimError> {
        let held = self.lock_claims(Kind::Cpu)?;
        self.claim_entry(&held, Kind::Cpu, &cpu.to_string())
    }

    /// The CPUs that are claimed at this moment, sorted.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn claimed_cpus(&self) -> Result<Vec<u32>, ClaimError> {
        let mut cpus: Vec<u32> = self.live_claims(Kind::Cpu)?.iter().filter_map(|name| name.parse().ok()).collect();
        cpus.sort_unstable();
        Ok(cpus)
    }

    /// Claims `size_bytes` of memory, if all claims together stay within `limit_bytes`.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Exhausted`] (ENOSPC) when they would not.
    pub fn claim_memory(&self, size_bytes: u64, limit_bytes: u64) -> Result<Claim, ClaimError> {
        let held = self.lock_claims(Kind::Memory)?;
        let claimed =
            self.live_claims_under(&held, Kind::Memory)?.iter().filter_map(|name| memory_size(name)).try_fold(0, u64::checked_add);
        let fits = claimed.and_then(|claimed| claimed.checked_add(size_bytes)).is_some_and(|sum| sum <= limit_bytes);
        if !fits {
            return Err(ClaimError::Exhausted(self.display(Kind::Memory.room(), "")));
        }
        let mut number = 0_u64;
        loop {
            match self.claim_entry(&held, Kind::Memory, &format!("{size_bytes}.{number}")) {
                Err(ClaimError::Taken(_) | ClaimError::Foreign(_)) => number += 1,
                other => return other,
            }
        }
    }

    /// Claims a name for an enclave: `wanted`, or `wanted` with `_1`, `_2`, ... behind it, whichever is free first.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Invalid`] for an empty name or one longer than 240 bytes (characters other than letters, digits, `.`, `_`, `-` count three
    /// for each byte).
    pub fn claim_name(&self, wanted: &str) -> Result<NameClaim, ClaimError> {
        let stem = escaped(wanted);
        if stem.is_empty() || stem.len() > LONGEST_NAME {
            return Err(ClaimError::Invalid(format!("Name `{wanted}`"), "1 to 240 bytes"));
        }
        let held = self.lock_claims(Kind::Name)?;
        let mut number = 0_u64;
        loop {
            let suffix = if number == 0 { String::new() } else { format!("_{number}") };
            match self.claim_entry(&held, Kind::Name, &format!("{stem}{suffix}")) {
                Ok(claim) => return Ok(NameClaim { name: format!("{wanted}{suffix}"), claim }),
                Err(ClaimError::Taken(_) | ClaimError::Foreign(_)) => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether `cid` is claimed at this moment.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn is_cid_claimed(&self, cid: u32) -> Result<bool, ClaimError> {
        let name = cid.to_string();
        match statat(self.room(Kind::Cid.room()), &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => return Ok(false),
            _ => {}
        }
        let held = self.lock_claims(Kind::Cid)?;
        match self.claim_entry(&held, Kind::Cid, &name) {
            Ok(_released) => Ok(false),
            Err(ClaimError::Taken(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// The size in a memory claim's file name, `<bytes>.<number>`.
fn memory_size(name: &str) -> Option<u64> {
    name.split_once('.')?.0.parse().ok()
}

/// Makes a file name of any text: letters, digits, `_`, `-` and inner dots stay, every other byte becomes `%` and two hex digits.
fn escaped(text: &str) -> String {
    let mut name = String::with_capacity(text.len());
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => name.push(char::from(byte)),
            b'.' if index > 0 => name.push('.'),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_one_harmless_file_name() {
        assert_eq!(escaped("hello-1.2_x"), "hello-1.2_x");
        assert_eq!(escaped("../a b"), "%2e.%2fa%20b");
        assert_eq!(escaped(".."), "%2e.");
        assert_eq!(escaped("%2e"), "%252e");
    }

    #[test]
    fn memory_claim_names_carry_their_size() {
        assert_eq!(memory_size("2097152.0"), Some(2_097_152));
        assert_eq!(memory_size("x.0"), None);
        assert_eq!(memory_size("5"), None);
    }
}
