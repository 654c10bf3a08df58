//! A local device with real enclave processes, under the engine that runs no VM.

use std::ffi::OsString;
use std::time::Duration;

use nitroxide_abi::{Cid, Code};
use nitroxide_client::{Device, DeviceChoice, Enclave, LocalOptions};
use nitroxide_device::Usage;
use nitroxide_enclave::control::{self, Selector};
use nitroxide_enclave::report::EndReason;
use nitroxide_enclave::{EngineChoice, LaunchOptions, Program};
use nitroxide_world::World;

const MIB: u64 = 1 << 20;

/// Long enough for any machine; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn role_enclave_process() {
    // The enclave process of the other tests, which ask for it by name; nothing otherwise.
    if !std::env::args().any(|argument| argument == "role_enclave_process") {
        return;
    }
    nitroxide_enclave::run_process().unwrap();
}

struct Place {
    world: World,
    device: Device,
    _directory: tempfile::TempDir,
}

fn place() -> Place {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(&directory.path().join("world")).expect("a new world");
    let device = device_in(&world);
    Place { world, device, _directory: directory }
}

fn device_in(world: &World) -> Device {
    let role = ["--exact", "role_enclave_process", "--nocapture", "--test-threads=1"];
    let mut launch = LaunchOptions::new("test");
    launch.engine = EngineChoice::None;
    launch.program = Program { path: None, arguments: role.map(OsString::from).to_vec() };
    let options = LocalOptions { world: Some(world.clone()), launch, ..LocalOptions::default() };
    Device::open(DeviceChoice::Local(options)).expect("a local device")
}

fn ready(device: &Device) -> Enclave {
    let mut memory = device.allocate_memory(64 * MIB).expect("memory");
    memory.write_image(&mut &b"not an image, which this engine does not mind"[..], 45).expect("it fits");
    let mut enclave = device.create_enclave().expect("a core is free");
    enclave.add_memory(memory).expect("memory is taken");
    enclave.add_vcpu(None).expect("a CPU is free");
    enclave
}

#[test]
fn enclave_runs_in_a_process_of_its_own_and_is_gone_after_close() {
    let place = place();
    let mut enclave = ready(&place.device);
    let slot_uid = enclave.slot_uid();
    let cid = enclave.start(None, false).unwrap();

    let listed = control::list(&place.world).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].enclave_cid, listed[0].memory_mib, &listed[0].cpu_ids), (cid.0, 64, &vec![1]));
    let record = place.device.launcher().and_then(|launcher| launcher.record(slot_uid.0)).unwrap();
    assert_eq!((record.cid, record.process_id), (Some(cid.0), Some(listed[0].process_id)));

    enclave.close();
    assert!(control::list(&place.world).unwrap().is_empty());
    assert!(!std::path::Path::new(&format!("/proc/{}", listed[0].process_id)).exists());
    assert_eq!(place.device.usage(), Some(Usage::default()));
    assert_eq!(place.world.claimed_cpus().unwrap(), [0_u32; 0]);
    assert!(!place.world.is_cid_claimed(cid.0).unwrap());
}

#[test]
fn enclave_terminated_by_somebody_else_is_seen_by_its_owner() {
    let place = place();
    let mut enclave = ready(&place.device);
    enclave.start(None, false).unwrap();
    let slot_uid = control::find(&place.world, &Selector::Name("test".to_owned())).unwrap();
    std::thread::scope(|scope| {
        let terminating = scope.spawn(|| control::terminate(&place.world, slot_uid).unwrap());
        assert!(enclave.wait_timeout(PATIENCE).unwrap());
        drop(enclave);
        assert_eq!(terminating.join().unwrap().reason, EndReason::Stopped);
    });
}

#[test]
fn cid_in_use_in_another_process_of_the_world_is_eaddrinuse_with_a_reason() {
    let place = place();
    let claimed = place.world.claim_cid(Some(77)).unwrap();
    let mut enclave = ready(&place.device);
    let error = enclave.start(Some(Cid(77)), false).unwrap_err();
    assert_eq!(error.code(), Some(Code::EADDRINUSE));
    assert!(error.detail().is_some_and(|detail| detail.contains("77")), "{error}");
    drop(claimed);
    assert_eq!(enclave.start(Some(Cid(77)), false).unwrap(), Cid(77));
}

#[test]
fn two_devices_of_one_world_run_enclaves_side_by_side() {
    let place = place();
    let other = device_in(&place.world);
    let (mut here, mut there) = (ready(&place.device), ready(&other));
    let cids = [here.start(None, false).unwrap(), there.start(None, false).unwrap()];
    assert_ne!(cids[0], cids[1]);
    assert_eq!(place.world.claimed_cpus().unwrap(), [1, 2]);
    assert_eq!(control::list(&place.world).unwrap().len(), 2);
    drop(here);
    assert!(!there.has_ended().unwrap());
    assert_eq!(control::list(&place.world).unwrap().len(), 1);
}

#[test]
fn dropped_device_ends_its_enclaves() {
    let place = place();
    let mut enclave = ready(&place.device);
    enclave.start(None, false).unwrap();
    drop(enclave);
    drop(place.device);
    assert!(control::list(&place.world).unwrap().is_empty());
}

#[test]
fn program_that_is_no_enclave_process_is_an_error_that_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(&directory.path().join("world")).unwrap();
    let mut launch = LaunchOptions::new("test");
    launch.program = Program { path: Some("/bin/false".into()), arguments: Vec::new() };
    let options = LocalOptions { world: Some(world), launch, ..LocalOptions::default() };
    let device = Device::open(DeviceChoice::Local(options)).unwrap();
    let mut enclave = ready(&device);
    let error = enclave.start(None, false).unwrap_err();
    assert_eq!(error.code(), Some(Code::EIO));
    assert!(error.detail().is_some_and(|detail| detail.contains("enclave process")), "{error}");
    drop(enclave);
    assert_eq!(device.usage(), Some(Usage::default()));
}
