//! The engine: one call from a specification to a running VM.
//!
//! [`Engine::launch`] checks the [`VmSpec`], chooses accelerator and clock, starts QEMU confined and waits until its guest runs. Everything it opened goes
//! to the VM or is closed again. Neighbours: `discover`, `accelerate`, `arguments`, `spawn`, `vm`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use displaydoc::Display;
use thiserror::Error;

use crate::accelerate::{self, Choice};
use crate::arguments::{self, Machine, Run};
use crate::bzimage;
use crate::child::{DropRoot, NOBODY};
use crate::confinement::Confinement;
use crate::discover::{self, DiscoverError, Discovery, Qemu};
use crate::root::OwnRoot;
use crate::spawn::{self, Plan, SpawnError};
use crate::spec::{self, FileRange, MAX_COMMAND_LINE_BYTES, SpecError, VmSpec};
use crate::tsc;
use crate::vm::{Started, Vm};

/// How long QEMU may take to build the machine before it is given up; it takes 0.1 s on an idle host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Starts VMs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    /// None = without a VM.
    qemu: Option<Arc<Qemu>>,
}

/// A VM that could not be launched. Nothing is left of it.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The VM cannot be launched as specified
    Spec(#[source] SpecError),
    /// KVM was demanded but does not work: {0}. Use the accelerator `auto` or `tcg`.
    Kvm(String),
    /// {0} has no vhost-user-test-device, which gives a guest /dev/nsm. Use QEMU 11 or newer.
    NoNsmDevice(PathBuf),
    /// {path} could not be started as the VM's process
    Spawn {
        /// The emulator.
        path: PathBuf,
        /// What failed.
        #[source]
        source: SpawnError,
    },
    /// {path} ended before its guest ran. {detail}
    DiedAtStart {
        /// The emulator.
        path: PathBuf,
        /// How it ended, and its last messages.
        detail: String,
    },
    /// {path} did not start its guest within {seconds} s and was stopped.
    Silent {
        /// The emulator.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The host gave no resources for a VM: {what}
    Host {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

impl Engine {
    /// Finds a QEMU that works here.
    ///
    /// # Errors
    ///
    /// [`DiscoverError`]: what is missing or wrong, and what to do.
    pub fn discover(discovery: &Discovery) -> Result<Self, DiscoverError> {
        tsc::begin();
        Ok(Self { qemu: Some(Arc::new(Qemu::find(discovery)?)) })
    }

    /// An engine without a VM: what it launches does nothing until it is stopped. For conformance runs, where any bytes are an image.
    pub fn none() -> Self {
        Self { qemu: None }
    }

    /// The QEMU in use; none for an engine without a VM.
    pub fn qemu(&self) -> Option<&Qemu> {
        self.qemu.as_deref()
    }

    /// Whether its guests can have /dev/nsm. An engine without a VM takes the socket and ignores it.
    pub fn has_nsm_device(&self) -> bool {
        self.qemu.as_ref().is_none_or(|qemu| qemu.has_nsm_device)
    }

    /// Whether KVM truly works on this host; if not, why. Asked once per process; takes up to 0.5 s where a fake KVM must be found out.
    ///
    /// # Errors
    ///
    /// The reason, as a phrase for people.
    pub fn kvm() -> Result<(), String> {
        accelerate::kvm_works().clone()
    }

    /// The frequency of this host's time stamp counter in kHz, which a guest kernel under TCG has to be told (`tsc_early_khz=`); none where the counter
    /// does not keep its rate. Takes 20 ms the first time.
    pub fn counter_khz() -> Option<u64> {
        tsc::begin();
        tsc::khz()
    }

    /// Tries how far this host lets a VM be confined, with a QEMU that only tells its version; none for an engine without a VM.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Spawn`] and [`LaunchError::Host`]: then no VM starts here either.
    pub fn try_confinement(&self) -> Result<Option<Confinement>, LaunchError> {
        let Some(qemu) = &self.qemu else { return Ok(None) };
        let null = File::options().write(true).open("/dev/null").map_err(host("/dev/null"))?;
        let (program, arguments) = program(qemu, vec![b"--version".to_vec()]);
        let own_root = OwnRoot::plan(qemu, false);
        let drop_root = drop_root(qemu, &[], false);
        let plan = Plan { program, arguments, environment: Vec::new(), keep: Vec::new(), stderr: null.into(), drop_root, own_root };
        let spawned = spawn::spawn(plan).map_err(|source| LaunchError::Spawn { path: qemu.path.clone(), source })?;
        let confinement = Confinement {
            isolation: spawned.isolation,
            own_root: spawned.has_own_root,
            dropped_root: spawned.dropped_root,
            sandbox: qemu.has_sandbox,
        };
        if let Some(process) = spawned.process.pidfd() {
            let _ = rustix::process::waitid(rustix::process::WaitId::PidFd(process), rustix::process::WaitIdOptions::EXITED);
        }
        Ok(Some(confinement))
    }

    /// Starts a VM and returns once its guest runs. The backends of its device sockets must be running already.
    ///
    /// # Errors
    ///
    /// [`LaunchError`]; nothing is left of the VM then.
    pub fn launch(&self, spec: VmSpec) -> Result<Vm, LaunchError> {
        let Some(qemu) = &self.qemu else { return Ok(Vm::without_process()) };
        spec.check().and_then(|()| spec::check_files(&spec.memory)).map_err(LaunchError::Spec)?;
        if spec.nsm.is_some() && !qemu.has_nsm_device {
            return Err(LaunchError::NoNsmDevice(qemu.path.clone()));
        }
        let choice = choose(&spec)?;
        let command_line = command_line(&spec, &choice)?;
        let (qmp, qmp_end) = socket_pair()?;
        let (console, console_end) = socket_pair()?;
        let (stderr, stderr_end) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| host("a pipe")(error.into()))?;

        let mut inherited = Inherited::default();
        let mut memory = Vec::with_capacity(spec.memory.len());
        for FileRange { file, offset, size } in &spec.memory {
            memory.push(Run { fd: inherited.add(file)?, offset: *offset, size: *size });
        }
        let machine = Machine {
            firmware: &qemu.firmware(),
            sandbox: qemu.has_sandbox,
            choice: &choice,
            discovery: spec.discovery,
            memory: &memory,
            vcpus: spec.vcpus,
            kernel: inherited.add(&spec.kernel)?,
            initrd: spec.initrd.as_ref().map(|file| inherited.add(file)).transpose()?,
            command_line: &command_line,
            console: inherited.add(&console_end)?,
            qmp: inherited.add(&qmp_end)?,
            vsock: spec.vsock.as_ref().map(|socket| inherited.add(socket)).transpose()?,
            nsm: spec.nsm.as_ref().map(|socket| inherited.add(socket)).transpose()?,
        };
        let (program, arguments) = program(qemu, arguments::build(&machine));
        let own_root = OwnRoot::plan(qemu, choice.kvm);
        let files = spec.memory.iter().map(|range| (&*range.file, 0o006)).chain([(&spec.kernel, 0o004)]);
        let files: Vec<(&OwnedFd, u32)> = files.chain(spec.initrd.iter().map(|initrd| (initrd, 0o004))).collect();
        let drop_root = drop_root(qemu, &files, choice.kvm);
        let plan = Plan { program, arguments, environment: Vec::new(), keep: inherited.numbers, stderr: stderr_end, drop_root, own_root };
        let spawned = spawn::spawn(plan).map_err(|source| LaunchError::Spawn { path: qemu.path.clone(), source })?;
        // Only QEMU has them from here on, so that everybody else sees its end.
        drop((spec, inherited.lifted, qmp_end, console_end));
        let confinement = Confinement {
            isolation: spawned.isolation,
            own_root: spawned.has_own_root,
            dropped_root: spawned.dropped_root,
            sandbox: qemu.has_sandbox,
        };
        tracing::debug!(pid = spawned.pid, %confinement, ?choice, "QEMU was started");
        let vm = Vm::watch(spawned, qmp, stderr, console, choice, confinement).map_err(host("a thread"))?;
        match vm.wait_started(PATIENCE) {
            Started::Running => Ok(vm),
            Started::Ended(report) => Err(LaunchError::DiedAtStart { path: qemu.path.clone(), detail: report.detail }),
            Started::Silent => Err(LaunchError::Silent { path: qemu.path.clone(), seconds: PATIENCE.as_secs() }),
        }
    }
}

/// What the new process inherits.
#[derive(Debug, Default)]
struct Inherited {
    /// The descriptors' numbers, the same there as here.
    numbers: Vec<RawFd>,
    /// Copies of those that were in the way of the standard streams.
    lifted: Vec<OwnedFd>,
}

impl Inherited {
    /// Adds a descriptor, which must stay open until the process runs; gives its number there.
    fn add(&mut self, descriptor: &OwnedFd) -> Result<RawFd, LaunchError> {
        let mut number = descriptor.as_raw_fd();
        if number < 3 {
            let copy = spawn::above_standard(descriptor).map_err(host("a file descriptor"))?;
            number = copy.as_raw_fd();
            self.lifted.push(copy);
        }
        self.numbers.push(number);
        Ok(number)
    }
}

fn choose(spec: &VmSpec) -> Result<Choice, LaunchError> {
    let kernel = spec.kernel.try_clone().map(File::from).map_err(host("a file descriptor"))?;
    accelerate::choose(spec.accelerator, bzimage::version(&kernel)).map_err(LaunchError::Kvm)
}

fn command_line(spec: &VmSpec, choice: &Choice) -> Result<Vec<u8>, LaunchError> {
    let devices = u64::from(spec.vsock.is_some()) + u64::from(spec.nsm.is_some());
    let line = arguments::kernel_command_line(&spec.cmdline, choice, spec.discovery, devices);
    if line.len() > MAX_COMMAND_LINE_BYTES {
        return Err(LaunchError::Spec(SpecError::LongCommandLine(line.len())));
    }
    Ok(line)
}

/// The file to execute and its arguments, its own name first. A tree's QEMU starts through the tree's loader.
fn program(qemu: &Qemu, arguments: Vec<Vec<u8>>) -> (CString, Vec<CString>) {
    let mut start = Vec::new();
    let program = match &qemu.tree {
        None => qemu.path.clone(),
        Some(tree) => {
            let loader = discover::loader(tree);
            start.push(loader.as_os_str().as_bytes().to_vec());
            start.push(b"--library-path".to_vec());
            start.push(discover::libraries(tree).into_os_string().into_vec());
            loader
        }
    };
    start.push(qemu.path.as_os_str().as_bytes().to_vec());
    let arguments = start.into_iter().chain(arguments).map(c_string).collect();
    (c_string(program.into_os_string().into_vec()), arguments)
}

/// Whether the launching process is root and everything its VM opens by name, with these permissions, is open to an ordinary user too.
fn drop_root(qemu: &Qemu, files: &[(&OwnedFd, u32)], kvm: bool) -> DropRoot {
    let everybody_may = |(file, bits): &(&OwnedFd, u32)| rustix::fs::fstat(file).is_ok_and(|status| status.st_mode & bits == *bits);
    if !rustix::process::geteuid().is_root()
        || !nobody_exists()
        || (kvm && std::fs::metadata("/dev/kvm").is_ok_and(|metadata| metadata.mode() & 0o006 != 0o006))
        || !files.iter().all(everybody_may)
    {
        return DropRoot::No;
    }
    let is_open = |folder: &Path| std::fs::metadata(folder).is_ok_and(|metadata| metadata.mode() & 0o001 != 0);
    if qemu.path.ancestors().skip(1).all(is_open) { DropRoot::Yes } else { DropRoot::WithOwnRoot }
}

/// Whether this user namespace has a user and a group `nobody`: a container's may have few ids.
fn nobody_exists() -> bool {
    ["/proc/self/uid_map", "/proc/self/gid_map"].iter().all(|file| {
        let map = std::fs::read_to_string(file).unwrap_or_default();
        map.lines().any(|line| {
            let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
            let (Some(Ok(first)), Some(Ok(count))) = (numbers.next(), numbers.nth(1)) else { return false };
            NOBODY.checked_sub(first).is_some_and(|offset| offset < count)
        })
    })
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd), LaunchError> {
    let (ours, theirs) = UnixStream::pair().map_err(host("a socket pair"))?;
    Ok((ours.into(), theirs.into()))
}

fn host(what: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::Host { what, source }
}

/// Ends at the first NUL; none of ours has one, and the kernel's command line was checked.
fn c_string(bytes: Vec<u8>) -> CString {
    CString::new(bytes).unwrap_or_else(|error| {
        let end = error.nul_position();
        let mut bytes = error.into_vec();
        bytes.truncate(end);
        CString::new(bytes).unwrap_or_default()
    })
}
