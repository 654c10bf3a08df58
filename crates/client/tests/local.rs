//! A local device through the client's interface, with a launcher that starts nothing: every call, every code, every fault.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nitroxide_abi::{Cid, Code, CpuId};
use nitroxide_client::{Device, DeviceChoice, DeviceKind, Enclave, LocalMemory, LocalOptions, OpenError, Topology};
use nitroxide_device::testing::{Call, NullLauncher};
use nitroxide_device::{DeviceCode, Faults, Launcher, Limits, Usage};
use nitroxide_world::World;

const MIB: u64 = 1 << 20;

/// Long enough for any machine; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(60);

/// A local device in a world of its own.
struct Place {
    device: Device,
    launcher: NullLauncher,
    memory: Arc<LocalMemory>,
    world: World,
    _directory: tempfile::TempDir,
}

fn place_with(change: impl FnOnce(&mut LocalOptions)) -> Place {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(&directory.path().join("world")).expect("a new world");
    let (device, launcher, memory) = device_in(&world, change);
    Place { device, launcher, memory, world, _directory: directory }
}

fn device_in(world: &World, change: impl FnOnce(&mut LocalOptions)) -> (Device, NullLauncher, Arc<LocalMemory>) {
    let launcher = NullLauncher::default();
    let mut options = LocalOptions { world: Some(world.clone()), reply_timeout: PATIENCE, ..LocalOptions::default() };
    change(&mut options);
    let mut memory = None;
    let device = Device::local_with(&options, |parent| {
        memory = Some(parent);
        Arc::new(launcher.clone()) as Arc<dyn Launcher>
    });
    (device.expect("a local device"), launcher, memory.expect("the device asks for its launcher"))
}

fn place() -> Place {
    place_with(|_| {})
}

fn faulty(faults: &str) -> Place {
    let faults: Faults = faults.parse().expect("tests write valid rules");
    place_with(|options| options.faults = faults)
}

/// A device whose replies are given up soon: for tests in which one never comes. Long enough that a loaded machine's own ones do.
fn impatient(faults: &str) -> Place {
    let faults: Faults = faults.parse().expect("tests write valid rules");
    place_with(|options| {
        options.faults = faults;
        options.reply_timeout = Duration::from_millis(1500);
    })
}

impl Place {
    fn ready(&self) -> Enclave {
        let mut enclave = self.device.create_enclave().expect("a core is free");
        let memory = self.device.allocate_memory(64 * MIB).expect("memory");
        enclave.add_memory(memory).expect("memory is taken");
        enclave.add_vcpu(None).expect("a CPU is free");
        enclave
    }

    fn running(&self) -> Enclave {
        let mut enclave = self.ready();
        enclave.start(None, false).expect("it starts");
        enclave
    }

    /// Nothing is held by anybody any more.
    fn assert_nothing_left(&self) {
        let held = || {
            let claimed = self.world.claimed_cpus().expect("the world can be read");
            (self.device.usage(), self.launcher.live_slots(), self.memory.size(), claimed)
        };
        let nothing = (Some(Usage::default()), 0, 0, Vec::new());
        let begin = Instant::now();
        // What could not be freed at once is freed when it is tried again.
        while held() != nothing && begin.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(held(), nothing);
    }
}

#[test]
fn enclave_is_created_filled_started_and_closed() {
    let place = place();
    let image: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let mut memory = place.device.allocate_memory(64 * MIB).unwrap();
    memory.write_image(&mut &image[..], 5_000_000).unwrap();

    let mut enclave = place.device.create_enclave().unwrap();
    assert_eq!(enclave.image_load_info().unwrap(), 8 * MIB);
    enclave.add_memory(memory).unwrap();
    assert_eq!(enclave.add_vcpu(None).unwrap(), CpuId(1));
    assert_eq!(enclave.add_vcpu(Some(CpuId(5))).unwrap(), CpuId(5));
    assert_eq!(place.world.claimed_cpus().unwrap(), [1, 5]);
    assert_eq!(enclave.start(Some(Cid(77)), true).unwrap(), Cid(77));

    let request = place.launcher.start_request(enclave.slot_uid()).unwrap();
    assert_eq!((request.debug, request.vcpus, request.cpus), (true, 2, vec![CpuId(1), CpuId(5)]));
    let run = place.launcher.memory(enclave.slot_uid())[0];
    let range = nitroxide_enclave::ParentMemory::resolve(&*place.memory, run).unwrap().remove(0);
    let mut donated = vec![0; image.len()];
    rustix::io::pread(&*range.file, &mut donated, range.offset + 8 * MIB).unwrap();
    assert_eq!(donated, image);

    enclave.close();
    place.assert_nothing_left();
}

