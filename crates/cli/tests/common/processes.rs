//! What the tests see of processes and files: who is alive, who belongs to whom, what is left.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and the helpers of tests are tests too")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::text;

/// Only ends hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Everything below a folder that is not a folder, by its path in it.
pub fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder {
                folders.push(entry.path());
            } else {
                found.insert(entry.path().strip_prefix(folder).unwrap().to_owned());
            }
        }
    }
    found
}

/// Every process of this machine.
pub fn all_processes() -> Vec<u32> {
    fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// State and parent of a process; none when it is gone.
pub fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Whether a process runs.
pub fn is_alive(pid: u32) -> bool {
    // A process that nobody has reaped yet has ended all the same.
    stat(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// The processes that a process has started and not outlived.
pub fn children(pid: u32) -> Vec<u32> {
    all_processes().into_iter().filter(|child| stat(*child).is_some_and(|(_, parent)| parent == pid)).collect()
}

/// Program and arguments of a process; empty when it is gone.
pub fn command_line(pid: u32) -> String {
    fs::read(format!("/proc/{pid}/cmdline")).map(|line| text(&line).replace('\0', " ")).unwrap_or_default()
}

/// Processes for a message.
pub fn describe(family: &BTreeSet<u32>) -> Vec<String> {
    family.iter().map(|pid| format!("{pid} {:?} {:.60}", stat(*pid), command_line(*pid))).collect()
}

/// A process and all below it.
pub fn descendants(pid: u32) -> BTreeSet<u32> {
    let below = children(pid).into_iter().flat_map(descendants);
    below.chain([pid]).collect()
}

/// Waits until something is so.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not so: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process has a socket open.
pub fn has_socket(pid: u32) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok()).any(|target| target.to_string_lossy().starts_with("socket:"))
}

/// kill -9.
pub fn kill(pid: u32) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
}
