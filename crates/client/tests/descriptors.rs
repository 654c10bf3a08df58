//! That devices and enclaves leave no descriptor and no thread behind. Alone in its program, since it counts what the process has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nitroxide_client::{Device, LocalOptions};
use nitroxide_device::testing::NullLauncher;
use nitroxide_world::World;

/// Long enough for any machine; only a leak gets there.
const PATIENCE: Duration = Duration::from_secs(30);

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).expect("procfs is mounted").count()
}

#[test]
fn no_descriptor_and_no_thread_is_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(&directory.path().join("world")).unwrap();
    let one_round = |fault: &str| {
        let options = LocalOptions { world: Some(world.clone()), faults: fault.parse().unwrap(), ..LocalOptions::default() };
        let device = Device::local_with(&options, |_| Arc::new(NullLauncher::default())).unwrap();
        let mut enclave = device.create_enclave().unwrap();
        // Refused or not: either way nothing may stay.
        let _ = enclave.add_memory(device.allocate_memory(64 << 20).unwrap());
        let _ = enclave.add_vcpu(None);
        let _ = enclave.start(None, false);
    };
    one_round("");
    let held = || (count("/proc/self/fd"), count("/proc/self/task"));
    let before = held();
    for fault in ["", "add-mem=-EIO", "add-vcpu=-EIO", "start=-EIO", "stop=-EIO", "free=-EIO", "info=-EIO,event=spurious"] {
        one_round(fault);
        let begin = Instant::now();
        // A thread is still listed for a moment after it was joined.
        while held() != before && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(held(), before, "{fault}");
    }
}
