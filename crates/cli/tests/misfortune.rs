//! What can go wrong at a launch, with the real program: bad images, sizes, CPUs and CIDs, a QEMU that is missing or dies, a directory that cannot be used,
//! a full disk, and kill -9 of everybody concerned.
//!
//! Each failure is one clear message on standard error with its E-code, which is also the exit status, and nothing on standard output; of the
//! enclave no process, socket or file is left. The cases with a virtual machine need `cargo xtask setup` and `cargo xtask guest`.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{
    finish, nitroxide,
    processes::{all_processes, children, command_line, descendants, describe, eventually, files, has_socket, is_alive, kill, stat},
    run, small_image, text,
};
use nitroxide_testkit::{Setup, images::ImageSpec};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

/// Only ends hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// The traditional user without rights, and its group.
const NOBODY: u32 = 65_534;

/// The ways to start an enclave; the image follows.
const FOREGROUND: &[&str] = &["run"];
const BACKGROUND: &[&str] = &["run-enclave", "--eif-path"];
const NOT_WAITING: &[&str] = &["run-enclave", "--no-wait", "--eif-path"];

/// A user with a runtime directory, a cache and an image that is well-formed but cannot boot.
struct User {
    directory: tempfile::TempDir,
    image: PathBuf,
}

impl User {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = small_image(directory.path());
        Self { directory, image }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn runtime(&self) -> PathBuf {
        self.path("runtime")
    }

    fn nitroxide(&self) -> Command {
        let mut command = nitroxide();
        command
            .env("NITROXIDE_RUNTIME_DIR", self.runtime())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("NITROXIDE_DEVICE", "local")
            .env_remove("NITROXIDE_QEMU");
        command
    }

    /// Without a virtual machine: the image is not looked at once the device has it.
    fn without_machine(&self) -> Command {
        let mut command = self.nitroxide();
        command.env("NITROXIDE_ENGINE", "none");
        command
    }

    /// Starts the small image without a virtual machine.
    fn start(&self, words: &[&str]) -> Value {
        let output = run(self.without_machine().args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&self.image).args(words));
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Both ways to start an enclave fail with a code and a message that has these words, and nothing is left.
    fn both_refused(&self, image: &Path, words: &[&str], code: i32, says: &[&str]) {
        // Damage inside an image (E35) is only looked for where a machine is to boot it.
        let engines = if code == 35 { ["auto"].as_slice() } else { &["auto", "none"] };
        for engine in engines {
            for way in [FOREGROUND, BACKGROUND] {
                self.refused(self.nitroxide().env("NITROXIDE_ENGINE", engine).args(way).arg(image).args(words), code, says);
            }
        }
    }

    /// A command fails, and what there was before is what there is after it.
    fn refused(&self, command: &mut Command, code: i32, says: &[&str]) {
        let before = (files(&self.runtime()), self.processes());
        let output = run(command);
        assert_failure(&output, code, says, &format!("{command:?}"));
        let after = (files(&self.runtime()), self.processes());
        assert_eq!(after, before, "left by {command:?}: {:?}", describe(&after.1));
    }

    /// Processes that were started with this user's runtime directory.
    fn processes(&self) -> BTreeSet<u32> {
        let wanted = format!("NITROXIDE_RUNTIME_DIR={}", self.runtime().display());
        let is_ours = |pid: &u32| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == wanted.as_bytes()))
        };
        all_processes().into_iter().filter(is_ours).filter(|pid| is_alive(*pid)).collect()
    }

    /// What an ordinary command says about the enclaves, whatever happened before.
    fn enclaves(&self) -> Vec<Value> {
        let output = run(self.nitroxide().arg("describe-enclaves"));
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// After something was killed: all of its enclave ends by itself, and the next enclave works and leaves nothing, of the killed one neither.
    fn recovers(&self, family: &BTreeSet<u32>) {
        eventually(&format!("{family:?} are gone: {:?}", describe(family)), || !family.iter().any(|pid| is_alive(*pid)));
        eventually("no process is left", || self.processes().is_empty());
        assert_eq!(self.enclaves(), [] as [Value; 0]);
        let next = self.start(&["--enclave-name", "next"]);
        assert_eq!(next["EnclaveName"], "next");
        assert!(run(self.without_machine().args(["terminate-enclave", "--all"])).status.success());
        eventually("no process is left", || self.processes().is_empty());
        assert_eq!(files(&self.runtime()), BTreeSet::new(), "not swept");
    }
}

