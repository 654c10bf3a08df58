//! Many enclaves at once, as on every CI machine: all boot, none gets in another's way, and nothing is left of any.
//!
//! 8 in the ordinary run; `cargo xtask soak` sets `NITROXIDE_SOAK` and starts 20.
#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{nitroxide, run, text};
use nitroxide_testkit::images::ImageSpec;
use serde_json::Value;

/// How long all of them together may take before the test is given up; not a measure.
const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn many_enclaves_at_once_all_boot_and_nothing_is_left_of_them() {
    let count = if std::env::var_os("NITROXIDE_SOAK").is_some() { 20 } else { 8 };
    let directory = tempfile::tempdir().unwrap();
    let runtime = directory.path().join("runtime");
    let image = directory.path().join("hello.eif");
    ImageSpec::hello().build(&image);

    let starting: Vec<Child> = (0..count).map(|_| start(&runtime, &image)).collect();
    let started: Vec<Value> = starting.into_iter().map(answer).collect();

    for field in ["EnclaveID", "EnclaveCID", "EnclaveName", "ProcessID"] {
        let values: BTreeSet<String> = started.iter().map(|enclave| enclave[field].to_string()).collect();
        assert_eq!(values.len(), count, "{field}: {values:?}");
    }
    let described: Vec<Value> = serde_json::from_slice(&run(command(&runtime).arg("describe-enclaves")).stdout).unwrap();
    assert_eq!(described.len(), count);
    assert!(described.iter().all(|enclave| enclave["State"] == "RUNNING"), "{described:?}");
    let processes: Vec<u64> = started.iter().map(|enclave| enclave["ProcessID"].as_u64().unwrap()).collect();
    let machines: Vec<u32> = processes.iter().flat_map(|process| children(*process)).collect();
    assert!(machines.len() >= count, "every enclave has a virtual machine: {machines:?}");

    let output = run(command(&runtime).args(["terminate-enclave", "--all"]));

    assert!(output.status.success(), "{}", text(&output.stderr));
    let left: Vec<Value> = serde_json::from_slice(&run(command(&runtime).arg("describe-enclaves")).stdout).unwrap();
    assert_eq!(left, Vec::<Value>::new());
    for process in processes.iter().copied().chain(machines.into_iter().map(u64::from)) {
        eventually(&format!("process {process} is gone"), || !Path::new(&format!("/proc/{process}")).exists());
    }
    eventually("no file of any enclave is left", || files(&runtime).is_empty());
}

fn command(runtime: &Path) -> Command {
    let mut command = nitroxide();
    command.env("NITROXIDE_RUNTIME_DIR", runtime).env("NITROXIDE_DEVICE", "local");
    command
}

fn start(runtime: &Path, image: &Path) -> Child {
    command(runtime)
        .args(["run-enclave", "--cpu-count", "2", "--memory", "128", "--eif-path"])
        .arg(image)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn answer(child: Child) -> Value {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn children(process: u64) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(|child| child.parse().unwrap()).collect::<Vec<_>>()).collect()
}

/// Everything below a folder that is not a folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() { folders.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not so: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
