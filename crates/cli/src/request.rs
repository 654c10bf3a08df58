//! What enclave is to be started: the command line or a `--config` file, checked as far as that is possible without starting anything.
//!
//! A [`LaunchRequest`] proves: the image is a well-formed EIF that fits into the memory, numbers are in their ranges, the name can be
//! used. What only the device knows (free CPUs, a free CID, memory) is decided by the device.

use std::path::{Path, PathBuf};

use nitroxide_client::Topology;
use nitroxide_world::ParentIdentity;
use serde::{Deserialize, Serialize};

use crate::{
    Dialect,
    arguments::{DeviceKind, Discovery, EngineKind, ParentArguments, Resources, RunEnclaveArguments},
    codes::ErrorCode,
    failure::Failure,
    image,
    remarks::Remarks,
};

/// The smallest enclave, in MiB (`NE_MIN_MEM_REGION` and `NE_ERR_ENCLAVE_MEM_MIN_SIZE` of Linux `drivers/virt/nitro_enclaves`).
const MIN_MEMORY_MIB: u64 = nitroxide_abi::limits::MIN_ENCLAVE_BYTES >> 20;
/// The smallest memory that is chosen for the user, in MiB: a distribution's kernel needs about 100.
const DEFAULT_MEMORY_MIB: u64 = 256;
/// The memory that nitro-cli demands, as a multiple of the image.
const IMAGE_FACTOR: u64 = 4;
const DEFAULT_CPUS: u32 = 2;
/// Where the image lies in the enclave's memory, in bytes (`NE_GET_IMAGE_LOAD_INFO`).
const IMAGE_OFFSET: u64 = nitroxide_abi::limits::EIF_OFFSET;
/// The longest name, in bytes: it becomes a file name.
const MAX_NAME_BYTES: usize = 128;

/// Which CPUs an enclave gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cpus {
    /// So many, whichever are free.
    Count(u32),
    /// These.
    Ids(Vec<u32>),
}

/// An enclave to be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchRequest {
    /// The image, as an absolute path.
    pub image: PathBuf,
    /// vCPUs.
    pub cpus: Cpus,
    /// Memory in MiB, even, 64 and up.
    pub memory_mib: u64,
    /// The wanted CID, if any: 4 to 2^32 - 2.
    pub cid: Option<u32>,
    /// Debug mode.
    pub debug: bool,
    /// The wanted name.
    pub name: String,
    /// Where it runs.
    pub device: DeviceKind,
    /// What runs a local enclave's virtual machine.
    pub engine: EngineKind,
    /// How its guest finds devices.
    pub discovery: Discovery,
    /// The CPUs of a local enclave's parent.
    pub topology: Topology,
    /// Those that enclaves may have.
    pub pool: String,
    /// Who a local enclave's parent is.
    pub identity: ParentIdentity,
}

/// A `--config` file. Unknown keys are refused: a misspelt one would silently be ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    eif_path: PathBuf,
    enclave_cid: Option<u64>,
    memory_mib: Option<u64>,
    cpu_ids: Option<Vec<u32>>,
    debug_mode: Option<bool>,
    attach_console: Option<bool>,
    cpu_count: Option<u32>,
    enclave_name: Option<String>,
}

