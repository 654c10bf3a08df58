//! What the tool does about descriptors 0 to 2 that are closed when it starts (`src/entry.rs`).

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags};

#[test]
fn closed_standard_descriptors_become_dev_null() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();

    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$0\" attest --nonce \"@$1\" <&- >&- 2>&-", env!("CARGO_BIN_EXE_nitroxide-guest")]).arg(&pipe);
    let mut tool = shell.spawn().unwrap();
    // A named pipe can be opened for writing once the tool has opened it for its nonce: it is past its beginning, and waits.
    let nonce = loop {
        match File::options().write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(&pipe) {
            Ok(nonce) => break nonce,
            Err(error) => assert!(tool.try_wait().unwrap().is_none(), "the tool ended before it read its nonce: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let links = [0, 1, 2].map(|number| fs::read_link(format!("/proc/{}/fd/{number}", tool.id())));
    drop(nonce);
    tool.wait().unwrap();

    for link in links {
        assert_eq!(link.unwrap().to_str(), Some("/dev/null"));
    }
}
