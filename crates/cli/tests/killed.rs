//! QEMU, enclave processes, owners and consoles that die at any time, and what an ordinary user can do, with the real program.
//!
//! Whoever is killed: everybody concerned says so, and nothing is left. Most cases need `cargo xtask setup` and `cargo xtask guest`.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::{
        fs::{PermissionsExt, chown},
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{
    finish,
    processes::{children, command_line, descendants, describe, eventually, files, has_socket, is_alive, kill, stat},
    run, text,
    user::{BACKGROUND, FOREGROUND, NOT_WAITING, User, assert_failure, executable, qemu_in_shell, shell},
};
use nitroxide_testkit::{Setup, images::ImageSpec};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

/// Only ends hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// The traditional user without rights, and its group.
const NOBODY: u32 = 65_534;

/// A command, and what it goes on to say on standard error.
struct Saying {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Saying {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr }
    }

    /// `wait` for the enclave in the background, once it waits.
    fn wait(user: &User) -> Self {
        let mut waiting = Self::start(user.nitroxide().args(["wait", "hello"]));
        waiting.line();
        // It says that it waits just before it does.
        eventually("`wait` has connected", || has_socket(waiting.child.id()));
        waiting
    }

    /// The next line.
    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.stderr.read_line(&mut line).unwrap() > 0, "ended before it said more");
        line
    }

    /// Waits for its end.
    fn finish(mut self) -> Output {
        let mut stderr = Vec::new();
        self.stderr.read_to_end(&mut stderr).unwrap();
        Output { stderr, ..self.child.wait_with_output().unwrap() }
    }
}

/// An enclave that boots, and whom it consists of.
struct Booting {
    /// The command that was started.
    front: Saying,
    /// `run`, or the background owner.
    owner: u32,
    enclave_process: u32,
    qemu: u32,
    family: BTreeSet<u32>,
}

impl Booting {
    /// Starts it with a command and waits until its machine runs.
    fn start(user: &User, image: &Path, words: &[&str]) -> Self {
        let mut front = Saying::start(user.nitroxide().args(words).arg(image));
        if words[0] == "run" {
            while !front.line().contains("runs with CID") {}
        }
        let deadline = Instant::now() + PATIENCE;
        let running = loop {
            let enclaves = user.enclaves();
            if let Some(running) = enclaves.into_iter().find(|enclave| enclave["State"] == "RUNNING") {
                break running;
            }
            assert!(Instant::now() < deadline, "the enclave does not run");
        };
        if words == NOT_WAITING {
            // From here on the background owner is alone with it.
            assert!(front.child.wait().unwrap().success());
        }
        let enclave_process = u32::try_from(running["ProcessID"].as_u64().unwrap()).unwrap();
        let (_, owner) = stat(enclave_process).unwrap();
        let qemu = children(enclave_process).into_iter().find(|child| command_line(*child).contains("qemu-system")).unwrap();
        let family = descendants(owner);
        assert!(family.contains(&qemu) && family.contains(&enclave_process));
        Self { front, owner, enclave_process, qemu, family }
    }

    /// Waits for the command, and until nothing of the enclave is left.
    fn finish(self, user: &User) -> Output {
        let output = self.front.finish();
        user.recovers(&self.family);
        output
    }
}

/// A user with the sample image, and the background enclave's command.
fn with_hello() -> (User, PathBuf) {
    let user = User::new();
    let image = user.path("hello.eif");
    ImageSpec::hello().build(&image);
    (user, image)
}

#[test]
fn when_qemu_is_killed_run_run_enclave_and_wait_say_so() {
    let (user, image) = with_hello();
    let booting = Booting::start(&user, &image, FOREGROUND);
    kill(booting.qemu);
    // The console may have said something before.
    let output = Output { stdout: Vec::new(), ..booting.finish(&user) };
    assert_failure(&output, 36, &["virtual machine failed", "killed by signal 9"], "run");

    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.qemu);
    assert_failure(&booting.finish(&user), 36, &["ended before it had booted", "killed by signal 9"], "run-enclave");

    let booting = Booting::start(&user, &image, NOT_WAITING);
    let waiting = Saying::wait(&user);
    kill(booting.qemu);
    let output = waiting.finish();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let ending: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(ending["Reason"], "engine_failed");
    assert!(ending["Detail"].as_str().unwrap().contains("killed by signal 9"), "{ending}");
    assert!(booting.finish(&user).status.success());
}

#[test]
fn when_the_enclave_process_is_killed_everybody_says_so_and_all_of_it_ends() {
    let (user, image) = with_hello();
    let booting = Booting::start(&user, &image, FOREGROUND);
    kill(booting.enclave_process);
    let output = Output { stdout: Vec::new(), ..booting.finish(&user) };
    assert_failure(&output, 39, &["The enclave's process ended unexpectedly", "signal: 9"], "run");

    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.enclave_process);
    assert_failure(&booting.finish(&user), 36, &["ended"], "run-enclave");

    let booting = Booting::start(&user, &image, NOT_WAITING);
    let waiting = Saying::wait(&user);
    kill(booting.enclave_process);
    assert_failure(&waiting.finish(), 39, &["The enclave has ended"], "wait");
    assert!(booting.finish(&user).status.success());
}

#[test]
fn when_an_owner_is_killed_its_enclave_ends_by_itself() {
    let (user, image) = with_hello();
    let booting = Booting::start(&user, &image, FOREGROUND);
    assert_eq!(booting.owner, booting.front.child.id());
    kill(booting.owner);
    assert_eq!(booting.finish(&user).status.signal(), Some(9));

    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.owner);
    assert_failure(
        &booting.finish(&user),
        39,
        &["The background process ended before the enclave was started", "signal: 9"],
        "run-enclave",
    );

    let booting = Booting::start(&user, &image, NOT_WAITING);
    kill(booting.owner);
    assert!(booting.finish(&user).status.success());

    // The front end that still waits for the heartbeat: nobody has taken the enclave over.
    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.front.child.id());
    assert_eq!(booting.finish(&user).status.signal(), Some(9));
}

