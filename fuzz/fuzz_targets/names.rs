//! Any bytes as a peer's abstract name and as an enclave id: what is accepted is exactly what is written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_world::{VsockAddress, enclave_id, slot_of_enclave_id};

fuzz_target!(|input: &[u8]| {
    if let Some(VsockAddress { cid, port }) = VsockAddress::from_abstract_name(input) {
        let canonical = format!("nitroxide/{cid}:{port}/");
        assert!(input.starts_with(canonical.as_bytes()) && input.len() == canonical.len() + 16);
    }
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(slot_uid) = slot_of_enclave_id(text)
    {
        assert_ne!(slot_uid, 0);
        assert_eq!(slot_of_enclave_id(&enclave_id(slot_uid)), Some(slot_uid));
    }
});
