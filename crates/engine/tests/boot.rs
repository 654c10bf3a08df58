//! Boots the distribution's kernel in a VM and ends it in every way there is. Needs `cargo xtask setup` and `cargo xtask guest`.
//!
//! The guest's init is `nitroxide-probe`: the kernel hands it the words behind ` -- `, so each test also shows that the VM's own parameters stand before.
//! Each test is a boot of a few seconds; nothing here depends on how long it takes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nitroxide_eif::cpio::{Device, Tree};
use nitroxide_engine::{
    Accelerator, Discovery, Engine, ExitReason, ExitReport, FileRange, Isolation, LaunchError, MAX_MEMORY_RUNS, PanicWatch,
    VirtioDiscovery, Vm, VmSpec,
};
use nitroxide_nsm::{InitialPcrs, NsmConfig};
use nitroxide_testkit::images::ImageSpec;
use nitroxide_testkit::{Setup, guest_program};
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig};
use rustix::fs::MemfdFlags;

const MIB: u64 = 1 << 20;

/// Ends a hanging test; no verdict depends on it otherwise.
const PATIENCE: Duration = Duration::from_secs(300);

fn engine() -> Engine {
    Engine::discover(&Discovery { chosen: None, path: None, setup: Some(Setup::locate().root().to_owned()), answers: None }).unwrap()
}

fn memory(mib: u64) -> Arc<OwnedFd> {
    let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, mib * MIB).unwrap();
    Arc::new(memory)
}

fn range(file: &Arc<OwnedFd>, offset_mib: u64, mib: u64) -> FileRange {
    FileRange { file: Arc::clone(file), offset: offset_mib * MIB, size: mib * MIB }
}

fn memfd_of(content: &[u8]) -> OwnedFd {
    let mut file = File::from(rustix::fs::memfd_create("part", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// A ramdisk whose init is the probe.
fn ramdisk() -> OwnedFd {
    let mut tree = Tree::new();
    tree.directory("dev", 0o755).unwrap();
    tree.device("dev/console", 0o600, Device::Character, (5, 1)).unwrap();
    tree.file_from("init", 0o755, guest_program("nitroxide-probe")).unwrap();
    memfd_of(&tree.to_bytes().unwrap())
}

/// A VM of 256 MiB whose init does what `words` say.
fn spec(words: &str) -> VmSpec {
    VmSpec {
        memory: vec![range(&memory(256), 0, 256)],
        vcpus: 1,
        kernel: File::open(Setup::locate().kernel()).unwrap().into(),
        initrd: Some(ramdisk()),
        cmdline: format!("console=ttyS0 panic=-1 -- {words}").into_bytes(),
        vsock: None,
        nsm: None,
        accelerator: Accelerator::Auto,
        discovery: VirtioDiscovery::Acpi,
    }
}

/// Reads a console to its end on a thread of its own.
fn collect(vm: &mut Vm) -> std::thread::JoinHandle<String> {
    let mut console = File::from(vm.take_console().unwrap());
    std::thread::spawn(move || {
        let mut output = Vec::new();
        // A console whose VM was killed may end with a reset instead of an end of file.
        let _ = console.read_to_end(&mut output);
        String::from_utf8_lossy(&output).into_owned()
    })
}

/// Waits until the console shows the text; returns what it showed until then.
fn read_until(console: &OwnedFd, text: &str) -> String {
    let mut output = String::new();
    let mut lines = BufReader::new(File::from(console.try_clone().unwrap()));
    while !output.contains(text) {
        let mut line = Vec::new();
        assert_ne!(lines.read_until(b'\n', &mut line).unwrap(), 0, "the console ended without {text:?}:\n{output}");
        output.push_str(&String::from_utf8_lossy(&line));
    }
    output
}

fn run(spec: VmSpec) -> (ExitReport, String) {
    let mut vm = engine().launch(spec).unwrap();
    let console = collect(&mut vm);
    let stopper = vm.stopper();
    let (ended, guard) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if guard.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            stopper.stop();
        }
    });
    let report = vm.wait();
    drop(ended);
    assert!(!alive(vm.pid().unwrap()), "the VM's process must be gone once wait() returns");
    (report, console.join().unwrap())
}

