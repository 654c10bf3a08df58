//! AWS's own client library, unmodified, against `/dev/nsm`: every rule that the `nsm-check` of its repository asserts, and a few more.
//!
//! Each rule is a line `nsm-client: ok NAME` or `nsm-client: FAILED NAME: why`; the test outside (`crates/nsm/tests/guest_client.rs`) wants all of them.
//! It locks every register, so a machine is good for one run. Asks through `nsm_init`, `nsm_process_request` and `nsm_exit` only.

#[path = "../machine.rs"]
mod machine;

use std::collections::BTreeSet;

use aws_nitro_enclaves_nsm_api::api::{Digest, ErrorCode, Request, Response};
use aws_nitro_enclaves_nsm_api::driver::{nsm_exit, nsm_init, nsm_process_request};
use serde_bytes::ByteBuf;
use sha2::{Digest as _, Sha384};

const BOOT_LOCKED: u16 = 16;
const PCRS: u16 = 32;

/// The longest field that AWS's check sends, in bytes.
const LONGEST: usize = 1024;

/// A rule that holds, or why it does not.
type Rule = Result<(), String>;

/// A rule by its name.
type Named = (&'static str, fn(&Nsm) -> Rule);

fn main() {
    machine::prepare(&|text| println!("nsm-client: {text}"));
    let nsm = Nsm(nsm_init());
    let rules: [Named; 14] = [
        ("description", description),
        ("registers at boot", registers_at_boot),
        ("boot registers cannot be locked", boot_registers_cannot_be_locked),
        ("boot registers cannot be extended", boot_registers_cannot_be_extended),
        ("there is no register 32", there_is_no_register_32),
        ("extending hashes old value and data", extending_hashes_old_value_and_data),
        ("random numbers vary", random_numbers_vary),
        ("documents repeat every combination of fields", documents_repeat_every_combination),
        ("empty fields stay empty", empty_fields_stay_empty),
        ("fields of 1025 bytes are too large", longer_fields_are_too_large),
        ("documents list what was extended", documents_list_what_was_extended),
        ("registers lock once", registers_lock_once),
        ("ranges lock", ranges_lock),
        ("locked registers stay", locked_registers_stay),
    ];
    for (name, rule) in rules {
        match rule(&nsm) {
            Ok(()) => println!("nsm-client: ok {name}"),
            Err(why) => println!("nsm-client: FAILED {name}: {why}"),
        }
    }
    nsm_exit(nsm.0);
    println!("nsm-client: done");
    machine::power_off();
}

/// The library's handle.
struct Nsm(i32);

impl Nsm {
    fn ask(&self, request: Request) -> Response {
        nsm_process_request(self.0, request)
    }

    fn pcr(&self, index: u16) -> Result<(bool, Vec<u8>), String> {
        match self.ask(Request::DescribePCR { index }) {
            Response::DescribePCR { lock, data } => Ok((lock, data)),
            other => Err(format!("DescribePCR {index}: {other:?}")),
        }
    }

    fn pcrs(&self) -> Result<Vec<(bool, Vec<u8>)>, String> {
        (0..PCRS).map(|index| self.pcr(index)).collect()
    }

    fn extend(&self, index: u16, data: &[u8]) -> Result<Vec<u8>, String> {
        match self.ask(Request::ExtendPCR { index, data: data.to_vec() }) {
            Response::ExtendPCR { data } => Ok(data),
            other => Err(format!("ExtendPCR {index}: {other:?}")),
        }
    }

    fn refused(&self, request: Request, code: &str) -> Rule {
        let asked = format!("{request:?}");
        match self.ask(request) {
            Response::Error(error) if format!("{error:?}") == code => Ok(()),
            other => Err(format!("{asked}: {other:?} instead of {code}")),
        }
    }

    /// The payload of a document with these fields.
    fn attest(&self, user_data: Option<ByteBuf>, nonce: Option<ByteBuf>, public_key: Option<ByteBuf>) -> Result<Payload, String> {
        match self.ask(Request::Attestation { user_data, nonce, public_key }) {
            Response::Attestation { document } => {
                payload(&document).ok_or_else(|| format!("a document of {} bytes is none", document.len()))
            }
            other => Err(format!("Attestation: {other:?}")),
        }
    }
}

/// As the library itself reads it.
type Payload = aws_nitro_enclaves_nsm_api::api::AttestationDoc;

/// The third part of a COSE_Sign1.
fn payload(document: &[u8]) -> Option<Payload> {
    let mut cbor = minicbor::Decoder::new(document);
    (cbor.array().ok()? == Some(4)).then_some(())?;
    cbor.skip().ok()?;
    cbor.skip().ok()?;
    Payload::from_binary(cbor.bytes().ok()?).ok()
}

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Rule {
    if holds { Ok(()) } else { Err(why()) }
}

fn described(nsm: &Nsm) -> Result<(String, BTreeSet<u16>), String> {
    match nsm.ask(Request::DescribeNSM) {
        Response::DescribeNSM {
            version_major: 1,
            version_minor: 0,
            version_patch: 0,
            module_id,
            max_pcrs: PCRS,
            locked_pcrs,
            digest: Digest::SHA384,
        } => Ok((module_id, locked_pcrs)),
        other => Err(format!("{other:?}")),
    }
}

fn description(nsm: &Nsm) -> Rule {
    let (module_id, locked) = described(nsm)?;
    ensure(locked.iter().copied().eq(0..BOOT_LOCKED), || format!("locked are {locked:?}"))?;
    let (instance, enclave) = module_id.split_once("-enc").ok_or_else(|| format!("module_id {module_id}"))?;
    let is_hex = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit));
    let is_instance = instance.strip_prefix("i-").is_some_and(is_hex);
    ensure(is_instance && enclave.len() == 16 && is_hex(enclave), || format!("module_id {module_id}"))
}

