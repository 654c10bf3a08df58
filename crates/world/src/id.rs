//! The enclave id: how a slot uid is shown to people.
//!
//! nitro-cli's shape is `<instance id>-enc<slot uid in hex>`; outside EC2 the instance id is all zeros. The hex is not padded, and
//! scripts take the slot uid from the part behind `-enc`, which alone identifies an enclave. With an instance id that somebody has chosen it is
//! [`InstanceId::enclave_id`](crate::InstanceId::enclave_id).

use crate::identity::DEFAULT_INSTANCE_ID;

/// A slot's enclave id where its parent is not known, or does not matter as in the world's files: `i-0000000000000000-enc` and the slot uid in
/// lower-case hex without padding.
#[must_use]
pub fn enclave_id(slot_uid: u64) -> String {
    format!("{DEFAULT_INSTANCE_ID}-enc{slot_uid:x}")
}

/// Reads the slot uid back from an enclave id, whatever its instance id is.
///
/// `None` unless the text ends in `-enc` and 1 to 16 hex digits, or when the number is 0, which no slot has.
#[must_use]
pub fn slot_of_enclave_id(id: &str) -> Option<u64> {
    let (_, digits) = id.rsplit_once("-enc")?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok().filter(|slot_uid| *slot_uid != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_unpadded_and_reads_back() {
        assert_eq!(enclave_id(0xab), "i-0000000000000000-encab");
        assert_eq!(slot_of_enclave_id(&enclave_id(0xab)), Some(0xab));
        assert_eq!(slot_of_enclave_id(&enclave_id(u64::MAX)), Some(u64::MAX));
    }

    #[test]
    fn foreign_text_is_no_id() {
        for text in ["", "i-1", "-enc", "i-1-enc", "i-1-encg", "i-1-enc0", "i-1-enc+1", "i-1-enc11112222333344445"] {
            assert_eq!(slot_of_enclave_id(text), None, "{text}");
        }
    }
}
