//! `nitroxide device` without a virtual machine: when it is ready, where it may listen, how it ends and what is left then, and what it refuses.
//!
//! What enclaves of a virtual machine do is tested with one (crates/testkit, "parent VM").

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use common::{
    finish,
    processes::{eventually, files},
    run, text,
    user::{User, assert_failure, executable, qemu_in_shell},
};
use nitroxide_testkit::Setup;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A running device.
struct Device {
    child: Child,
    ready: Value,
    socket: PathBuf,
}

impl Device {
    /// Starts it and waits until it is ready.
    fn start(user: &User, words: &[&str]) -> Self {
        let socket = user.path("ne.sock");
        // Tests that run under nohup have SIGHUP ignored, and what they start inherits that.
        let mut command = wrapped("env --default-signal=HUP", &command(user, &socket));
        command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            panic!("not ready: {}", text(&child.wait_with_output().unwrap().stderr));
        }
        Self { child, ready: serde_json::from_str(&line).unwrap(), socket }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.ready[key].as_str().unwrap().into()
    }

    /// Ends it with a signal: its exit status and what it has said.
    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Nothing to end in most cases.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(user: &User, socket: &Path) -> Command {
    let mut command = user.without_machine();
    command.arg("device").arg("--socket").arg(socket);
    command
}

/// A command by another program, which becomes it.
fn wrapped(words: &str, plain: &Command) -> Command {
    let mut words = words.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command.arg(plain.get_program()).args(plain.get_args()).envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// What is left of devices: files of the runtime directory and worlds in it.
fn left(user: &User) -> (BTreeSet<PathBuf>, usize) {
    (files(&user.runtime()), fs::read_dir(user.runtime().join("parents")).map_or(0, Iterator::count))
}

#[test]
fn it_is_ready_when_both_sockets_listen_and_signals_end_it_with_nothing_left() {
    let user = User::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let device = Device::start(&user, &[]);
        assert_eq!(device.path("Socket"), device.socket);
        assert!(device.path("Socket").is_absolute());
        assert_eq!(device.path("VsockSocket"), user.path("ne.sock.vsock"));
        for socket in ["Socket", "VsockSocket"] {
            UnixStream::connect(device.path(socket)).unwrap();
        }
        // The enclaves of the VM can be looked at by its directory, and are not among the user's own.
        let world = device.path("RuntimeDirectory");
        assert!(world.starts_with(user.runtime()) && world.is_dir(), "{world:?}");
        assert_eq!(text(&run(user.without_machine().env("NITROXIDE_RUNTIME_DIR", &world).arg("describe-enclaves")).stdout), "[]\n");
        // Another command does not take the directory of a running device for a dead one's.
        assert_eq!(user.enclaves(), [] as [Value; 0]);
        assert!(world.is_dir());

        let sockets = [device.path("Socket"), device.path("VsockSocket")];
        let (status, said) = device.end(signal);
        assert_eq!(status, Some(0), "{said}");
        for word in [
            "vfio-user-pci",
            "memory-backend-memfd",
            "share=on",
            "vhost-user-vsock-pci",
            "NITROXIDE_RUNTIME_DIR=",
            "describe-enclaves",
            "logs ENCLAVE",
            "console ENCLAVE",
        ] {
            assert!(said.contains(word), "{word}: {said}");
        }
        assert!(!world.exists() && !sockets.iter().any(|socket| socket.exists()), "{signal:?}");
        assert_eq!(left(&user), (BTreeSet::new(), 0));
        assert_eq!(user.processes(), BTreeSet::new());
    }
}

#[test]
fn started_with_nohup_it_outlives_its_terminal() {
    let user = User::new();
    let mut child = wrapped("nohup", &command(&user, &user.path("ne.sock")));
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::HUP).unwrap();
    // Time to end, for one that wrongly does; one that does not passes however long this takes.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(child.try_wait().unwrap(), None);
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(left(&user), (BTreeSet::new(), 0));
}

#[test]
fn a_killed_device_is_swept_by_the_next_command_and_its_sockets_are_taken_over() {
    let user = User::new();
    let device = Device::start(&user, &[]);
    let world = device.path("RuntimeDirectory");
    device.end(Signal::KILL);
    assert!(world.is_dir());
    assert!(fs::metadata(user.path("ne.sock")).unwrap().file_type().is_socket());
    eventually("no process is left", || user.processes().is_empty());
    assert_eq!(user.enclaves(), [] as [Value; 0]);
    assert_eq!(left(&user), (BTreeSet::new(), 0));

    let next = Device::start(&user, &[]);
    assert_eq!(next.end(Signal::TERM).0, Some(0));
    assert!(!user.path("ne.sock").exists() && !user.path("ne.sock.vsock").exists());
}