fn registers_at_boot(nsm: &Nsm) -> Rule {
    for (index, (lock, data)) in (0..).zip(nsm.pcrs()?) {
        ensure(lock == (index < BOOT_LOCKED), || format!("lock of {index}: {lock}"))?;
        ensure(data.len() == 48, || format!("{index} has {} bytes", data.len()))?;
        // Image, kernel, application and instance are measured; there is no role, and the image is not signed.
        ensure((data != [0; 48]) == [0, 1, 2, 4].contains(&index), || format!("{index} is {data:02x?}"))?;
    }
    Ok(())
}

fn boot_registers_cannot_be_locked(nsm: &Nsm) -> Rule {
    (0..BOOT_LOCKED).try_for_each(|index| nsm.refused(Request::LockPCR { index }, "ReadOnlyIndex"))
}

fn boot_registers_cannot_be_extended(nsm: &Nsm) -> Rule {
    let before = nsm.pcrs()?;
    (0..BOOT_LOCKED).try_for_each(|index| nsm.refused(Request::ExtendPCR { index, data: vec![1, 2, 3] }, "ReadOnlyIndex"))?;
    ensure(nsm.pcrs()? == before, || "a register has changed".to_owned())
}

fn there_is_no_register_32(nsm: &Nsm) -> Rule {
    for index in [PCRS, PCRS + 1, u16::MAX] {
        nsm.refused(Request::DescribePCR { index }, "InvalidIndex")?;
        nsm.refused(Request::ExtendPCR { index, data: vec![1] }, "InvalidIndex")?;
        nsm.refused(Request::LockPCR { index }, "InvalidIndex")?;
    }
    Ok(())
}

/// All of 16 to 31, with data of several lengths, and nothing else changes.
fn extending_hashes_old_value_and_data(nsm: &Nsm) -> Rule {
    let mut expected = nsm.pcrs()?;
    for index in BOOT_LOCKED..PCRS {
        // One to three times, with as many bytes as the register's number says, or a few thousand.
        for round in 0..=index % 3 {
            let data = vec![u8::try_from(index).unwrap_or(0); usize::from(index) * if round == 2 { 100 } else { 1 }];
            let Some((_, value)) = expected.get_mut(usize::from(index)) else { return Err("a register is missing".to_owned()) };
            let wanted = Sha384::new().chain_update(&*value).chain_update(&data).finalize().to_vec();
            let new = nsm.extend(index, &data)?;
            ensure(new == wanted, || format!("{index} after extending is {new:02x?}"))?;
            *value = new;
        }
    }
    ensure(nsm.pcrs()? == expected, || "DescribePCR does not give what ExtendPCR gave".to_owned())
}

fn random_numbers_vary(nsm: &Nsm) -> Rule {
    let mut seen = BTreeSet::new();
    for _ in 0..16 {
        match nsm.ask(Request::GetRandom) {
            Response::GetRandom { random } if !random.is_empty() => {
                ensure(seen.insert(random), || "the same bytes twice".to_owned())?;
            }
            other => return Err(format!("{other:?}")),
        }
    }
    Ok(())
}