fn assert_failure(output: &Output, code: i32, says: &[&str], what: &str) {
    let complaint = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}: {:?} {complaint}", output.status.signal());
    assert_eq!(text(&output.stdout), "", "{what}");
    // Messages are wrapped for terminals only; their own line breaks are not looked at.
    let words = complaint.split_whitespace().filter(|word| *word != "│").collect::<Vec<_>>().join(" ");
    assert!(words.contains(&format!("[E{code:02}]")), "{what}: {complaint}");
    for said in says {
        assert!(words.contains(said), "{what}: no {said:?} in {complaint}");
    }
    assert!(!complaint.contains("panicked at"), "{what}: {complaint}");
}

/// Makes a script, or a copy of a program. Another process writes it: of a file that we had open, another thread's new child could still have a
/// descriptor, and then it cannot be executed.
fn executable(path: &Path, script: &str) -> PathBuf {
    shell("printf '%s\n' \"$2\" > \"$1\" && chmod 755 \"$1\"", [path, Path::new(&format!("#!/bin/sh\n{script}"))]);
    path.to_owned()
}

fn shell(words: &str, arguments: [&Path; 2]) {
    assert!(Command::new("sh").args(["-c", words, "sh"]).args(arguments).status().unwrap().success());
}

/// A shell's words that run the unpacked QEMU.
fn qemu_in_shell() -> String {
    let qemu = Setup::locate().qemu();
    [qemu.get_program()].into_iter().chain(qemu.get_args()).fold(String::new(), |mut line, word| {
        let _ = write!(line, "'{}' ", word.to_str().unwrap());
        line
    })
}

#[test]
fn damaged_images_are_refused_wherever_the_damage_is() {
    let user = User::new();
    let whole = fs::read(&user.image).unwrap();
    let kernel = whole.windows(5000).position(|window| window.iter().all(|byte| *byte == 1)).unwrap();
    let damaged = user.path("damaged.eif");
    for length in [0, 1, 4, 100, 547, 548, 555, 560, kernel + 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&damaged, &whole[..length]).unwrap();
        user.both_refused(&damaged, &[], 35, &["damaged.eif"]);
    }
    // Magic, version, flags, default memory and CPUs, number of sections, an offset, a size, unused, the checksum itself, a section's header, payloads.
    for at in [0, 3, 5, 7, 15, 16, 27, 35, 291, 541, 544, 547, 549, 559, kernel, kernel + 4999, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&damaged, &bytes).unwrap();
        user.both_refused(&damaged, &[], 35, &["damaged.eif"]);
    }
}

#[test]
fn what_is_no_image_or_too_large_is_refused() {
    let user = User::new();
    user.both_refused(&user.path("missing.eif"), &[], 19, &["missing.eif", "No such file"]);
    user.both_refused(user.directory.path(), &[], 19, &["is not a file"]);
    user.both_refused(Path::new("/dev/zero"), &[], 19, &["/dev/zero", "is not a file"]);
    user.both_refused(Path::new("/etc/passwd"), &[], 35, &["/etc/passwd is not an enclave image"]);
    let pipe = user.path("pipe.eif");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    user.both_refused(&pipe, &[], 19, &["is not a file"]);
    let looped = user.path("loop.eif");
    symlink(&looped, &looped).unwrap();
    user.both_refused(&looped, &[], 19, &["loop.eif"]);

    let large = user.path("large.eif");
    nitroxide_eif::Builder::new(vec![1_u8; 60 << 20], "console=ttyS0").write_file(&large).unwrap();
    user.both_refused(&large, &["--memory", "64"], 26, &["64 MiB is too little: the image does not fit", "--memory"]);
    // Bytes behind the image do not belong to it and are not looked at, however many they are.
    fs::File::options().append(true).open(&user.image).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(user.start(&[])["MemoryMiB"], 64);
    assert!(run(user.without_machine().args(["terminate-enclave", "small"])).status.success());
}

