//! Our own commands as far as the core answers them: NE_QUERY, NE_ENCLAVE_INFO, NE_LIST, NE_POOL_INFO (NE_STOP is
//! [`Enclave::stop`](crate::Enclave::stop)).
//!
//! All of them are read by the one growth rule of [`nitroxide_abi::sized`]; none asks the device. docs/abi.md, "The extension".

use nitroxide_abi::extension::{self, cid_flag, feature, group, EnclaveInfo, List, PoolInfo, Query, Stop};
use nitroxide_abi::sized::copy_sized;
use nitroxide_abi::{flags, ioctl, limits, Code, CpuId, SlotUid};

use crate::client::Client;
use crate::enclave::clamp;
use crate::{CpuEntry, Machine, Pool, Summary};

/// What only the home knows of itself, for NE_QUERY.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Home {
    /// Where the driver lives, one of [`extension::home`].
    pub home: u32,
    /// What runs the enclaves, one of [`extension::backend`].
    pub backend: u32,
    /// What protects an enclave from the parent, one of [`extension::isolation`].
    pub isolation: u32,
    /// Weaknesses that the home has mended, one bit each, beside [`CORE_ERRATA`]; W(n+1) is bit n.
    pub errata: u64,
    /// Features of the home, bits of [`extension::feature`], beside the core's.
    pub features: u64,
}

/// The weaknesses of the original driver that this crate has mended whatever the home does: W2, W3, W5, W10 to W16, W20.
/// The others are [`HOME_ERRATA`].
pub const CORE_ERRATA: u64 = bit(2) | bit(3) | bit(5) | bit(10) | bit(11) | bit(12) | bit(13) | bit(14) | bit(15) | bit(16) | bit(20);

/// The weaknesses that a home has mended if it does its part: W1, W4, W6 to W9, W17 to W19.
pub const HOME_ERRATA: u64 = bit(1) | bit(4) | bit(6) | bit(7) | bit(8) | bit(9) | bit(17) | bit(18) | bit(19);

/// The bit of weakness W`number`, 1 to 20, in [`Query::errata`].
#[must_use]
pub const fn bit(number: u32) -> u64 {
    1 << (number - 1)
}

/// All commands that answer, bit = number - 0x20.
const COMMANDS: u64 = command_bit(ioctl::CREATE_VM)
    | command_bit(ioctl::ADD_VCPU)
    | command_bit(ioctl::GET_IMAGE_LOAD_INFO)
    | command_bit(ioctl::SET_USER_MEMORY_REGION)
    | command_bit(ioctl::START_ENCLAVE)
    | command_bit(extension::POOL_INFO)
    | command_bit(extension::STOP)
    | command_bit(extension::LIST)
    | command_bit(extension::ENCLAVE_INFO)
    | command_bit(extension::QUERY);

const fn command_bit(word: u32) -> u64 {
    1 << ((word & 0xFF) - 0x20)
}

/// Answers NE_QUERY; `enclave` is given on an enclave's descriptor.
///
/// # Errors
///
/// EFAULT, EINVAL and E2BIG for the struct.
pub fn query(machine: &impl Machine, client: &mut impl Client, home: &Home, enclave: Option<&Summary>, argument: u64) -> Result<(), Code> {
    let (bytes, shared) = read_sized::<{ Query::SIZE }>(client, argument, QUERY_MINIMUM)?;
    let request = Query::from_bytes(&bytes);
    if request.flags != 0 || request.reserved != 0 {
        return Err(Code::EINVAL);
    }
    let provided = if request.requested == 0 { group::EVERYTHING } else { request.requested & group::EVERYTHING };
    let mut reply = Query { requested: request.requested, provided, ..Query::default() };
    if provided & group::IDENTITY != 0 {
        reply.api_version = extension::API_VERSION;
        reply.home = home.home;
        reply.backend = home.backend;
        reply.isolation = home.isolation;
        reply.commands = COMMANDS;
        reply.errata = CORE_ERRATA | home.errata;
        reply.features = [feature::EXIT_REASON | feature::RECOVERY | home.features, 0];
    }
    if provided & group::FLAGS != 0 {
        reply.image_flags = flags::IMAGE_LOAD_VALID;
        reply.memory_flags = flags::MEMORY_REGION_VALID;
        reply.start_flags = flags::ENCLAVE_START_VALID;
    }
    if provided & group::LIMITS != 0 {
        fill_limits(&mut reply, machine, enclave);
    }
    write_sized(client, argument, reply.to_bytes(), shared)
}

fn fill_limits(reply: &mut Query, machine: &impl Machine, enclave: Option<&Summary>) {
    reply.granule = limits::GRANULE;
    reply.min_memory = limits::MIN_ENCLAVE_BYTES;
    reply.eif_offset = limits::EIF_OFFSET;
    reply.max_regions = enclave.map_or(0, |enclave| clamp(enclave.max_regions));
    reply.min_cid = limits::MIN_ENCLAVE_CID.0;
    reply.max_cid = limits::MAX_ENCLAVE_CID.0;
    reply.cid_flags = cid_flag::UNIQUE;
    machine.with_pool(|pool, _| {
        reply.max_vcpus = u32::try_from(pool.cpus().count()).unwrap_or(u32::MAX);
        reply.threads_per_core = pool.threads_per_core();
        reply.numa_node = pool.node();
    });
}

