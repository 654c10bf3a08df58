//! `device`: the Nitro Enclaves device for a virtual machine, which becomes a parent instance by it.
//!
//! One process serves one VM: the PCI device and the parent's vsock, each at a socket that QEMU connects to. Enclaves run in processes of their own. What
//! happens is told on standard error; standard output gets one line of JSON when both sockets listen. The user's page is docs/device-pci.md.

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use nitroxide_device::{Device, Launcher};
use nitroxide_device_pci::{BindError, ParentRam, ParentVsock, ParentVsockError, PciServer, ServerOptions, Stop};
use nitroxide_enclave::{Happening, LaunchOptions, MemoryMode, Parent, ParentMemory, ProcessLauncher, SlotRecord};
use nitroxide_engine::{Engine, Qemu};
use nitroxide_guest_sys::signals::Signals;
use nitroxide_world::World;
use rustix::{
    fs::{FlockOperation, flock},
    process::Signal,
};
use serde::Serialize;

use crate::{
    arguments::{DeviceArguments, MemoryKind},
    codes::ErrorCode,
    ending, ending_signals,
    failure::Failure,
    launch, output,
    remarks::Remarks,
    world,
};

/// How much of the last console output is shown with the end of an enclave, in lines.
const TAIL_LINES: usize = 10;

/// What standard output gets when both sockets listen.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Ready<'a> {
    socket: &'a Path,
    vsock_socket: &'a Path,
    runtime_directory: &'a Path,
    qemu_options: Vec<String>,
}

/// Serves one VM after the other until a signal comes.
pub fn run(arguments: &DeviceArguments, remarks: Remarks) -> Result<ExitCode, Failure> {
    let faults = launch::faults(&arguments.behaviour)?;
    // Absolute, because that is how QEMU gets them: the length that a socket's path may have is judged on what QEMU has to connect to.
    let socket = absolute(&arguments.socket)?;
    let vsock_path = absolute(&arguments.vsock.clone().unwrap_or_else(|| with_suffix(&arguments.socket, ".vsock")))?;
    if socket == vsock_path {
        return Err(Failure::new(ErrorCode::INVALID_ARGUMENT, "--socket and --vsock name the same path; each needs its own"));
    }
    // Before any thread is there: all of them inherit it, and one waits.
    let signals = ending_signals::block(&[Signal::INT, Signal::TERM, Signal::HUP])
        .map_err(|error| Failure::new(ErrorCode::SIGNAL_MASK, "Signals cannot be blocked").because(error))?;
    // Dropped last, when nothing uses the directory any more.
    let place = Place::new(arguments.world.as_deref())?;
    let world = &place.world;

    let ram = Arc::new(ParentRam::new());
    let launcher = Arc::new(ProcessLauncher::new(world.clone(), Arc::clone(&ram) as Arc<dyn ParentMemory>, launch_options(arguments)));
    tell_what_happens(&launcher, remarks);
    let device = Arc::new(Device::new(launch::limits(&arguments.behaviour), faults, Arc::clone(&launcher) as Arc<dyn Launcher>));
    let options = ServerOptions { test_control: arguments.test_control };
    let server = PciServer::bind(&socket, options, device, ram).map_err(|error| not_bound(&socket, error))?;
    let _vsock = ParentVsock::listen(&vsock_path, world).map_err(|error| match error {
        ParentVsockError::Socket(error) => not_bound(&vsock_path, error),
        error => Failure::new(ErrorCode::SOCKET, "The virtual machine's vsock cannot be served").because(error),
    })?;

    let engine = if arguments.launch.engine == crate::arguments::EngineKind::None { None } else { say_what_is_missing(remarks) };
    announce(&socket, &vsock_path, world, remarks)?;
    if let Some(qemu) = engine.as_ref().and_then(Engine::qemu) {
        say_which_qemu(qemu, remarks);
    }
    end_on_signal(signals, server.stopper());
    server.run().map_err(|error| Failure::new(ErrorCode::SOCKET, "The device cannot be served any more").because(error))?;
    Ok(ExitCode::SUCCESS)
}