/// Reads a `--config` file into the arguments it stands for.
pub fn read_config(
    path: &Path,
    local: crate::arguments::LocalArguments,
    parent: ParentArguments,
    no_wait: bool,
) -> Result<RunEnclaveArguments, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot read {}", path.display())).because(error))?;
    let config: Config = serde_json::from_str(&text).map_err(|error| {
        Failure::new(ErrorCode::SERDE, format!("{} is not a configuration of an enclave", path.display()))
            .because(error)
            .help("Keys are eif_path, cpu_count or cpu_ids, memory_mib, enclave_cid, enclave_name, debug_mode, attach_console.")
    })?;
    if config.cpu_ids.is_some() && config.cpu_count.is_some() {
        return Err(Failure::new(
            ErrorCode::CONFLICTING_ARGUMENTS,
            format!("{} has both cpu_count and cpu_ids; leave one out", path.display()),
        ));
    }
    Ok(RunEnclaveArguments {
        eif_path: Some(config.eif_path),
        resources: Resources {
            cpu_count: config.cpu_count,
            cpu_ids: config.cpu_ids.map(|ids| ids.iter().map(u32::to_string).collect()),
            memory: config.memory_mib,
            enclave_cid: config.enclave_cid.map(|cid| cid.to_string()),
            debug_mode: config.debug_mode.unwrap_or(false),
            enclave_name: config.enclave_name,
            local,
            parent,
        },
        attach_console: config.attach_console.unwrap_or(false),
        no_wait,
        config: None,
    })
}

impl LaunchRequest {
    /// Checks the arguments and the image.
    pub fn new(image: &Path, resources: &Resources, device: DeviceKind, dialect: Dialect, remarks: Remarks) -> Result<Self, Failure> {
        let cpus = cpus(resources, dialect)?;
        let cid = resources.enclave_cid.as_deref().map_or(Ok(None), |text| cid(text, remarks))?;
        let name = match &resources.enclave_name {
            Some(name) => checked_name(name)?.to_owned(),
            None => default_name(image),
        };
        let image_bytes = image::open(image)?.end();
        let memory_mib = memory(resources.memory, image_bytes, dialect, remarks)?;
        let image = std::path::absolute(image).map_err(|error| {
            Failure::new(ErrorCode::FILE_OPERATION, format!("The path {} cannot be made absolute", image.display())).because(error)
        })?;
        let (engine, discovery) = (resources.local.engine, resources.local.virtio_discovery);
        let (topology, pool, identity) = (resources.parent.topology(), resources.parent.pool(), resources.parent.identity.identity());
        Ok(Self { image, cpus, memory_mib, cid, debug: resources.debug_mode, name, device, engine, discovery, topology, pool, identity })
    }

    /// How many vCPUs.
    pub fn cpu_count(&self) -> usize {
        match &self.cpus {
            Cpus::Count(count) => usize::try_from(*count).unwrap_or(usize::MAX),
            Cpus::Ids(ids) => ids.len(),
        }
    }
}

fn cpus(resources: &Resources, dialect: Dialect) -> Result<Cpus, Failure> {
    let Some(texts) = &resources.cpu_ids else {
        return match (resources.cpu_count, dialect) {
            (Some(0), _) => Err(Failure::new(ErrorCode::INVALID_ARGUMENT, "An enclave needs at least one vCPU")),
            (Some(count), _) => Ok(Cpus::Count(count)),
            (None, Dialect::Nitroxide) => Ok(Cpus::Count(DEFAULT_CPUS)),
            (None, Dialect::NitroCli) => {
                Err(Failure::new(ErrorCode::MISSING_ARGUMENT, "Give the number of vCPUs with --cpu-count, or the CPUs with --cpu-ids"))
            }
        };
    };
    let mut ids = Vec::new();
    for text in texts {
        let id: u32 = text
            .trim()
            .parse()
            .map_err(|_| Failure::new(ErrorCode::MALFORMED_CPU_ID, format!("`{text}` in --cpu-ids is not a CPU number")))?;
        if ids.contains(&id) {
            return Err(Failure::new(ErrorCode::MALFORMED_CPU_ID, format!("CPU {id} stands twice in --cpu-ids")));
        }
        ids.push(id);
    }
    if ids.is_empty() {
        return Err(Failure::new(ErrorCode::MALFORMED_CPU_ID, "The list of CPUs is empty"));
    }
    // 0 means "any" to the driver, so it cannot name a CPU; it is also never in a pool.
    if ids.contains(&0) {
        return Err(Failure::new(ErrorCode::CPU_NOT_IN_POOL, "CPU 0 stays with the parent and cannot be given to an enclave")
            .help("Leave 0 out of --cpu-ids."));
    }
    Ok(Cpus::Ids(ids))
}