#[test]
fn memory_cpus_and_cids_out_of_range_or_taken_are_refused() {
    let user = User::new();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--memory", "63"], 26, &["63 MiB is too little", "64"]),
        (&["--memory", "2"], 26, &["64"]),
        (&["--memory", "0"], 3, &["an enclave without memory is not possible"]),
        (&["--memory", "-64"], 3, &[]),
        (&["--memory", "1.5G"], 3, &["not a memory size"]),
        // More than can be counted, than can be addressed, and than the machine has.
        (&["--memory", "99999999999999999999"], 3, &["memory size"]),
        (&["--memory", "17592186044415"], 3, &["17592186044415 MiB is more memory than an enclave can have"]),
        (&["--memory", "4294967296"], 27, &["4294967296 MiB of memory are not to be had"]),
        (&["--memory", "200T"], 27, &["MiB of memory are not to be had"]),
        (&["--memory", "100T"], 27, &["MiB of memory are not to be had: this machine has"]),
        (&["--cpu-count", "0"], 3, &["0 is not in 1.."]),
        (&["--cpu-count", "64"], 22, &["64 vCPUs were asked for, but the pool has only 63 left"]),
        (&["--cpu-count", "4294967295"], 22, &["only 63 left"]),
        (&["--cpu-count", "4294967296"], 3, &["4294967296"]),
        (&["--cpu-ids", "0"], 21, &["CPU 0 stays with the parent"]),
        (&["--cpu-ids", "64"], 21, &["CPU 64 is not in the pool"]),
        (&["--cpu-ids", "4294967295"], 21, &["CPU 4294967295 is not in the pool"]),
        (&["--cpu-ids", "4294967296"], 23, &["`4294967296` in --cpu-ids is not a CPU number"]),
        (&["--cpu-ids", "5", "5"], 23, &["CPU 5 stands twice"]),
        (&["--enclave-cid", "1"], 3, &["1 cannot be an enclave's CID", "4 to 4294967294"]),
        (&["--enclave-cid", "2"], 3, &["2 cannot be an enclave's CID"]),
        (&["--enclave-cid", "3"], 3, &["3 cannot be an enclave's CID", "the parent"]),
        (&["--enclave-cid", "4294967295"], 3, &["4294967295 cannot be an enclave's CID"]),
        (&["--enclave-cid", "4294967296"], 3, &["4294967296"]),
    ];
    for (words, code, says) in cases {
        user.both_refused(&user.image, words, *code, says);
    }

    user.start(&["--cpu-ids", "7", "--enclave-cid", "77"]);
    for (words, code, says) in [
        (["--cpu-ids", "7"], 21, "CPU 7 is not in the pool, or belongs to another enclave"),
        (["--cpu-count", "63"], 22, "63 vCPUs were asked for"),
        (["--enclave-cid", "77"], 29, "CID 77 is in use"),
    ] {
        for way in [FOREGROUND, BACKGROUND] {
            user.refused(user.without_machine().args(way).arg(&user.image).args(words), code, &[says]);
        }
    }
    assert!(run(user.without_machine().args(["terminate-enclave", "--all"])).status.success());
    assert_eq!(files(&user.runtime()), BTreeSet::new());
}

