//! The commands beside mainline's five, as a client calls them (docs/abi.md, "The extension"); W19 is what they mend.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

mod support;

use nitroxide_abi::extension::{self, exit_reason, group, EnclaveInfo, List, PoolInfo, Query, Stop};
use nitroxide_abi::{flags, ioctl, Code, SlotUid};
use nitroxide_driver::call::{device_call, enclave_call_needs_lock, enclave_look};
use nitroxide_driver::extension::{bit, list, Listed, CORE_ERRATA};
use support::{Fixture, TestEnclave, ARGUMENT, HOME, MIB};

/// Puts a struct of `size` bytes at the argument.
fn put(f: &Fixture, bytes: &[u8], size: u32) {
    let mut bytes = bytes.to_vec();
    bytes.resize(size as usize, 0);
    bytes[..4].copy_from_slice(&size.to_le_bytes());
    f.memory.put(ARGUMENT, &bytes);
}

fn on_device(f: &Fixture, word: u32) -> Result<u32, Code> {
    device_call(&f.machine, &mut f.memory.stranger(), &HOME, word, ARGUMENT)
}

fn on_enclave(f: &Fixture, enclave: &TestEnclave, word: u32) -> Result<u32, Code> {
    enclave_look(&enclave.summary(), &f.machine, &mut f.memory.stranger(), &HOME, word, ARGUMENT)
}

fn query(f: &Fixture, requested: u64) -> Query {
    put(f, &Query { requested, ..Query::default() }.to_bytes(), 152);
    assert_eq!(on_device(f, extension::QUERY), Ok(0));
    Query::from_bytes(&f.memory.take(ARGUMENT))
}

#[test]
fn query_tells_everything_to_who_asks_for_nothing() {
    let f = Fixture::new(200);
    let answer = query(&f, 0);
    assert_eq!((answer.size, answer.provided, answer.api_version), (152, group::EVERYTHING, 1));
    assert_eq!((answer.home, answer.backend), (extension::home::LIBRARY, extension::backend::NONE));
    // Bits 0 to 4 and 27 to 31: 0x20..=0x24, 0x3B..=0x3F. Nothing of the second generation's.
    assert_eq!(answer.commands, 0xF800_001F);
    assert_eq!(answer.errata, CORE_ERRATA | bit(1));
    assert_eq!((answer.image_flags, answer.memory_flags, answer.start_flags), (flags::EIF_IMAGE, 0, flags::ENCLAVE_DEBUG_MODE));
    assert_eq!((answer.granule, answer.min_memory, answer.eif_offset), (2 * MIB, 64 * MIB, 8 * MIB));
    assert_eq!((answer.max_regions, answer.max_vcpus, answer.threads_per_core, answer.numa_node), (0, 4, 2, 0));
    assert_eq!((answer.min_cid, answer.max_cid), (4, 0xffff_fffe));
}

#[test]
fn query_gives_only_the_groups_that_are_wanted_and_known() {
    let f = Fixture::new(200);
    let answer = query(&f, group::FLAGS | 1 << 63);
    assert_eq!((answer.requested, answer.provided), (group::FLAGS | 1 << 63, group::FLAGS));
    assert_eq!((answer.api_version, answer.granule, answer.image_flags), (0, 0, 1));
}

#[test]
fn query_on_an_enclave_knows_its_limit() {
    let mut f = Fixture::new(200);
    let enclave = f.create(ARGUMENT).unwrap();
    put(&f, &Query::default().to_bytes(), 152);
    assert_eq!(on_enclave(&f, &enclave, extension::QUERY), Ok(0));
    assert_eq!(Query::from_bytes(&f.memory.take(ARGUMENT)).max_regions, 200);
}

