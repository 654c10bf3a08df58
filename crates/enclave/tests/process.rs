//! Enclave processes with the engine that runs no VM: starting, ending, refusing, being controlled, being killed at every stage.
#![expect(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]

mod common;

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{GONE, PATIENCE, Place, assert_clean, eventually, is_alive, kill, notifier, request, role};
use nitroxide_abi::{Cid, Gpa};
use nitroxide_device::{DeviceCode, Launcher, MemoryRun};
use nitroxide_enclave::control::{self, Command as Wanted, ControlError, Request, Selector, VERSION};
use nitroxide_enclave::report::{EndReason, Flags, State};
use nitroxide_enclave::stage::Stage;
use nitroxide_enclave::{EngineChoice, LaunchOptions, MemoryMode};
use nitroxide_world::{Endpoint, World};

const MIB: u64 = 1 << 20;

#[test]
fn role_enclave_process() {
    if !common::is_role("role_enclave_process") {
        return;
    }
    nitroxide_enclave::run_process().unwrap();
}

#[test]
fn an_enclave_starts_is_described_and_stops() {
    let place = Place::new(64 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();

    let cid = slot.start(&request(), ended).unwrap();
    assert_eq!(cid, Cid(16));
    let listed = control::list(&place.world).unwrap();
    let [description] = &listed[..] else { panic!("{listed:?}") };
    assert_eq!(description.enclave_name, "test");
    assert_eq!(description.enclave_id, format!("i-0000000000000000-enc{uid:x}"));
    assert_eq!((description.enclave_cid, description.number_of_cpus, description.memory_mib), (16, 1, 64));
    assert_eq!((description.state, description.flags), (State::Running, Flags::None));
    assert_eq!(description.cpu_ids, [1]);
    assert_ne!(description.process_id, std::process::id());
    assert_eq!(control::find(&place.world, &Selector::Name("test".to_owned())).unwrap(), uid);
    assert_eq!(control::find(&place.world, &Selector::Id(description.enclave_id.clone())).unwrap(), uid);
    assert!(matches!(control::find(&place.world, &Selector::Name("other".to_owned())), Err(ControlError::NotFound(_))));
    let stages: Vec<Stage> = description.stages.iter().map(|time| time.stage).collect();
    for stage in [Stage::Requested, Stage::Spawned, Stage::Begun, Stage::Claimed, Stage::Served, Stage::Launching, Stage::Running] {
        assert!(stages.contains(&stage), "{stage:?} in {stages:?}");
    }

    slot.stop();
    assert!(!is_alive(description.process_id));
    assert!(news.try_recv().is_err(), "a stop that was asked for is no news");
    assert_eq!(place.launcher.record(uid).unwrap().end.unwrap().reason, EndReason::Stopped);
    drop(slot);
    assert_clean(&place.world);
}

#[test]
fn terminate_answers_when_the_process_is_gone_and_tells_everybody() {
    let place = Place::new(64 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    slot.start(&request(), ended).unwrap();
    let process = control::describe(&place.world, uid).unwrap().process_id;

    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..4).map(|_| scope.spawn(|| control::wait(&place.world, uid).unwrap())).collect();
        let follower = scope.spawn(|| {
            let mut stream = control::logs(&place.world, uid, true).unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap();
            stream.report().cloned().unwrap()
        });
        let terminating = scope.spawn(|| control::terminate(&place.world, uid).unwrap());
        news.recv_timeout(PATIENCE).unwrap();
        // The process stays for those who ask until its owner lets go, as a client does that sees POLLHUP and closes.
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap().reason, EndReason::Stopped);
        }
        assert_eq!(follower.join().unwrap().reason, EndReason::Stopped);
        drop(slot);
        assert_eq!(terminating.join().unwrap().reason, EndReason::Stopped);
        assert!(!is_alive(process));
    });
    assert!(matches!(control::describe(&place.world, uid), Err(ControlError::NotFound(_))));
    assert_clean(&place.world);
}

