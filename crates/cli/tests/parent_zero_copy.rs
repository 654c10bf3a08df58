//! Enclaves in the very pages that a parent VM gives away: one page of 1 GiB, and many of 2 MiB.

use nitroxide_testkit::images::ImageSpec;
use nitroxide_testkit::parent_vm::ParentVm;

const NITROXIDE: &str = env!("CARGO_BIN_EXE_nitroxide");

#[test]
fn an_enclave_runs_in_a_page_of_a_gibibyte_and_in_pages_of_two_mebibytes() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("hello.eif");
    ImageSpec::hello().build(&image);
    // A page of 1 GiB is to be had only from memory above the first 3 GiB.
    let vm = ParentVm::builder()
        .memory_mib(4096)
        .hugepages(150)
        .kernel_parameters("hugepagesz=1G hugepages=1")
        .program(NITROXIDE)
        .file(&image, "/root/hello.eif")
        .device_program(NITROXIDE)
        .device_arguments(["--memory", "zero-copy"])
        .boot();
    let free = "cat /sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
    assert_eq!(vm.check(free), "1\n");
    // Pages that were used before come back in descending order, which makes more pieces of the last one than a machine takes as they are.
    for (memory, pages_of_a_gibibyte) in [("1024", "0\n"), ("288", "1\n"), ("288", "1\n")] {
        vm.check(&format!("nitroxide --quiet run-enclave --device host --eif-path /root/hello.eif --memory {memory} --cpu-count 1"));
        assert_eq!(vm.check(free), pages_of_a_gibibyte);
        let cid = vm.check("nitroxide describe-enclaves | grep EnclaveCID | tr -dc 0-9");
        let ask = format!(
            "for i in $(seq 300); do echo 'echo in place' | nitroxide vsock connect {cid} 5005 2>/dev/null && exit; sleep 0.2; done; exit 1"
        );
        assert_eq!(vm.check(&ask), "in place\n");
        vm.check("nitroxide terminate-enclave --all");
        vm.check(&format!("until [ $({free}) = 1 ]; do sleep 0.1; done"));
    }
    let log = vm.device_log();
    assert!(log.contains("1 vCPUs, 1024 MiB") && log.matches("1 vCPUs, 288 MiB").count() == 2, "{log}");
}