/// Whether the process is there; one that has ended and only waits for its parent to take notice (init, perhaps a slow one) is not.
fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !stat.rsplit_once(") ").unwrap().1.starts_with(['Z', 'X'])
}

fn wait_until_gone(pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    while alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn one_range_boots_and_powers_off() {
    let (report, console) = run(spec("poweroff"));
    assert_eq!(report, ExitReport { reason: ExitReason::PoweredOff, detail: String::new() }, "{console}");
    assert!(console.contains("reboot: Power down"), "{console}");
    let line = console.lines().find(|line| line.contains("Kernel command line: ")).unwrap();
    assert!(line.ends_with(" -- poweroff"), "{line}");
    if Engine::kvm().is_err() {
        assert!(line.contains(" panic=-1 tsc_early_khz="), "{line}");
    }
}

#[test]
fn as_many_ranges_as_possible_are_one_memory_for_guest_and_devices_and_reboot_ends_the_vm() {
    let (first, second, third) = (memory(200), memory(400), memory(250));
    // Out of order, with gaps, of any size; more than the 8 slots that a vhost-user device has by default. No page twice: that would be one page.
    let mut memory = vec![range(&second, 250, 2), range(&first, 40, 60), range(&second, 100, 128)];
    memory.extend((0..MAX_MEMORY_RUNS as u64 - 3).rev().map(|piece| range(&third, 2 * piece, 2)));
    let nsm = nitroxide_nsm::spawn(NsmConfig {
        module_id: "i-0000000000000000-enc0000000000000001".to_owned(),
        pcrs: Box::new(|| InitialPcrs::of_image([1; 48], [2; 48], [3; 48], None)),
        debug: false,
        pki: None,
    })
    .unwrap();
    let vsock = nitroxide_vsock::spawn(VsockConfig::new(16, Arc::new(Nowhere))).unwrap();
    let image = ImageSpec::probe(&["reboot"]);
    let ramdisks = [image.bootstrap().to_bytes().unwrap(), image.application().to_bytes().unwrap()].concat();
    let spec = VmSpec {
        memory,
        vcpus: 2,
        initrd: Some(memfd_of(&ramdisks)),
        cmdline: b"console=ttyS0 panic=-1".to_vec(),
        vsock: vsock.take_frontend(),
        nsm: nsm.take_frontend(),
        ..spec("")
    };
    assert!(spec.vsock.is_some() && spec.nsm.is_some());
    let (report, console) = run(spec);
    assert_eq!(report.reason, ExitReason::Rebooted, "{console}");
    assert!(console.contains("smp: Brought up 1 node, 2 CPUs"), "{console}");
    // 440 MiB in all: RAM ends at 0x1b800000 (but for a page of ACPI tables) in one piece.
    assert!(console.contains("[mem 0x0000000000100000-0x000000001b7fefff]"), "{console}");
    // The guest's own drivers found both devices: the vsock device answered a connection, with a refusal.
    assert!(console.contains("nobody listens on port 9000"), "{console}");
    assert!(console.contains("virtio_mmio vsock") && console.contains(" nsm"), "{console}");
}

/// A router that leads nowhere.
struct Nowhere;

impl Router for Nowhere {
    fn connect(&self, _request: ConnectRequest) -> std::io::Result<Route> {
        Err(std::io::ErrorKind::ConnectionRefused.into())
    }
}

#[test]
fn a_panic_looks_like_a_reboot_and_the_console_tells_it() {
    // Without /proc the probe cannot trigger a crash and ends, which panics the kernel just as well: init must not end.
    let (report, console) = run(spec("panic"));
    assert_eq!(report.reason, ExitReason::Rebooted, "{console}");
    assert!(PanicWatch::default().feed(console.as_bytes()), "{console}");
}

#[test]
fn a_panic_is_told_by_a_kernel_that_drives_the_panic_device() {
    let setup = Setup::locate();
    let image = ImageSpec::probe(&["panic"]);
    let mut bootstrap = image.bootstrap();
    for module in ["pvpanic", "pvpanic-mmio"] {
        bootstrap.file(format!("modules/{module}.ko"), 0o644, setup.module_bytes(module)).unwrap();
    }
    let ramdisks = [bootstrap.to_bytes().unwrap(), image.application().to_bytes().unwrap()].concat();
    // Without panic= the kernel would halt for ever: the device ends it at once.
    let spec = VmSpec { initrd: Some(memfd_of(&ramdisks)), cmdline: b"console=ttyS0".to_vec(), ..spec("") };
    let (report, console) = run(spec);
    assert_eq!(report.reason, ExitReason::Panicked, "{console}");
}

#[test]
fn an_old_kernel_keeps_time_by_counting_instructions() {
    // The same kernel, whose header says that it is older than the parameter.
    let mut kernel = std::fs::read(Setup::locate().kernel()).unwrap();
    let version = 0x200 + usize::from(u16::from_le_bytes([kernel[0x20E], kernel[0x20F]]));
    kernel[version..version + 4].copy_from_slice(b"4.14");
    let old = VmSpec { kernel: memfd_of(&kernel), accelerator: Accelerator::Tcg, ..spec("poweroff") };
    let (report, console) = run(old);
    assert_eq!(report.reason, ExitReason::PoweredOff, "{console}");
    assert!(!console.contains("tsc_early_khz"), "{console}");
}

#[test]
fn a_stopped_vm_and_a_dropped_one_are_gone_and_a_killed_one_is_a_failure() {
    let engine = engine();

    let vm = engine.launch(spec("hang")).unwrap();
    let stopper = vm.stopper();
    std::thread::spawn(move || stopper.stop()).join().unwrap();
    assert_eq!(vm.wait(), ExitReport { reason: ExitReason::Stopped, detail: String::new() });
    assert!(!alive(vm.pid().unwrap()));
    vm.stopper().stop();

    let vm = engine.launch(spec("hang")).unwrap();
    let pid = vm.pid().unwrap();
    assert!(alive(pid));
    drop(vm);
    assert!(!alive(pid));

    let vm = engine.launch(spec("hang")).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(vm.pid().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let report = vm.wait();
    assert_eq!(report.reason, ExitReason::EngineFailed);
    assert!(report.detail.contains("killed by signal 9"), "{report:?}");
}

#[test]
fn the_process_is_confined_and_inherits_nothing_else() {
    // A descriptor that any careless program could have left open across an exec.
    let (sentinel, _other_end) = rustix::pipe::pipe().unwrap();
    let sentinel_inode = rustix::fs::fstat(&sentinel).unwrap().st_ino;
    let vm = engine().launch(spec("hang")).unwrap();
    let process = PathBuf::from(format!("/proc/{}", vm.pid().unwrap()));

    let status = std::fs::read_to_string(process.join("status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned()).unwrap();
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), if vm.confinement().sandbox { "2" } else { "0" });
    let terminate = 1 << (15 - 1);
    assert_eq!(u64::from_str_radix(&field("SigBlk:"), 16).unwrap() & terminate, 0, "the launcher's signal mask is not inherited");
    assert!(vm.confinement().sandbox);
    let every_user_exists = std::fs::read_to_string("/proc/self/uid_map").unwrap().split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    if rustix::process::geteuid().is_root() && every_user_exists {
        assert!(vm.confinement().dropped_root);
        assert_eq!(field("Uid:"), "65534\t65534\t65534\t65534");
        assert_eq!(field("Gid:"), "65534\t65534\t65534\t65534");
    }
    assert_eq!(field("CapEff:"), "0000000000000000");
    let limits = std::fs::read_to_string(process.join("limits")).unwrap();
    assert!(limits.lines().any(|line| line.starts_with("Max core file size        0 ")), "{limits}");

    for entry in std::fs::read_dir(process.join("fd")).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap_or_default();
        assert_ne!(target, Path::new(&format!("pipe:[{sentinel_inode}]")));
    }
    if vm.confinement().isolation == Isolation::Full {
        assert!(vm.confinement().own_root, "{}", vm.confinement());
        let names = |folder: &str| {
            let root = process.join("root").join(folder);
            let mut names: Vec<String> =
                std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("dev"), ["urandom"]);
        assert!(!process.join("root/etc").exists());
        // Only itself: process 1 of its own namespace.
        assert_eq!(names("proc").iter().filter(|name| name.parse::<u32>().is_ok()).count(), 1);
        let mounts = std::fs::read_to_string(process.join("mounts")).unwrap();
        assert!(mounts.lines().all(|line| line.contains(" ro,") || line.contains(" /dev/")), "{mounts}");
        for namespace in ["user", "mnt", "net", "ipc", "pid", "uts"] {
            let of = |process: &Path| std::fs::read_link(process.join("ns").join(namespace)).unwrap();
            assert_ne!(of(&process), of(Path::new("/proc/self")), "{namespace}");
        }
    } else {
        println!("namespaces are not allowed here: {}", vm.confinement());
    }
    assert!(sentinel.as_raw_fd() > 2);
}

#[test]
fn confinement_can_be_tried_without_a_vm() {
    let engine = engine();
    let vm = engine.launch(spec("hang")).unwrap();
    assert_eq!(engine.try_confinement().unwrap(), Some(vm.confinement()));
    assert_eq!(Engine::none().try_confinement().unwrap(), None);
    let version = engine.qemu().unwrap().version().unwrap();
    assert!(version.starts_with(|first: char| first.is_ascii_digit()), "{version}");
}

#[test]
fn a_host_that_forbids_namespaces_still_gets_what_is_possible() {
    // In a user namespace of its own the helper may forbid itself all further ones; it is root there, with a single user id.
    let forbid = "for kind in user mnt net pid ipc uts; do echo 0 > /proc/sys/user/max_${kind}_namespaces || exit 99; done; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "sh", "-c", forbid, "sh"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", "the_process_is_confined_and_inherits_nothing_else", "--nocapture"]);
    let output = match command.output() {
        Ok(output) if output.status.code() != Some(99) && !String::from_utf8_lossy(&output.stderr).contains("unshare failed") => output,
        other => return println!("skipped: this host lets nobody make a user namespace: {other:?}"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("no namespaces (not allowed here), system call filter"), "{text}");
}

