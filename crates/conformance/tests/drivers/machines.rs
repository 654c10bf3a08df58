//! Machines with a driver in front of the null device.

use std::path::PathBuf;
use std::time::Duration;

use nitroxide_testkit::parent_vm::{Builder, Driver, ParentVm};
use nitroxide_testkit::{guest_program, kernel_module};

/// It only ends hangs.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// The example next to this test's program.
pub fn null_device() -> PathBuf {
    let deps = std::env::current_exe().expect("a running program has a path");
    let program = deps.ancestors().nth(2).expect("tests lie in target/debug/deps").join("examples/null_device");
    assert!(program.exists(), "`cargo build -p nitroxide-conformance --examples` makes {}", program.display());
    program
}

/// Our module.
pub fn ours() -> Driver {
    Driver::Rust(kernel_module())
}

/// Six CPUs in cores of two threads, of which 2-5 are the pool.
pub fn machine(driver: Driver) -> Builder {
    shaped(driver, 6, 2, "2-5")
}

/// A machine with other CPUs, other cores and another pool.
pub fn shaped(driver: Driver, cpus: u32, threads_per_core: u32, pool: &str) -> Builder {
    ParentVm::builder()
        .memory_mib(1024)
        .cpus(cpus)
        .threads_per_core(threads_per_core)
        .hugepages(140)
        .pool(pool)
        .driver(driver)
        .device_program(null_device())
        .program(guest_program("nitroxide-conformance"))
}

/// Runs our program in the machine and gives what it prints.
pub fn run(vm: &ParentVm, arguments: &str) -> String {
    let output = vm
        .try_run(&format!("nitroxide-conformance {arguments} 2>&1"), PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.everything()));
    assert_eq!(output.status, 0, "{}\n{}", output.stdout, vm.console());
    output.stdout
}

/// What the kernel complained of.
pub fn complaint(vm: &ParentVm) -> &'static str {
    let console = vm.console();
    ["Oops", "BUG", "WARNING", "INFO: task", "KASAN", "possible recursive", "sleeping function"]
        .into_iter()
        .find(|word| console.contains(word))
        .unwrap_or("nothing")
}
