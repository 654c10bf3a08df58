//! Starting an enclave on a device: the calls in their order, and what each failure means to the user.
//!
//! Used by `run` (in its own process) and by the background owner of `run-enclave`. The order is nitro-cli's (docs/cli.md, "What a start does").

use std::{
    io::{self, Read},
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use nitroxide_abi::{Cid, Code, CpuId};
use nitroxide_client::{Device, DeviceChoice, DeviceKind as Kind, Enclave, LocalOptions, OpenError, StartError};
use nitroxide_device::{Faults, Launcher as _, Limits};
use nitroxide_enclave::{EngineChoice, LaunchOptions, ProcessLauncher, report::EndReport};
use nitroxide_engine::{Accelerator, VirtioDiscovery};
use nitroxide_world::ParentIdentity;
use serde::{Deserialize, Serialize};

use crate::{
    arguments::{BehaviourArguments, DeviceKind, Discovery, EngineKind},
    codes::ErrorCode,
    failure::Failure,
    host, image,
    request::{Cpus, LaunchRequest},
    world,
};

/// The real device.
pub const HOST_DEVICE: &str = "/dev/nitro_enclaves";

/// A started enclave as nitro-cli shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Started {
    /// The name it got.
    pub enclave_name: String,
    /// Its id.
    #[serde(rename = "EnclaveID")]
    pub enclave_id: String,
    /// The process that it ends with.
    #[serde(rename = "ProcessID")]
    pub process_id: u32,
    /// Its CID.
    #[serde(rename = "EnclaveCID")]
    pub enclave_cid: u32,
    /// How many vCPUs.
    #[serde(rename = "NumberOfCPUs")]
    pub number_of_cpus: usize,
    /// Which ones.
    #[serde(rename = "CPUIDs")]
    pub cpu_ids: Vec<u32>,
    /// Its memory in MiB.
    #[serde(rename = "MemoryMiB")]
    pub memory_mib: u64,
}

/// An enclave that is set up: it has everything, but does not run yet.
#[derive(Debug)]
pub struct Prepared {
    // Dropped before the device it belongs to.
    enclave: Enclave,
    device: Device,
    cpu_ids: Vec<u32>,
    memory_mib: u64,
}

/// A running enclave. Dropping it ends the enclave.
#[derive(Debug)]
pub struct Running {
    /// The enclave.
    pub enclave: Enclave,
    /// Its device.
    pub device: Device,
    /// The facts.
    pub started: Started,
}

/// A start that somebody else may end before the enclave runs.
#[derive(Debug, Default)]
pub struct Cancel {
    is_asked_for: AtomicBool,
    /// What starts the enclave; empty before that, and for ever on a real device.
    launcher: OnceLock<Arc<ProcessLauncher>>,
}

impl Cancel {
    /// Whether the start is to end.
    pub fn is_asked_for(&self) -> bool {
        self.is_asked_for.load(Ordering::SeqCst)
    }

    /// Ends the start. Once is enough for what it is doing now; call it again, as it may be about to wait for something else.
    pub fn ask(&self) {
        self.is_asked_for.store(true, Ordering::SeqCst);
        if let Some(launcher) = self.launcher.get() {
            launcher.interrupt();
        }
    }

    fn check(&self) -> Result<(), Failure> {
        if self.is_asked_for() { Err(Failure::new(ErrorCode::NOT_EXECUTED, "The start was ended")) } else { Ok(()) }
    }
}

/// A reader that fails once the start is to end: an image of gigabytes takes its time.
struct Cancellable<'a, R>(R, &'a Cancel);

impl<R: Read> Read for Cancellable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.1.is_asked_for() { Err(io::Error::other("The start was ended.")) } else { self.0.read(buffer) }
    }
}

