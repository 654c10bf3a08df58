//! Bringing an enclave up, stage by stage, from what its owner sent to a running VM.
//!
//! Everything that is taken is held by a value, so that a refusal at any stage gives back what the stages before took.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nitroxide_eif::{Image, Measurements};
use nitroxide_engine::{Accelerator, DiscoverError, Discovery, Engine, ExitReason, ExitReport, FileRange, MAX_MEMORY_RUNS, Vm, VmSpec};
use nitroxide_nsm::{InitialPcrs, NsmBackend, NsmConfig, Pki, Timestamp};
use nitroxide_vsock::{VsockBackend, VsockConfig};
use nitroxide_world::{Claim, Endpoint, ParentIdentity, SocketFile, World, peer_address};
use rustix::io::Errno;

use crate::console::Console;
use crate::control::{Controlled, Server};
use crate::controls::{ConsoleService, Controls};
use crate::image::{self, ExtractedImage};
use crate::measured::{Measured, Promise};
use crate::memory::LinearMemory;
use crate::options::{EngineChoice, MemoryMode};
use crate::packet::{FromProcess, RangeSpec, StartSpec};
use crate::process::Process;
use crate::refused::Refused;
use crate::report::{Description, EndReason, EndReport, Flags, Isolation, metadata_value};
use crate::router::{ApplicationExitCell, EnclaveRouter};
use crate::stage::Stage;

/// How long the console may take to come to its end after QEMU is gone.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// What an owner gave for one enclave.
#[derive(Debug)]
pub(crate) struct Donation {
    pub(crate) spec: StartSpec,
    memory: LinearMemory,
    world: OwnedFd,
    slot_claim: OwnedFd,
}

impl Donation {
    /// Puts the packets together.
    pub(crate) fn new(spec: StartSpec, files: &[Arc<OwnedFd>], ranges: &[RangeSpec], descriptors: Vec<OwnedFd>) -> Result<Self, Refused> {
        let malformed = || Refused { errno: Errno::INVAL.raw_os_error(), message: "The owner's request does not fit together.".to_owned() };
        let [world, slot_claim] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| malformed())?;
        let memory = ranges
            .iter()
            .map(|range| Some(FileRange { file: Arc::clone(files.get(range.file)?), offset: range.offset, size: range.size }))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(malformed)?;
        let memory = LinearMemory::new(memory).map_err(|_| malformed())?;
        Ok(Self { spec, memory, world, slot_claim })
    }
}

/// A running enclave with everything that serves it. Dropping it takes it down.
#[derive(Debug)]
pub(crate) struct Enclave {
    // In the order in which they are to go.
    server: Server,
    console_service: Option<ConsoleService>,
    /// Reports the end.
    end: Option<JoinHandle<()>>,
    vm: Arc<Vm>,
    _vsock: Option<(VsockBackend, SocketFile)>,
    _nsm: Option<NsmBackend>,
    _claims: [Claim; 2],
    /// Keeps the slot's claim held if the owner dies first. Not a [`Claim`]: giving it back is the owner's, who may start the slot again.
    _slot_claim: OwnedFd,
}

impl Enclave {
    /// Gives clients time to fetch their last answers.
    pub(crate) fn drain_clients(&self, patience: Duration) {
        self.server.drain(patience);
        if let Some(service) = &self.console_service {
            service.drain(patience);
        }
    }
}

impl Drop for Enclave {
    fn drop(&mut self) {
        // Normally it has ended long before.
        self.vm.stopper().stop();
        self.vm.wait();
        // The owner is to hear of the end before the process is gone.
        if let Some(end) = self.end.take() {
            let _ = end.join();
        }
    }
}

