//! What the tests of the program share: starting it, reading what it says, a small image.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod processes;
pub mod user;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// The program under test, with nothing of the caller's environment that would change what it does.
pub fn nitroxide() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nitroxide"));
    command
        .stdin(Stdio::null())
        .env_remove("NITROXIDE_DEVICE")
        .env_remove("NITROXIDE_ENGINE")
        .env_remove("NITROXIDE_INSTANCE_ID")
        .env_remove("NITROXIDE_IAM_ROLE")
        .env("NO_COLOR", "1");
    // The local PKI of all tests, which need not be the developer's.
    command.env("XDG_DATA_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/data"));
    command
}

/// Only ends hangs: the slowest guest test takes seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Runs to the end. Standard output is kept unless the command sends it elsewhere.
///
/// # Panics
///
/// When it does not end at all.
pub fn run(command: &mut Command) -> Output {
    finish(command.stdout(Stdio::piped()))
}

/// As [`run`], with standard output where the caller has sent it.
pub fn finish(command: &mut Command) -> Output {
    let child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
    let pid = Pid::from_child(&child);
    let (ended, watched) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if watched.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL);
            return false;
        }
        true
    });
    let output = child.wait_with_output().expect("the program can be waited for");
    drop(ended);
    assert!(watchdog.join().expect("the watchdog does not panic"), "hangs: {command:?}\n{}{}", text(&output.stdout), text(&output.stderr));
    output
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An image that is well-formed but cannot boot.
pub fn small_image(directory: &Path) -> PathBuf {
    let path = directory.join("small.eif");
    let builder = nitroxide_eif::Builder::new(vec![1_u8; 5000], "console=ttyS0").metadata(nitroxide_eif::Metadata::new("small", "1"));
    builder.ramdisk(vec![2_u8; 3000]).ramdisk(vec![3_u8; 100]).write_file(&path).expect("the image can be written");
    path
}