#[test]
fn end_of_an_enclave_is_seen_by_poll_wait_and_other_pollers() {
    let place = place();
    let enclave = place.running();
    let other = place.running();
    assert!(!enclave.has_ended().unwrap());
    let copy = enclave.poll_fd().try_clone_to_owned().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| enclave.wait().unwrap());
        assert!(place.launcher.end(enclave.slot_uid()));
        waiting.join().unwrap();
    });
    assert!(enclave.wait_timeout(PATIENCE).unwrap());
    assert!(!other.wait_timeout(Duration::from_millis(20)).unwrap());
    drop(enclave);
    let mut fds = [rustix::event::PollFd::new(&copy, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, None).unwrap();
    assert_eq!(fds[0].revents(), rustix::event::PollFlags::HUP);
}

#[test]
fn codes_of_create_and_add_vcpu() {
    let place = place_with(|options| {
        options.topology = Topology { cpus: 6, threads: 2 };
        options.pool = "2-5".to_owned();
    });
    let mut first = place.device.create_enclave().unwrap();
    let code = |enclave: &mut Enclave, cpu: u32| enclave.add_vcpu(Some(CpuId(cpu))).unwrap_err().code();
    assert_eq!(first.add_vcpu(None).unwrap(), CpuId(2));
    assert_eq!(code(&mut first, 2), Some(Code::VCPU_ALREADY_USED));
    assert_eq!(code(&mut first, 1), Some(Code::VCPU_NOT_IN_CPU_POOL));
    assert_eq!(code(&mut first, 6), Some(Code::INVALID_VCPU));
    let mut second = place.device.create_enclave().unwrap();
    assert_eq!(code(&mut second, 3), Some(Code::VCPU_NOT_IN_CPU_POOL));
    assert_eq!(second.add_vcpu(Some(CpuId(5))).unwrap(), CpuId(5));
    assert_eq!(second.add_vcpu(None).unwrap(), CpuId(4));
    assert_eq!(code(&mut second, 0), Some(Code::NO_CPUS_AVAIL_IN_POOL));
    let error = place.device.create_enclave().unwrap_err();
    assert_eq!(error.code(), Some(Code::NO_CPUS_AVAIL_IN_POOL));
    assert!(error.to_string().contains("NE_CREATE_VM was refused with NE_ERR_NO_CPUS_AVAIL_IN_POOL (272)"), "{error}");
    drop(second);
    place.device.create_enclave().unwrap();
}

#[test]
fn codes_of_start_in_mainline_order() {
    let place = place_with(|options| {
        options.topology = Topology { cpus: 6, threads: 2 };
        options.pool = "2-5".to_owned();
    });
    let mut enclave = place.device.create_enclave().unwrap();
    let code = |enclave: &mut Enclave, flags, cid| enclave.start_with(flags, cid).unwrap_err().code();
    assert_eq!(code(&mut enclave, 2, 1), Some(Code::INVALID_FLAG_VALUE));
    for cid in [1, 2, 3, u64::from(u32::MAX), 1 << 32] {
        assert_eq!(code(&mut enclave, 0, cid), Some(Code::INVALID_ENCLAVE_CID));
    }
    assert_eq!(code(&mut enclave, 0, 0), Some(Code::NO_MEM_REGIONS_ADDED));
    enclave.add_memory(place.device.allocate_memory(62 * MIB).unwrap()).unwrap();
    assert_eq!(code(&mut enclave, 0, 0), Some(Code::ENCLAVE_MEM_MIN_SIZE));
    enclave.add_memory(place.device.allocate_memory(2 * MIB).unwrap()).unwrap();
    assert_eq!(code(&mut enclave, 0, 0), Some(Code::NO_VCPUS_ADDED));
    enclave.add_vcpu(None).unwrap();
    assert_eq!(code(&mut enclave, 0, 0), Some(Code::FULL_CORES_NOT_USED));
    enclave.add_vcpu(None).unwrap();
    enclave.start(None, false).unwrap();

    assert_eq!(code(&mut enclave, 0, 2), Some(Code::INVALID_ENCLAVE_CID));
    assert_eq!(code(&mut enclave, 0, 0), Some(Code::NOT_IN_INIT_STATE));
    assert_eq!(enclave.add_vcpu(None).unwrap_err().code(), Some(Code::NOT_IN_INIT_STATE));
    assert_eq!(enclave.image_load_info().unwrap_err().code(), Some(Code::NOT_IN_INIT_STATE));
    let memory = place.device.allocate_memory(2 * MIB).unwrap();
    assert_eq!(enclave.add_memory(memory).unwrap_err().code(), Some(Code::NOT_IN_INIT_STATE));
}

