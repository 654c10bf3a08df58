//! Machines of other shapes: two nodes, a page of 1 GiB, cores of one thread and of three. The C driver's answers, and that the core says the same.

#![cfg(feature = "core")]

mod common;

use nitroxide_conformance::cases;
use nitroxide_conformance::compare::compare;
use nitroxide_conformance::simulated::Core;
use nitroxide_conformance::transcript::{Transcript, run_all};
use nitroxide_testkit::parent_vm::{Builder, Driver};

use common::{machine, run, shaped};

/// Runs a case there and by the core; `head` is what the core cannot see of the machine. Gives what the machine said, and the rules that were used.
fn both(machine: Builder, name: &str, head: &[(&str, &str)]) -> (String, Vec<&'static str>) {
    let vm = machine.boot();
    let text = run(&vm, &format!("run --shapes --control pci --filter {name}"));
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
    let machine = shaped(Driver::C, "6,sockets=1,cores=3,threads=2", "4-5")
        .hugepages(0)
        .qemu_arguments(["-acpitable", &format!("sig=SRAT,rev=3,data={}", table.display())])
        .at_start("echo 140 > /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages");
    let (text, _) = both(machine, "numa", &[("second node from", "4")]);
    assert!(text.contains("NE_ERR_MEM_DIFFERENT_NUMA_NODE") && text.contains("pool \"2-5\" -> EINVAL"), "{text}");
}

#[test]
fn page_of_1_gib_is_given_whole_and_the_c_driver_gives_it_for_2_mib() {
    let machine = machine(Driver::C).memory_mib(4096).kernel_parameters("hugepagesz=1G hugepages=1");
    let (text, rules) = both(machine, "gigantic", &[("gigantic", "1")]);
    assert!(text.contains("NE_ERR_INVALID_PAGE_SIZE") && text.contains("1024M"), "{text}");
    assert_eq!(rules, ["W14"]);
}

#[test]
fn cores_of_one_thread_and_an_odd_number_of_them() {
    both(shaped(Driver::C, "7,sockets=1,cores=7,threads=1", "3-5"), "cores", &[]);
}

#[test]
fn cores_of_three_threads() {
    both(shaped(Driver::C, "6,sockets=1,cores=2,threads=3", "3-5"), "cores", &[]);
}