fn cid(text: &str, remarks: Remarks) -> Result<Option<u32>, Failure> {
    let invalid = |why: &str| {
        Failure::new(ErrorCode::INVALID_ARGUMENT, format!("{text} cannot be an enclave's CID: {why}"))
            .help("CIDs are 4 to 4294967294; 0 means any that is free.")
    };
    let number: u32 = text.parse().map_err(|_| invalid("it is not a number of 32 bits"))?;
    match number {
        0 => {
            remarks.note("The enclave CID 0 means that a free one is chosen");
            Ok(None)
        }
        1 => Err(invalid("1 is the local machine")),
        2 => Err(invalid("2 is the host")),
        3 => Err(invalid("3 is the parent")),
        u32::MAX => Err(invalid("it means `any`")),
        number => Ok(Some(number)),
    }
}

fn memory(wanted_mib: Option<u64>, image_bytes: u64, dialect: Dialect, remarks: Remarks) -> Result<u64, Failure> {
    let rule_mib = image_bytes.saturating_mul(IMAGE_FACTOR).div_ceil(1 << 20);
    let wanted_mib = match (wanted_mib, dialect) {
        (Some(mib), _) => mib,
        (None, Dialect::Nitroxide) => rule_mib.max(DEFAULT_MEMORY_MIB),
        (None, Dialect::NitroCli) => return Err(Failure::new(ErrorCode::MISSING_ARGUMENT, "Give the memory in MiB with --memory")),
    };
    if wanted_mib.checked_mul(1 << 20).is_none_or(|bytes| bytes > 1 << 52) {
        return Err(Failure::new(ErrorCode::INVALID_ARGUMENT, format!("{wanted_mib} MiB is more memory than an enclave can have")));
    }
    let too_little = |least: u64, why: &str| {
        Failure::new(ErrorCode::INSUFFICIENT_MEMORY_REQUESTED, format!("{wanted_mib} MiB is too little: {why}"))
            .help(format!("Give at least --memory {least}."))
    };
    let fits_mib = image_bytes.saturating_add(IMAGE_OFFSET).div_ceil(1 << 20);
    if wanted_mib < MIN_MEMORY_MIB {
        return Err(too_little(MIN_MEMORY_MIB.max(rule_mib), "an enclave has at least 64 MiB"));
    }
    if wanted_mib < fits_mib {
        return Err(too_little(rule_mib, "the image does not fit"));
    }
    if wanted_mib < rule_mib {
        if dialect == Dialect::NitroCli {
            return Err(too_little(rule_mib, "it must be at least four times the image"));
        }
        remarks.note(format!("Note: nitro-cli would demand {rule_mib} MiB for this image, four times its size"));
    }
    // Memory is donated in pages of 2 MiB.
    Ok(wanted_mib.next_multiple_of(2))
}

fn checked_name(name: &str) -> Result<&str, Failure> {
    let refuse = |why: &str| {
        Err(Failure::new(ErrorCode::NAMING, format!("`{}` cannot be an enclave's name: {why}", name.escape_debug()))
            .help("Choose another with --enclave-name."))
    };
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return refuse("it must have 1 to 128 bytes");
    }
    if name.contains('/') || name.chars().any(char::is_control) {
        return refuse("slashes and control characters are not allowed");
    }
    if nitroxide_world::slot_of_enclave_id(name).is_some() {
        return refuse("it looks like an enclave's id");
    }
    Ok(name)
}

