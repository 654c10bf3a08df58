//! The parent VM itself, without a device: commands, their ends, files, panics.

use std::time::{Duration, Instant};

use nitroxide_testkit::parent_vm::{JobError, ParentVm};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn a_parent_vm_runs_commands_one_after_the_other_and_at_once() {
    let vm = ParentVm::builder().hugepages(16).memory_mib(512).boot();
    println!("boot: {:?}", vm.boot_times());
    assert_eq!(vm.check("echo out; echo err >&2; uname -s"), "out\nerr\nLinux\n");
    assert_eq!(vm.run("exit 42").status, 42);
    assert_eq!(vm.run("kill -TERM $$").status, 128 + 15);
    assert_eq!(vm.check("grep HugePages_Total /proc/meminfo | tr -d ' '"), "HugePages_Total:16\n");
    assert_eq!(vm.check("lsmod | grep -c vsock"), "3\n");

    // Standard input, and much output.
    vm.write_file("/tmp/file", &vec![b'x'; 3 << 20]);
    assert_eq!(vm.check("wc -c < /tmp/file").trim(), (3 << 20).to_string());
    assert_eq!(vm.check("head -c 1000000 /tmp/file").len(), 1_000_000);

    // Two at once: the first waits for what the second does.
    let mut waiting = vm.start("echo waiting; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo went");
    assert!(waiting.wait_for("waiting", PATIENCE));
    vm.check("touch /tmp/go");
    assert_eq!(waiting.wait(PATIENCE).unwrap().stdout, "waiting\nwent\n");

    // A background process does not hold up the shell that started it, and lives on.
    vm.check("sleep 1000 & echo $! > /tmp/pid");
    vm.check("kill $(cat /tmp/pid)");

    // Too long: killed with what it started.
    let started = Instant::now();
    let error = vm.try_run("echo begun; sleep 1000", Duration::from_secs(1)).unwrap_err();
    assert_eq!(error, JobError::TimedOut("begun\n".to_owned()));
    assert!(started.elapsed() < PATIENCE);
    vm.check("while pgrep sleep; do sleep 0.05; done");

    // A panic of the kernel ends the VM, and shows.
    let error = vm.try_run("echo c > /proc/sysrq-trigger", PATIENCE).unwrap_err();
    assert!(matches!(error, JobError::Gone(_)), "{error:?}");
    assert!(vm.console().contains("Kernel panic"), "{}", vm.console());
}