fn launch_options(arguments: &DeviceArguments) -> LaunchOptions {
    let mut options = launch::options("enclave", arguments.launch.engine, arguments.launch.virtio_discovery, arguments.identity.identity());
    options.parent = Parent::Vm;
    options.memory = match arguments.memory {
        MemoryKind::Isolated => MemoryMode::Isolated,
        MemoryKind::ZeroCopy => MemoryMode::Shared,
    };
    options
}

fn not_bound(path: &Path, error: BindError) -> Failure {
    let (code, help) = match &error {
        BindError::TooLong(_) => (ErrorCode::SOCKET_PATH, Some("Give a shorter one, e.g. --socket /tmp/ne.sock.")),
        BindError::NotSocket(_) => (ErrorCode::SOCKET_PATH, None),
        BindError::Io(_, cause) => (ErrorCode::SOCKET, what_to_do(cause)),
        _ => (ErrorCode::SOCKET, None),
    };
    let failure = Failure::new(code, format!("There can be no device at {}", path.display())).because(error);
    if let Some(help) = help { failure.help(help) } else { failure }
}

fn what_to_do(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Some("Its folder is not there; make it first, or give another path."),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Some("You may not write into its folder; give a path in one of your own, e.g. below $XDG_RUNTIME_DIR.")
        }
        _ => None,
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| {
        Failure::new(ErrorCode::INVALID_ARGUMENT, format!("The path {} cannot be made absolute", path.display())).because(error)
    })
}

/// Says what enclaves will lack, once and before a guest is surprised.
fn say_what_is_missing(remarks: Remarks) -> Option<Engine> {
    match Engine::discover(&nitroxide_engine::Discovery::default()) {
        Err(error) => {
            remarks.note(format!("Enclaves cannot be started: {error}"));
            None
        }
        Ok(engine) => {
            if !engine.has_nsm_device() {
                remarks.note("Enclaves will have no /dev/nsm: this QEMU has no vhost-user-test-device (11.0 and later)");
            }
            Some(engine)
        }
    }
}

/// Says whether the QEMU here can run the virtual machine, and how it is started where its name alone does not start it.
fn say_which_qemu(qemu: &Qemu, remarks: Remarks) {
    if !qemu.lacks_for_parents.is_empty() {
        remarks.note(format!(
            "{} cannot run that virtual machine: it has no {}. Use QEMU 11 or newer, e.g. the one of `cargo xtask setup`",
            qemu.path.display(),
            qemu.lacks_for_parents.join(" and no ")
        ));
    } else if qemu.tree.is_some() {
        let words: Vec<String> = words(qemu).iter().map(|word| shell_word(word)).collect();
        remarks.note(format!("A QEMU that can run that virtual machine is here: {}", words.join(" ")));
    }
}

/// The words that start it from a shell.
fn words(qemu: &Qemu) -> Vec<String> {
    let command = qemu.command();
    let mut words: Vec<String> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy().into_owned()).collect();
    for folder in qemu.firmware() {
        words.extend(["-L".to_owned(), folder.to_string_lossy().into_owned()]);
    }
    words
}

