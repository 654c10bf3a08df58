//! Linux' own driver and ours side by side: one parent VM with both modules, which take turns, so that what drifts meets both.
//!
//! The times are those of `nitroxide-conformance bench` in the VM. The device is the null device of the conformance tests, in this program itself. Not a
//! criterion benchmark: what is timed runs in a guest. Method and results: docs/benchmarks.md.
#![expect(clippy::unwrap_used, reason = "a benchmark that fails is a panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use nitroxide_abi::pci::Command;
use nitroxide_testkit::parent_vm::{Driver, ParentVm};
use nitroxide_testkit::{guest_program, kernel_module};

#[path = "../examples/null_device.rs"]
mod null_device;

/// Turns of each driver; `NITROXIDE_BENCH_TURNS` says otherwise.
const TURNS: usize = 6;
/// Rounds of calls in a turn; `NITROXIDE_BENCH_ROUNDS` says otherwise.
const ROUNDS: usize = 60;
/// It only ends hangs.
const PATIENCE: Duration = Duration::from_secs(900);
/// QEMU's lines about accesses to the device's registers.
const ACCESSES: [&str; 2] = ["vfio_region_read", "vfio_region_write"];

/// One driver's figures of a turn by the name of the call: the first quarter and the median, in nanoseconds.
type Figures = BTreeMap<String, (f64, f64)>;

fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        // This program is its own device.
        Some("device") => return null_device::main(),
        // `cargo test --benches` only wants to know that it builds.
        Some("--test") => return,
        _ => {}
    }
    let number = |name: &str, otherwise: usize| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (turns, rounds) = (number("NITROXIDE_BENCH_TURNS", TURNS), number("NITROXIDE_BENCH_ROUNDS", ROUNDS));
    let vm = machine(&[]);
    let mut all: [Vec<Figures>; 2] = [Vec::new(), Vec::new()];
    for _ in 0..turns {
        for (driver, list) in all.iter_mut().enumerate() {
            load(&vm, driver);
            list.push(figures(&bench(&vm, rounds)));
        }
    }
    drop(vm);
    println!("{turns} turns of {rounds} rounds each, microseconds; ratios are ours to Linux' own");
    println!(
        "{:<26}{:>12}{:>12}{:>8}{:>20}{:>14}{:>12}{:>8}",
        "", "C median", "ours", "ratio", "turns' ratios", "C 1st quarter", "ours", "ratio"
    );
    let names: Vec<&String> = all[0][0].keys().collect();
    for name in names {
        let of =
            |driver: usize, part: fn(&(f64, f64)) -> f64| -> Vec<f64> { all[driver].iter().map(|turn| part(&turn[name]) / 1e3).collect() };
        let (c, ours) = (of(0, |pair| pair.1), of(1, |pair| pair.1));
        // Each turn of ours beside the turn of the other before it: what drifts slowly drops out.
        let mut ratios: Vec<f64> = c.iter().zip(&ours).map(|(c, ours)| ours / c).collect();
        ratios.sort_by(f64::total_cmp);
        let spread = format!("{:.2} to {:.2}", ratios[0], ratios[ratios.len() - 1]);
        let (c_quarter, ours_quarter) = (median(of(0, |pair| pair.0)), median(of(1, |pair| pair.0)));
        let (c, ours, ratio) = (median(c), median(ours), median(ratios));
        println!(
            "{name:<26}{c:>12.1}{ours:>12.1}{ratio:>8.2}{spread:>20}{c_quarter:>14.1}{ours_quarter:>12.1}{:>8.2}",
            ours_quarter / c_quarter
        );
        println!("drivers {name} c_us={c:.1} ours_us={ours:.1} ratio={ratio:.3} c_q1_us={c_quarter:.1} ours_q1_us={ours_quarter:.1}");
    }
    accesses();
}

/// A parent VM with both modules, of which Linux' own is loaded.
fn machine(qemu_arguments: &[&str]) -> ParentVm {
    let program = std::env::current_exe().unwrap();
    ParentVm::builder()
        .memory_mib(1024)
        .cpus(4)
        .threads_per_core(2)
        .qemu_arguments(qemu_arguments)
        .hugepages(140)
        .pool("2-3")
        .driver(Driver::C)
        .device_program(program)
        .program(guest_program("nitroxide-conformance"))
        .file(kernel_module(), "modules/nitroxide.ko")
        .boot()
}