/// Opens the device and sets an enclave up. `say` is told what is going on.
pub fn prepare(request: &LaunchRequest, cancel: &Cancel, say: &mut dyn FnMut(&str)) -> Result<Prepared, Failure> {
    let device = Device::open(choice(request)).map_err(|error| match error {
        OpenError::World(error) => world::unusable(error),
        error @ (OpenError::Pool { .. } | OpenError::Topology { .. }) => {
            Failure::new(ErrorCode::INVALID_ARGUMENT, "There can be no such parent").because(error)
        }
        error => Failure::new(ErrorCode::FILE_OPERATION, "No device for enclaves can be opened")
            .because(error)
            .help("`nitroxide doctor` says what this machine can do."),
    })?;
    if device.kind() == Kind::Local {
        check_memory(request.memory_mib, machine_memory_mib())?;
    }
    let mut enclave = device.create_enclave().map_err(|error| match error.code() {
        // The driver asks for a free core before anybody wants one.
        code @ Some(Code::NO_CPUS_AVAIL_IN_POOL) => vcpu_refused(None, 0, request, code, error),
        code => refused("The driver did not create an enclave", code, error),
    })?;

    say("Loading the image");
    let bytes = request.memory_mib << 20; // Checked in `LaunchRequest`: at most 2^52.
    let mut memory = device.allocate_memory(bytes).map_err(|error| {
        Failure::new(ErrorCode::INSUFFICIENT_MEMORY_AVAILABLE, format!("{} MiB of memory are not to be had", request.memory_mib))
            .because(error)
    })?;
    let image = image::open(&request.image)?;
    // Bytes behind the image do not belong to it; the request was only checked for the image itself.
    memory
        .write_image(&mut Cancellable(image.source(), cancel), image.end())
        .map_err(|error| Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot load {}", request.image.display())).because(error))?;
    let memory_mib = memory.size() >> 20;
    enclave.add_memory(memory).map_err(|error| refused("The driver did not take the enclave's memory", error.code(), error))?;

    let mut cpu_ids = Vec::with_capacity(request.cpu_count().min(1024));
    let wanted: Box<dyn Iterator<Item = Option<CpuId>>> = match &request.cpus {
        Cpus::Count(count) => Box::new((0..*count).map(|_| None)),
        Cpus::Ids(ids) => Box::new(ids.iter().map(|id| Some(CpuId(*id)))),
    };
    for cpu in wanted {
        let got = enclave.add_vcpu(cpu).map_err(|error| vcpu_refused(cpu, cpu_ids.len(), request, error.code(), error))?;
        cpu_ids.push(got.0);
    }
    if let Some(launcher) = device.launcher() {
        // Set once: a `Cancel` is for one start.
        let _ = cancel.launcher.set(Arc::clone(launcher));
    }
    cancel.check()?;
    Ok(Prepared { enclave, device, cpu_ids, memory_mib })
}

impl Prepared {
    /// Which device it is.
    pub fn kind(&self) -> Kind {
        self.device.kind()
    }

    /// Starts it.
    pub fn start(self, request: &LaunchRequest) -> Result<Running, Failure> {
        let Self { mut enclave, device, cpu_ids, memory_mib } = self;
        let slot_uid = enclave.slot_uid();
        let cid = enclave.start(request.cid.map(Cid), request.debug).map_err(|error| start_refused(request, error))?;
        let record = device.launcher().and_then(|launcher| launcher.record(slot_uid.0));
        // The real device knows neither names nor processes: the enclave is ours.
        let enclave_name = record.as_ref().and_then(|record| record.name.clone()).unwrap_or_else(|| request.name.clone());
        let enclave_id = record.as_ref().map_or_else(|| host::instance_id().enclave_id(slot_uid.0), |record| record.enclave_id.clone());
        let process_id = record.and_then(|record| record.process_id).unwrap_or_else(std::process::id);
        let started =
            Started { enclave_name, enclave_id, process_id, enclave_cid: cid.0, number_of_cpus: cpu_ids.len(), cpu_ids, memory_mib };
        Ok(Running { enclave, device, started })
    }
}

impl Running {
    /// Ends the enclave, if it has not ended, and says how it did; `None` where that is not known.
    pub fn into_report(self) -> Option<EndReport> {
        let slot_uid = self.enclave.slot_uid();
        let Self { enclave, device, .. } = self;
        // Only now everything about its end is known.
        drop(enclave);
        device.launcher()?.record(slot_uid.0)?.end
    }
}

/// How enclaves of this name are run, by `--engine` and `--virtio-discovery`, and who their parent is.
pub fn options(name: &str, engine: EngineKind, discovery: Discovery, identity: ParentIdentity) -> LaunchOptions {
    let mut options = LaunchOptions::new(name);
    options.parent_identity = identity;
    options.engine = if engine == EngineKind::None { EngineChoice::None } else { EngineChoice::Auto };
    options.accelerator = match engine {
        EngineKind::Kvm => Accelerator::Kvm,
        EngineKind::Tcg => Accelerator::Tcg,
        EngineKind::Auto | EngineKind::None => Accelerator::Auto,
    };
    options.discovery = match discovery {
        Discovery::Acpi => VirtioDiscovery::Acpi,
        Discovery::Cmdline => VirtioDiscovery::Cmdline,
    };
    options
}

/// What a device allows that is made here.
pub fn limits(arguments: &BehaviourArguments) -> Limits {
    let default = Limits::default();
    Limits {
        max_slots: arguments.max_enclaves.unwrap_or(default.max_slots),
        max_regions: arguments.max_regions.unwrap_or(default.max_regions),
        ..default
    }
}

/// What goes wrong with it on purpose.
pub fn faults(arguments: &BehaviourArguments) -> Result<Faults, Failure> {
    arguments.fault.parse().map_err(|error| Failure::new(ErrorCode::INVALID_ARGUMENT, "--fault is not understood").because(error))
}

fn choice(request: &LaunchRequest) -> DeviceChoice {
    let launch = options(&request.name, request.engine, request.discovery, request.identity.clone());
    let local = LocalOptions { launch, topology: request.topology, pool: request.pool.clone(), ..LocalOptions::default() };
    match request.device {
        // The device that is seen there is of this same world, whose enclaves are run as anywhere else.
        DeviceKind::Auto if nitroxide_user_home::is_supervised() => DeviceChoice::Local(local),
        DeviceKind::Auto => DeviceChoice::Auto(local),
        DeviceKind::Host => DeviceChoice::Host(PathBuf::from(HOST_DEVICE)),
        DeviceKind::Local => DeviceChoice::Local(local),
    }
}

/// Memory is only taken when the guest touches it, so the system promises any amount; a guest that believes in it is killed, or kills.
fn check_memory(wanted_mib: u64, machine_mib: u64) -> Result<(), Failure> {
    if wanted_mib <= machine_mib {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::INSUFFICIENT_MEMORY_AVAILABLE,
        format!("{wanted_mib} MiB of memory are not to be had: this machine has {machine_mib} MiB, swap included"),
    )
    .help("Ask for less with --memory."))
}

