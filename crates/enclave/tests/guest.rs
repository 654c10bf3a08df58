//! Whole enclaves: the sample image boots in a VM and everything around it is looked at. Needs `cargo xtask setup` and `cargo xtask guest`.
#![expect(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use common::{GONE, PATIENCE, Place, assert_clean, eventually, is_alive, kill, notifier, request};
use nitroxide_device::StartRequest;
use nitroxide_enclave::control;
use nitroxide_enclave::report::{ApplicationExit, EndReason, Flags, State};
use nitroxide_enclave::stage::Stage;
use nitroxide_enclave::{EngineChoice, LaunchOptions, MemoryMode};
use nitroxide_testkit::images::ImageSpec;
use nitroxide_world::{Endpoint, VsockAddress};

const MIB: u64 = 1 << 20;

/// The port of the sample application.
const HELLO_PORT: u32 = 5005;

#[test]
fn role_enclave_process() {
    if !common::is_role("role_enclave_process") {
        return;
    }
    nitroxide_enclave::run_process().unwrap();
}

/// A parent whose memory of 260 MiB holds an image; the image's measurements as well.
fn place(image: &ImageSpec, change: impl FnOnce(&mut LaunchOptions)) -> (Place, nitroxide_eif::Measurements) {
    let place = Place::new(260 * MIB, |options| {
        options.engine = EngineChoice::Auto;
        change(options);
    });
    let path = place.dir.path().join("image.eif");
    image.build(&path);
    let bytes = std::fs::read(&path).unwrap();
    place.memory.write(&bytes, 8 << 20);
    (place, nitroxide_eif::Image::open(bytes).unwrap().measure().unwrap())
}

/// Sends lines to the sample application and returns all it answers.
fn talk(stream: &UnixStream, lines: &str) -> String {
    (&mut &*stream).write_all(lines.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    (&mut &*stream).read_to_string(&mut answer).unwrap();
    answer
}

/// The processes below a process.
fn descendants(pid: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect();
    children.iter().copied().chain(children.iter().flat_map(|child| descendants(*child))).collect()
}

#[test]
fn the_sample_enclave_lives_a_whole_life() {
    let (place, measurements) = place(&ImageSpec::hello(), |_| {});
    let heartbeat = place.world.bind(Endpoint::Heartbeat(std::process::id())).unwrap();
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    let cid = slot.start(&StartRequest { vcpus: 2, ..request() }, ended).unwrap().0;

    // Its heartbeat comes to the process that created it, under its own address.
    let (mut stream, peer) = heartbeat.accept().unwrap();
    assert_eq!(peer.map(|peer| peer.cid), Some(cid));
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0xB7]);
    stream.write_all(&byte).unwrap();

    // Its console can be followed from the beginning.
    let mut console = BufReader::new(control::logs(&place.world, uid, true).unwrap());
    let mut line = String::new();
    while !line.contains("hello: listening") {
        line.clear();
        assert_ne!(console.read_line(&mut line).unwrap(), 0, "the enclave ended early");
    }

    // It has the measurements of the image: to itself by its NSM, and to us.
    let parent = VsockAddress { cid: 3, port: 4_000_000 };
    let (stream, _) = place.world.connect_enclave(parent, cid, HELLO_PORT, PATIENCE).unwrap();
    let answer = talk(&stream, "echo both ways\npcrs\n");
    assert!(answer.contains("both ways\n"), "{answer}");
    for (register, value) in [("PCR0", measurements.pcr0), ("PCR1", measurements.pcr1), ("PCR2", measurements.pcr2)] {
        assert!(answer.contains(&format!("{register} {value}")), "{register} {value} in {answer}");
    }
    let description = control::describe(&place.world, uid).unwrap();
    assert_eq!(description.measurements, Some((&measurements).into()));
    assert_eq!((description.state, description.flags, description.image_name.as_deref()), (State::Running, Flags::None, Some("hello")));
    assert_eq!((description.memory_mib, description.number_of_cpus), (260, 2));
    assert!(description.stages.iter().any(|time| time.stage == Stage::Heartbeat));
    assert!(description.engine.contains("qemu"), "{}", description.engine);
    let first = description.stages.first().unwrap().at_ns;
    for time in &description.stages {
        println!("{:>10} {:>8} us", time.stage.name(), (time.at_ns - first) / 1000);
    }

    // Nobody listens on other ports of the parent, and CID 0 has no console outside of debug mode.
    assert!(place.world.connect(Endpoint::Console(cid), Some(parent)).is_err());
    assert!(place.world.connect_enclave(parent, cid, HELLO_PORT + 1, PATIENCE).is_err());

    // It ends by itself, and says how.
    let (stream, _) = place.world.connect_enclave(parent, cid, HELLO_PORT, PATIENCE).unwrap();
    let waiter = std::thread::spawn({
        let world = place.world.clone();
        move || control::wait(&world, uid).unwrap()
    });
    talk(&stream, "exit 42\n");
    news.recv_timeout(PATIENCE).unwrap();
    let report = waiter.join().unwrap();
    assert_eq!(report.application, Some(ApplicationExit::Exited(42)), "{report:?}");
    assert!(matches!(report.reason, EndReason::PoweredOff | EndReason::Rebooted), "{report:?}");
    assert!(report.console_tail.contains("exit"), "{}", report.console_tail);
    let mut rest = String::new();
    console.read_to_string(&mut rest).unwrap();
    assert_eq!(console.get_ref().report(), Some(&report));

    slot.stop();
    drop(slot);
    assert!(!is_alive(description.process_id));
    assert_eq!(place.launcher.record(uid).unwrap().end, Some(report));
    assert_clean(&place.world);
}

