//! Linux' own AF_VSOCK says what was recorded of it. `NITROXIDE_RECORD=vsock` writes the record anew.

use std::path::Path;

use nitroxide_testkit::parent_vm::Driver;

use crate::machines::{complaint, machine, run};

#[test]
fn kernels_vsock_says_what_was_recorded() {
    let vm = machine(Driver::None).module("vsock_loopback").boot();
    vm.check("insmod /modules/vsock_loopback.ko");
    let said = run(&vm, "vsock");
    assert_eq!(complaint(&vm), "nothing", "{}", vm.console());
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("record/linux-vsock.txt");
    if std::env::var("NITROXIDE_RECORD").is_ok_and(|what| what == "vsock") {
        std::fs::write(&place, &said).unwrap();
    }
    let recorded = std::fs::read_to_string(&place).unwrap();
    let differences: Vec<_> = said.lines().zip(recorded.lines()).filter(|(now, then)| now != then).collect();
    assert!(differences.is_empty() && said.len() == recorded.len(), "now and then: {differences:#?}");
}