fn machine_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_add(info.totalswap).saturating_mul(u64::from(info.mem_unit)) >> 20
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A refusal of the driver: E29, with the driver's own name for it.
fn refused(what: &str, code: Option<Code>, error: impl Into<Cause>) -> Failure {
    let named = code.map(|code| format!(": {} ({})", code.name(), code.number())).unwrap_or_default();
    Failure::new(ErrorCode::IOCTL, format!("{what}{named}")).because(error)
}

fn vcpu_refused(cpu: Option<CpuId>, have: usize, request: &LaunchRequest, code: Option<Code>, error: impl Into<Cause>) -> Failure {
    let pool = "`nitroxide describe-enclaves` shows which CPUs are in use.";
    match (code, cpu) {
        (Some(Code::VCPU_NOT_IN_CPU_POOL | Code::INVALID_VCPU | Code::VCPU_INVALID_CPU_CORE), Some(cpu)) => {
            Failure::new(ErrorCode::CPU_NOT_IN_POOL, format!("CPU {cpu} is not in the pool, or belongs to another enclave"))
                .because(error)
                .help(pool)
        }
        (Some(Code::NO_CPUS_AVAIL_IN_POOL), _) => Failure::new(
            ErrorCode::INSUFFICIENT_CPUS,
            format!("{} vCPUs were asked for, but the pool has only {have} left", request.cpu_count()),
        )
        .because(error)
        .help(pool),
        _ => refused("The driver did not add a vCPU", code, error),
    }
}

fn start_refused(request: &LaunchRequest, error: StartError) -> Failure {
    let code = error.code();
    if code == Some(Code::EADDRINUSE) {
        let cid = request.cid.map_or_else(|| "The enclave's CID".to_owned(), |cid| format!("CID {cid}"));
        return refused(&format!("{cid} is in use"), code, error).help("Leave --enclave-cid out to get one that is free.");
    }
    // A local device knows more than a code can say: what the process that was to run the enclave found wrong. The code's own meaning is left out then.
    match (error.detail().map(str::to_owned), code) {
        (Some(detail), Some(Code::EINVAL)) => {
            Failure::new(ErrorCode::EIF_PARSING, format!("{} cannot be booted", request.image.display())).because(detail)
        }
        (Some(detail), _) => Failure::new(ErrorCode::BOOT, "The enclave could not be started")
            .because(detail)
            .help("`nitroxide doctor` says what this machine can do."),
        (None, _) => refused("The driver did not start the enclave", code, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_the_machine_does_not_have_is_refused() {
        assert!(machine_memory_mib() > 64);
        assert!(check_memory(1024, 1024).is_ok());
        assert_eq!(check_memory(1026, 1024).unwrap_err().code(), ErrorCode::INSUFFICIENT_MEMORY_AVAILABLE);
    }
}