#[test]
fn codes_of_image_load_info_and_memory() {
    let place = place_with(|options| {
        options.limits = Limits { max_regions: 3, ..Limits::default() };
        options.region_bytes = 2 * MIB;
    });
    let mut enclave = place.device.create_enclave().unwrap();
    for flags in [0, 2, u64::MAX] {
        assert_eq!(enclave.image_load_info_with(flags).unwrap_err().code(), Some(Code::INVALID_FLAG_VALUE));
    }
    assert_eq!(place.device.allocate_memory(MIB).unwrap_err().code(), Some(Code::INVALID_MEM_REGION_SIZE));
    assert_eq!(place.device.allocate_memory(0).unwrap_err().code(), Some(Code::ENOMEM));
    enclave.add_memory(place.device.allocate_memory(4 * MIB).unwrap()).unwrap();
    let error = enclave.add_memory(place.device.allocate_memory(4 * MIB).unwrap()).unwrap_err();
    assert_eq!(error.code(), Some(Code::MEM_MAX_REGIONS), "{error}");
    // What was refused is gone, what was accepted stays.
    assert_eq!((place.memory.size(), place.device.usage().map(|usage| usage.regions)), (6 * MIB, Some(3)));
    drop(enclave);
    place.assert_nothing_left();
}

#[test]
fn memory_of_another_device_is_refused() {
    let (here, there) = (place(), place());
    let mut enclave = here.device.create_enclave().unwrap();
    let error = enclave.add_memory(there.device.allocate_memory(2 * MIB).unwrap()).unwrap_err();
    assert_eq!(error.code(), None);
    assert_eq!(there.memory.size(), 0);
}

#[test]
fn every_code_a_device_can_give_reaches_the_caller() {
    let codes = (256..=275).chain([2, 5, 12, 14, 16, 22, 28, 98]).filter_map(Code::new);
    for code in codes {
        let number = code.number();
        let place = faulty(&format!("alloc@2=-{number} add-vcpu@1=-{number} add-mem@1=-{number} start@1=-{number}"));
        let mut enclave = place.device.create_enclave().unwrap();
        assert_eq!(place.device.create_enclave().unwrap_err().code(), Some(code));
        let memory = || place.device.allocate_memory(64 * MIB).unwrap();
        assert_eq!(enclave.add_memory(memory()).unwrap_err().code(), Some(code));
        assert_eq!(enclave.add_vcpu(None).unwrap_err().code(), Some(code));
        enclave.add_memory(memory()).unwrap();
        enclave.add_vcpu(None).unwrap();
        let error = enclave.start(None, false).unwrap_err();
        assert_eq!(error.code(), Some(code));
        assert!(error.to_string().starts_with(&format!("NE_START_ENCLAVE was refused with {code}: ")), "{error}");
        enclave.start(None, false).unwrap();
        drop(enclave);
        place.assert_nothing_left();
    }
}

#[test]
fn device_codes_that_are_no_errno_become_eio() {
    let place = faulty("start@1=-5000 start@2=-512 start@3=-4");
    let mut enclave = place.ready();
    for _ in 0..3 {
        assert_eq!(enclave.start(None, false).unwrap_err().code(), Some(Code::EIO));
    }
    enclave.start(None, false).unwrap();
}