#[test]
fn a_qemu_that_is_missing_broken_or_dies_at_its_start_is_named() {
    let user = User::new();
    let image = user.path("hello.eif");
    ImageSpec::hello().build(&image);
    let plain = user.path("plain-file");
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    let real = qemu_in_shell();
    let asked = "case \"$*\" in *'-device help'*)";
    let dies = executable(&user.path("dies"), &format!("{asked} exec {real} \"$@\";; esac\necho 'out of luck' >&2\nexit 1"));
    let quiet = executable(&user.path("quiet"), &format!("{asked} exec {real} \"$@\";; esac\nexit 0"));
    let no_program = user.path("no-program");
    shell("printf '#!%s\n' \"$2\" > \"$1\" && chmod 755 \"$1\"", [&no_program, Path::new("/nonexistent/shell")]);
    for (qemu, says) in [
        (Path::new("/nonexistent/qemu"), ["NITROXIDE_QEMU names /nonexistent/qemu", "No such file"]),
        (&plain, ["NITROXIDE_QEMU names", "plain-file, which cannot be executed"]),
        (user.directory.path(), ["NITROXIDE_QEMU names", "it is not a file"]),
        (Path::new("/bin/false"), ["does not answer like QEMU", "exit status: 1"]),
        (Path::new("/bin/true"), ["does not answer like QEMU", "it lists no devices"]),
        (&no_program, ["no-program does not answer like QEMU", "No such file"]),
        (&dies, ["dies ended before its guest ran. QEMU ended with status 1.", "out of luck"]),
        (&quiet, ["quiet ended before its guest ran.", "It wrote no message"]),
    ] {
        for way in [FOREGROUND, BACKGROUND] {
            user.refused(user.nitroxide().env("NITROXIDE_QEMU", qemu).args(way).arg(&image), 36, &says);
        }
    }
    // None at all: neither chosen, nor in the path, nor unpacked.
    let mut command = user.nitroxide();
    command.env("NITROXIDE_SETUP", user.path("no-setup")).env("PATH", "/nonexistent");
    user.refused(command.arg("run").arg(&image), 36, &["No QEMU found", "NITROXIDE_QEMU", "cargo xtask setup"]);
}

#[test]
fn a_runtime_directory_that_cannot_be_used_is_named() {
    let user = User::new();
    let runtime = user.runtime();
    let refused = |says: &[&str]| {
        for way in [FOREGROUND, BACKGROUND] {
            user.refused(user.without_machine().args(way).arg(&user.image), 7, says);
        }
        let name = says[0];
        user.refused(user.without_machine().arg("describe-enclaves"), 7, &[name]);
    };
    fs::write(&runtime, "a file").unwrap();
    refused(&["runtime", "directory"]);
    assert_eq!(fs::read(&runtime).unwrap(), b"a file");
    fs::remove_file(&runtime).unwrap();
    symlink(user.directory.path(), &runtime).unwrap();
    refused(&["runtime", "directory"]);
    fs::remove_file(&runtime).unwrap();
    fs::create_dir(&runtime).unwrap();
    for mode in [0o500, 0o755, 0o770, 0o000] {
        fs::set_permissions(&runtime, fs::Permissions::from_mode(mode)).unwrap();
        refused(&["runtime"]);
        assert_eq!(fs::metadata(&runtime).unwrap().permissions().mode() & 0o7777, mode, "somebody else's mode is not changed");
    }
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o700)).unwrap();
    if geteuid().is_root() {
        chown(&runtime, Some(NOBODY), Some(NOBODY)).unwrap();
        refused(&["runtime", "65534"]);
    } else {
        eprintln!("not tested: only root can make a directory of another user");
    }
    user.refused(user.without_machine().env("NITROXIDE_RUNTIME_DIR", "relative").arg("run").arg(&user.image), 7, &["relative", "absolute"]);
    user.refused(
        user.without_machine().env("NITROXIDE_RUNTIME_DIR", "/proc/nitroxide").arg("run").arg(&user.image),
        7,
        &["/proc/nitroxide"],
    );
    // A path too long for a socket's address is no obstacle.
    let long = user.path(&"long/".repeat(60));
    fs::create_dir_all(&long).unwrap();
    let mut command = user.without_machine();
    command.env("NITROXIDE_RUNTIME_DIR", long.join("runtime"));
    let output = run(command.args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&user.image));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut command = user.without_machine();
    command.env("NITROXIDE_RUNTIME_DIR", long.join("runtime"));
    assert!(run(command.args(["terminate-enclave", "--all"])).status.success());
    assert_eq!(files(&long), BTreeSet::new());
}