fn documents_repeat_every_combination(nsm: &Nsm) -> Rule {
    let (module_id, _) = described(nsm)?;
    for choice in 0..8_u8 {
        let field = |bit: u8| (choice >> bit & 1 == 1).then(|| ByteBuf::from(vec![bit + 1; LONGEST]));
        let fields = (field(0), field(1), field(2));
        let document = nsm.attest(fields.0.clone(), fields.1.clone(), fields.2.clone())?;
        ensure((document.user_data, document.nonce, document.public_key) == fields, || format!("choice {choice}: other fields"))?;
        ensure(document.module_id == module_id && matches!(document.digest, Digest::SHA384), || {
            format!("choice {choice}: another module")
        })?;
        ensure(document.timestamp > 0 && !document.certificate.is_empty() && !document.cabundle.is_empty(), || {
            format!("choice {choice}: no time or certificates")
        })?;
    }
    Ok(())
}

fn empty_fields_stay_empty(nsm: &Nsm) -> Rule {
    let empty = || Some(ByteBuf::new());
    let document = nsm.attest(empty(), None, empty())?;
    ensure((document.user_data, document.nonce, document.public_key) == (empty(), None, empty()), || "other fields".to_owned())
}

fn longer_fields_are_too_large(nsm: &Nsm) -> Rule {
    let field = |is_it: bool| is_it.then(|| ByteBuf::from(vec![7; LONGEST + 1]));
    for which in 0..3 {
        let request = Request::Attestation { user_data: field(which == 0), nonce: field(which == 1), public_key: field(which == 2) };
        ensure(matches!(nsm.ask(request), Response::Error(ErrorCode::InputTooLarge)), || format!("field {which} is taken"))?;
    }
    Ok(())
}

/// 16 to 31 were all extended by now.
fn documents_list_what_was_extended(nsm: &Nsm) -> Rule {
    let document = nsm.attest(None, None, None)?;
    ensure(document.pcrs.keys().copied().eq(0..usize::from(PCRS)), || format!("it lists {:?}", document.pcrs.keys()))?;
    let values: Vec<Vec<u8>> = nsm.pcrs()?.into_iter().map(|(_, data)| data).collect();
    ensure(document.pcrs.into_values().map(ByteBuf::into_vec).eq(values), || "its values are not DescribePCR's".to_owned())
}

/// The lower half of 16 to 31, one by one.
fn registers_lock_once(nsm: &Nsm) -> Rule {
    for index in BOOT_LOCKED..24 {
        let answer = nsm.ask(Request::LockPCR { index });
        ensure(matches!(answer, Response::LockPCR), || format!("{index}: {answer:?}"))?;
        nsm.refused(Request::LockPCR { index }, "ReadOnlyIndex")?;
    }
    let (_, locked) = described(nsm)?;
    ensure(locked.iter().copied().eq(0..24), || format!("locked are {locked:?}"))
}

/// The rest of them, with one that is too far before; again and over locked ones is fine.
fn ranges_lock(nsm: &Nsm) -> Rule {
    for range in [PCRS + 1, u16::MAX] {
        nsm.refused(Request::LockPCRs { range }, "InvalidIndex")?;
    }
    ensure(!nsm.pcr(24)?.0, || "a range that was refused has locked".to_owned())?;
    for (range, below) in [(0, 24), (BOOT_LOCKED, 24), (25, 25), (PCRS, PCRS), (PCRS, PCRS)] {
        let answer = nsm.ask(Request::LockPCRs { range });
        ensure(matches!(answer, Response::LockPCRs), || format!("{range}: {answer:?}"))?;
        let (_, locked) = described(nsm)?;
        ensure(locked.iter().copied().eq(0..below), || format!("after {range} locked are {locked:?}"))?;
    }
    Ok(())
}

fn locked_registers_stay(nsm: &Nsm) -> Rule {
    let before = nsm.pcrs()?;
    (0..PCRS).try_for_each(|index| nsm.refused(Request::ExtendPCR { index, data: vec![1, 2, 3] }, "ReadOnlyIndex"))?;
    (0..PCRS).try_for_each(|index| nsm.refused(Request::LockPCR { index }, "ReadOnlyIndex"))?;
    ensure(nsm.pcrs()? == before && before.iter().all(|(lock, _)| *lock), || "a register has changed or is open".to_owned())
}