/// Answers NE_ENCLAVE_INFO from a summary, which may be a copy taken a moment ago.
///
/// # Errors
///
/// EFAULT, EINVAL and E2BIG for the struct.
pub fn enclave_info(client: &mut impl Client, enclave: &Summary, argument: u64) -> Result<(), Code> {
    let (bytes, shared) = read_sized::<{ EnclaveInfo::SIZE }>(client, argument, EnclaveInfo::SIZE)?;
    if EnclaveInfo::from_bytes(&bytes).flags != 0 {
        return Err(Code::EINVAL);
    }
    write_sized(client, argument, enclave.to_info().to_bytes(), shared)
}

/// An enclave as NE_LIST shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listed {
    /// The enclave.
    pub summary: Summary,
    /// User id of its creator, as the caller sees it.
    pub owner_uid: u32,
    /// Process id of its creator, as the caller sees it; 0 if it cannot.
    pub owner_pid: u32,
}

/// Answers NE_LIST. `next_after` finds, among the enclaves that the caller may see, the one with the lowest slot uid above the
/// one given; it may take the home's list lock but waits for no enclave.
///
/// # Errors
///
/// EFAULT, EINVAL and E2BIG for the struct; ENOENT after the last enclave.
pub fn list(client: &mut impl Client, argument: u64, next_after: impl FnOnce(SlotUid) -> Option<Listed>) -> Result<(), Code> {
    let (bytes, shared) = read_sized::<{ List::SIZE }>(client, argument, List::SIZE)?;
    let request = List::from_bytes(&bytes);
    if request.flags != 0 {
        return Err(Code::EINVAL);
    }
    let listed = next_after(SlotUid(request.cursor)).ok_or(Code::ENOENT)?;
    let info = listed.summary.to_info();
    let reply = List {
        size: 0,
        flags: 0,
        cursor: info.slot_uid,
        slot_uid: info.slot_uid,
        enclave_cid: info.enclave_cid,
        start_flags: info.start_flags,
        state: info.state,
        exit_reason: info.exit_reason,
        memory_size: info.memory_size,
        vcpus: info.vcpus,
        owner_uid: listed.owner_uid,
        owner_pid: listed.owner_pid,
        trouble: listed.summary.trouble,
    };
    write_sized(client, argument, reply.to_bytes(), shared)
}

/// Answers NE_POOL_INFO.
///
/// # Errors
///
/// EFAULT, EINVAL and E2BIG for the struct; EINVAL if `first_cpu` is no multiple of 64.
pub fn pool_info(machine: &impl Machine, client: &mut impl Client, argument: u64) -> Result<(), Code> {
    let (bytes, shared) = read_sized::<{ PoolInfo::SIZE }>(client, argument, PoolInfo::SIZE)?;
    let request = PoolInfo::from_bytes(&bytes);
    if request.flags != 0 || request.reserved != 0 || request.first_cpu % u64::BITS != 0 {
        return Err(Code::EINVAL);
    }
    let mut reply = PoolInfo { first_cpu: request.first_cpu, ..PoolInfo::default() };
    machine.with_pool(|pool, _| fill_pool(&mut reply, pool));
    write_sized(client, argument, reply.to_bytes(), shared)
}

fn fill_pool<T: AsRef<[CpuEntry]> + AsMut<[CpuEntry]>>(reply: &mut PoolInfo, pool: &Pool<T>) {
    reply.numa_node = pool.node();
    reply.threads_per_core = pool.threads_per_core();
    for (cpu, core, free) in pool.cpus() {
        let first_of_core = u32::from(cpu == core);
        reply.cpus = reply.cpus.saturating_add(1);
        reply.cores = reply.cores.saturating_add(first_of_core);
        set_bit(&mut reply.pool_mask, reply.first_cpu, cpu);
        if free {
            reply.free_cpus = reply.free_cpus.saturating_add(1);
            reply.free_cores = reply.free_cores.saturating_add(first_of_core);
            set_bit(&mut reply.free_mask, reply.first_cpu, cpu);
        }
    }
}

fn set_bit(mask: &mut [u64; 16], first_cpu: u32, cpu: CpuId) {
    let Some(offset) = cpu.0.checked_sub(first_cpu) else { return };
    let word = usize::try_from(offset / u64::BITS).ok().and_then(|index| mask.get_mut(index));
    if let Some(word) = word {
        *word |= 1 << (offset % u64::BITS);
    }
}

/// Reads NE_STOP's struct, which only can be malformed.
pub(crate) fn read_stop(client: &mut impl Client, argument: u64) -> Result<(), Code> {
    let (bytes, _) = read_sized::<{ Stop::SIZE }>(client, argument, Stop::SIZE)?;
    if Stop::from_bytes(&bytes).flags != 0 {
        return Err(Code::EINVAL);
    }
    Ok(())
}

/// The part of [`Query`] that its first version must have: everything that goes in.
const QUERY_MINIMUM: usize = 24;

/// Reads a struct of `N` bytes by the growth rule; also how many bytes of it may be written back.
fn read_sized<const N: usize>(client: &mut impl Client, argument: u64, minimum: usize) -> Result<([u8; N], usize), Code> {
    let mut known = [0; N];
    let shared = copy_sized(minimum, &mut known, |offset, bytes| {
        let offset = u64::try_from(offset).map_err(|_| Code::EFAULT)?;
        client.read(argument.checked_add(offset).ok_or(Code::EFAULT)?, bytes)
    })?;
    Ok((known, shared))
}

/// Writes back as much of a struct as the caller has room for, with that length as its size.
fn write_sized<const N: usize>(client: &mut impl Client, argument: u64, mut bytes: [u8; N], shared: usize) -> Result<(), Code> {
    let size = u32::try_from(shared).map_err(|_| Code::E2BIG)?;
    for (target, source) in bytes.iter_mut().zip(size.to_le_bytes()) {
        *target = source;
    }
    client.write(argument, bytes.get(..shared).unwrap_or(&bytes))
}