#[test]
fn refused_vcpu_gives_its_core_back() {
    let place = faulty("add-vcpu@1=-EIO");
    let mut enclave = place.device.create_enclave().unwrap();
    enclave.add_vcpu(Some(CpuId(9))).unwrap_err();
    assert_eq!(place.world.claimed_cpus().unwrap(), [0_u32; 0]);
    assert_eq!(enclave.add_vcpu(Some(CpuId(9))).unwrap(), CpuId(9));
}

#[test]
fn launcher_that_refuses_a_cid_in_use_says_so() {
    let place = place();
    let mut first = place.ready();
    first.start(Some(Cid(77)), false).unwrap();
    let mut second = place.ready();
    let error = second.start(Some(Cid(77)), false).unwrap_err();
    assert_eq!(error.code(), Some(Code::EADDRINUSE));
    assert!(error.to_string().contains("The CID is in use"), "{error}");
    second.start(None, false).unwrap();
}

#[test]
fn lost_replies_end_as_timeouts_and_leave_nothing_behind() {
    for rule in ["alloc@1=lost", "add-mem@1=lost", "add-vcpu@1=lost", "start@1=lost", "stop@1=lost", "free@1=lost", "info=lost"] {
        let place = impatient(rule);
        let first = place.device.create_enclave();
        if rule.starts_with("alloc") {
            assert_eq!(first.unwrap_err().code(), Some(Code::ETIMEDOUT), "{rule}");
            // The slot of the lost reply has no name here: only the end of the device frees it.
            drop(place.device);
            assert_eq!(place.launcher.live_slots(), 0);
            continue;
        }
        let mut enclave = first.unwrap();
        let timeouts = [
            enclave.add_memory(place.device.allocate_memory(64 * MIB).unwrap()).err().and_then(|error| error.code()),
            enclave.add_vcpu(None).err().and_then(|error| error.code()),
            enclave.start(None, false).err().and_then(|error| error.code()),
        ];
        assert!(
            timeouts.iter().flatten().all(|code| matches!(
                *code,
                Code::ETIMEDOUT | Code::NO_MEM_REGIONS_ADDED | Code::ENCLAVE_MEM_MIN_SIZE | Code::NO_VCPUS_ADDED
            )),
            "{rule}: {timeouts:?}"
        );
        let expected = usize::from(!rule.starts_with("stop") && !rule.starts_with("free") && !rule.starts_with("info"));
        assert_eq!(timeouts.iter().filter(|code| **code == Some(Code::ETIMEDOUT)).count(), expected, "{rule}: {timeouts:?}");
        drop(enclave);
        place.assert_nothing_left();
    }
}

#[test]
fn late_replies_are_waited_for_within_the_time_limit_and_not_believed_after_it() {
    let place = impatient("start@1=delay:30ms add-vcpu@1=delay:4s");
    let mut enclave = place.device.create_enclave().unwrap();
    enclave.add_memory(place.device.allocate_memory(64 * MIB).unwrap()).unwrap();
    assert_eq!(enclave.add_vcpu(None).unwrap_err().code(), Some(Code::ETIMEDOUT));
    // Its late reply, seconds from now, is nobody's.
    assert_eq!(enclave.add_vcpu(Some(CpuId(9))).unwrap(), CpuId(9));
    assert_eq!(enclave.start(None, false).unwrap_err().code(), Some(Code::FULL_CORES_NOT_USED));
    drop(enclave);
    let enclave = place.running();
    drop(enclave);
    place.assert_nothing_left();
}

#[test]
fn stop_and_free_that_fail_are_tried_again_until_they_succeed() {
    for rule in ["stop@1-2=-EIO", "free@1-2=-EIO"] {
        let place = faulty(rule);
        drop(place.running());
        place.assert_nothing_left();
    }
}

