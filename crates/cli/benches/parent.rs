//! A launch in a parent VM with the distribution's driver: from the request to the heartbeat, with donated memory isolated and in place.
//!
//! Stage times come from the enclave itself, as for `launch`; what the client in the VM waits for is measured from outside. Not a criterion benchmark: one
//! launch takes seconds. Method and results: docs/benchmarks.md.
#![expect(clippy::unwrap_used, reason = "a benchmark that fails is a panic")]

use std::path::Path;
use std::time::Instant;

use nitroxide_enclave::control;
use nitroxide_enclave::stage::{Stage, StageTime};
use nitroxide_testkit::images::ImageSpec;
use nitroxide_testkit::parent_vm::ParentVm;
use nitroxide_world::World;

/// Launches to measure in each mode; one more before them warms the caches.
const ROUNDS: usize = 5;

const NITROXIDE: &str = env!("CARGO_BIN_EXE_nitroxide");

/// What is measured of a launch, in milliseconds.
struct Launch {
    /// The command `run-enclave` in the VM, which returns after the heartbeat.
    command: f64,
    /// From START at the device to the running guest.
    start: f64,
    /// From there to the guest's connection to the heartbeat port.
    guest: f64,
}

fn main() {
    // `cargo test --benches` only wants to know that it builds.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("hello.eif");
    ImageSpec::hello().build(&image);
    println!("512 MiB of pages of 2 MiB, 2 vCPUs; medians of {ROUNDS} launches after one to warm up, in ms");
    println!("{:<12}{:>32}{:>32}{:>32}", "memory", "run-enclave in the VM", "START until the guest runs", "guest until its heartbeat");
    for memory in ["isolated", "zero-copy"] {
        let vm = ParentVm::builder()
            .memory_mib(1536)
            .hugepages(300)
            .program(NITROXIDE)
            .file(&image, "/root/hello.eif")
            .device_program(NITROXIDE)
            .device_arguments(["--memory", memory])
            .boot();
        launch(&vm);
        let launches: Vec<Launch> = (0..ROUNDS).map(|_| launch(&vm)).collect();
        let median = |part: fn(&Launch) -> f64| {
            let mut values: Vec<f64> = launches.iter().map(part).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let [command, start, guest] = [median(|launch| launch.command), median(|launch| launch.start), median(|launch| launch.guest)];
        println!("{memory:<12}{command:>32.0}{start:>32.1}{guest:>32.0}");
    }
}

fn launch(vm: &ParentVm) -> Launch {
    let begin = Instant::now();
    vm.check("nitroxide --quiet run-enclave --device host --eif-path /root/hello.eif --memory 512 --cpu-count 2");
    let command = begin.elapsed().as_secs_f64() * 1e3;
    let log = vm.device_log();
    let line = log.lines().find(|line| line.starts_with('{')).unwrap();
    let ready: serde_json::Value = serde_json::from_str(line).unwrap();
    let world = World::open(Path::new(ready["RuntimeDirectory"].as_str().unwrap())).unwrap();
    let stages = control::list(&world).unwrap().remove(0).stages;
    let at = |stage: Stage| stages.iter().find(|time: &&StageTime| time.stage == stage).unwrap().at_ns;
    let ms = |from: Stage, to: Stage| (at(to) - at(from)) as f64 / 1e6;
    let launch = Launch { command, start: ms(Stage::Requested, Stage::Running), guest: ms(Stage::Running, Stage::Heartbeat) };
    vm.check("nitroxide terminate-enclave --all");
    launch
}