#[test]
fn in_debug_mode_the_console_is_on_cid_0_and_a_killed_qemu_is_an_engine_failure() {
    // In more pieces than a VM can have.
    let place = place(&ImageSpec::hello(), |_| {}).0.scattered(|options| options.engine = EngineChoice::Auto);
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    let cid = slot.start(&StartRequest { debug: true, ..request() }, ended).unwrap().0;
    let process = control::describe(&place.world, uid).unwrap().process_id;

    let console = place.world.connect(Endpoint::Console(cid), Some(VsockAddress { cid: 3, port: 4_000_000 })).unwrap();
    let mut lines = BufReader::new(console);
    let mut output = String::new();
    // The heartbeat was answered without anybody listening, or init would not have gone on.
    while !output.contains("hello: listening") {
        let count = lines.read_line(&mut output).unwrap();
        assert_ne!(count, 0, "the console ended early: {:?}\n{output}", control::wait(&place.world, uid));
    }
    assert!(output.contains(&format!("PCR0 {}", "0".repeat(96))), "{output}");

    let below = descendants(process);
    assert!(!below.is_empty());
    for pid in &below {
        kill(*pid);
    }
    news.recv_timeout(PATIENCE).unwrap();
    let report = place.launcher.record(uid).unwrap().end.unwrap();
    assert_eq!(report.reason, EndReason::EngineFailed, "{report:?}");
    assert!(report.console_tail.contains("hello: listening"), "{}", report.console_tail);
    let description = control::describe(&place.world, uid).unwrap();
    assert_eq!((description.state, description.exit), (State::Terminating, Some(report)));
    lines.read_to_string(&mut output).unwrap(); // Which shows that the console's stream has ended.
    drop(slot);
    assert_clean(&place.world);
}

#[test]
fn a_killed_enclave_process_takes_its_vm_along() {
    let (place, _) = place(&ImageSpec::hello(), |options| options.memory = MemoryMode::Copied);
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    slot.start(&request(), ended).unwrap();
    let process = place.launcher.record(uid).unwrap().process_id.unwrap();
    let below = descendants(process);
    assert!(!below.is_empty());
    kill(process);
    news.recv_timeout(GONE).unwrap();
    eventually("the end of QEMU", GONE, || below.iter().all(|pid| !is_alive(*pid)));
    drop(slot);
    assert_clean(&place.world);
}

/// Bytes of a parent's file that are there; nothing else is anything but zero.
fn there(place: &Place) -> u64 {
    u64::try_from(rustix::fs::fstat(&place.memory.file).unwrap().st_blocks).unwrap() * 512
}

#[test]
fn a_kernel_panic_is_told_from_a_reboot_and_nothing_of_the_enclave_stays_with_its_parent() {
    for mode in [MemoryMode::Shared, MemoryMode::Isolated] {
        let (place, _) = place(&ImageSpec::probe(&["panic"]), |options| options.memory = mode);
        let image = there(&place);
        let mut slot = place.slot();
        assert_eq!(there(&place), if mode == MemoryMode::Isolated { 0 } else { image });
        let (ended, news) = notifier();
        slot.start(&request(), ended).unwrap();
        news.recv_timeout(PATIENCE).unwrap();
        let report = place.launcher.record(slot.uid().0).unwrap().end.unwrap();
        assert_eq!(report.reason, EndReason::Panicked, "{report:?}");
        assert!(report.console_tail.contains("Kernel panic"), "{report:?}");
        // The guest has run in the parent's own pages, or in none of them.
        assert!(
            if mode == MemoryMode::Isolated { there(&place) == 0 } else { there(&place) > image },
            "{mode:?}: {} {image}",
            there(&place)
        );
        drop(slot);
        assert_eq!(there(&place), 0, "{mode:?}");
    }
}