/// What the next test does on a disk of a given size; not a test by itself.
#[test]
fn helper_on_a_small_disk() {
    let Some(place) = std::env::var_os("MISFORTUNE_DISK").map(PathBuf::from) else { return };
    let mut user = User::new();
    user.image = small_image(user.directory.path());
    let at = |disk: &str| {
        let mut command = user.without_machine();
        command.env("NITROXIDE_RUNTIME_DIR", place.join(disk).join("world"));
        command
    };
    let (mut refused, mut started) = (0, 0);
    for inodes in 2..24 {
        let disk = inodes.to_string();
        let output = run(at(&disk).args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&user.image));
        if output.status.success() {
            started += 1;
            let output = run(at(&disk).args(["terminate-enclave", "--all"]));
            assert!(output.status.success(), "{disk}: {}", text(&output.stderr));
        } else {
            refused += 1;
            let code = output.status.code().unwrap();
            assert!([7, 29, 36].contains(&code), "{disk}: {} {}", code, text(&output.stderr));
            assert_failure(&output, code, &["pace is left"], &disk);
        }
        assert_eq!(files(&place.join(&disk)), BTreeSet::new(), "{disk}");
    }
    assert!(refused > 10 && started > 0, "{refused} {started}");
    let output = run(at("read-only").arg("run").arg(&user.image));
    assert_failure(&output, 7, &["read-only", "writable"], "read-only");
}

#[test]
fn a_full_or_read_only_disk_is_told_and_nothing_is_left_half_made() {
    let directory = tempfile::tempdir().unwrap();
    let mount = "cd \"$MISFORTUNE_DISK\" && for n in $(seq 2 23); do mkdir $n && mount -t tmpfs -o mode=700,nr_inodes=$n none $n || exit 1; done \
         && mkdir read-only && mount -t tmpfs -o ro none read-only";
    let in_namespace = |then: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &format!("{mount} && {then}"), "sh"]);
        command.arg(std::env::current_exe().unwrap()).env("MISFORTUNE_DISK", directory.path());
        command
    };
    if !in_namespace("true").status().is_ok_and(|status| status.success()) {
        eprintln!("not tested: this machine does not let a user mount in a namespace of its own");
        return;
    }
    for folder in fs::read_dir(directory.path()).unwrap().flatten() {
        fs::remove_dir(folder.path()).unwrap();
    }
    let output = in_namespace("\"$1\" --exact helper_on_a_small_disk --nocapture").output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "{}", text(&output.stdout));
}

/// An enclave that boots, and whom it consists of.
struct Booting {
    /// The command that was started.
    front: Child,
    /// What it says on standard error, to be read to its end.
    stderr: BufReader<std::process::ChildStderr>,
    /// `run`, or the background owner.
    owner: u32,
    enclave_process: u32,
    qemu: u32,
    family: BTreeSet<u32>,
}

impl Booting {
    /// Starts it with a command and waits until its machine runs.
    fn start(user: &User, image: &Path, words: &[&str]) -> Self {
        let mut front = user.nitroxide().args(words).arg(image).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(front.stderr.take().unwrap());
        if words[0] == "run" {
            let mut line = String::new();
            while !line.contains("runs with CID") {
                line.clear();
                assert!(stderr.read_line(&mut line).unwrap() > 0, "ended before it ran");
            }
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
            assert!(front.wait().unwrap().success());
        }
        let enclave_process = u32::try_from(running["ProcessID"].as_u64().unwrap()).unwrap();
        let (_, owner) = stat(enclave_process).unwrap();
        let qemu = children(enclave_process).into_iter().find(|child| command_line(*child).contains("qemu-system")).unwrap();
        let family = descendants(owner);
        assert!(family.contains(&qemu) && family.contains(&enclave_process));
        Self { front, stderr, owner, enclave_process, qemu, family }
    }

