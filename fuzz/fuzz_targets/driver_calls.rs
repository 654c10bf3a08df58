//! Any calls of a client, with any struct bytes, over pages of any shape, on a device that answers anything: no panic, and once the
//! device confirms that it let go, nothing is held.
#![no_main]

#[path = "../../crates/driver/tests/support/mod.rs"]
mod support;

use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use nitroxide_abi::pci::{Command, Reply};
use nitroxide_abi::{extension, ioctl};
use nitroxide_driver::call::{device_call, enclave_look};
use nitroxide_driver::extension::Home;
use nitroxide_driver::{Device, Notice, SendError};
use support::client::{Mapped, Memory};
use support::machine::TestMachine;
use support::{Fixture, ARGUMENT, MIB};

const WORDS: [u32; 12] = [
    ioctl::ADD_VCPU,
    ioctl::ADD_VCPU,
    ioctl::GET_IMAGE_LOAD_INFO,
    ioctl::SET_USER_MEMORY_REGION,
    ioctl::SET_USER_MEMORY_REGION,
    ioctl::START_ENCLAVE,
    extension::STOP,
    extension::QUERY,
    extension::ENCLAVE_INFO,
    extension::POOL_INFO,
    extension::GET_API_VERSION,
    ioctl::CREATE_VM,
];

const HOME: Home = Home { home: 3, backend: 0, isolation: 0, errata: 0, features: 0 };

/// Slot numbers that never repeat, which even this device keeps to, or no test could tell two slots apart.
static NEXT_SLOT: AtomicU64 = AtomicU64::new(1);

/// Answers as the input says, until it confirms everything.
struct AnyDevice<'a> {
    answers: Unstructured<'a>,
    confirms: bool,
}

impl Device for AnyDevice<'_> {
    fn send(&mut self, command: Command, _: &[u8]) -> Result<Reply, SendError> {
        let slot_uid = NEXT_SLOT.fetch_add(1, Ordering::Relaxed);
        let fine = Reply { slot_uid, mem_regions: 8, enclave_cid: 16, state: 2, ..Reply::default() };
        if self.confirms {
            return Ok(fine);
        }
        match self.answers.arbitrary::<u8>().unwrap_or(0) {
            0..=160 => Ok(fine),
            161..=180 => Err(SendError::NoReply),
            181..=190 => Err(SendError::NotSent),
            191..=193 => Err(SendError::Gone),
            194..=230 => Ok(Reply { rc: self.answers.arbitrary().unwrap_or(-1), ..fine }),
            _ => {
                let reply = Reply::from_bytes(&self.answers.arbitrary().unwrap_or([0; 72]));
                Ok(if command == Command::SlotAlloc { Reply { slot_uid, ..reply } } else { reply })
            }
        }
    }
    fn events_seen(&mut self) -> u64 {
        self.answers.arbitrary::<u8>().unwrap_or(0).into()
    }
    fn now_ns(&mut self) -> u64 {
        self.answers.arbitrary().unwrap_or(0)
    }
    fn notice(&mut self, notice: &Notice) {
        assert!(!notice.to_string().is_empty());
    }
}

fuzz_target!(|input: &[u8]| {
    let mut calls = Unstructured::new(input);
    let Ok(answers) = calls.bytes(input.len() / 3) else { return };
    let machine = TestMachine::with_threads(8, 2);
    machine.write_pool("2-7").expect("a good pool");
    let memory = Memory::new();
    let pages = (0..6).map_while(|_| {
        let sizes = [2 * MIB, 32 * MIB, 64 * MIB, 4096];
        Some(Mapped {
            gpa: if calls.ratio(9, 10).ok()? { calls.int_in_range(0..=200).ok()? * 2 * MIB } else { calls.arbitrary().ok()? },
            size: *calls.choose(&sizes).ok()?,
            huge: calls.ratio(9, 10).ok()?,
            node: 0,
            readable: true,
        })
    });
    let address = memory.map(pages.collect());
    let mut f = Fixture { machine, device: AnyDevice { answers: Unstructured::new(answers), confirms: false }, memory };
    let mut enclaves: Vec<_> = (0..2).filter_map(|_| f.create(ARGUMENT).ok()).collect();
    while !calls.is_empty() {
        let (Ok(word), Ok(which)) = (calls.choose(&WORDS).copied(), calls.arbitrary::<bool>()) else { break };
        let Some(enclave) = enclaves.get_mut(usize::from(which)) else { break };
        let mut bytes: [u8; 32] = calls.arbitrary().unwrap_or_default();
        if word == ioctl::SET_USER_MEMORY_REGION && bytes[31] % 8 != 0 {
            bytes[..8].fill(0);
            let (size, offset) = (u64::from(bytes[8] % 64) * 2 * MIB, u64::from(bytes[16] % 64) * 2 * MIB);
            bytes[8..16].copy_from_slice(&size.to_le_bytes());
            bytes[16..24].copy_from_slice(&(address + offset).to_le_bytes());
        }
        if word == ioctl::ADD_VCPU {
            let cpu = u32::from(bytes[0] % 9);
            bytes[..4].copy_from_slice(&cpu.to_le_bytes());
        }
        f.memory.put(ARGUMENT, &bytes);
        let mut client = f.memory.owner();
        let _ = f.call(enclave, &mut client, word, ARGUMENT);
        let _ = enclave_look(&enclave.summary(), &f.machine, &mut client, &HOME, word, ARGUMENT);
        let _ = device_call(&f.machine, &mut client, &HOME, word, ARGUMENT);
        if calls.ratio(1, 8).unwrap_or(false) {
            enclave.device_event(&mut f.device);
            let _ = f.machine.write_pool("2-5");
        }
    }
    for enclave in &mut enclaves {
        let _ = enclave.release(&f.machine, &mut f.device);
    }
    f.device.confirms = true;
    for enclave in &mut enclaves {
        enclave.release(&f.machine, &mut f.device).expect("the device confirms everything now");
    }
    drop(enclaves);
    assert_eq!(f.memory.pinned(), 0);
    f.machine.assert_nothing_held();
});