#[test]
fn structs_follow_the_growth_rule() {
    let f = Fixture::new(200);
    let ask = |size, bytes: &[u8]| {
        put(&f, bytes, size);
        on_device(&f, extension::QUERY)
    };
    assert_eq!(ask(23, &[]), Err(Code::EINVAL));
    assert_eq!(ask(24, &[]), Ok(0));
    assert_eq!(f.memory.take::<4>(ARGUMENT), 24_u32.to_le_bytes());
    assert_eq!(ask(160, &[]), Ok(0));
    assert_eq!(f.memory.take::<4>(ARGUMENT), 152_u32.to_le_bytes());
    let mut longer = [0; 160];
    longer[159] = 1;
    assert_eq!(ask(160, &longer), Err(Code::E2BIG));
    assert_eq!(ask(5000, &[]), Err(Code::E2BIG));
    assert_eq!(ask(4096, &[]), Ok(0));
    assert_eq!(ask(4097, &[]), Err(Code::E2BIG));
    let flags = Query { flags: 1, ..Query::default() };
    assert_eq!(ask(152, &flags.to_bytes()), Err(Code::EINVAL));
    let reserved = Query { reserved: 1, ..Query::default() };
    assert_eq!(ask(152, &reserved.to_bytes()), Err(Code::EINVAL));
    assert_eq!(device_call(&f.machine, &mut f.memory.owner(), &HOME, extension::QUERY, 0), Err(Code::EFAULT));
}

#[test]
fn version_word_answers_on_both_descriptors_without_looking_at_the_argument() {
    let mut f = Fixture::new(200);
    let enclave = f.create(ARGUMENT).unwrap();
    assert_eq!(device_call(&f.machine, &mut f.memory.owner(), &HOME, extension::GET_API_VERSION, 0), Ok(1));
    assert_eq!(on_enclave(&f, &enclave, extension::GET_API_VERSION), Ok(1));
}

#[test]
fn enclave_info_follows_its_life() {
    let mut f = Fixture::new(200);
    let mut enclave = f.ready();
    let info = |f: &Fixture, enclave: &TestEnclave| {
        put(f, &EnclaveInfo::default().to_bytes(), 120);
        assert_eq!(on_enclave(f, enclave, extension::ENCLAVE_INFO), Ok(0));
        EnclaveInfo::from_bytes(&f.memory.take(ARGUMENT))
    };
    let setup = info(&f, &enclave);
    assert_eq!((setup.size, setup.slot_uid, setup.state, setup.enclave_cid), (120, enclave.slot_uid().0, extension::state::INIT, 0));
    assert_eq!((setup.vcpus, setup.memory_size, setup.regions, setup.max_regions), (2, 64 * MIB, 1, 200));
    assert_eq!((setup.started_ns, setup.device_commands), (0, 3));
    f.start(&mut enclave, 1, 77).unwrap();
    let running = info(&f, &enclave);
    assert_eq!((running.state, running.enclave_cid, running.start_flags), (extension::state::RUNNING, 77, 1));
    assert!(running.started_ns > running.created_ns);
    f.device.end(enclave.slot_uid(), 0xFFFF);
    enclave.device_event(&mut f.device);
    let ended = info(&f, &enclave);
    assert_eq!((ended.state, ended.exit_reason, ended.events), (extension::state::STOPPED, exit_reason::ENDED, 1));
    assert!(ended.ended_ns > ended.started_ns);
}

#[test]
fn stop_by_ioctl_is_276_unless_it_runs() {
    let mut f = Fixture::new(200);
    let mut enclave = f.ready();
    let mut client = f.memory.stranger();
    put(&f, &Stop::default().to_bytes(), 8);
    assert_eq!(f.call(&mut enclave, &mut client, extension::STOP, ARGUMENT), Err(Code::NOT_IN_RUNNING_STATE));
    f.start(&mut enclave, 0, 0).unwrap();
    put(&f, &Stop { flags: 1, ..Stop::default() }.to_bytes(), 8);
    assert_eq!(f.call(&mut enclave, &mut client, extension::STOP, ARGUMENT), Err(Code::EINVAL));
    put(&f, &Stop::default().to_bytes(), 8);
    assert_eq!(f.call(&mut enclave, &mut client, extension::STOP, ARGUMENT), Ok(0));
    assert!(enclave.hung_up());
}

#[test]
fn list_walks_ascending_and_ends_with_enoent() {
    let mut f = Fixture::new(200);
    let enclaves = [f.create(ARGUMENT).unwrap(), f.running()];
    let next = |after: SlotUid| {
        let found =
            enclaves.iter().map(|enclave| enclave.summary()).filter(|summary| summary.slot > after).min_by_key(|summary| summary.slot)?;
        Some(Listed { summary: found, owner_uid: 1000, owner_pid: 42 })
    };
    put(&f, &List::default().to_bytes(), 72);
    for enclave in &enclaves {
        list(&mut f.memory.owner(), ARGUMENT, next).unwrap();
        let entry = List::from_bytes(&f.memory.take(ARGUMENT));
        assert_eq!((entry.slot_uid, entry.cursor), (enclave.slot_uid().0, enclave.slot_uid().0));
        assert_eq!((entry.state, entry.owner_uid, entry.owner_pid), (enclave.state().number(), 1000, 42));
    }
    assert_eq!(list(&mut f.memory.owner(), ARGUMENT, next), Err(Code::ENOENT));
}