/// The image's file name without `.eif`, or something harmless where that is no usable name.
fn default_name(image: &Path) -> String {
    let file = image.file_name().unwrap_or_default().to_string_lossy();
    let name = file.strip_suffix(".eif").unwrap_or(&file);
    checked_name(name).map_or_else(|_| "enclave".to_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: fn() -> Remarks = || Remarks::new(true);

    fn code<T: std::fmt::Debug>(result: Result<T, Failure>) -> ErrorCode {
        result.unwrap_err().code()
    }

    #[test]
    fn cids_follow_nitro_clis_rules() {
        assert_eq!(cid("0", QUIET()).unwrap(), None);
        assert_eq!(cid("4", QUIET()).unwrap(), Some(4));
        assert_eq!(cid("4294967294", QUIET()).unwrap(), Some(u32::MAX - 1));
        for wrong in ["1", "2", "3", "4294967295", "4294967296", "-1", "x", ""] {
            assert_eq!(code(cid(wrong, QUIET())), ErrorCode::INVALID_ARGUMENT, "{wrong}");
        }
    }

    #[test]
    fn memory_must_hold_the_image_and_nitro_cli_demands_four_times_it() {
        let image = 100 << 20; // bytes
        assert_eq!(memory(Some(400), image, Dialect::NitroCli, QUIET()).unwrap(), 400);
        assert_eq!(code(memory(Some(399), image, Dialect::NitroCli, QUIET())), ErrorCode::INSUFFICIENT_MEMORY_REQUESTED);
        assert_eq!(memory(Some(399), image, Dialect::Nitroxide, QUIET()).unwrap(), 400);
        assert_eq!(memory(Some(108), image, Dialect::Nitroxide, QUIET()).unwrap(), 108);
        assert_eq!(code(memory(Some(107), image, Dialect::Nitroxide, QUIET())), ErrorCode::INSUFFICIENT_MEMORY_REQUESTED);
        assert_eq!(code(memory(Some(63), 1, Dialect::Nitroxide, QUIET())), ErrorCode::INSUFFICIENT_MEMORY_REQUESTED);
        assert_eq!(code(memory(Some(u64::MAX), 1, Dialect::Nitroxide, QUIET())), ErrorCode::INVALID_ARGUMENT);
    }

    #[test]
    fn memory_has_a_default_except_for_nitro_cli() {
        assert_eq!(memory(None, 1 << 20, Dialect::Nitroxide, QUIET()).unwrap(), 256);
        assert_eq!(memory(None, 100 << 20, Dialect::Nitroxide, QUIET()).unwrap(), 400);
        assert_eq!(code(memory(None, 1 << 20, Dialect::NitroCli, QUIET())), ErrorCode::MISSING_ARGUMENT);
    }

    #[test]
    fn cpu_ids_are_numbers_once_each_and_never_zero() {
        let ids = |list: &[&str]| {
            cpus(&Resources { cpu_ids: Some(list.iter().map(|id| (*id).to_owned()).collect()), ..Resources::default() }, Dialect::Nitroxide)
        };
        assert_eq!(ids(&["2", "3"]).unwrap(), Cpus::Ids(vec![2, 3]));
        assert_eq!(code(ids(&["2", "2"])), ErrorCode::MALFORMED_CPU_ID);
        assert_eq!(code(ids(&["x"])), ErrorCode::MALFORMED_CPU_ID);
        assert_eq!(code(ids(&[])), ErrorCode::MALFORMED_CPU_ID);
        assert_eq!(code(ids(&["0", "1"])), ErrorCode::CPU_NOT_IN_POOL);
    }

    #[test]
    fn names_come_from_the_image_and_bad_ones_are_refused() {
        assert_eq!(default_name(Path::new("/x/hello.eif")), "hello");
        assert_eq!(default_name(Path::new("image")), "image");
        assert_eq!(default_name(Path::new(".eif")), "enclave");
        assert_eq!(checked_name("größe 1").unwrap(), "größe 1");
        for wrong in ["", "a/b", "a\nb", "i-0000000000000000-enc1f", &"n".repeat(129)] {
            assert_eq!(code(checked_name(wrong)), ErrorCode::NAMING, "{wrong}");
        }
    }
}