/// Brings an enclave up and tells the owner that it runs.
///
/// # Errors
///
/// Why it is not started; nothing of it is left then.
pub(crate) fn bring_up(process: &Arc<Process>, donation: Donation) -> Result<Enclave, Refused> {
    let Donation { spec, memory, world, slot_claim } = donation;
    let engine = EngineSearch::begin(&spec);
    let world = World::from_fd(world, Path::new(&spec.world_path)).map_err(|error| Refused::new(Errno::IO, &error))?;
    let cid = world.claim_cid(spec.cid)?;
    let name = world.claim_name(&spec.name)?;
    process.reach(Stage::Claimed);

    let measured = Arc::new(Measured::default());
    let (memory, image) = prepare_image(process, &spec, memory, &measured)?;
    let engine = engine.found()?;

    let console = Arc::new(Console::default());
    let application = Arc::<ApplicationExitCell>::default();
    let answering = Arc::<AtomicUsize>::default();
    let router = EnclaveRouter {
        world: world.clone(),
        cid: cid.cid,
        creator_pid: spec.creator_pid,
        parent: spec.parent,
        stages: Arc::clone(&process.stages),
        application: Arc::clone(&application),
        answering,
    };
    let has_guest = image.is_some();
    let vsock = has_guest.then(|| serve_vsock(&world, router)).transpose()?;
    let nsm = (has_guest && engine.has_nsm_device()).then(|| serve_nsm(&spec, &measured)).transpose()?;
    let console_service = (has_guest && spec.debug).then(|| ConsoleService::start(&world, cid.cid, &console)).transpose()?;
    let controls = Arc::new(Controls {
        description: describe(&spec, &name.name, cid.cid, &memory, image.as_ref(), &engine),
        engine: OnceLock::new(),
        life: Arc::clone(&process.life),
        stages: Arc::clone(&process.stages),
        measured: Arc::clone(&measured),
        console: Arc::clone(&console),
    });
    let server = Server::start(&world, spec.slot_uid, Arc::clone(&controls) as Arc<dyn Controlled>)?;
    process.reach(Stage::Served);

    if process.life.is_stop_requested() {
        let message = "The enclave was stopped while it started.".to_owned();
        return Err(Refused { errno: Errno::CANCELED.raw_os_error(), message });
    }
    process.reach(Stage::Launching);
    let mut vm = launch(&engine, &spec, &memory, image.as_ref(), vsock.as_ref().map(|(vsock, _)| vsock), nsm.as_ref())?;
    let _ = controls.engine.set(engine_words(&engine, &vm));
    match vm.take_console() {
        Some(source) => {
            let console = Arc::clone(&console);
            spawn("console", move || console.drain(File::from(source)))?;
        }
        None => console.end(),
    }
    let vm = Arc::new(vm);
    let started = FromProcess::Started { cid: cid.cid, name: name.name.clone() };
    let mut enclave = Enclave {
        server,
        console_service,
        end: None,
        vm: Arc::clone(&vm),
        _vsock: vsock,
        _nsm: nsm,
        _claims: [cid.claim, name.claim],
        _slot_claim: slot_claim,
    };
    process.reach(Stage::Running);
    process.life.runs(vm.stopper());
    // Before anybody can tell of the end, which may have come already: the owner takes `Started` first.
    process.tell(&started);
    let watched = Arc::clone(process);
    let end = spawn("vm-end", move || {
        let report = vm.wait();
        console.wait_for_end(CONSOLE_PATIENCE);
        watched.stages.reach(Stage::Ended);
        let application = *application.lock().unwrap_or_else(PoisonError::into_inner);
        let report = end_report(report, application, &console);
        watched.life.ended(report.clone());
        watched.tell(&FromProcess::Ended(report));
    })?;
    enclave.end = Some(end);
    Ok(enclave)
}

/// The engine being looked for, which takes as long as running a program does. Dropping it waits: the emulator that is being asked is a
/// process of ours, and is not to be left behind by a start that was refused meanwhile.
#[derive(Debug)]
struct EngineSearch(Option<JoinHandle<Result<Engine, DiscoverError>>>);

impl EngineSearch {
    /// Begins.
    fn begin(spec: &StartSpec) -> Self {
        let discovery = match &spec.engine {
            EngineChoice::None => return Self(None),
            EngineChoice::Qemu(Some(path)) => Discovery { chosen: Some(path.clone()), ..Discovery::default() },
            EngineChoice::Qemu(None) | EngineChoice::Auto => Discovery::default(),
        };
        if !matches!(Accelerator::from(spec.accelerator), Accelerator::Tcg) {
            // Remembered for the launch; finding out a KVM that does not work takes half a second.
            std::thread::spawn(|| drop(Engine::kvm()));
        }
        Self(Some(std::thread::spawn(move || Engine::discover(&discovery))))
    }

