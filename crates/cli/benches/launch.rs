//! A launch as a whole, from the start of `nitroxide run-enclave` to the first line of user space, split into whose time it is.
//!
//! Not a criterion benchmark: one launch takes seconds, and what is wanted is its parts. Stage times come from the enclave itself
//! ([`nitroxide_enclave::stage`]); the console is read as it comes. Method and results: docs/benchmarks.md.
#![expect(clippy::unwrap_used, reason = "a benchmark that fails is a panic")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nitroxide_enclave::control;
use nitroxide_enclave::stage::{Stage, StageTime, monotonic_ns};
use nitroxide_testkit::images::ImageSpec;
use nitroxide_world::World;

/// Launches to measure; one more before them warms the caches.
const ROUNDS: usize = 10;

/// One launch: the parts in milliseconds.
struct Launch {
    /// From before the process was created to the exec of QEMU: ours.
    ours: f64,
    /// From the exec of QEMU until the guest runs: QEMU's start.
    qemu: f64,
    /// From there to the first line of user space: the guest's kernel.
    kernel: f64,
    /// The stages of our share, each since the one before.
    stages: Vec<(&'static str, f64)>,
}

/// What one row of the table shows of a launch.
type Part = fn(&Launch) -> f64;

fn main() {
    // `cargo test --benches` only wants to know that it builds.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("hello.eif");
    ImageSpec::hello().build(&image);
    println!("image: {:.1} MiB; 2 vCPUs, 256 MiB; {ROUNDS} launches after one to warm up", bytes_mib(&image));
    launch(folder.path(), &image);
    let launches: Vec<Launch> = (0..ROUNDS).map(|_| launch(folder.path(), &image)).collect();

    let parts: [(&str, Part); 3] = [
        ("ours: process start to exec of QEMU", |launch| launch.ours),
        ("QEMU: exec until the guest runs", |launch| launch.qemu),
        ("guest kernel: until the first line of user space", |launch| launch.kernel),
    ];
    println!("{:<52}{:>10}{:>10}{:>10}", "ms", "least", "median", "most");
    for (name, part) in parts {
        let (least, median, most) = spread(launches.iter().map(part).collect());
        println!("{name:<52}{least:>10.1}{median:>10.1}{most:>10.1}");
    }
    println!("our share by stages (median ms since the stage before):");
    for (index, (name, _)) in launches[0].stages.iter().enumerate() {
        let (_, median, _) = spread(launches.iter().map(|launch| launch.stages[index].1).collect());
        println!("  {name:<20}{median:>8.2}");
    }
}

fn launch(folder: &Path, image: &Path) -> Launch {
    let runtime = folder.join("runtime");
    let started_ns = monotonic_ns();
    let mut front = Command::new(env!("CARGO_BIN_EXE_nitroxide"))
        .args(["run-enclave", "--device", "local", "--cpu-count", "2", "--memory", "256", "--eif-path"])
        .arg(image)
        .env("NITROXIDE_RUNTIME_DIR", &runtime)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (world, slot) = appears(&runtime);
    let mut console = BufReader::new(control::logs(&world, slot, true).unwrap());
    let mut line = Vec::new();
    while !line.starts_with(b"nitroxide-init:") {
        line.clear();
        assert_ne!(console.read_until(b'\n', &mut line).unwrap(), 0, "the enclave ended before its first line");
    }
    let first_line_ns = monotonic_ns();
    assert!(front.wait().unwrap().success(), "run-enclave failed");
    let stages = control::describe(&world, slot).unwrap().stages;
    control::terminate(&world, slot).unwrap();
    split(started_ns, &stages, first_line_ns)
}

/// Waits until the enclave of an empty world can be spoken to.
fn appears(runtime: &Path) -> (World, u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(world) = World::open(runtime)
            && let Some(slot) = world.enclaves().into_iter().flatten().find(|slot| control::logs(&world, *slot, false).is_ok())
        {
            return (world, slot);
        }
        assert!(Instant::now() < deadline, "no enclave appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn split(started_ns: u64, stages: &[StageTime], first_line_ns: u64) -> Launch {
    let at = |wanted: Stage| stages.iter().find(|time| time.stage == wanted).map_or(0, |time| time.at_ns);
    let mut before_ns = started_ns;
    let ours = stages.iter().filter(|time| time.stage <= Stage::Launching);
    let ours = ours.map(|time| (time.stage.name(), milliseconds(&mut before_ns, time.at_ns))).collect();
    Launch {
        ours: since(started_ns, at(Stage::Launching)),
        qemu: since(at(Stage::Launching), at(Stage::Running)),
        kernel: since(at(Stage::Running), first_line_ns),
        stages: ours,
    }
}

fn milliseconds(before_ns: &mut u64, at_ns: u64) -> f64 {
    let taken = since(*before_ns, at_ns);
    *before_ns = at_ns;
    taken
}

fn since(before_ns: u64, at_ns: u64) -> f64 {
    Duration::from_nanos(at_ns.saturating_sub(before_ns)).as_secs_f64() * 1000.0
}

fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

#[expect(clippy::cast_precision_loss, reason = "a size to be printed with one digit")]
fn bytes_mib(path: &Path) -> f64 {
    path.metadata().unwrap().len() as f64 / f64::from(1 << 20)
}
