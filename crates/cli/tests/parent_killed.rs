//! The parent VM is killed at every stage of an enclave's life: whatever was under way, nothing is left, and the device serves on.
//!
//! Each test boots a VM with the distribution's driver, lets an enclave come as far as the named pause point (a held command of the device, or a stage of
//! the enclave process), and kills QEMU with SIGKILL. Needs `cargo xtask setup --tests` and `cargo xtask guest`.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::processes::{descendants, eventually};
use nitroxide_testkit::images::ImageSpec;
use nitroxide_testkit::parent_vm::ParentVm;
use nitroxide_world::World;
use rustix::process::Signal;

/// Only ends hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where an enclave's life is held when its parent is killed.
enum Pause {
    /// The device holds a command, before it carries it out.
    Command(&'static str),
    /// The device has carried a command out and holds its reply.
    Reply(&'static str),
    /// The enclave process holds at a stage of its start.
    Stage(&'static str),
    /// Nowhere: the enclave runs.
    Running,
}

fn kill_parent_at(pause: &Pause) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("hello.eif");
    ImageSpec::hello().build(&image);
    let fault = match pause {
        Pause::Command(command) => format!("{command}=hold"),
        Pause::Reply(command) => format!("{command}=delay:10min"),
        Pause::Stage(_) | Pause::Running => String::new(),
    };
    let mut vm = ParentVm::builder()
        .memory_mib(768)
        .hugepages(80)
        .program(env!("CARGO_BIN_EXE_nitroxide"))
        .file(&image, "/hello.eif")
        .device_program(env!("CARGO_BIN_EXE_nitroxide"))
        .device_environment("NITROXIDE_LOG", "warn")
        .device_environment("NITROXIDE_PAUSE", if let Pause::Stage(stage) = pause { *stage } else { "" })
        .device_arguments(["--fault", &fault])
        .boot();
    let _running = vm.start("nitroxide run --device host --memory 128 --cpu-count 1 /hello.eif & sleep 1; wait");
    let device = vm.device().unwrap().id();
    match pause {
        Pause::Command(command) => {
            if matches!(*command, "stop" | "free") {
                wait_for(&vm, "runs: CID");
                // The client is ended by a signal, upon which the driver stops and frees the enclave.
                vm.check("killall -INT nitroxide");
            }
            wait_for(&vm, "holds the command");
        }
        Pause::Reply(_) => eventually("the enclave process", || !below(device).is_empty()),
        Pause::Stage(stage) => wait_for(&vm, &format!("pauses at {stage}")),
        Pause::Running => wait_for(&vm, "runs: CID"),
    }

    vm.kill();

    eventually("the end of the device's processes", || below(device).is_empty());
    let log = vm.device_log();
    let line = log.lines().find(|line| line.starts_with("{\"Socket\"")).unwrap();
    let ready: serde_json::Value = serde_json::from_str(line).unwrap();
    let world = World::open(Path::new(ready["RuntimeDirectory"].as_str().unwrap())).unwrap();
    eventually("released claims", || world.enclaves().unwrap().is_empty() && !world.is_cid_claimed(16).unwrap());
    eventually("released memory", || memory_files(device).is_empty());
    // The next VM may come.
    let socket = ready["Socket"].as_str().unwrap();
    drop(UnixStream::connect(socket).unwrap());

    let process = vm.device().unwrap();
    process.signal(Signal::TERM);
    assert!(process.wait(PATIENCE).is_some_and(|status| status.success()), "{}", vm.device_log());
    assert!(!Path::new(socket).exists() && !world.path().exists());
}

fn wait_for(vm: &ParentVm, text: &str) {
    let begin = std::time::Instant::now();
    while !vm.device_log().contains(text) {
        assert!(begin.elapsed() < PATIENCE, "`{text}` did not come:\n{}\n{}", vm.device_log(), vm.console());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes that the device has started, and theirs.
fn below(device: u32) -> BTreeSet<u32> {
    let mut family = descendants(device);
    family.remove(&device);
    family
}

/// The memory files that a process has open: the VM's RAM, and enclaves'.
fn memory_files(process: u32) -> Vec<String> {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    let names = links.filter_map(|link| Some(std::fs::read_link(link.path()).ok()?.to_string_lossy().into_owned()));
    names.filter(|name| name.starts_with("/memfd:")).collect()
}

macro_rules! killed {
    ($($name:ident => $pause:expr;)*) => { $(
        #[test]
        fn $name() {
            kill_parent_at(&$pause);
        }
    )* };
}

killed! {
    while_a_slot_is_allocated => Pause::Command("alloc");
    while_memory_is_donated => Pause::Command("add-mem");
    while_a_vcpu_is_added => Pause::Command("add-vcpu");
    before_the_start => Pause::Command("start");
    when_the_enclave_process_has_its_memory => Pause::Stage("received");
    when_the_image_is_verified => Pause::Stage("verified");
    when_the_machine_is_launched => Pause::Stage("launching");
    when_the_start_has_no_reply_yet => Pause::Reply("start");
    while_the_enclave_runs => Pause::Running;
    while_the_enclave_is_stopped => Pause::Command("stop");
    while_the_slot_is_freed => Pause::Command("free");
}
