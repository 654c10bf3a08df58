//! A user of the program: runtime directory, image, commands, and what has to hold of what is left.
#![allow(
    dead_code,
    clippy::unwrap_used,
    missing_docs,
    reason = "each test program uses a part of it, and the helpers of tests are tests too"
)]

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nitroxide_testkit::Setup;
use serde_json::Value;

use super::{
    nitroxide,
    processes::{all_processes, describe, eventually, files, is_alive},
    run, small_image, text,
};

/// The ways to start an enclave; the image follows.
pub const FOREGROUND: &[&str] = &["run"];
pub const BACKGROUND: &[&str] = &["run-enclave", "--eif-path"];
pub const NOT_WAITING: &[&str] = &["run-enclave", "--no-wait", "--eif-path"];

/// A user with a runtime directory, a cache and an image that is well-formed but cannot boot.
pub struct User {
    pub directory: tempfile::TempDir,
    pub image: PathBuf,
}

impl User {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = small_image(directory.path());
        Self { directory, image }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn runtime(&self) -> PathBuf {
        self.path("runtime")
    }

    pub fn nitroxide(&self) -> Command {
        let mut command = nitroxide();
        command
            .env("NITROXIDE_RUNTIME_DIR", self.runtime())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("NITROXIDE_DEVICE", "local")
            .env_remove("NITROXIDE_QEMU");
        command
    }

    /// Without a virtual machine: the image is not looked at once the device has it.
    pub fn without_machine(&self) -> Command {
        let mut command = self.nitroxide();
        command.env("NITROXIDE_ENGINE", "none");
        command
    }

    /// Starts the small image without a virtual machine.
    pub fn start(&self, words: &[&str]) -> Value {
        let output = run(self.without_machine().args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&self.image).args(words));
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Both ways to start an enclave fail with a code and a message that has these words, and nothing is left.
    pub fn both_refused(&self, image: &Path, words: &[&str], code: i32, says: &[&str]) {
        // Damage inside an image (E35) is only looked for where a machine is to boot it.
        let engines = if code == 35 { ["auto"].as_slice() } else { &["auto", "none"] };
        for engine in engines {
            for way in [FOREGROUND, BACKGROUND] {
                self.refused(self.nitroxide().env("NITROXIDE_ENGINE", engine).args(way).arg(image).args(words), code, says);
            }
        }
    }

    /// A command fails, and what there was before is what there is after it.
    pub fn refused(&self, command: &mut Command, code: i32, says: &[&str]) {
        let before = (files(&self.runtime()), self.processes());
        let output = run(command);
        assert_failure(&output, code, says, &format!("{command:?}"));
        let after = (files(&self.runtime()), self.processes());
        assert_eq!(after, before, "left by {command:?}: {:?}", describe(&after.1));
    }

    /// Processes that were started with this user's runtime directory.
    pub fn processes(&self) -> BTreeSet<u32> {
        let wanted = format!("NITROXIDE_RUNTIME_DIR={}", self.runtime().display());
        let is_ours = |pid: &u32| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == wanted.as_bytes()))
        };
        all_processes().into_iter().filter(is_ours).filter(|pid| is_alive(*pid)).collect()
    }

    /// What an ordinary command says about the enclaves, whatever happened before.
    pub fn enclaves(&self) -> Vec<Value> {
        let output = run(self.nitroxide().arg("describe-enclaves"));
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// After something was killed: all of its enclave ends by itself, and the next enclave works and leaves nothing, of the killed one neither.
    pub fn recovers(&self, family: &BTreeSet<u32>) {
        eventually(&format!("{family:?} are gone: {:?}", describe(family)), || !family.iter().any(|pid| is_alive(*pid)));
        eventually("no process is left", || self.processes().is_empty());
        assert_eq!(self.enclaves(), [] as [Value; 0]);
        let next = self.start(&["--enclave-name", "next"]);
        assert_eq!(next["EnclaveName"], "next");
        assert!(run(self.without_machine().args(["terminate-enclave", "--all"])).status.success());
        eventually("no process is left", || self.processes().is_empty());
        assert_eq!(files(&self.runtime()), BTreeSet::new(), "not swept");
    }

    /// A command that needs no virtual machine.
    pub fn say(&self, words: &[&str]) -> Output {
        run(self.without_machine().args(words))
    }

    /// Sockets that are left in the runtime directory.
    pub fn sockets(&self) -> Vec<PathBuf> {
        ["enclaves", "vsock", "vsock/0", "vsock/3"]
            .iter()
            .flat_map(|place| fs::read_dir(self.runtime().join(place)).into_iter().flatten())
            .map(|entry| entry.unwrap().path())
            .filter(|path| !path.is_dir())
            .collect()
    }

    /// Ends all enclaves.
    pub fn ends_with_nothing_left(self) {
        let output = self.say(&["terminate-enclave", "--all"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(self.enclaves(), Vec::<Value>::new());
        assert_eq!(self.sockets(), Vec::<PathBuf>::new());
    }
}

pub fn assert_failure(output: &Output, code: i32, says: &[&str], what: &str) {
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
pub fn executable(path: &Path, script: &str) -> PathBuf {
    shell("printf '%s\n' \"$2\" > \"$1\" && chmod 755 \"$1\"", [path, Path::new(&format!("#!/bin/sh\n{script}"))]);
    path.to_owned()
}

pub fn shell(words: &str, arguments: [&Path; 2]) {
    assert!(Command::new("sh").args(["-c", words, "sh"]).args(arguments).status().unwrap().success());
}

/// A shell's words that run the unpacked QEMU.
pub fn qemu_in_shell() -> String {
    let qemu = Setup::locate().qemu();
    [qemu.get_program()].into_iter().chain(qemu.get_args()).fold(String::new(), |mut line, word| {
        let _ = write!(line, "'{}' ", word.to_str().unwrap());
        line
    })
}
