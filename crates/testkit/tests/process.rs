//! Processes of a parent VM never outlive the test that started them, however it ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nitroxide_testkit::parent_vm::Process;

/// Makes this program the one that is killed.
const ROLE: &str = "NITROXIDE_TESTKIT_VICTIM";

fn sleeper() -> Process {
    Process::start(Command::new("sleep").arg("1000")).expect("sleep starts")
}

fn is_there(process: &str) -> bool {
    // A process that ended and was not reaped yet is a zombie.
    std::fs::read_to_string(Path::new("/proc").join(process).join("status")).is_ok_and(|status| !status.contains("State:\tZ"))
}

#[test]
fn a_dropped_process_is_gone() {
    let process = sleeper();
    let id = process.id().to_string();
    assert!(is_there(&id));
    drop(process);
    assert!(!is_there(&id));
}

#[test]
fn a_process_outlives_the_thread_that_started_it() {
    let process = std::thread::spawn(sleeper).join().expect("the thread does not panic");
    std::thread::sleep(Duration::from_millis(50));
    assert!(is_there(&process.id().to_string()));
}

#[test]
fn lines_of_standard_output_and_error_are_not_mixed_within_a_line() {
    // A line of standard error whose end is long in coming, and meanwhile one of standard output.
    let script = "printf half >&2; sleep 0.2; echo whole; sleep 0.2; echo ' done' >&2; printf last";
    let mut process = Process::start(Command::new("sh").args(["-c", script])).expect("sh starts");
    assert!(process.wait(Duration::from_secs(60)).is_some());
    let started = Instant::now();
    while !process.log().text().contains("last") {
        assert!(started.elapsed() < Duration::from_secs(60), "{}", process.log().text());
        std::thread::sleep(Duration::from_millis(5));
    }
    let text = process.log().text();
    assert!(text.lines().any(|line| line == "whole"), "{text}");
    assert!(text.contains("half done\n"), "{text}");
}

#[test]
fn a_process_of_a_killed_test_is_gone() {
    if std::env::var_os(ROLE).is_some() {
        println!("\nvictim {}", sleeper_kept().id());
        std::thread::sleep(Duration::from_secs(1000));
    }
    let mut victim = Command::new(std::env::current_exe().expect("a test has a path"))
        .args(["--exact", "a_process_of_a_killed_test_is_gone", "--nocapture"])
        .env(ROLE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("a test starts");
    let output = BufReader::new(victim.stdout.take().expect("a pipe"));
    let id = output.lines().map_while(Result::ok).find_map(|line| line.strip_prefix("victim ").map(str::to_owned));
    let id = id.expect("the victim says what it started");
    assert!(is_there(&id));
    victim.kill().expect("the victim can be killed");
    victim.wait().expect("the victim can be reaped");
    let started = Instant::now();
    while is_there(&id) {
        assert!(started.elapsed() < Duration::from_secs(60), "process {id} is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Not dropped before the kill.
fn sleeper_kept() -> &'static Process {
    Box::leak(Box::new(sleeper()))
}