    /// Waits for it.
    fn found(mut self) -> Result<Engine, Refused> {
        let Some(thread) = self.0.take() else { return Ok(Engine::none()) };
        let panicked = |_| Refused { errno: Errno::IO.raw_os_error(), message: "Looking for QEMU failed unexpectedly.".to_owned() };
        Ok(thread.join().map_err(panicked)??)
    }
}

impl Drop for EngineSearch {
    fn drop(&mut self) {
        // What it found no longer matters.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

/// Copies the image out of the memory, checks it, and makes the memory ready for a VM. Without an engine there is nothing to do.
fn prepare_image(
    process: &Process,
    spec: &StartSpec,
    memory: LinearMemory,
    measured: &Arc<Measured>,
) -> Result<(LinearMemory, Option<ExtractedImage>), Refused> {
    if spec.engine == EngineChoice::None {
        measured.set(None);
        process.reach(Stage::Extracted);
        process.reach(Stage::Verified);
        return Ok((memory, None));
    }
    let image = image::extract(&memory)?;
    process.reach(Stage::Extracted);
    // Two different files: what is checked is the copy. Punching takes as long as checking, so both at once.
    let measurements = std::thread::scope(|scope| {
        let punching = (spec.memory != MemoryMode::Shared).then(|| scope.spawn(|| image::punch_out(&memory, &image)));
        let measurements = image::verify(&image);
        if let Some(Ok(Err(error))) = punching.map(std::thread::ScopedJoinHandle::join) {
            // The guest overwrites it like any other memory: only pages are wasted.
            tracing::debug!(%error, "The image stays in the enclave's memory.");
        }
        measurements
    })?;
    process.reach(Stage::Verified);
    match measurements {
        Some(_) => measured.set(measurements),
        None => measure_later(&image, measured)?,
    }
    Ok((few_runs(memory, spec.memory)?, Some(image)))
}

/// Hashes the image while the guest boots.
fn measure_later(image: &ExtractedImage, measured: &Arc<Measured>) -> Result<(), Refused> {
    let (image, measured) = (image.clone(), Promise(Arc::clone(measured)));
    spawn("measure", move || {
        let result = image.measure();
        if let Err(error) = &result {
            tracing::error!(%error, "The image cannot be measured.");
        }
        measured.set(result.ok());
    })
    .map(drop)
}

/// A VM takes only so many pieces of memory; more are put in the file's order, or copied into one. The image must have been extracted.
fn few_runs(memory: LinearMemory, mode: MemoryMode) -> Result<LinearMemory, Refused> {
    if memory.ranges().len() <= MAX_MEMORY_RUNS {
        return Ok(memory);
    }
    if mode == MemoryMode::Shared {
        // The image is copied out by now, and nothing else in the memory has a place: it may lie in the order of the file, where pages that were used
        // before, which come back in descending order, are neighbours again.
        let memory = memory.in_file_order().map_err(|error| Refused::io("The enclave's memory cannot be put in order", &error))?;
        let runs = memory.ranges().len();
        if runs <= MAX_MEMORY_RUNS {
            return Ok(memory);
        }
        let message = format!(
            "The enclave's memory consists of {runs} pieces of the parent's, and a virtual machine runs in at most {MAX_MEMORY_RUNS}: \
             use larger pages (1 GiB), or the isolated mode."
        );
        return Err(Refused { errno: Errno::NOSPC.raw_os_error(), message });
    }
    memory.gathered().map_err(|error| Refused::io("The enclave's memory cannot be gathered", &error))
}

fn serve_vsock(world: &World, router: EnclaveRouter) -> Result<(VsockBackend, SocketFile), Refused> {
    let (listener, file) = world.bind(Endpoint::Enclave(router.cid))?.into_parts();
    // The guest sees the port that its peer has, which may be a process or a VM with ports of its own.
    let peer = |stream: &UnixStream| peer_address(stream).ok().flatten().map(|peer| (peer.cid, peer.port));
    let config = VsockConfig { listener: Some(listener), peer: Some(Arc::new(peer)), ..VsockConfig::new(router.cid, Arc::new(router)) };
    let backend = nitroxide_vsock::spawn(config).map_err(|error| Refused::io("The vsock device cannot be started", &error))?;
    Ok((backend, file))
}

fn serve_nsm(spec: &StartSpec, measured: &Arc<Measured>) -> Result<NsmBackend, Refused> {
    let measured = Arc::clone(measured);
    let ParentIdentity { instance_id, role } = spec.parent_identity.clone();
    let module_id = instance_id.module_id(spec.slot_uid);
    let pcrs = move || match measured.wait(None) {
        Some(Measurements { pcr0, pcr1, pcr2, pcr8 }) => {
            let pcrs = InitialPcrs::of_image(pcr0.0, pcr1.0, pcr2.0, pcr8.map(|pcr| pcr.0)).with_instance_id(instance_id.as_str());
            role.map_or(pcrs, |role| pcrs.with_role(role.as_str()))
        }
        // The NSM then refuses to speak about registers, which is better than to attest wrong ones.
        None => std::panic::resume_unwind(Box::new("the image could not be measured")),
    };
    let config = NsmConfig { module_id, pcrs: Box::new(pcrs), debug: spec.debug, pki: Pki::of_user().ok() };
    nitroxide_nsm::spawn(config).map_err(|error| Refused::io("The NSM cannot be started", &error))
}

fn launch(
    engine: &Engine,
    spec: &StartSpec,
    memory: &LinearMemory,
    image: Option<&ExtractedImage>,
    vsock: Option<&VsockBackend>,
    nsm: Option<&NsmBackend>,
) -> Result<Vm, Refused> {
    let nothing = || crate::memory::sealable_memory("no-kernel");
    let parts = image.map(Image::source);
    let failed = |error: io::Error| Refused::io("The image cannot be handed to QEMU", &error);
    Ok(engine.launch(VmSpec {
        memory: memory.ranges().to_vec(),
        vcpus: spec.vcpus,
        kernel: parts.map_or_else(nothing, |parts| parts.kernel()).map_err(failed)?,
        initrd: parts.map(|parts| parts.ramdisks()).transpose().map_err(failed)?.flatten(),
        cmdline: image.map(|image| image.cmdline().to_vec()).unwrap_or_default(),
        vsock: vsock.and_then(VsockBackend::take_frontend),
        nsm: nsm.and_then(NsmBackend::take_frontend),
        accelerator: spec.accelerator.into(),
        discovery: spec.discovery(),
    })?)
}

fn end_report(report: ExitReport, application: Option<crate::report::ApplicationExit>, console: &Console) -> EndReport {
    let reason = match report.reason {
        // A stock kernel's panic looks like a reboot to QEMU, or like power-off, as its command line wishes.
        ExitReason::Rebooted | ExitReason::PoweredOff if console.panicked() => EndReason::Panicked,
        ExitReason::PoweredOff => EndReason::PoweredOff,
        ExitReason::Rebooted => EndReason::Rebooted,
        ExitReason::Panicked => EndReason::Panicked,
        ExitReason::Stopped => EndReason::Stopped,
        _ => EndReason::EngineFailed,
    };
    EndReport { reason, detail: report.detail, application, console_tail: console.tail() }
}

/// What the user has to know about the PKI that attestation documents hang from: nothing while all is well.
fn pki_note() -> Option<String> {
    match Pki::of_user() {
        Ok(pki) => pki
            .look(Timestamp::now().0)
            .err()
            .map(|error| format!("The enclave gets no attestation documents. {}", nitroxide_nsm::in_one_line(&error))),
        Err(error) => Some(format!("Attestation documents hang from a root that ends with the enclave. {error}")),
    }
}

fn describe(spec: &StartSpec, name: &str, cid: u32, memory: &LinearMemory, image: Option<&ExtractedImage>, engine: &Engine) -> Description {
    // Metadata is unmeasured text of the image's builder: worth showing, not worth failing for.
    let metadata = image.and_then(|image| image.metadata().ok().flatten());
    let mut notes = engine.qemu().map(|qemu| qemu.notes.clone()).unwrap_or_default();
    if image.is_some() && !engine.has_nsm_device() {
        notes.push("The enclave has no /dev/nsm: this QEMU has no vhost-user-test-device. Use QEMU 11 or newer.".to_owned());
    }
    if image.is_some() && engine.has_nsm_device() {
        notes.extend(pki_note());
    }
    Description {
        enclave_name: name.to_owned(),
        enclave_id: spec.parent_identity.instance_id.enclave_id(spec.slot_uid),
        process_id: std::process::id(),
        enclave_cid: cid,
        number_of_cpus: spec.vcpus,
        cpu_ids: spec.cpus.clone(),
        memory_mib: memory.size() >> 20,
        state: crate::report::State::Empty,
        flags: if spec.debug { Flags::DebugMode } else { Flags::None },
        measurements: None,
        image_name: metadata.as_ref().map(|metadata| metadata.image_name.clone()),
        image_version: metadata.as_ref().map(|metadata| metadata.image_version.clone()),
        metadata: metadata.as_ref().map(metadata_value),
        exit: None,
        engine: String::new(),
        isolation: Isolation::None,
        notes,
        stages: Vec::new(),
    }
}

fn engine_words(engine: &Engine, vm: &Vm) -> String {
    let Some(qemu) = engine.qemu() else { return "none".to_owned() };
    let accelerator = match vm.choice() {
        Some(choice) if choice.kvm => "KVM".to_owned(),
        Some(choice) if choice.reason.is_empty() => "TCG".to_owned(),
        Some(choice) => format!("TCG ({})", choice.reason),
        None => "no accelerator".to_owned(),
    };
    format!("{}; {accelerator}; {}", qemu.path.display(), vm.confinement())
}

fn spawn(name: &str, act: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Refused> {
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(act);
    started.map_err(|error| Refused::io("A thread cannot be started", &error))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::options::Parent;
    use crate::packet::{self, WireAccelerator};
    use crate::stage::Stages;

    /// So many pages of 2 MiB that do not continue each other.
    fn scattered(pieces: u64) -> LinearMemory {
        let granule = 2_u64 << 20;
        let file = Arc::new(crate::memory::sealable_memory("parent").unwrap());
        rustix::fs::ftruncate(&file, 2 * pieces * granule).unwrap();
        LinearMemory::new((0..pieces).map(|piece| FileRange { file: Arc::clone(&file), offset: 2 * piece * granule, size: granule }))
            .unwrap()
    }

    #[test]
    fn hundreds_of_pieces_are_gathered_or_refused_where_the_parents_pages_are_used() {
        let many = few_runs(scattered(600), MemoryMode::Private).unwrap();
        assert_eq!((many.ranges().len(), many.size()), (1, 1200 << 20));
        assert_eq!(few_runs(scattered(128), MemoryMode::Shared).unwrap().ranges().len(), 128);
        let refused = few_runs(scattered(129), MemoryMode::Shared).unwrap_err();
        assert_eq!(refused.errno, Errno::NOSPC.raw_os_error());
        assert!(refused.message.contains("129 pieces"), "{}", refused.message);
    }

    #[test]
    fn an_enclave_that_ends_at_once_is_told_to_run_before_it_is_told_to_have_ended() {
        let dir = tempfile::tempdir().unwrap();
        let world = World::open(&dir.path().join("world")).unwrap();
        let slot = world.claim_slot().unwrap();
        let spec = StartSpec {
            slot_uid: slot.slot_uid,
            cid: None,
            debug: false,
            vcpus: 1,
            cpus: vec![1],
            name: "test".to_owned(),
            creator_pid: std::process::id(),
            memory: MemoryMode::Private,
            parent: Parent::Processes,
            parent_identity: ParentIdentity::default(),
            engine: EngineChoice::None,
            accelerator: WireAccelerator::Tcg,
            virtio_by_command_line: false,
            world_path: world.path().display().to_string(),
            stages: Vec::new(),
        };
        let descriptors = vec![world.as_fd().try_clone_to_owned().unwrap(), slot.claim.hand_over().unwrap()];
        let donation = Donation::new(spec, &[], &[], descriptors).unwrap();
        let (owner, ears) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let process = Arc::new(Process { owner, stages: Arc::<Stages>::default(), life: Arc::default() });

        let enclave = bring_up(&process, donation).unwrap();
        process.life.request_stop();
        drop(enclave);

        drop(process);
        let told: Vec<FromProcess> = std::iter::from_fn(|| packet::receive(&ears).unwrap()).map(|(packet, _)| packet).collect();
        let news: Vec<&FromProcess> = told.iter().filter(|packet| !matches!(packet, FromProcess::Stage(_))).collect();
        assert!(matches!(news[..], [FromProcess::Started { .. }, FromProcess::Ended(_)]), "{news:?}");
    }
}
