//! Adding a vCPU: which CPU it may be, and what the device is told.
//!
//! Order of checks: docs/driver.md, "ADD_VCPU". Which CPU it is decides [`crate::Pool`].

use nitroxide_abi::pci::{Command, SlotAddVcpu};
use nitroxide_abi::CpuId;

use crate::device::DeviceError;
use crate::error::AddVcpuError;
use crate::pool::Vcpu;
use crate::{Cpus, Device, Enclave, Machine, State};

impl<P, R> Enclave<P, R> {
    /// Adds one vCPU to an enclave that is being set up, and returns its Linux CPU number.
    ///
    /// `wanted` is a CPU of the pool (1 and up), or [`CpuId::ANY`] for the next free one; `is_owner` says whether the caller made
    /// the enclave. With its first CPU a whole core moves to the enclave.
    ///
    /// # Errors
    ///
    /// 270 past `Init`; 271 beyond the CPUs there are; 256, 257, 272 by the pool's state; EIO for another caller; the device's code.
    /// Afterwards pool and enclave are as before, unless the device did not answer: then the core stays until SLOT_FREE.
    pub fn add_vcpu<M: Machine>(
        &mut self,
        machine: &M,
        device: &mut impl Device,
        is_owner: bool,
        wanted: CpuId,
    ) -> Result<CpuId, AddVcpuError> {
        self.must_be_init(AddVcpuError::NotInit)?;
        let (slot, holder) = (self.slot, self.holder);
        let reserved = machine.with_pool(|pool, cpus| {
            if wanted.0 >= cpus.count() {
                return Err(AddVcpuError::NoSuchCpu);
            }
            pool.reserve(cpus, holder, wanted, is_owner)
        })?;
        let request = SlotAddVcpu { slot_uid: slot.0, vcpu_id: reserved.cpu.0, padding: 0 }.to_bytes();
        let result = self.exchange(device, Command::SlotAddVcpu, &request);
        machine.with_pool(|pool, cpus| match result {
            Ok(_) => pool.record_vcpu(reserved.cpu, Vcpu::Added),
            // The device may have the CPU or take it later: the core stays, the call can be repeated.
            Err(DeviceError::NoReply) => pool.record_vcpu(reserved.cpu, Vcpu::InDoubt),
            Err(_) => pool.undo(cpus, holder, reserved),
        });
        result?;
        self.summary.vcpus = self.summary.vcpus.saturating_add(1);
        Ok(reserved.cpu)
    }

    /// The state check that every call begins with or soon comes to.
    pub(crate) fn must_be_init<E: From<DeviceError>>(&self, otherwise: E) -> Result<(), E> {
        self.summary.state.must_be_init(otherwise)
    }
}

impl State {
    #[inline]
    pub(crate) fn must_be_init<E: From<DeviceError>>(self, otherwise: E) -> Result<(), E> {
        match self {
            Self::Init => Ok(()),
            Self::Gone => Err(DeviceError::Gone.into()),
            Self::Running | Self::Stopped | Self::Other(_) => Err(otherwise),
        }
    }
}