/// Loads Linux' own module (0) or ours (1).
fn load(vm: &ParentVm, driver: usize) {
    let file = ["nitro_enclaves.ko", "nitroxide.ko"][driver];
    vm.check(&format!("rmmod nitro_enclaves && insmod /modules/{file} ne_cpus=2-3"));
}

fn bench(vm: &ParentVm, rounds: usize) -> String {
    let output = vm.try_run(&format!("nitroxide-conformance bench --rounds {rounds} 2>&1"), PATIENCE).unwrap();
    assert_eq!(output.status, 0, "{}\n{}", output.stdout, vm.everything());
    output.stdout
}

/// Reads the lines for programs.
fn figures(text: &str) -> Figures {
    let figure = |line: &str| {
        let mut words = line.strip_prefix("bench ")?.split(' ');
        let name = words.next()?.to_owned();
        let values: BTreeMap<&str, f64> =
            words.filter_map(|word| word.split_once('=')).map(|(key, value)| (key, value.parse().unwrap())).collect();
        Some((name, (values["q1_ns"], values["median_ns"])))
    };
    text.lines().filter_map(figure).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Counts accesses to the registers by the device's commands, as QEMU's trace shows them. In a VM of its own: tracing takes time.
fn accesses() {
    let events: Vec<String> = ACCESSES.iter().flat_map(|event| ["-trace".to_owned(), (*event).to_owned()]).collect();
    let mut vm = machine(&events.iter().map(String::as_str).collect::<Vec<_>>());
    let mut counts = [BTreeMap::new(), BTreeMap::new()];
    for (driver, counts) in counts.iter_mut().enumerate() {
        load(&vm, driver);
        let before = vm.qemu().log().text().len();
        bench(&vm, 2);
        // The trace's last lines may still be in the pipe.
        std::thread::sleep(Duration::from_millis(500));
        *counts = by_command(vm.qemu().log().text().get(before..).unwrap_or_default());
    }
    println!(
        "accesses to registers per command, the wait for its reply included; what is read before a command counts with the command before it"
    );
    for (command, (reads, writes)) in &counts[0] {
        let ours = counts[1].get(command).copied().unwrap_or_default();
        let name = u32::try_from(*command).ok().and_then(Command::from_number).map_or("unknown", Command::name);
        println!("accesses {name} c_reads={reads:.1} c_writes={writes:.1} ours_reads={:.1} ours_writes={:.1}", ours.0, ours.1);
    }
}

/// Reads and writes for each command, on average.
fn by_command(trace: &str) -> BTreeMap<u64, (f64, f64)> {
    /// BAR 3's registers (docs/device-pci.md).
    const COMMAND: u64 = 0x004;
    const REQUEST: u64 = 0x010;
    let mut sums: BTreeMap<u64, (f64, f64, f64)> = BTreeMap::new();
    let (mut command, mut writes_before) = (0, 0.0);
    for line in trace.lines() {
        let is_read = line.contains(ACCESSES[0]);
        if !is_read && !line.contains(ACCESSES[1]) {
            continue;
        }
        // ` (name:region3+0x10, 0x0, 4)` of a write, ` (name:region3+0x100, 4) = 0x0` of a read.
        let Some((_, rest)) = line.split_once("region3+0x") else { continue };
        let mut words = rest.split([',', ')', ' ', '=']).filter(|word| !word.is_empty());
        let Some(offset) = words.next().and_then(|word| u64::from_str_radix(word, 16).ok()) else { continue };
        let value = words.next().and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()).unwrap_or(0);
        if is_read {
            sums.entry(command).or_default().0 += 1.0;
        } else if offset == COMMAND {
            command = value;
            let sum = sums.entry(command).or_default();
            sum.1 += writes_before + 1.0;
            sum.2 += 1.0;
            writes_before = 0.0;
        } else if (REQUEST..REQUEST + 240).contains(&offset) {
            writes_before += 1.0;
        }
    }
    sums.into_iter()
        .filter(|(_, sum)| sum.2 > 0.0)
        .map(|(command, (reads, writes, count))| (command, (reads / count, writes / count)))
        .collect()
}