#[test]
fn pool_info_shows_what_is_in_the_pool_and_what_is_free() {
    let mut f = Fixture::new(200);
    let mut enclave = f.create(ARGUMENT).unwrap();
    f.add_vcpu(&mut enclave, 0).unwrap();
    put(&f, &PoolInfo::default().to_bytes(), 296);
    assert_eq!(on_device(&f, extension::POOL_INFO), Ok(0));
    let info = PoolInfo::from_bytes(&f.memory.take(ARGUMENT));
    assert_eq!((info.cpus, info.free_cpus, info.cores, info.free_cores, info.threads_per_core), (4, 2, 2, 1, 2));
    assert_eq!((info.pool_mask[0], info.free_mask[0]), (0b11_1100, 0b11_0000));
    put(&f, &PoolInfo { first_cpu: 64, ..PoolInfo::default() }.to_bytes(), 296);
    assert_eq!(on_device(&f, extension::POOL_INFO), Ok(0));
    let info = PoolInfo::from_bytes(&f.memory.take(ARGUMENT));
    assert_eq!((info.cpus, info.pool_mask), (4, [0; 16]));
    put(&f, &PoolInfo { first_cpu: 63, ..PoolInfo::default() }.to_bytes(), 296);
    assert_eq!(on_device(&f, extension::POOL_INFO), Err(Code::EINVAL));
}

#[test]
fn inputs_without_a_meaning_are_einval() {
    let mut f = Fixture::new(200);
    let enclave = f.create(ARGUMENT).unwrap();
    put(&f, &EnclaveInfo { flags: 1, ..EnclaveInfo::default() }.to_bytes(), 120);
    assert_eq!(on_enclave(&f, &enclave, extension::ENCLAVE_INFO), Err(Code::EINVAL));
    for info in [PoolInfo { flags: 1, ..PoolInfo::default() }, PoolInfo { reserved: 1, ..PoolInfo::default() }] {
        put(&f, &info.to_bytes(), 296);
        assert_eq!(on_device(&f, extension::POOL_INFO), Err(Code::EINVAL));
    }
    put(&f, &List { flags: 1, ..List::default() }.to_bytes(), 72);
    assert_eq!(list(&mut f.memory.owner(), ARGUMENT, |_| None), Err(Code::EINVAL));
}

#[test]
fn foreign_words_are_enotty_everywhere() {
    let mut f = Fixture::new(200);
    let mut enclave = f.create(ARGUMENT).unwrap();
    let theirs = nitroxide_abi::reserved::SECOND_GENERATION_WORDS.iter().chain(&nitroxide_abi::reserved::DRAFT_WORDS);
    for word in theirs {
        let mut client = f.memory.owner();
        assert_eq!(f.call(&mut enclave, &mut client, word.word, ARGUMENT), Err(Code::ENOTTY), "{}", word.name);
        assert_eq!(on_enclave(&f, &enclave, word.word), Err(Code::ENOTTY));
        assert_eq!(on_device(&f, word.word), Err(Code::ENOTTY));
        assert!(!enclave_call_needs_lock(word.word));
    }
    assert_eq!(on_device(&f, ioctl::ADD_VCPU), Err(Code::ENOTTY));
    assert_eq!(on_device(&f, extension::STOP), Err(Code::ENOTTY));
}

/// For who traces calls: two reasons that share a code are told apart.
#[test]
fn refused_call_tells_why() {
    let mut f = Fixture::new(8);
    let mut e = f.create(ARGUMENT).unwrap();
    let mut stranger = f.memory.stranger();
    assert_eq!(f.add_vcpu_as(&mut e, &mut stranger, 0), Err(Code::EIO));
    assert_eq!(f.start(&mut e, 0, 0), Err(Code::NO_MEM_REGIONS_ADDED));
    let slot = e.slot_uid();
    let expected = ["Only the process that created the enclave may add vCPUs.", "The enclave has no memory yet."];
    assert_eq!(f.device.refusals, expected.map(|why| format!("{slot}: {why}")));
}
