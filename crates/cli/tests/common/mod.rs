//! What the tests of the program share: starting it, reading what it says, a small image.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// The program under test, with nothing of the caller's environment that would change what it does.
pub fn nitroxide() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nitroxide"));
    command.stdin(Stdio::null()).env_remove("NITROXIDE_DEVICE").env_remove("NITROXIDE_ENGINE").env("NO_COLOR", "1");
    command
}

/// Runs to the end; standard output is kept unless the command sends it elsewhere.
pub fn run(command: &mut Command) -> Output {
    command.output().expect("the program starts")
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
