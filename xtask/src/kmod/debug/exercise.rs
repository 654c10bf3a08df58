//! What is done in the VM with the kernel that checks itself: [`LIST`], and what comes of it.
//!
//! An exercise is a line of shell. It fails by its exit status, by a complaint of the kernel on the console, and by one that it prints itself. One VM is for
//! our module; the C driver has one of its own for [`C_LIST`], whose complaints are shown and no failure: mainline's weaknesses are known.

use std::path::Path;
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use nitroxide_testkit::guest_program;
use nitroxide_testkit::parent_vm::{Driver, ParentVm};

use super::{Built, complaints};
use crate::context::{self, Context};
use crate::{guest, setup};

/// An exercise's name and what is run; the functions of [`TOOLS`] are there.
type Exercise = (&'static str, &'static str);

/// Our module's exercises, one after the other in one VM; one more is one line more.
const LIST: [Exercise; 22] = [
    ("directed", "nitroxide-conformance run --control pci"),
    ("random", "nitroxide-conformance random --control pci --seed 1 --sequences 200"),
    ("threads", "nitroxide-conformance probe threads"),
    ("exec", "nitroxide-conformance probe exec"),
    ("compat", "nitroxide-conformance probe compat"),
    ("refused-pages", "nitroxide-conformance probe refused-pages"),
    ("mm-identity", "nitroxide-conformance probe mm-identity"),
    ("uid-zero", "nitroxide-conformance probe uid-zero"),
    ("w8", "nitroxide-conformance run --dangerous --control pci --filter w8"),
    ("w10", "nitroxide-conformance run --dangerous --control pci --filter w10"),
    // Each may be called at any time by anybody.
    ("at-once", "calls 1 & calls 2 & calls 3 & looks & for text in 2-3 2-5 '' 2-5; do pool $text; done; wait"),
    ("killed", "for i in $(seq 12); do killed $i 0.$i; done"),
    ("rebind", "for i in $(seq 12); do rebind || return 1; done"),
    ("unbind-open", "for i in 1 2 3; do with_open_descriptors rebind || return 1; done"),
    ("pull-open", "with_open_descriptors pull && pull"),
    ("rebind-at-once", "calls 1 & calls 2 & looks & for i in $(seq 8); do rebind || return 1; sleep 0.5; done; wait"),
    ("reload", "for i in $(seq 12); do reload || return 1; done"),
    (
        "no-memory",
        "for act in 'calls 3' rebind 'pool 2-3' 'calls 4'; do with_failing_allocations $act; done; rmmod nitro_enclaves && online && insmod $MODULE ne_cpus=2-5",
    ),
    ("stress", "nitroxide-conformance stress --seconds 60 --exact-only --control pci"),
    // What was given away came back, and nothing was forgotten.
    ("pages", "test $(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages) = $PAGES"),
    ("leaks", "rmmod nitro_enclaves; leaks"),
    // Lockdep goes off for good at its first complaint, and where its tables are full.
    ("watchful", "grep 'debug_locks: *1' /proc/lockdep_stats"),
];

/// The C driver's. Loaded with a pool it ends lockdep, so that comes last.
const C_LIST: [Exercise; 4] = [
    ("load", "insmod /modules/nitro_enclaves.ko && pool 2-5"),
    ("directed", "nitroxide-conformance run --control pci"),
    ("leaks", "rmmod nitro_enclaves; leaks"),
    ("load-with-pool", "insmod /modules/nitro_enclaves.ko ne_cpus=2-5"),
];

/// Huge pages of the VM: each of three programs at once wants 110.
const PAGES: u32 = 400;

/// What the kernel is started with.
///
/// `no5lvl`: with five levels of page tables KASAN is wrong about interrupts that come while `identify_cpu` has cleared boot_cpu_data's capabilities for a
/// moment, among them the one that says how large the address space is; an emulated kernel on a busy machine spends long there. `slab_debug=F`: without it
/// the slab keeps addresses of what it has given away in arrays of each CPU (sheaves), and kmemleak takes them for references.
const PARAMETERS: &str = "no5lvl kasan_multi_shot page_poison=1 slab_debug=F";