/// Says that QEMU may come, and how.
fn announce(socket: &Path, vsock: &Path, world: &World, remarks: Remarks) -> Result<(), Failure> {
    let options = qemu_options(socket, vsock);
    remarks.note("The device waits for a virtual machine. Add to QEMU (11 or newer), with as much memory as the VM has in both places:\n");
    let shown: Vec<String> = options.iter().map(|option| shell_word(option)).collect();
    for pair in shown.chunks(2) {
        remarks.note(format!("  {} \\", pair.join(" ")));
    }
    let directory = shell_word(&world.path().to_string_lossy());
    remarks.note("\nEnclaves can be looked at from here:\n");
    for command in ["describe-enclaves", "logs ENCLAVE --follow", "console ENCLAVE"] {
        remarks.note(format!("  NITROXIDE_RUNTIME_DIR={directory} nitroxide {command}"));
    }
    remarks.note("");
    let ready = Ready { socket, vsock_socket: vsock, runtime_directory: world.path(), qemu_options: options };
    let line = serde_json::to_string(&ready)
        .map_err(|error| Failure::new(ErrorCode::SERDE, "The result cannot be written as JSON").because(error))?;
    output::bytes(format!("{line}\n").as_bytes())
}

/// What QEMU needs besides an ordinary VM.
fn qemu_options(socket: &Path, vsock: &Path) -> Vec<String> {
    let device = serde_json::json!({ "driver": "vfio-user-pci", "socket": { "type": "unix", "path": socket.to_string_lossy() } });
    // In QEMU's own syntax a comma in a value is written twice.
    let chardev = format!("socket,id=ne-vsock,path={}", vsock.to_string_lossy().replace(',', ",,"));
    [
        ("-m", "4G"),
        ("-object", "memory-backend-memfd,id=ne-ram,size=4G,share=on"),
        ("-machine", "q35,memory-backend=ne-ram"),
        ("-device", &device.to_string()),
        ("-chardev", &chardev),
        ("-device", "vhost-user-vsock-pci,chardev=ne-vsock"),
    ]
    .into_iter()
    .flat_map(|(option, value)| [option.to_owned(), value.to_owned()])
    .collect()
}

/// A word as a shell reads it.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Ends the server at the first signal, this process at the second (and everything with it).
fn end_on_signal(signals: Signals, stop: Arc<Stop>) {
    thread::spawn(move || {
        let mut told = false;
        loop {
            if signals.next(Duration::from_secs(3600)).is_none() {
                continue;
            }
            if told {
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
            }
            told = true;
            stop.stop();
        }
    });
}

/// Tells of enclaves that start, are refused, end.
fn tell_what_happens(launcher: &Arc<ProcessLauncher>, remarks: Remarks) {
    let records = Arc::downgrade(launcher);
    launcher.observe(move |happening| {
        let record = |slot: u64| records.upgrade().and_then(|launcher| launcher.record(slot)).unwrap_or_default();
        match happening {
            Happening::Started { slot_uid, memory_bytes, request } => {
                let SlotRecord { enclave_id, cid, .. } = record(*slot_uid);
                let debug = if request.debug { ", debug mode" } else { "" };
                remarks.note(format!(
                    "Enclave {enclave_id} runs: CID {}, {} vCPUs, {} MiB{debug}",
                    cid.map_or_else(|| "?".to_owned(), |cid| cid.to_string()),
                    request.vcpus,
                    memory_bytes >> 20,
                ));
            }
            Happening::Refused { slot_uid, refusal } => {
                let id = record(*slot_uid).enclave_id;
                remarks.note(format!("Enclave {id} is not started (errno {}): {}", refusal.errno, refusal.message));
            }
            Happening::Ended { slot_uid, report } => {
                remarks.note(format!("{}: {}", record(*slot_uid).enclave_id, ending::text(report)));
                for line in last_lines(&report.console_tail) {
                    remarks.note(format!("  | {line}"));
                }
            }
        }
    });
}

/// The last lines of a console.
fn last_lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.trim_end().lines().count();
    text.trim_end().lines().skip(lines.saturating_sub(TAIL_LINES))
}

/// The world of one VM: a fresh directory below the runtime directory, gone at the end; or one that the user names, which stays.
#[derive(Debug)]
struct Place {
    world: World,
    /// A fresh directory, and the lock that says that it is in use.
    fresh: Option<(PathBuf, OwnedFd)>,
}

