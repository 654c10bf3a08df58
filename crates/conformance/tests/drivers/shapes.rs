//! Machines of other shapes: two nodes, a page of 1 GiB, cores of one thread and of three. The answers of both drivers, and that the core says the same.

use nitroxide_conformance::cases;
use nitroxide_conformance::compare::compare;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_testkit::parent_vm::{Builder, Driver, ParentVm};

use crate::machines::{machine, ours, run, shaped};

/// Runs a case with each driver in a machine of its own and by the core; `head` is what the core cannot see of the machine. Gives what the C driver said, and the
/// rules that were used for it; the module needs none.
fn both(machine: impl Fn(Driver) -> Builder, name: &str, head: &[(&str, &str)]) -> (String, Vec<&'static str>) {
    let (ours, needed) = beside_core(&machine(ours()).boot(), name, head);
    assert!(needed.is_empty(), "{ours}");
    beside_core(&machine(Driver::C).boot(), name, head)
}

fn beside_core(vm: &ParentVm, name: &str, head: &[(&str, &str)]) -> (String, Vec<&'static str>) {
    let text = run(vm, &format!("run --shapes --control pci --filter {name}"));
    let mut said = Transcript::parse(&text).expect("our program prints a transcript");
    said.head.extend(head.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let cases = cases::shapes().into_iter().filter(|case| case.name == name);
    let report = compare(&said, &run_all(&mut Core::like(&said), cases));
    println!("{text}\n{report}");
    assert!(report.differences.is_empty() && report.mismatch.is_none() && report.steps > 0, "{text}\n{report}");
    (text, report.used.into_keys().collect())
}

/// An ACPI table that makes two nodes of a machine of 1 GiB: CPUs 0-3 with the lower half, 4 and 5 with the upper one (ACPI 6.5, 5.2.16, "SRAT").
///
/// QEMU's own nodes want memory of their own each, and a parent VM has one piece.
fn two_nodes() -> Vec<u8> {
    const ENABLED: u32 = 1;
    const HALF: u64 = 512 << 20;
    let mut table = [1_u32.to_le_bytes().as_slice(), &[0; 8]].concat();
    for cpu in 0..6_u8 {
        // Processor: type, length, node, APIC id, flags, and nothing else.
        table.extend([0, 16, u8::from(cpu >= 4), cpu]);
        table.extend(ENABLED.to_le_bytes());
        table.extend([0; 8]);
    }
    for node in 0..2_u8 {
        // Memory: type, length, node, base, length, flags.
        table.extend([1, 40, node, 0, 0, 0, 0, 0]);
        table.extend((u64::from(node) * HALF).to_le_bytes());
        table.extend(HALF.to_le_bytes());
        table.extend([0; 4]);
        table.extend(ENABLED.to_le_bytes());
        table.extend([0; 8]);
    }
    table
}

#[test]
fn memory_of_another_node_is_refused_and_so_is_a_pool_of_two_nodes() {
    let table = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("two-nodes");
    std::fs::write(&table, two_nodes()).expect("the folder for tests can be written");
    let machine = |driver| {
        shaped(driver, 6, 2, "4-5")
            .hugepages(0)
            .qemu_arguments(["-acpitable", &format!("sig=SRAT,rev=3,data={}", table.display())])
            .at_start("echo 140 > /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages")
    };
    let (text, _) = both(machine, "numa", &[("second node from", "4")]);
    assert!(text.contains("NE_ERR_MEM_DIFFERENT_NUMA_NODE") && text.contains("pool \"2-5\" -> EINVAL"), "{text}");
}

#[test]
fn page_of_1_gib_is_given_whole_and_the_c_driver_gives_it_for_2_mib() {
    let machine = |driver| machine(driver).memory_mib(4096).kernel_parameters("hugepagesz=1G hugepages=1");
    let (text, rules) = both(machine, "gigantic", &[("gigantic", "1")]);
    assert!(text.contains("NE_ERR_INVALID_PAGE_SIZE") && text.contains("1024M"), "{text}");
    assert_eq!(rules, ["W14"]);
}

#[test]
fn cores_of_one_thread_and_an_odd_number_of_them() {
    both(|driver| shaped(driver, 7, 1, "3-5"), "cores", &[]);
}

#[test]
fn cores_of_three_threads() {
    both(|driver| shaped(driver, 6, 3, "3-5"), "cores", &[]);
}