#[test]
fn device_that_never_frees_keeps_everything_until_its_own_end() {
    let place = faulty("free=-EIO");
    drop(place.running());
    assert_eq!((place.launcher.live_slots(), place.memory.size()), (1, 64 * MIB));
    assert_eq!(place.world.claimed_cpus().unwrap(), [1]);
    drop(place.device);
    assert_eq!((place.launcher.live_slots(), place.memory.size()), (0, 0));
    assert_eq!(place.world.claimed_cpus().unwrap(), [0_u32; 0]);
}

#[test]
fn spurious_event_wakes_nobody_and_a_lost_one_is_made_up_for_by_the_next() {
    let place = faulty("event@1=lost");
    let (first, second) = (place.running(), place.running());
    place.device.set_faults("info@1=spurious event@1=lost".parse().unwrap());
    assert!(place.launcher.end(first.slot_uid()));
    assert!(!first.wait_timeout(Duration::from_millis(30)).unwrap());
    assert!(place.launcher.end(second.slot_uid()));
    assert!(first.wait_timeout(PATIENCE).unwrap() && second.wait_timeout(PATIENCE).unwrap());
    let third = place.running();
    place.device.set_faults("any=spurious".parse().unwrap());
    drop(place.running());
    assert!(!third.wait_timeout(Duration::from_millis(30)).unwrap());
}

#[test]
fn w2_state_that_cannot_be_read_after_an_event_is_asked_for_again() {
    let place = impatient("info@1=-EIO info@2=lost");
    let mut enclave = place.running();
    assert!(place.launcher.end(enclave.slot_uid()));
    assert!(!enclave.has_ended().unwrap());
    assert_eq!(enclave.add_vcpu(None).unwrap_err().code(), Some(Code::NOT_IN_INIT_STATE));
    assert!(enclave.wait_timeout(PATIENCE).unwrap());
}

#[test]
fn an_end_during_start_is_seen_although_the_first_question_about_it_fails() {
    let place = faulty("start@1=delay:300ms info@1=-EIO info@2=-EIO");
    let mut enclave = place.ready();
    let uid = enclave.slot_uid();
    thread::scope(|scope| {
        let starting = scope.spawn(|| enclave.start(None, false).map(|_| enclave));
        while place.launcher.running() == 0 {
            thread::yield_now();
        }
        // The event comes while the call is under way, so the call looks at it when it is done.
        assert!(place.launcher.end(uid));
        let enclave = starting.join().unwrap().unwrap();
        assert!(enclave.wait_timeout(Duration::from_secs(20)).unwrap());
    });
}

#[test]
fn w9_slow_start_holds_up_neither_other_enclaves_nor_their_events() {
    let place = place();
    let running = place.running();
    let mut slow = place.ready();
    thread::scope(|scope| {
        place.launcher.close_gate(Call::Start);
        let starting = scope.spawn(|| slow.start(None, false).map(|_| slow));
        place.launcher.wait_at_gate(Call::Start);
        assert!(place.launcher.end(running.slot_uid()));
        assert!(running.wait_timeout(PATIENCE).unwrap());
        drop(running);
        drop(place.ready());
        place.launcher.open_gate(Call::Start);
        let slow = starting.join().unwrap().unwrap();
        assert!(place.launcher.end(slow.slot_uid()));
        assert!(slow.wait_timeout(PATIENCE).unwrap());
    });
    place.assert_nothing_left();
}

#[test]
fn two_devices_of_one_world_share_its_cpus() {
    let place = place_with(|options| options.pool = "1-3".to_owned());
    let (other, _, _) = device_in(&place.world, |options| options.pool = "1-3".to_owned());
    let mut here = place.device.create_enclave().unwrap();
    let mut there = other.create_enclave().unwrap();
    assert_eq!(here.add_vcpu(None).unwrap(), CpuId(1));
    assert_eq!(there.add_vcpu(None).unwrap(), CpuId(2));
    assert_eq!(there.add_vcpu(Some(CpuId(1))).unwrap_err().code(), Some(Code::VCPU_NOT_IN_CPU_POOL));
    assert_eq!(here.add_vcpu(None).unwrap(), CpuId(3));
    assert_eq!(other.create_enclave().unwrap_err().code(), Some(Code::NO_CPUS_AVAIL_IN_POOL));
    drop(here);
    assert_eq!(there.add_vcpu(None).unwrap(), CpuId(1));
}