impl Place {
    fn new(named: Option<&Path>) -> Result<Self, Failure> {
        if let Some(path) = named {
            let path = absolute(path)?;
            return Ok(Self { world: World::open(&path).map_err(world::unusable)?, fresh: None });
        }
        // Opening the user's own world makes sure that its directory is the user's alone.
        let parents = world::open()?.path().join(world::PARENTS);
        let failed =
            |error: std::io::Error| Failure::new(ErrorCode::READ_DISK, format!("{} cannot be used", parents.display())).because(error);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&parents).map_err(failed)?;
        // As long as this is held nobody sweeps: a new folder has no lock yet. Others hold it for an instant.
        let making: OwnedFd = std::fs::File::open(&parents).map_err(failed)?.into();
        flock(&making, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        let path = fresh_folder(&parents).map_err(failed)?;
        let lock = world::lock(&path).map_err(failed)?;
        Ok(Self { world: World::open(&path).map_err(world::unusable)?, fresh: Some((path, lock)) })
    }
}

/// Makes a folder named after this process; or with something added, where containers that share the runtime directory have the same process number.
fn fresh_folder(parents: &Path) -> io::Result<PathBuf> {
    let mut path = parents.join(std::process::id().to_string());
    let mut others = 0;
    loop {
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                others += 1;
                path = parents.join(format!("{}-{others}", std::process::id()));
            }
            Err(error) => return Err(error),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((path, _lock)) = &self.fresh {
            // What is in it belongs to enclaves that are gone.
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_options_can_be_pasted_into_a_shell() {
        let options = qemu_options(Path::new("/run/it's,here/ne.sock"), Path::new("/run/a,b/v.sock"));
        assert!(
            options.contains(&r#"{"driver":"vfio-user-pci","socket":{"path":"/run/it's,here/ne.sock","type":"unix"}}"#.to_owned())
                || options.contains(&r#"{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/it's,here/ne.sock"}}"#.to_owned())
        );
        assert!(options.contains(&"socket,id=ne-vsock,path=/run/a,,b/v.sock".to_owned()));
        assert_eq!(shell_word("a'b {"), r"'a'\''b {'");
        assert_eq!(shell_word("q35,memory-backend=ne-ram"), "q35,memory-backend=ne-ram");
    }

    #[test]
    fn an_installed_qemu_is_started_by_its_path_and_an_unpacked_one_by_its_loader_with_its_firmware() {
        let qemu = |path: &str, tree: Option<&str>| Qemu { path: path.into(), tree: tree.map(PathBuf::from), ..Qemu::default() };
        assert_eq!(words(&qemu("/usr/bin/qemu-system-x86_64", None)), ["/usr/bin/qemu-system-x86_64"]);
        assert_eq!(
            words(&qemu("/t/usr/bin/qemu-system-x86_64", Some("/t"))).join(" "),
            "/t/usr/lib64/ld-linux-x86-64.so.2 --library-path /t/usr/lib/x86_64-linux-gnu /t/usr/bin/qemu-system-x86_64 \
             -L /t/usr/share/qemu -L /t/usr/share/seabios"
        );
    }

    #[test]
    fn devices_of_the_same_process_number_have_folders_of_their_own() {
        let parents = tempfile::tempdir().unwrap();
        let made: Vec<PathBuf> = (0..3).map(|_| fresh_folder(parents.path()).unwrap()).collect();
        assert!(made.iter().all(|path| path.is_dir()));
        assert_eq!(std::fs::read_dir(parents.path()).unwrap().count(), 3);
        assert_eq!(fresh_folder(&parents.path().join("missing")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn only_the_last_lines_of_a_console_are_shown() {
        let text: String = (0..15).map(|line| format!("{line}\n")).collect();
        assert_eq!(last_lines(&text).collect::<Vec<_>>(), ["5", "6", "7", "8", "9", "10", "11", "12", "13", "14"]);
        assert_eq!(last_lines("").count(), 0);
    }
}
