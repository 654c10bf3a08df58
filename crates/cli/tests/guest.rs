//! The real program with real enclaves: a distribution's kernel, our init, its own NSM and vsock drivers, in QEMU.
//!
//! Slow, so few and rich. They need `cargo xtask setup` and `cargo xtask guest`; `cargo xtask test` runs both before.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use common::{nitroxide, run, small_image, text};
use nitroxide_testkit::images::ImageSpec;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A user with a runtime directory.
struct User {
    directory: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn image(&self, spec: &ImageSpec) -> PathBuf {
        let path = self.directory.path().join(format!("{}.eif", spec.name));
        spec.build(&path);
        path
    }

    fn nitroxide(&self) -> Command {
        let mut command = nitroxide();
        command.env("NITROXIDE_RUNTIME_DIR", self.directory.path().join("runtime")).env("NITROXIDE_DEVICE", "local");
        command
    }

    fn run(&self, spec: &ImageSpec) -> Output {
        run(self.nitroxide().arg("run").arg(self.image(spec)))
    }

    fn ask(&self, cid: &Value, question: &str) -> String {
        let mut client = self
            .nitroxide()
            .args(["vsock", "connect", &cid.to_string(), "5005"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        client.stdin.take().unwrap().write_all(question.as_bytes()).unwrap();
        text(&client.wait_with_output().unwrap().stdout)
    }

    fn enclaves(&self) -> Vec<Value> {
        serde_json::from_slice(&run(self.nitroxide().arg("describe-enclaves")).stdout).unwrap()
    }
}

#[test]
fn an_enclave_in_the_background_boots_answers_and_tells_how_it_ended() {
    let user = User::new();
    let image = user.image(&ImageSpec::hello());
    let output =
        run(user.nitroxide().args(["run-enclave", "--cpu-count", "2", "--memory", "256", "--debug-mode", "--eif-path"]).arg(&image));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let started: Value = serde_json::from_slice(&output.stdout).unwrap();

    // The measurements are the image's for everybody: describe-eif, describe-enclaves, and the enclave itself, which is in debug mode.
    let described: Value = serde_json::from_slice(&run(user.nitroxide().arg("describe-eif").arg(&image)).stdout).unwrap();
    let enclaves: Vec<Value> = serde_json::from_slice(&run(user.nitroxide().args(["describe-enclaves", "--metadata"])).stdout).unwrap();
    assert_eq!(enclaves[0]["Measurements"], described["Measurements"]);
    assert_eq!(enclaves[0]["ImageName"], "hello");

    // `logs --follow` from the beginning to the end, while somebody talks to the application.
    let mut logs = user.nitroxide().args(["logs", "--follow", "hello"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(logs.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("hello: listening")));
    let cid = &started["EnclaveCID"];
    assert_eq!(user.ask(cid, "echo a b\ncid\n"), format!("a b\n{cid}\n"));
    // A document as one line of hex: COSE_Sign1 with ES384, and the nonce in it.
    let document = user.ask(cid, "attest 0123456789abcdef\n");
    assert!(document.starts_with("8444a1013822a0") && document.ends_with('\n') && document.contains("480123456789abcdef"), "{document}");
    assert_eq!(user.ask(cid, "attest 0\n"), "error: the nonce is pairs of hex digits, e.g. attest 00ff\n");
    let waiting = user.nitroxide().args(["wait", "hello"]).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(user.ask(cid, "exit 42\n"), "exiting with status 42\n");
    assert!(lines.any(|line| line.unwrap().contains("exited with status 42")));
    logs.wait().unwrap();
    // Whether `wait` came in time is not what is tested here; if it did, it knows the status.
    let output = waiting.wait_with_output().unwrap();
    if output.status.success() {
        let ending: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((ending["Reason"].as_str(), ending["ExitCode"].as_u64()), (Some("powered_off"), Some(42)));
    }
    // It is listed as long as its owner has not let go of it.
    while user.enclaves().iter().any(|enclave| enclave["State"] == "TERMINATING") {
        std::thread::yield_now();
    }
    assert!(user.enclaves().is_empty());
}

#[test]
fn run_shows_the_console_and_ends_with_the_applications_status() {
    let user = User::new();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["exit", "0"], 0, "exited with status 0"),
        (&["exit", "42"], 42, "exited with status 42"),
        (&["signal", "15"], 143, "ended by signal 15"),
        (&["panic"], 36, "Kernel panic"),
    ];
    for (words, status, printed) in cases {
        let output = user.run(&ImageSpec::probe(words));
        let (console, remarks) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(*status), "{words:?}: {remarks}\n{console}");
        assert!(console.contains(printed), "{words:?}: {console}");
        assert!(user.enclaves().is_empty());
    }
}