#[test]
fn kill_9_of_the_launching_process_ends_the_vm() {
    let mut helper = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_launches_and_waits", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(helper.stdout.take().unwrap()).lines();
    let pid: u32 = loop {
        let line = lines.next().expect("the helper tells its VM's process id").unwrap();
        if let Some((_, pid)) = line.split_once("vm process ") {
            break pid.trim().parse().unwrap();
        }
    };
    assert!(alive(pid));
    helper.kill().unwrap();
    helper.wait().unwrap();
    wait_until_gone(pid);
}

#[test]
fn helper_launches_and_waits() {
    // A part of `kill_9_of_the_launching_process_ends_the_vm`, which asks for it by name; nothing otherwise.
    if !std::env::args().any(|argument| argument == "helper_launches_and_waits") {
        return;
    }
    // From a thread that ends at once: the VM must not end with it.
    let vm = std::thread::spawn(|| engine().launch(spec("hang")).unwrap()).join().unwrap();
    println!("vm process {}", vm.pid().unwrap());
    std::io::stdout().flush().unwrap();
    vm.wait();
}

#[test]
fn a_vm_outlives_the_thread_that_launched_it() {
    let mut vm = std::thread::spawn(|| engine().launch(spec("poweroff")).unwrap()).join().unwrap();
    let console = vm.take_console().unwrap();
    read_until(&console, "reboot: Power down");
    assert_eq!(vm.wait().reason, ExitReason::PoweredOff);
    assert!(console.as_fd().as_raw_fd() > 2);
}

