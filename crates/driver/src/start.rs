//! Starting an enclave.
//!
//! Order of checks: docs/driver.md, "START_ENCLAVE".

use nitroxide_abi::ioctl::EnclaveStartInfo;
use nitroxide_abi::pci::{self, Command};
use nitroxide_abi::{flags, limits, Cid};

use crate::device::DeviceError;
use crate::error::StartError;
use crate::{Device, Enclave, Machine, State};

impl<P, R> Enclave<P, R> {
    /// Starts an enclave whose memory and vCPUs are complete, and returns its CID as the device gave it.
    ///
    /// Any holder of the descriptor may start it, as in mainline (W15). An event that came while the device was starting it is looked
    /// at before this returns.
    ///
    /// # Errors
    ///
    /// 274, 275, 270, 266, 268, 267, 269 in this order; then the device's code, and the state stays `Init`: it can be tried again.
    pub fn start(&mut self, machine: &impl Machine, device: &mut impl Device, request: &EnclaveStartInfo) -> Result<u64, StartError> {
        check_arguments(request)?;
        self.must_be_init(StartError::NotInit)?;
        self.check_complete(machine)?;
        let events_before = device.events_seen();
        let command = pci::EnclaveStart { slot_uid: self.slot.0, enclave_cid: request.enclave_cid, flags: request.flags }.to_bytes();
        let reply = self.exchange(device, Command::EnclaveStart, &command).inspect_err(|error| {
            // The device may be starting it all the same; a release then stops it first.
            self.start_in_doubt |= *error == DeviceError::NoReply;
        })?;
        self.summary.state = State::Running;
        self.summary.cid = Cid(u32::try_from(reply.enclave_cid).unwrap_or(u32::MAX));
        self.summary.start_flags = request.flags;
        self.summary.started_ns = device.now_ns();
        if device.events_seen() != events_before {
            // The home's event worker could not look at an enclave that was locked (W9).
            self.device_event(device);
        }
        Ok(reply.enclave_cid)
    }

    fn check_complete(&self, machine: &impl Machine) -> Result<(), StartError> {
        if self.summary.runs == 0 {
            return Err(StartError::NoMemory);
        }
        if self.summary.memory_bytes < limits::MIN_ENCLAVE_BYTES {
            return Err(StartError::TooLittleMemory);
        }
        if self.summary.vcpus == 0 {
            return Err(StartError::NoVcpus);
        }
        let holder = self.holder;
        if machine.with_pool(|pool, _| pool.has_half_core(holder)) {
            return Err(StartError::HalfCore);
        }
        Ok(())
    }
}

fn check_arguments(request: &EnclaveStartInfo) -> Result<(), StartError> {
    if request.flags >= flags::ENCLAVE_START_MAX_FLAG_VAL {
        return Err(StartError::BadFlags);
    }
    let any = u64::from(Cid::ANY.0);
    let own = u64::from(limits::MIN_ENCLAVE_CID.0)..=u64::from(limits::MAX_ENCLAVE_CID.0);
    if request.enclave_cid != any && !own.contains(&request.enclave_cid) {
        return Err(StartError::BadCid);
    }
    Ok(())
}