/// Shell functions for the exercises, at /etc/exercises in the VM.
const TOOLS: &str = r#"
DRIVER=/sys/bus/pci/drivers/nitro_enclaves
DEVICE=$(cd /sys/bus/pci/devices && grep -l 0xe4c1 */device | head -n 1 | cut -d / -f 1)
MODULE=/modules/nitroxide.ko

# Calls without a hold on the device, so that several may run at once.
calls() { nitroxide-conformance random --control none --seed "$1" --sequences 25 > /dev/null; }

# The same, killed after so many seconds.
killed() {
    nitroxide-conformance random --control none --seed "$1" --sequences 25 > /dev/null &
    sleep "$2"
    kill -9 $!
    wait $!
    true
}

# What anybody may read, over and over.
looks() {
    for i in $(seq 60); do
        cat /sys/module/nitro_enclaves/parameters/ne_cpus /proc/[0-9]*/fdinfo/* /proc/interrupts > /dev/null 2>&1
        sleep 0.05
    done
}

pool() { echo "$1" > /sys/module/nitro_enclaves/parameters/ne_cpus; true; }
rebind() { echo $DEVICE > $DRIVER/unbind && echo $DEVICE > $DRIVER/bind && test -e $DRIVER/$DEVICE; }
pull() { echo 1 > /sys/bus/pci/devices/$DEVICE/remove && echo 1 > /sys/bus/pci/rescan && test -e $DRIVER/$DEVICE; }
reload() { rmmod nitro_enclaves && insmod $MODULE ne_cpus=2-5; }

# A CPU that did not come back for want of memory stays offline.
online() { for cpu in /sys/devices/system/cpu/cpu[2-5]; do grep -q 1 $cpu/online || echo 1 > $cpu/online || return 1; done; }

# While a program has the node and an enclave open, whose device went and came back already.
with_open_descriptors() {
    nitroxide-conformance probe unbind > /tmp/unbind 2>&1 &
    holder=$!
    until grep -q done /tmp/unbind; do kill -0 $holder || { cat /tmp/unbind; return 1; }; sleep 0.1; done
    echo $DEVICE > $DRIVER/bind || return 1
    "$@"
    outcome=$?
    kill -9 $holder
    wait $holder
    return $outcome
}

# One in eight allocations that come from the module fails.
with_failing_allocations() {
    (
        cd /sys/kernel/debug/failslab || exit 1
        text=$(cat /sys/module/nitro_enclaves/sections/.text)
        echo $text > require-start
        printf '0x%x' $((text + 0x40000)) > require-end
        echo 24 > stacktrace-depth
        echo N > ignore-gfp-wait
        echo 0 > verbose
        echo -1 > times
        echo 12 > probability
        "$@"
        echo 0 > probability
    )
    true
}

# What the kernel cannot reach any more; younger than 5 s is not looked at.
leaks() {
    for i in 1 2; do sleep 6; echo scan > /sys/kernel/debug/kmemleak || return 1; done
    cat /sys/kernel/debug/kmemleak
}
"#;

/// It only ends hangs.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Boots, does everything whose name contains one of `filters`, and says what the kernel said.
pub fn run(context: &Context, built: &Built, filters: &[String]) -> Result<()> {
    setup::extras(context, setup::Extras::ParentVm)?;
    guest::run(context)?;
    context::run(&mut context.cargo(["build", "--quiet", "--package", "nitroxide-conformance", "--examples"]))?;
    let folder = context.in_target("kmod-debug");
    let ours = on(context, built, Driver::Rust(built.module.clone()), &LIST, filters, &folder.join("rust-console.txt"))?;
    let theirs = on(context, built, Driver::None, &C_LIST, filters, &folder.join("c-console.txt"))?;
    eprintln!("kmod-debug: the C driver: {theirs} exercises failed, which is no failure here");
    eprintln!("kmod-debug: the module: {ours} exercises failed; the consoles are {}/*-console.txt", folder.display());
    if ours == 0 { Ok(()) } else { Err(miette!("{ours} of the module's exercises failed: see above")) }
}

/// The exercises on one driver, in a VM of its own; how many failed.
fn on(context: &Context, built: &Built, driver: Driver, list: &[Exercise], filters: &[String], console: &Path) -> Result<usize> {
    let name = if driver == Driver::None { "c" } else { "rust" };
    let is_wanted = |exercise: &str| filters.is_empty() || filters.iter().any(|filter| exercise.contains(filter));
    let wanted: Vec<&Exercise> = list.iter().filter(|(exercise, _)| is_wanted(exercise)).collect();
    if wanted.is_empty() {
        eprintln!("kmod-debug: {name}: no exercise of that name");
        return Ok(0);
    }
    let tools = console.with_file_name("exercises");
    std::fs::write(&tools, format!("PAGES={PAGES}\n{TOOLS}")).into_diagnostic().wrap_err("Writing the exercises' functions")?;
    let vm = ParentVm::builder()
        .kernel(&built.kernel)
        .kernel_parameters(PARAMETERS)
        .memory_mib(2560)
        .cpus(6)
        .threads_per_core(2)
        .hugepages(PAGES.into())
        .pool("2-5")
        .driver(driver)
        .device_program(context.in_target("debug/examples/null_device"))
        .program(guest_program("nitroxide-conformance"))
        .file(tools, "etc/exercises")
        // What the kernel itself has lost until now is not the module's.
        .at_start("echo scan > /sys/kernel/debug/kmemleak; echo clear > /sys/kernel/debug/kmemleak")
        .boot();
    let mut driver = Watched { vm: &vm, name, seen: 0, failed: 0 };
    eprintln!("kmod-debug: up after {:.0} s", vm.boot_times().0.as_secs_f64());
    driver.judge("boot", None, "");
    for (exercise, script) in wanted {
        let started = Instant::now();
        let outcome = vm.try_run(&format!(". /etc/exercises\nexercise() {{\n{script}\n}}\nexercise 2>&1"), PATIENCE);
        let (failure, printed) = match outcome {
            Ok(output) if output.status == 0 => (None, output.stdout),
            Ok(output) => (Some(format!("its exit status is {}", output.status)), output.stdout),
            Err(error) => (Some(error.to_string()), String::new()),
        };
        let good = driver.judge(exercise, failure.as_deref(), &printed);
        let verdict = if good { "nothing to complain of" } else { "FAILED" };
        eprintln!("kmod-debug: {name}: {exercise}: {verdict}, {:.0} s", started.elapsed().as_secs_f64());
    }
    let failed = driver.failed;
    std::fs::write(console, vm.console()).into_diagnostic().wrap_err_with(|| format!("Writing {}", console.display()))?;
    Ok(failed)
}

/// A VM whose console is read piece by piece.
struct Watched<'a> {
    vm: &'a ParentVm,
    name: &'a str,
    /// Bytes of the console that were judged already.
    seen: usize,
    failed: usize,
}

impl Watched<'_> {
    /// Shows what went wrong in one exercise; whether nothing did.
    fn judge(&mut self, exercise: &str, failure: Option<&str>, printed: &str) -> bool {
        let console = self.vm.console();
        let new = console.get(self.seen..).unwrap_or_default();
        self.seen = console.len();
        let found: Vec<String> = [new, printed].into_iter().flat_map(complaints::find).collect();
        for complaint in &found {
            eprintln!("kmod-debug: {}: {exercise}: the kernel complains:\n{complaint}", self.name);
        }
        if let Some(failure) = failure {
            let lines: Vec<&str> = printed.lines().collect();
            let last = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
            eprintln!("kmod-debug: {}: {exercise}: {failure}; it printed last:\n{last}", self.name);
        }
        let good = found.is_empty() && failure.is_none();
        self.failed += usize::from(!good);
        good
    }
}