#[test]
fn a_kernel_that_is_none_dies_at_start_with_qemus_message() {
    let Err(LaunchError::DiedAtStart { path, detail }) = engine().launch(VmSpec { kernel: memfd_of(b"no kernel"), ..spec("hang") }) else {
        panic!("an empty kernel must not boot")
    };
    assert!(path.ends_with("usr/bin/qemu-system-x86_64"));
    assert!(detail.contains("status 1") && detail.contains("kernel"), "{detail}");
}

/// A program that answers like QEMU when asked for its devices and does as told otherwise.
fn pretender(folder: &Path, text: &str) -> Engine {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("pretender");
    let text = format!("#!/bin/sh\ncase \"$*\" in *'-device help') echo 'name \"vhost-user-vsock-device\"'; exit 0;; esac\n{text}\n");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Engine::discover(&Discovery { chosen: Some(path), path: None, setup: None, answers: None }).unwrap()
}

#[test]
fn a_qemu_that_ends_at_once_is_told_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let engine = pretender(folder.path(), "echo 'no memory for you' >&2; exit 3");
    let Err(LaunchError::DiedAtStart { detail, .. }) = engine.launch(spec("hang")) else { panic!("it ended") };
    assert!(detail.contains("status 3") && detail.contains("no memory for you"), "{detail}");
}