#[test]
fn after_terminate_the_cpus_can_be_taken_again() {
    let place = Place::new(2 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let cpu = place.world.claim_cpu(1).unwrap(); // As the owner's driver does.
    let (ended, news) = notifier();
    slot.start(&request(), ended).unwrap();
    let owner = std::thread::spawn(move || {
        news.recv_timeout(PATIENCE).unwrap();
        drop(slot);
        std::thread::sleep(Duration::from_millis(200)); // Makes a terminate that does not wait fail for sure.
        drop(cpu);
    });
    control::terminate(&place.world, uid).unwrap();
    drop(place.world.claim_cpu(1).unwrap());
    owner.join().unwrap();
}

#[test]
fn an_ended_enclave_answers_until_its_owner_lets_go() {
    let place = Place::new(64 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    slot.start(&request(), ended).unwrap();
    let client = std::thread::spawn({
        let world = place.world.clone();
        move || control::terminate(&world, uid).unwrap()
    });
    news.recv_timeout(PATIENCE).unwrap();
    assert_eq!(control::wait(&place.world, uid).unwrap().reason, EndReason::Stopped);
    let description = control::describe(&place.world, uid).unwrap();
    assert_eq!((description.state, description.exit.unwrap().reason), (State::Terminating, EndReason::Stopped));
    drop(slot);
    client.join().unwrap();
    assert_clean(&place.world);
}

#[test]
fn the_console_is_for_debug_mode_and_the_logs_are_for_the_owner() {
    let place = Place::new(64 * MIB, |_| {});
    let (mut plain, mut debug) = (place.slot(), place.slot());
    plain.start(&request(), notifier().0).unwrap();
    debug.start(&nitroxide_device::StartRequest { debug: true, ..request() }, notifier().0).unwrap();

    assert!(matches!(control::console(&place.world, plain.uid().0), Err(ControlError::NotDebug(_))));
    control::console(&place.world, debug.uid().0).unwrap();
    for slot in [&plain, &debug] {
        let mut output = Vec::new();
        control::logs(&place.world, slot.uid().0, false).unwrap().read_to_end(&mut output).unwrap();
        assert!(output.is_empty());
    }
    let names: Vec<String> = control::list(&place.world).unwrap().into_iter().map(|description| description.enclave_name).collect();
    assert!(names.contains(&"test".to_owned()) && names.contains(&"test_1".to_owned()), "{names:?}");
}

#[test]
fn a_cid_in_use_is_refused_and_the_slot_can_start_with_another() {
    let place = Place::new(64 * MIB, |_| {});
    let wish = |cid| nitroxide_device::StartRequest { cid: Some(Cid(cid)), ..request() };
    let (mut first, mut second) = (place.slot(), place.slot());
    first.start(&wish(20), notifier().0).unwrap();
    assert_eq!(second.start(&wish(20), notifier().0), Err(DeviceCode::EADDRINUSE));
    let refusal = place.launcher.refusal(second.uid().0).unwrap();
    assert_eq!(refusal.errno, 98);
    assert!(refusal.message.contains("cids/20"), "{}", refusal.message);
    assert_eq!(second.start(&wish(21), notifier().0), Ok(Cid(21)));
}

#[test]
fn memory_that_the_parent_does_not_have_is_refused() {
    let place = Place::new(4 * MIB, |_| {});
    let mut slot = place.launcher.reserve_slot().unwrap();
    assert_eq!(slot.add_memory(MemoryRun { gpa: Gpa(4 * MIB), size: 2 * MIB }), Err(DeviceCode::EFAULT));
    slot.add_memory(MemoryRun { gpa: Gpa(2 * MIB), size: 2 * MIB }).unwrap();
}

#[test]
fn an_image_that_is_none_is_einval_with_a_reason() {
    let place = Place::new(64 * MIB, |options| options.engine = EngineChoice::Auto);
    place.memory.write(b"not an image", 8 << 20);
    let mut slot = place.slot();
    let uid = slot.uid().0;
    assert_eq!(slot.start(&request(), notifier().0), Err(DeviceCode::EINVAL));
    let refusal = place.launcher.refusal(uid).unwrap();
    assert!(refusal.message.contains("image"), "{}", refusal.message);
    let process = place.launcher.record(uid).unwrap().process_id.unwrap();
    assert!(!is_alive(process));
    assert_clean(&place.world);
}

#[test]
fn copied_memory_is_taken_when_it_is_added() {
    let place = Place::new(32 * MIB, |options| {
        options.engine = EngineChoice::Auto;
        options.memory = MemoryMode::Copied;
    });
    let mut image = std::io::Cursor::new(Vec::new());
    nitroxide_eif::Builder::new(vec![0; 5000], "x").write_to(&mut image).unwrap();
    place.memory.write(image.get_ref(), 8 << 20);
    let mut slot = place.slot();
    place.memory.write(&vec![0xff; image.get_ref().len()], 8 << 20);
    // The copy is a sound image, though with a kernel that no VM can boot: whatever is refused now, it is not the image.
    let _ = slot.start(&request(), notifier().0);
    let record = place.launcher.record(slot.uid().0).unwrap();
    assert!(record.stages.iter().any(|time| time.stage == Stage::Verified), "{record:?}");
}

#[test]
fn many_enclaves_of_one_owner_start_at_once() {
    let place = Place::new(64 * MIB, |_| {});
    let mut cids: Vec<u32> = std::thread::scope(|scope| {
        let start = || {
            let mut slot = place.slot();
            let cid = slot.start(&request(), notifier().0).unwrap().0;
            (slot, cid)
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        let running: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(control::list(&place.world).unwrap().len(), 8);
        running.into_iter().map(|(_, cid)| cid).collect()
    });
    cids.sort_unstable();
    assert_eq!(cids, (16..24).collect::<Vec<u32>>());
    assert_clean(&place.world);
}

#[test]
fn a_killed_enclave_process_is_noticed_and_leaves_nothing() {
    let place = Place::new(64 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    slot.start(&request(), ended).unwrap();
    kill(control::describe(&place.world, uid).unwrap().process_id);
    news.recv_timeout(GONE).unwrap();
    assert_eq!(place.launcher.record(uid).unwrap().end.unwrap().reason, EndReason::ProcessLost);
    assert_eq!(control::list(&place.world).unwrap().len(), 0);
    slot.stop();
    drop(slot);
    assert_clean(&place.world);
}

#[test]
fn role_owner() {
    if !common::is_role("role_owner") {
        return;
    }
    let dir = std::env::var_os("ENCLAVE_TEST_WORLD").unwrap();
    let world = World::open(std::path::Path::new(&dir)).unwrap();
    let memory = common::Memory::new(64 * MIB);
    let launcher = nitroxide_enclave::ProcessLauncher::new(world, memory, common::options());
    let mut slot = launcher.reserve_slot().unwrap();
    slot.add_memory(MemoryRun { gpa: Gpa(0), size: 64 * MIB }).unwrap();
    let uid = slot.uid().0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = slot.start(&request(), notifier().0);
            loop {
                std::thread::park();
            }
        });
        // Tells the test how far the enclave is, one stage per line.
        let mut told = 0;
        loop {
            let record = launcher.record(uid).unwrap();
            for time in record.stages.iter().skip(told) {
                println!("@{} {}", time.stage.name(), record.process_id.unwrap_or(0));
                told += 1;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
}

/// An owner in a process of its own whose enclave stops at `stage`; returns it and the enclave's process when both are there.
fn owner_paused_at(place: &Place, stage: Stage) -> (std::process::Child, u32) {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(role("role_owner"))
        .env("ENCLAVE_TEST_WORLD", place.world.path())
        .env("NITROXIDE_PAUSE", stage.name())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(owner.stdout.take().unwrap()));
    let prefix = format!("{} ", stage.name());
    let process = loop {
        let line = lines.next().unwrap().unwrap();
        if let Some(pid) = line.split_once('@').and_then(|(_, text)| text.strip_prefix(&prefix)) {
            break pid.parse().unwrap();
        }
    };
    // Somebody has to read on, or the owner stops at a full pipe.
    std::thread::spawn(move || lines.count());
    (owner, process)
}

const STAGES: [Stage; 8] =
    [Stage::Begun, Stage::Received, Stage::Claimed, Stage::Extracted, Stage::Verified, Stage::Served, Stage::Launching, Stage::Running];

#[test]
fn a_killed_owner_takes_its_enclave_along_at_every_stage() {
    for stage in STAGES {
        let place = Place::new(2 * MIB, |_| {});
        let (mut owner, process) = owner_paused_at(&place, stage);
        owner.kill().unwrap();
        owner.wait().unwrap();
        eventually(&format!("the end of a process at {stage:?}"), GONE, || !is_alive(process));
        assert_clean(&place.world);
    }
}

#[test]
fn an_enclave_process_killed_at_any_stage_leaves_nothing_and_its_owner_goes_on() {
    for stage in STAGES {
        let place = Place::new(2 * MIB, |_| {});
        let (mut owner, process) = owner_paused_at(&place, stage);
        kill(process);
        eventually(&format!("the end of a process at {stage:?}"), GONE, || !is_alive(process));
        eventually("released claims", GONE, || !place.world.is_cid_claimed(16).unwrap());
        assert!(owner.try_wait().unwrap().is_none());
        owner.kill().unwrap();
        owner.wait().unwrap();
        assert_clean(&place.world);
    }
}

#[test]
fn a_start_that_hangs_is_refused_when_its_device_is_reset() {
    for stage in STAGES {
        let place = Place::new(64 * MIB, |options| {
            // `env` sets the variable for the enclave's process alone: this process has other tests in it.
            let pause = format!("NITROXIDE_PAUSE={}", stage.name());
            options.program.arguments.splice(0..0, [pause.into(), std::env::current_exe().unwrap().into_os_string()]);
            options.program.path = Some("/usr/bin/env".into());
        });
        let mut slot = place.slot();
        let uid = slot.uid().0;
        let interrupted = std::thread::scope(|scope| {
            let start = scope.spawn(|| slot.start(&request(), notifier().0));
            eventually("the stage", PATIENCE, || {
                place.launcher.record(uid).is_some_and(|record| record.stages.iter().any(|time| time.stage == stage))
            });
            while !start.is_finished() {
                place.launcher.interrupt();
                std::thread::sleep(Duration::from_millis(2));
            }
            start.join().unwrap()
        });
        interrupted.unwrap_err();
        drop(slot);
        assert_clean(&place.world);
    }
}

/// As many pieces as no socket takes at once, for a process that neither reads nor ends by itself.
#[test]
fn a_process_that_does_not_listen_does_not_hold_up_a_reset() {
    const PIECES: u64 = 6000;
    let place = Place::new(PIECES * 4 * MIB, |options| {
        options.program.arguments = vec!["100000".into()];
        options.program.path = Some("/bin/sleep".into());
    });
    let mut slot = place.launcher.reserve_slot().unwrap();
    for piece in 0..PIECES {
        slot.add_memory(MemoryRun { gpa: Gpa(piece * 4 * MIB), size: 2 * MIB }).unwrap();
    }
    let uid = slot.uid().0;
    std::thread::scope(|scope| {
        let start = scope.spawn(|| slot.start(&request(), notifier().0));
        eventually("the end of the start", PATIENCE, || {
            place.launcher.interrupt();
            start.is_finished()
        });
        start.join().unwrap().unwrap_err();
    });
    assert!(!is_alive(place.launcher.record(uid).unwrap().process_id.unwrap()));
}

#[test]
fn hostile_control_clients_cost_little_and_block_nobody() {
    let place = Place::new(64 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    slot.start(&request(), notifier().0).unwrap();
    let connect = || place.world.connect_patiently(Endpoint::Control(uid), None, PATIENCE).unwrap();
    let ask = |command| {
        let mut stream = connect();
        let request = serde_json::to_vec(&Request { protocol: VERSION, command }).unwrap();
        stream.write_all(&u32::try_from(request.len()).unwrap().to_le_bytes()).unwrap();
        stream.write_all(&request).unwrap();
        stream
    };
    let raw = |bytes: &[u8]| {
        let mut stream = connect();
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };

    // Many that wait or follow and never read: the last ones are refused, and a question is still answered.
    let waiting: Vec<_> = (0..47).map(|index| ask(if index % 2 == 0 { Wanted::Wait } else { Wanted::Logs { follow: true } })).collect();
    eventually("a refusal of more that wait", PATIENCE, || {
        let _one_more = ask(Wanted::Wait);
        matches!(control::logs(&place.world, uid, true), Err(ControlError::Refused(_)))
    });
    control::describe(&place.world, uid).unwrap();
    drop(waiting);
    eventually("room again", PATIENCE, || control::logs(&place.world, uid, false).is_ok());

    // Nonsense.
    assert_eq!(raw(&u32::MAX.to_le_bytes()), "");
    assert!(raw(b"\x02\0\0\0{}").contains("malformed"));
    assert!(raw(b"\x2b\0\0\0{\"protocol\":999,\"command\":\"wait\",\"more\":[1]}").contains("version"));
    // Connections that say nothing: more than are served. The surplus is closed, and when they are gone there is room.
    let silent: Vec<_> = (0..100).map(|_| connect()).collect();
    drop(silent);
    eventually("room again", PATIENCE, || control::describe(&place.world, uid).is_ok());
    slot.stop();
    assert_eq!(place.launcher.record(uid).unwrap().end.unwrap().reason, EndReason::Stopped);
}

#[test]
fn an_enclave_for_which_many_wait_can_still_be_ended() {
    let place = Place::new(2 * MIB, |_| {});
    let mut slot = place.slot();
    let uid = slot.uid().0;
    let (ended, news) = notifier();
    slot.start(&request(), ended).unwrap();
    let follow = || control::logs(&place.world, uid, true);
    let followers: Vec<_> = std::iter::from_fn(|| follow().ok()).take(1000).collect();
    assert!(matches!(follow(), Err(ControlError::Refused(_))));

    std::thread::scope(|scope| {
        let terminating = scope.spawn(|| control::terminate(&place.world, uid).map(|report| report.reason));
        let told = news.recv_timeout(GONE);
        drop(slot);
        assert_eq!(terminating.join().unwrap().unwrap(), EndReason::Stopped);
        told.unwrap();
    });
    drop(followers);
}

#[test]
fn a_program_that_cannot_be_started_is_a_refusal_with_a_reason() {
    let place = Place::new(2 * MIB, |options: &mut LaunchOptions| options.program.path = Some("/nonexistent/program".into()));
    let mut slot = place.slot();
    assert_eq!(slot.start(&request(), notifier().0), Err(DeviceCode::ENOENT));
    assert!(place.launcher.refusal(slot.uid().0).unwrap().message.contains("cannot be started"));
}

#[test]
fn a_program_that_ends_at_once_is_a_refusal_with_a_reason() {
    let place = Place::new(2 * MIB, |options: &mut LaunchOptions| options.program.path = Some("/bin/true".into()));
    let mut slot = place.slot();
    assert_eq!(slot.start(&request(), notifier().0), Err(DeviceCode::EIO));
    assert!(place.launcher.refusal(slot.uid().0).unwrap().message.contains("ended before"));
}

#[test]
fn without_an_owner_there_is_no_enclave_process() {
    let output = Command::new(std::env::current_exe().unwrap()).args(role("role_enclave_process")).stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("NoOwner"));
}
