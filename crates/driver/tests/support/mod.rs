//! A home made for tests: a machine with made-up CPUs and pages, and a device model that can misbehave. Single-threaded.
//!
//! [`Fixture`] puts the parts together and speaks in ioctls, as a client does.

#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its own part of this; tests may unwrap")]

pub mod client;
pub mod device;
pub mod machine;
pub mod wire;

use nitroxide_abi::ioctl::{self, EnclaveStartInfo, ImageLoadInfo, UserMemoryRegion};
use nitroxide_abi::{extension, Code, SlotUid};
use nitroxide_driver::extension::{bit, Home};
use nitroxide_driver::{call, Device, Enclave, Region, Slot};

use client::{Memory, TestClient, TestPages};
use device::Model;
use machine::TestMachine;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

pub type TestEnclave = Enclave<TestPages, Vec<Region<TestPages>>>;

/// Where tests put an ioctl's argument; any address that is no region.
pub const ARGUMENT: u64 = 0x10_0000;

/// What NE_QUERY says of the home.
pub const HOME: Home = Home {
    home: extension::home::LIBRARY,
    backend: extension::backend::NONE,
    isolation: extension::isolation::NONE,
    errata: bit(1),
    features: 0,
};

/// One parent with one client process and one device.
pub struct Fixture<D = Model> {
    pub machine: TestMachine,
    pub device: D,
    pub memory: Memory,
}

impl Fixture<Model> {
    /// Six CPUs in cores of two threads, pool `2-5`, and a device that takes `max_regions` regions per slot.
    pub fn new(max_regions: u64) -> Self {
        let machine = TestMachine::with_threads(6, 2);
        machine.write_pool("2-5\n").unwrap();
        Self { machine, device: Model::new(max_regions), memory: Memory::new() }
    }
}

impl<D: Device> Fixture<D> {
    /// NE_CREATE_VM up to and including the writing of the uid.
    pub fn create(&mut self, argument: u64) -> Result<TestEnclave, Code> {
        let slot = Slot::allocate(&self.machine, &mut self.device)?;
        let storage = (0..slot.max_regions().min(4096)).map(|_| Region::default()).collect();
        let mut enclave = Enclave::new(&slot, storage, &mut self.device);
        let mut client = self.memory.owner();
        if let Err(code) = call::create_vm(&mut client, enclave.slot_uid(), argument) {
            let _ = enclave.release(&self.machine, &mut self.device);
            return Err(code);
        }
        Ok(enclave)
    }

    pub fn call(&mut self, enclave: &mut TestEnclave, client: &mut TestClient, word: u32, argument: u64) -> Result<u32, Code> {
        if word == ioctl::GET_IMAGE_LOAD_INFO {
            return call::enclave_look(&enclave.summary(), &self.machine, client, &HOME, word, argument);
        }
        call::enclave_call(enclave, &self.machine, &mut self.device, client, word, argument)
    }

    pub fn add_vcpu(&mut self, enclave: &mut TestEnclave, cpu: u32) -> Result<u32, Code> {
        let mut client = self.memory.owner();
        self.add_vcpu_as(enclave, &mut client, cpu)
    }

    pub fn add_vcpu_as(&mut self, enclave: &mut TestEnclave, client: &mut TestClient, cpu: u32) -> Result<u32, Code> {
        self.memory.put(ARGUMENT, &cpu.to_le_bytes());
        self.call(enclave, client, ioctl::ADD_VCPU, ARGUMENT)?;
        Ok(u32::from_le_bytes(self.memory.take(ARGUMENT)))
    }

    pub fn load_info(&mut self, enclave: &mut TestEnclave, flags: u64) -> Result<u64, Code> {
        self.memory.put(ARGUMENT, &ImageLoadInfo { flags, memory_offset: 7 }.to_bytes());
        let mut client = self.memory.stranger();
        self.call(enclave, &mut client, ioctl::GET_IMAGE_LOAD_INFO, ARGUMENT)?;
        Ok(ImageLoadInfo::from_bytes(&self.memory.take(ARGUMENT)).memory_offset)
    }

    pub fn set_memory(&mut self, enclave: &mut TestEnclave, address: u64, size: u64) -> Result<(), Code> {
        self.set_memory_flags(enclave, address, size, 0)
    }

    pub fn set_memory_flags(&mut self, enclave: &mut TestEnclave, address: u64, size: u64, flags: u64) -> Result<(), Code> {
        let mut client = self.memory.owner();
        self.set_memory_as(enclave, &mut client, UserMemoryRegion { flags, memory_size: size, userspace_addr: address })
    }

    pub fn set_memory_as(&mut self, enclave: &mut TestEnclave, client: &mut TestClient, region: UserMemoryRegion) -> Result<(), Code> {
        self.memory.put(ARGUMENT, &region.to_bytes());
        self.call(enclave, client, ioctl::SET_USER_MEMORY_REGION, ARGUMENT).map(|_| ())
    }

    pub fn start(&mut self, enclave: &mut TestEnclave, flags: u64, cid: u64) -> Result<u64, Code> {
        self.memory.put(ARGUMENT, &EnclaveStartInfo { flags, enclave_cid: cid }.to_bytes());
        let mut client = self.memory.stranger();
        self.call(enclave, &mut client, ioctl::START_ENCLAVE, ARGUMENT)?;
        Ok(EnclaveStartInfo::from_bytes(&self.memory.take(ARGUMENT)).enclave_cid)
    }

    /// The last close; gives the enclave back if the device did not confirm.
    #[allow(clippy::result_large_err, reason = "the enclave itself is what is left")]
    pub fn close(&mut self, mut enclave: TestEnclave) -> Result<(), TestEnclave> {
        match enclave.release(&self.machine, &mut self.device) {
            Ok(()) => Ok(()),
            Err(_) => Err(enclave),
        }
    }

    /// An enclave that lacks nothing but the start: 64 MiB in one run, two vCPUs.
    pub fn ready(&mut self) -> TestEnclave {
        let mut enclave = self.create(ARGUMENT).unwrap();
        let address = self.memory.map_huge(64 * MIB);
        self.set_memory(&mut enclave, address, 64 * MIB).unwrap();
        self.add_vcpu(&mut enclave, 0).unwrap();
        self.add_vcpu(&mut enclave, 0).unwrap();
        enclave
    }

    /// The same, running.
    pub fn running(&mut self) -> TestEnclave {
        let mut enclave = self.ready();
        self.start(&mut enclave, 0, 0).unwrap();
        enclave
    }

    /// Nothing is held: no page, no core, no run, no slot in the core's books.
    pub fn assert_nothing_held(&self) {
        assert_eq!(self.memory.pinned(), 0, "pages are pinned");
        self.machine.assert_nothing_held();
    }
}

/// The uid that CREATE_VM wrote.
pub fn written_uid(memory: &Memory) -> SlotUid {
    SlotUid(u64::from_le_bytes(memory.take(ARGUMENT)))
}