#[test]
fn a_qemu_that_cannot_be_executed_any_more_is_told_by_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let engine = pretender(folder.path(), "");
    std::fs::remove_file(folder.path().join("pretender")).unwrap();
    let Err(error @ LaunchError::Spawn { .. }) = engine.launch(spec("hang")) else { panic!("there is no such file") };
    assert!(error.to_string().contains("pretender"), "{error}");
}

#[test]
fn a_qemu_without_the_nsm_device_refuses_an_nsm_socket() {
    let folder = tempfile::tempdir().unwrap();
    let engine = pretender(folder.path(), "exit 1");
    assert!(!engine.has_nsm_device());
    let (socket, _other_end) = UnixStream::pair().unwrap();
    let refused = engine.launch(VmSpec { nsm: Some(socket.into()), ..spec("hang") });
    assert!(matches!(refused, Err(LaunchError::NoNsmDevice(_))));
}

#[test]
fn specifications_that_cannot_be_are_refused_before_anything_starts() {
    let file = memory(256);
    let launch = |memory: Vec<FileRange>, vcpus: u32, cmdline: &[u8]| {
        let error = engine().launch(VmSpec { memory, vcpus, cmdline: cmdline.to_vec(), ..spec("hang") }).unwrap_err();
        assert!(matches!(error, LaunchError::Spec(_)), "{error:?}");
    };
    launch(Vec::new(), 1, b"");
    launch(vec![range(&file, 0, 130), range(&file, 128, 128)], 1, b"");
    launch(vec![range(&file, 128, 130)], 1, b"");
    launch((0..129).map(|_| range(&file, 0, 2)).collect(), 1, b"");
    launch(vec![FileRange { size: MIB, ..range(&file, 0, 2) }], 1, b"");
    launch(vec![FileRange { offset: 100, ..range(&file, 0, 2) }], 1, b"");
    launch(vec![range(&file, 0, 256)], 0, b"");
    launch(vec![range(&file, 0, 256)], 256, b"");
    launch(vec![range(&file, 0, 256)], 1, b"a\0b");
    launch(vec![range(&file, 0, 256)], 1, &[b'a'; 2040]);
}

#[test]
fn an_engine_without_a_vm_runs_until_stopped() {
    let mut vm = Engine::none().launch(VmSpec { kernel: memfd_of(b"any bytes"), initrd: None, ..spec("") }).unwrap();
    assert!(vm.take_console().is_none() && vm.report().is_none() && vm.pid().is_none());
    vm.stopper().stop();
    assert_eq!(vm.wait().reason, ExitReason::Stopped);
}