#[test]
fn an_images_user_directory_entrypoint_and_environment_count() {
    let user = User::new();
    let mut spec = ImageSpec::probe(&["whoami", "two words"]);
    spec.entrypoint = vec![spec.command.remove(0)];
    spec.files = vec![
        ("/etc/passwd".to_owned(), b"app:x:1000:1001:App:/home/app:/bin/sh\n".to_vec()),
        ("/etc/group".to_owned(), b"audio:x:29:app\n".to_vec()),
        ("/srv/data/file".to_owned(), Vec::new()),
    ];
    spec.user = Some("app".to_owned());
    spec.directory = Some("/srv/data".to_owned());
    spec.environment = vec!["LINES=one\ntwo".to_owned(), "EMPTY=".to_owned()];
    let output = user.run(&spec);
    let console = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}{console}", text(&output.stderr));
    for line in [
        "probe: uid 1000 gid 1001 groups [Gid(29)]",
        "probe: directory /srv/data",
        "probe: arguments [\"two words\"]",
        "probe: env \"LINES\"=\"one\\ntwo\"",
        "probe: env \"EMPTY\"=\"\"",
        "probe: env \"HOME\"=\"/home/app\"",
        "probe: mount cgroup2 /sys/fs/cgroup",
    ] {
        assert!(console.contains(line), "{line}\n{console}");
    }
}

#[test]
fn images_with_awss_init_run() {
    let user = User::new();
    let output = user.run(&ImageSpec::probe(&["exit", "42"]).with_aws_init());
    let console = text(&output.stdout);
    // AWS's init drops the status and restarts the machine.
    assert_eq!(output.status.code(), Some(0), "{}{console}", text(&output.stderr));
    assert!(console.contains("aws-init: application ended"), "{console}");
}

#[test]
fn images_that_cannot_start_say_why() {
    let user = User::new();
    // No program of that name, nothing to run at all, and a kernel that is none.
    let mut spec = ImageSpec::probe(&[]);
    spec.command = vec!["/bin/missing".to_owned()];
    let output = user.run(&spec);
    assert_eq!(output.status.code(), Some(127));
    assert!(text(&output.stdout).contains("cannot execute /bin/missing"));

    spec.command = Vec::new();
    let output = user.run(&spec);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stdout).contains("names nothing to run"));

    let image = small_image(user.directory.path());
    for command in [["run"].as_slice(), &["run-enclave", "--eif-path"]] {
        let output = run(user.nitroxide().args(command).arg(&image));
        assert!(!output.status.success());
        assert!(text(&output.stderr).contains("[E"), "{}", text(&output.stderr));
    }
    let output = run(user
        .nitroxide()
        .env("NITROXIDE_QEMU", "/nonexistent/qemu")
        .args(["run-enclave", "--eif-path"])
        .arg(user.image(&ImageSpec::hello())));
    assert!(text(&output.stderr).contains("NITROXIDE_QEMU"), "{}", text(&output.stderr));
    assert!(user.enclaves().is_empty());
}

#[test]
fn an_enclave_that_ends_before_its_heartbeat_is_a_boot_failure_with_its_last_lines() {
    let user = User::new();
    let mut spec = ImageSpec::hello();
    // The probe as init: it powers the machine off before anything else.
    "nitroxide-probe".clone_into(&mut spec.init);
    spec.cmdline += " -- poweroff";
    let output = run(user.nitroxide().args(["run-enclave", "--eif-path"]).arg(user.image(&spec)));
    assert_eq!(output.status.code(), Some(36), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Power down"), "{}", text(&output.stderr));
    assert!(user.enclaves().is_empty());
}

#[test]
fn ctrl_c_ends_the_enclave_in_order() {
    let user = User::new();
    let image = user.image(&ImageSpec::probe(&["hang"]));
    let mut child = user.nitroxide().arg("run").arg(image).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("nitroxide-init: starting")));
    let process = user.enclaves()[0]["ProcessID"].as_u64().unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(!PathBuf::from(format!("/proc/{process}")).exists());
    assert!(user.enclaves().is_empty());
    let mut remarks = String::new();
    child.stderr.take().unwrap().read_to_string(&mut remarks).unwrap();
    assert!(remarks.contains("Ending the enclave"), "{remarks}");
}
