//! `nitroxide exec` on a stock kernel with each of Yama's scopes, as an ordinary user: programs are looked into where Yama allows it, and refused where it does not.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use nitroxide_testkit::guest_program;
use nitroxide_testkit::parent_vm::{Driver, ParentVm};

/// Starts a daemon, which becomes the reaper's child, and waits for what it says.
const DAEMON: &str = "#!/bin/sh
rm -f /tmp/run/daemon
(setsid sh -c 'sleep 1; test -c /dev/nitro_enclaves && echo seen > /tmp/run/daemon' &)
until [ -s /tmp/run/daemon ]; do sleep 0.1; done
cat /tmp/run/daemon
";

#[test]
fn programs_run_under_scopes_0_and_1_and_scope_2_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = folder.path().join("daemon");
    fs::write(&daemon, DAEMON).expect("a file in the temporary folder");
    fs::set_permissions(&daemon, fs::Permissions::from_mode(0o755)).expect("a file of ours");
    let vm = ParentVm::builder()
        .driver(Driver::None)
        .program(env!("CARGO_BIN_EXE_nitroxide"))
        .program(guest_program("nitroxide-conformance"))
        .file(&daemon, "bin/daemon")
        .boot();
    let as_nobody = |command: &str| {
        let home = "export HOME=/tmp XDG_RUNTIME_DIR=/tmp/run; mkdir -p -m 700 /tmp/run";
        vm.run(&format!("su nobody -s /bin/sh -c '{home}; {command}'"))
    };
    let set_scope = |scope: u32| vm.check(&format!("echo {scope} > /proc/sys/kernel/yama/ptrace_scope"));

    let [first, second] = [0, 1].map(|scope| {
        set_scope(scope);
        let told = as_nobody("nitroxide exec --engine none -- nitroxide-conformance vsock");
        assert_eq!(told.status, 0, "scope {scope}: {}", told.stdout);
        let seen = as_nobody("nitroxide exec --engine none -- daemon");
        assert_eq!((seen.status, seen.stdout.trim()), (0, "seen"), "scope {scope}");
        told.stdout
    });
    assert!(first.lines().count() > 200, "{first}");
    assert_eq!(first, second);

    set_scope(2);
    let refused = as_nobody("nitroxide exec --engine none -- echo the-client-was-executed");
    assert_eq!(refused.status, 125, "{}", refused.stdout);
    assert!(!refused.stdout.contains("the-client-was-executed"), "{}", refused.stdout);
    for said in [refused.stdout, as_nobody("nitroxide doctor").stdout] {
        assert!(said.contains("kernel.yama.ptrace_scope is 2"), "{said}");
    }
    // Root may look into everything.
    vm.check("nitroxide exec --engine none -- test -c /dev/nitro_enclaves");
}
