//! What the tests of this crate share: a world in a temporary directory, and child processes that are this test program again.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nitroxide_world::World;

/// A world that is removed at the end of the test.
pub fn world() -> (tempfile::TempDir, World) {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("world")).unwrap();
    (dir, world)
}

/// This test program again, running only the test `role` with the environment variable `WORLD_TEST_ROLE` set to `world`.
pub struct Helper {
    pub child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Helper {
    pub fn start(role: &str, world: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", role, "--nocapture", "--test-threads=1"])
            .env("WORLD_TEST_ROLE", world)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdin, stdout }
    }

    /// The next line that begins with `@`, without that.
    pub fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the helper ended early");
            // The test harness prints `test name ... ` without a line feed before it.
            if let Some((_, text)) = line.split_once('@') {
                return text.trim_end().to_owned();
            }
        }
    }

    /// Ends it as the kernel's out-of-memory killer would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Closes its standard input and waits for its end.
    pub fn finish(mut self) {
        drop(self.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a helper: its world, or `None` when this is the ordinary test run.
pub fn role() -> Option<World> {
    let path = std::env::var_os("WORLD_TEST_ROLE")?;
    Some(World::open(Path::new(&path)).unwrap())
}

/// In a helper: tells the test something.
pub fn say(text: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "@{text}").unwrap();
    out.flush().unwrap();
}

/// In a helper: waits until the test closes standard input.
pub fn wait_for_end() {
    let _ = std::io::stdin().lines().count();
}