    /// Waits for the command that was started.
    fn finish(mut self) -> Output {
        let mut stderr = Vec::new();
        self.stderr.read_to_end(&mut stderr).unwrap();
        let output = self.front.wait_with_output().unwrap();
        Output { stderr, ..output }
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
    let family = booting.family.clone();
    let output = booting.finish();
    // The console may have said something before.
    assert_failure(&Output { stdout: Vec::new(), ..output }, 36, &["virtual machine failed", "killed by signal 9"], "run");
    user.recovers(&family);

    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.qemu);
    let family = booting.family.clone();
    assert_failure(&booting.finish(), 36, &["ended before it had booted", "killed by signal 9"], "run-enclave");
    user.recovers(&family);

    let booting = Booting::start(&user, &image, NOT_WAITING);
    let mut waiting = user.nitroxide().args(["wait", "hello"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut waiting_says = BufReader::new(waiting.stderr.take().unwrap());
    waiting_says.read_line(&mut String::new()).unwrap();
    // It says when it waits, just before it does.
    eventually("`wait` has connected", || has_socket(waiting.id()));
    kill(booting.qemu);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let ending: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(ending["Reason"], "engine_failed");
    assert!(ending["Detail"].as_str().unwrap().contains("killed by signal 9"), "{ending}");
    user.recovers(&booting.family.clone());
    assert!(booting.finish().status.success());
}

#[test]
fn when_the_enclave_process_is_killed_everybody_says_so_and_all_of_it_ends() {
    let (user, image) = with_hello();
    let booting = Booting::start(&user, &image, FOREGROUND);
    kill(booting.enclave_process);
    let family = booting.family.clone();
    let output = booting.finish();
    assert_failure(&Output { stdout: Vec::new(), ..output }, 39, &["The enclave's process ended unexpectedly", "signal: 9"], "run");
    user.recovers(&family);

    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.enclave_process);
    let family = booting.family.clone();
    assert_failure(&booting.finish(), 36, &["ended"], "run-enclave");
    user.recovers(&family);

    let booting = Booting::start(&user, &image, NOT_WAITING);
    let mut waiting = user.nitroxide().args(["wait", "hello"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut waiting_says = BufReader::new(waiting.stderr.take().unwrap());
    waiting_says.read_line(&mut said).unwrap();
    kill(booting.enclave_process);
    waiting_says.read_to_string(&mut said).unwrap();
    let output = Output { stderr: said.into_bytes(), ..waiting.wait_with_output().unwrap() };
    assert_failure(&output, 39, &["The enclave has ended"], "wait");
    user.recovers(&booting.family.clone());
    assert!(booting.finish().status.success());
}

#[test]
fn when_an_owner_is_killed_its_enclave_ends_by_itself() {
    let (user, image) = with_hello();
    let booting = Booting::start(&user, &image, FOREGROUND);
    assert_eq!(booting.owner, booting.front.id());
    kill(booting.owner);
    let family = booting.family.clone();
    assert_eq!(booting.finish().status.signal(), Some(9));
    user.recovers(&family);

    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.owner);
    let family = booting.family.clone();
    assert_failure(&booting.finish(), 39, &["The background process ended before the enclave was started", "signal: 9"], "run-enclave");
    user.recovers(&family);

    let booting = Booting::start(&user, &image, NOT_WAITING);
    kill(booting.owner);
    user.recovers(&booting.family.clone());
    assert!(booting.finish().status.success());

    // The front end that still waits for the heartbeat: nobody has taken the enclave over.
    let booting = Booting::start(&user, &image, BACKGROUND);
    kill(booting.front.id());
    let family = booting.family.clone();
    assert_eq!(booting.finish().status.signal(), Some(9));
    user.recovers(&family);
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
