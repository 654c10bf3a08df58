//! Many threads and dying processes at once on the project's own module: no answer that cannot be, nothing lost, no complaint of the kernel.
//!
//! 60 seconds of it; with `NITROXIDE_SOAK` set 300. docs/conformance.md, "Stress".

use crate::machines::{complaint, ours, run, shaped};

#[test]
fn stress_on_our_module_has_no_impossible_answer_and_loses_nothing() {
    let seconds = if std::env::var_os("NITROXIDE_SOAK").is_some() { 300 } else { 60 };
    // Three cores for enclaves, one for the threads; pages for as many starts at once as there are threads.
    let vm = shaped(ours(), 8, 2, "2-7").memory_mib(1536).hugepages(400).boot();
    let printed = run(&vm, &format!("stress --seconds {seconds} --control pci"));
    println!("{printed}");

    // It has done what it is for.
    let count = |what: &str| -> u64 {
        let line = printed.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(" -> "));
        line.and_then(|count| count.parse().ok()).unwrap_or(0)
    };
    for what in [
        "enclaves started",
        "fork and kill: 0",
        "unbind: 0",
        "bind: 0",
        "device end: 0",
        "device faults: 0",
        "LIST: 0",
        "pool write: EPERM",
    ] {
        assert!(count(what) > 0, "never: {what}\n{}", printed);
    }

    vm.check("rmmod nitro_enclaves");
    assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), "0-7\n");
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
}