#[test]
fn stale_sockets_are_replaced_while_live_ones_and_other_files_are_refused() {
    let user = User::new();
    let (socket, vsock) = (user.path("ne.sock"), user.path("ne.sock.vsock"));
    drop((UnixListener::bind(&socket).unwrap(), UnixListener::bind(&vsock).unwrap()));
    let device = Device::start(&user, &[]);
    // One world is the running device's.
    let worlds = left(&user).1;
    assert_failure(&run(&mut command(&user, &socket)), 11, &["ne.sock", "in use by a running program"], "the same socket");
    let other = user.path("other.sock");
    assert_failure(&run(command(&user, &other).arg("--vsock").arg(&vsock)), 11, &["ne.sock.vsock", "in use"], "the same vsock");
    assert!(!other.exists(), "left after a refusal");
    assert_eq!(left(&user).1, worlds);
    UnixStream::connect(&socket).unwrap();
    assert_eq!(device.end(Signal::TERM).0, Some(0));

    fs::write(&socket, "precious").unwrap();
    let output = run(&mut command(&user, &socket));
    assert_ne!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("is not a socket"), "{}", text(&output.stderr));
    assert_eq!(fs::read(&socket).unwrap(), b"precious");
    assert_eq!(left(&user), (BTreeSet::new(), 0));
}

#[test]
fn what_cannot_be_is_refused_at_the_place_and_leaves_nothing() {
    let user = User::new();
    let socket = user.path("ne.sock");
    let long = user.path(&"n".repeat(120));
    let same = socket.display().to_string();
    for (path, words, code, says) in [
        (&socket, ["--fault", "start@1=-NONSENSE"].as_slice(), 3, ["--fault", "NONSENSE"].as_slice()),
        (&socket, &["--fault", "start"], 3, &["--fault", "start"]),
        (&socket, &["--max-enclaves", "0"], 3, &["0 is not in 1.."]),
        (&socket, &["--memory", "shared"], 3, &["isolated", "zero-copy"]),
        (&socket, &["--vsock", &same], 3, &["--socket and --vsock name the same path"]),
        (&user.path("missing/ne.sock"), &[], 11, &["missing/ne.sock", "No such file", "make it first"]),
        (&long, &[], 40, &["too long", "107", "shorter"]),
    ] {
        let output = run(command(&user, path).args(words));
        assert_eq!(output.status.code(), Some(code), "{words:?} {path:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "");
        for said in says {
            assert!(text(&output.stderr).contains(said), "{words:?}: no {said} in {}", text(&output.stderr));
        }
        assert_eq!(left(&user), (BTreeSet::new(), 0), "{words:?}");
        assert!(!path.exists());
    }
    assert_eq!(run(user.without_machine().arg("device")).status.code(), Some(1));
    // QEMU is given absolute paths, so a short name in a deep folder does not do.
    let deep = user.path(&"d".repeat(100));
    fs::create_dir(&deep).unwrap();
    let output = run(command(&user, Path::new("ne.sock")).current_dir(&deep));
    assert_failure(&output, 40, &["too long"], "a deep folder");
    assert_eq!(fs::read_dir(&deep).unwrap().count(), 0);
    // Who started it would wait for ever for the line that cannot be written.
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    assert_failure(&finish(command(&user, &socket).stdout(full)), 19, &["Standard output cannot be written"], "/dev/full");
    assert_eq!(left(&user), (BTreeSet::new(), 0));
    assert!(!socket.exists());
}

#[test]
fn qemu_starts_with_the_options_that_the_documentation_gives() {
    let user = User::new();
    for image in ["debian-13-genericcloud-amd64.qcow2", "seed.img"] {
        fs::File::create(user.path(image)).unwrap().set_len(1 << 20).unwrap();
    }
    for document in ["README.md", "docs/parent-vm.md"] {
        let text_of = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(document)).unwrap();
        let options = text_of.split("-accel kvm").nth(1).unwrap().split("```").next().unwrap();
        let device = Device::start(&user, &[]);
        // Any port, an empty disk that needs no format, and a machine that waits for its monitor instead of running.
        let options = options
            .replace("/tmp/ne.sock", device.socket.to_str().unwrap())
            .replace("tcp::2222-", "tcp::0-")
            .replace("qcow2,if=virtio", "qcow2,if=virtio,format=raw")
            .replace("-nographic", "-display none -serial none -monitor stdio -S");
        let script = format!("echo quit | {}-accel kvm {}", qemu_in_shell(), options.trim());
        let output = Command::new("sh").args(["-c", &script]).current_dir(user.directory.path()).output().unwrap();
        assert!(output.status.success(), "{document}: {script}\n{}", text(&output.stderr));
        assert_eq!(device.end(Signal::TERM).0, Some(0));
    }
}

#[test]
fn what_enclaves_and_the_machine_will_lack_is_said_at_the_start() {
    let user = User::new();
    let old = executable(&user.path("old-qemu"), "echo 'name \"vhost-user-vsock-device\"'; echo 'name \"vhost-user-vsock-pci\"'");
    let unpacked = Setup::locate().root().join("usr/bin/qemu-system-x86_64");
    for (qemu, says) in [
        (Path::new("/nonexistent/qemu"), ["Enclaves cannot be started"].as_slice()),
        (&old, &["no /dev/nsm", "old-qemu cannot run that virtual machine: it has no vfio-user-pci.", "QEMU 11"]),
        (&unpacked, &["A QEMU that can run that virtual machine is here: ", "ld-linux", " -L "]),
    ] {
        // The variable means "no virtual machine" otherwise, and then nothing is lacking.
        let mut child = command(&user, &user.path("ne.sock"))
            .env("NITROXIDE_ENGINE", "auto")
            .env("NITROXIDE_QEMU", qemu)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        for said in says {
            assert!(text(&output.stderr).contains(said), "{qemu:?}: no {said} in {}", text(&output.stderr));
        }
    }
}