#[test]
fn cores_of_two_devices_are_whole() {
    let change = |options: &mut LocalOptions| {
        options.topology = Topology { cpus: 6, threads: 2 };
        options.pool = "2-5".to_owned();
    };
    let place = place_with(change);
    let (other, _, _) = device_in(&place.world, change);
    let mut here = place.device.create_enclave().unwrap();
    let mut there = other.create_enclave().unwrap();
    assert_eq!(here.add_vcpu(None).unwrap(), CpuId(2));
    assert_eq!(place.world.claimed_cpus().unwrap(), [2, 3]);
    assert_eq!(there.add_vcpu(Some(CpuId(3))).unwrap_err().code(), Some(Code::VCPU_NOT_IN_CPU_POOL));
    assert_eq!(there.add_vcpu(None).unwrap(), CpuId(4));
}

#[test]
fn dropping_the_device_before_its_enclave_keeps_the_enclave_alive() {
    let place = place();
    let enclave = place.running();
    drop(place.device);
    assert_eq!(place.launcher.running(), 1);
    assert!(place.launcher.end(enclave.slot_uid()));
    assert!(enclave.wait_timeout(PATIENCE).unwrap());
    drop(enclave);
    assert_eq!((place.launcher.live_slots(), place.memory.size()), (0, 0));
}

#[test]
fn failed_launcher_calls_leave_nothing_behind() {
    let place = place();
    for call in [Call::ReserveSlot, Call::AddMemory, Call::Start] {
        place.launcher.refuse(call, Some(DeviceCode::ENOSPC));
        let code = match place.device.create_enclave() {
            Err(error) => error.code(),
            Ok(mut enclave) => {
                let added = enclave.add_memory(place.device.allocate_memory(64 * MIB).unwrap());
                enclave.add_vcpu(None).unwrap();
                match added {
                    Err(error) => error.code(),
                    Ok(()) => enclave.start(None, false).unwrap_err().code(),
                }
            }
        };
        assert_eq!(code, Some(Code::ENOSPC), "{call:?}");
        place.launcher.refuse(call, None);
        place.assert_nothing_left();
    }
}

#[test]
fn wrong_pools_and_topologies_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(&directory.path().join("world")).unwrap();
    let open = |cpus, threads, pool: &str| {
        let topology = Topology { cpus, threads };
        let options = LocalOptions { topology, pool: pool.to_owned(), world: Some(world.clone()), ..LocalOptions::default() };
        Device::open(DeviceChoice::Local(options)).map(|device| device.kind())
    };
    assert_eq!(open(4, 2, "2-3").unwrap(), DeviceKind::Local);
    for (cpus, threads, pool, part) in [
        (1, 1, "0", "topology of 1 CPUs"),
        (6, 4, "2-5", "topology of 6 CPUs"),
        (4, 0, "1", "with 0 threads"),
        (u32::MAX, 1, "1", "CPUs must be"),
        (4, 1, "0-3", "CPU pool `0-3` does not work: CPU 0 stays with the parent"),
        (4, 2, "1-3", "CPU 1 shares its core with CPU 0"),
        (6, 2, "2-4", "CPU 5 shares a core"),
        (4, 1, "4", "larger than this machine can have"),
        (4, 1, "", "The list is empty"),
        (4, 1, "x", "no CPU list"),
    ] {
        let message = open(cpus, threads, pool).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn host_device_that_is_not_there_is_an_error_and_auto_takes_a_local_one() {
    let path = std::path::PathBuf::from("/dev/no-nitro-enclaves-here");
    let error = Device::open(DeviceChoice::Host(path)).unwrap_err();
    assert!(matches!(error, OpenError::NoDeviceFile(_)), "{error}");
    if !std::path::Path::new("/dev/nitro_enclaves").exists() {
        let directory = tempfile::tempdir().unwrap();
        let world = World::open(&directory.path().join("world")).unwrap();
        let options = LocalOptions { world: Some(world), ..LocalOptions::default() };
        assert_eq!(Device::open(DeviceChoice::Auto(options)).unwrap().kind(), DeviceKind::Local);
    }
}
