//! From ioctl words to operations: what is copied in, done, and copied out, in mainline's order.
//!
//! A home looks at the word once ([`enclave_call_needs_lock`]) and calls one of three functions: [`enclave_call`] with the
//! enclave locked, [`enclave_look`] with only what can be seen without ([`Look`]), or [`device_call`] on `/dev/nitro_enclaves`. NE_CREATE_VM
//! and NE_LIST need the home's descriptors and list: [`create_vm`] and [`crate::extension::list`].

use nitroxide_abi::ioctl::{self, EnclaveStartInfo, ImageLoadInfo, UserMemoryRegion};
use nitroxide_abi::{extension, Code, CpuId, SlotUid};

use crate::client::{Client, Pages};
use crate::extension::{enclave_info, pool_info, query, read_stop, Home};
use crate::image::image_load_info;
use crate::{Device, Enclave, Machine, Region, State, Summary};

/// Does this command on an enclave's descriptor need the enclave itself? If not, [`enclave_look`] answers it at once, even
/// while another call waits for the device.
#[must_use]
pub fn enclave_call_needs_lock(word: u32) -> bool {
    matches!(word, ioctl::ADD_VCPU | ioctl::SET_USER_MEMORY_REGION | ioctl::START_ENCLAVE | extension::STOP)
}

/// Does one command on an enclave's descriptor and returns what the ioctl returns.
///
/// # Errors
///
/// The code that the caller gets; ENOTTY for a word that is not one of [`enclave_call_needs_lock`].
pub fn enclave_call<M, C, R>(
    enclave: &mut Enclave<C::Pages, R>,
    machine: &M,
    device: &mut impl Device,
    client: &mut C,
    word: u32,
    argument: u64,
) -> Result<u32, Code>
where
    M: Machine,
    C: Client,
    C::Pages: Pages,
    R: AsRef<[Region<C::Pages>]> + AsMut<[Region<C::Pages>]>,
{
    match word {
        ioctl::ADD_VCPU => {
            let bytes = client.read_array::<4>(argument)?;
            let cpu = enclave.add_vcpu(machine, device, client.is_owner(), CpuId(u32::from_le_bytes(bytes)));
            let cpu = told(enclave.slot, device, cpu)?;
            // If this fails the vCPU stays: the device has it, and no command takes it back.
            client.write_array(argument, &cpu.0.to_le_bytes())?;
        }
        ioctl::SET_USER_MEMORY_REGION => {
            let bytes = client.read_array::<{ UserMemoryRegion::SIZE }>(argument)?;
            let result = enclave.set_memory(machine, device, client, &UserMemoryRegion::from_bytes(&bytes));
            told(enclave.slot, device, result)?;
        }
        ioctl::START_ENCLAVE => {
            let bytes = client.read_array::<{ EnclaveStartInfo::SIZE }>(argument)?;
            let request = EnclaveStartInfo::from_bytes(&bytes);
            let enclave_cid = enclave.start(machine, device, &request);
            let enclave_cid = told(enclave.slot, device, enclave_cid)?;
            // If this fails the enclave runs all the same.
            client.write_array(argument, &EnclaveStartInfo { enclave_cid, ..request }.to_bytes())?;
        }
        extension::STOP => {
            read_stop(client, argument)?;
            let result = enclave.stop(device);
            told(enclave.slot, device, result)?;
        }
        _ => return Err(Code::ENOTTY),
    }
    Ok(0)
}

/// Tells why a call is refused, and makes a code of it.
fn told<T, E: Copy + Into<Code> + core::fmt::Display>(slot: SlotUid, device: &mut impl Device, result: Result<T, E>) -> Result<T, Code> {
    result.map_err(|error| {
        device.refused(slot, &error);
        error.into()
    })
}

/// What a home shows of an enclave without its lock, which a call may hold that waits for the device.
pub trait Look {
    /// Where it is in its life.
    fn state(&self) -> State;
    /// Everything that there is to see.
    fn summary(&self) -> Summary;
}

impl Look for Summary {
    fn state(&self) -> State {
        self.state
    }

    fn summary(&self) -> Summary {
        *self
    }
}

/// Answers the commands on an enclave's descriptor that only look.
///
/// # Errors
///
/// The code that the caller gets; ENOTTY for every other word.
pub fn enclave_look(
    enclave: &impl Look,
    machine: &impl Machine,
    client: &mut impl Client,
    home: &Home,
    word: u32,
    argument: u64,
) -> Result<u32, Code> {
    match word {
        ioctl::GET_IMAGE_LOAD_INFO => {
            let bytes = client.read_array::<{ ImageLoadInfo::SIZE }>(argument)?;
            let request = ImageLoadInfo::from_bytes(&bytes);
            let memory_offset = image_load_info(enclave.state(), request.flags)?;
            client.write_array(argument, &ImageLoadInfo { memory_offset, ..request }.to_bytes())?;
            Ok(0)
        }
        extension::ENCLAVE_INFO => enclave_info(client, &enclave.summary(), argument).map(|()| 0),
        extension::QUERY => query(machine, client, home, Some(&enclave.summary()), argument).map(|()| 0),
        extension::GET_API_VERSION => Ok(extension::API_VERSION),
        _ => Err(Code::ENOTTY),
    }
}

/// Answers the commands on `/dev/nitro_enclaves` that need nothing but the machine.
///
/// # Errors
///
/// The code that the caller gets; ENOTTY for every other word, NE_CREATE_VM and NE_LIST among them.
pub fn device_call(machine: &impl Machine, client: &mut impl Client, home: &Home, word: u32, argument: u64) -> Result<u32, Code> {
    match word {
        extension::QUERY => query(machine, client, home, None, argument).map(|()| 0),
        extension::POOL_INFO => pool_info(machine, client, argument).map(|()| 0),
        extension::GET_API_VERSION => Ok(extension::API_VERSION),
        _ => Err(Code::ENOTTY),
    }
}

/// Tells the caller of NE_CREATE_VM the slot's number: the last step before its descriptor is installed.
///
/// After an error the home releases the enclave and installs nothing (CVE-2021-3543 was the other order).
///
/// # Errors
///
/// EFAULT.
pub fn create_vm(client: &mut impl Client, slot: SlotUid, argument: u64) -> Result<(), Code> {
    client.write_array(argument, &slot.0.to_le_bytes())
}