#[test]
fn run_outlives_a_console_that_ends_before_its_enclave() {
    let user = User::new();
    let run_command =
        user.without_machine().args(FOREGROUND).arg(&user.image).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the enclave runs", || !user.enclaves().is_empty());
    // Without a machine the console ends at once; whoever follows it is let go after some seconds. Followed twice, `run` has been let go as well.
    for _ in 0..2 {
        assert!(run(user.without_machine().args(["logs", "--follow", "small"])).status.success());
    }
    assert_eq!(user.enclaves().len(), 1);
    kill_process(Pid::from_child(&run_command), Signal::TERM).unwrap();
    let output = run_command.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Ending the enclave"), "{}", text(&output.stderr));
    assert_eq!(files(&user.runtime()), BTreeSet::new());
}

#[test]
fn an_ordinary_user_can_do_all_of_it() {
    if !geteuid().is_root() {
        eprintln!("not tested apart: these tests run as an ordinary user anyway");
        return;
    }
    let root = fs::canonicalize(Setup::locate().root()).unwrap();
    let (user, image) = with_hello();
    let closed = root
        .ancestors()
        .chain(user.directory.path().ancestors().skip(1))
        .find(|folder| fs::metadata(folder).unwrap().permissions().mode() & 0o005 != 0o005);
    if let Some(folder) = closed {
        eprintln!("not tested: another user cannot enter {}", folder.display());
        return;
    }
    fs::set_permissions(user.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = user.path("nitroxide");
    shell("cp \"$2\" \"$1\" && chmod 755 \"$1\"", [&program, Path::new(env!("CARGO_BIN_EXE_nitroxide"))]);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).unwrap();
    let home = user.path("home");
    fs::create_dir(&home).unwrap();
    chown(&home, Some(NOBODY), Some(NOBODY)).unwrap();
    let as_nobody = |runtime: &str| {
        let mut command = Command::new(&program);
        command
            .env_clear()
            .env("NO_COLOR", "1")
            .env("NITROXIDE_DEVICE", "local")
            .env("NITROXIDE_SETUP", root.parent().unwrap())
            .env("HOME", &home);
        command.env("PATH", std::env::var_os("PATH").unwrap()).env("NITROXIDE_RUNTIME_DIR", home.join(runtime)).current_dir("/");
        command.stdin(Stdio::null()).uid(NOBODY).gid(NOBODY);
        command
    };

    let output = run(as_nobody("denied/runtime").arg("doctor"));
    assert!(output.status.code().is_some(), "{}", text(&output.stderr));
    let image_that_exits = user.path("probe.eif");
    ImageSpec::probe(&["exit", "42"]).build(&image_that_exits);
    fs::set_permissions(&image_that_exits, fs::Permissions::from_mode(0o644)).unwrap();
    let output = finish(as_nobody("runtime").arg("run").arg(&image_that_exits).stdout(Stdio::piped()));
    assert_eq!(output.status.code(), Some(42), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("exited with status 42"));
    assert_eq!(files(&home.join("runtime")), BTreeSet::new());

    // A directory that an ordinary user may not write into, which root could.
    let locked = user.path("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = as_nobody("");
    let output = run(command.env("NITROXIDE_RUNTIME_DIR", locked.join("runtime")).arg("run").arg(&image));
    assert_failure(&output, 7, &["locked", "cannot be created or written", "NITROXIDE_RUNTIME_DIR"], "locked");
    // And an image that it may not read.
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    let output = run(as_nobody("runtime").arg("run").arg(&image));
    assert_failure(&output, 19, &["hello.eif", "Permission denied"], "unreadable");
}

#[test]
fn a_signal_while_an_enclave_starts_ends_the_start_and_leaves_nothing() {
    let user = User::new();
    let image = user.path("hello.eif");
    ImageSpec::hello().build(&image);
    // Answers like QEMU, but never runs anything: a start that takes for ever.
    let asked = "case \"$*\" in *'-device help'*)";
    let stuck = executable(&user.path("stuck"), &format!("{asked} exec {} \"$@\";; esac\nexec sleep 1000", qemu_in_shell()));
    // A start in the background ends with the command that the user sees.
    let mut front = user.nitroxide().env("NITROXIDE_QEMU", &stuck).args(BACKGROUND).arg(&image).spawn().unwrap();
    eventually("the emulator is started", || {
        user.processes().into_iter().flat_map(descendants).any(|pid| command_line(pid).contains("sleep 1000"))
    });
    let family: BTreeSet<u32> = user.processes().into_iter().flat_map(descendants).collect();
    kill_process(Pid::from_child(&front), Signal::INT).unwrap();
    front.wait().unwrap();
    eventually("the emulator has ended", || !family.iter().any(|pid| is_alive(*pid)));
    eventually("no process is left", || user.processes().is_empty());
    assert_eq!(files(&user.runtime()), BTreeSet::new());
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let child = user
            .nitroxide()
            .env("NITROXIDE_QEMU", &stuck)
            .arg("run")
            .arg(&image)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("the emulator is started", || descendants(child.id()).iter().any(|pid| command_line(*pid).contains("sleep 1000")));
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("The start was ended"), "{}", text(&output.stderr));
        assert_eq!(user.processes(), BTreeSet::new(), "{:?}", describe(&user.processes()));
        assert_eq!(files(&user.runtime()), BTreeSet::new());
    }
}
