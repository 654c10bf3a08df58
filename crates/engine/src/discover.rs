//! Which QEMU runs the enclaves: found, asked what it can do, and remembered.
//!
//! Order: `$NITROXIDE_QEMU`, the one in PATH, the one that `cargo xtask setup` unpacked (with its own dynamic loader). One that lacks the device for
//! /dev/nsm gives way to a later one that has it, and says so. The question (`-device help`) is asked once per state of the file (`answers`).

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use displaydoc::Display;
use thiserror::Error;

use crate::answers::{self, Abilities, Key};
use crate::arguments::SANDBOX;
use crate::child;

/// What attaches a VM to the two sockets of `nitroxide device`.
const VFIO_USER: &str = "vfio-user-pci";
const VSOCK_PCI: &str = "vhost-user-vsock-pci";

/// The emulator's file name.
const NAME: &str = "qemu-system-x86_64";
/// How long an emulator may take to list its devices; a slow disk's first reading included.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long its last words may take after its end.
const PIPE_PATIENCE: Duration = Duration::from_secs(2);
/// The most of an answer that is read; a real one is some 30 KiB.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Where to look for QEMU. [`Discovery::default`] takes everything from the environment.
#[derive(Debug, Clone)]
pub struct Discovery {
    /// The user's own choice: used whatever else is there.
    pub chosen: Option<PathBuf>,
    /// Folders to search, `:` between them, as in `$PATH`.
    pub path: Option<OsString>,
    /// The root folder of an unpacked tree, as [`setup_root`] gives it.
    pub setup: Option<PathBuf>,
    /// A file that keeps what emulators answered, for the next process; none: every process asks again.
    pub answers: Option<PathBuf>,
}

impl Default for Discovery {
    /// `$NITROXIDE_QEMU`, `$PATH`, [`setup_root`], and answers kept in the user's cache.
    fn default() -> Self {
        let chosen = std::env::var_os("NITROXIDE_QEMU").filter(|path| !path.is_empty()).map(PathBuf::from);
        Self { chosen, path: std::env::var_os("PATH"), setup: setup_root(), answers: answers::default_file() }
    }
}

/// The tree that `cargo xtask setup` made: `$NITROXIDE_SETUP/root`, else the nearest `setup/root` above the running program.
pub fn setup_root() -> Option<PathBuf> {
    if let Some(setup) = std::env::var_os("NITROXIDE_SETUP").filter(|path| !path.is_empty()) {
        return Some(PathBuf::from(setup).join("root"));
    }
    let program = std::env::current_exe().ok()?;
    program.ancestors().map(|folder| folder.join("setup/root")).find(|root| root.join("usr/bin").join(NAME).exists())
}

/// A QEMU that can run enclaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Qemu {
    /// The emulator's file.
    pub path: PathBuf,
    /// The unpacked tree it belongs to, with a dynamic loader and libraries of its own; none for an installed one.
    pub tree: Option<PathBuf>,
    /// Whether it has `vhost-user-test-device`, by which a guest gets /dev/nsm.
    pub has_nsm_device: bool,
    /// Whether it can filter its own system calls.
    pub has_sandbox: bool,
    /// The devices it lacks for a VM that `nitroxide device` makes a parent instance: of `vfio-user-pci` and `vhost-user-vsock-pci`.
    pub lacks_for_parents: Vec<&'static str>,
    /// What the user should know about the choice; empty where there is nothing to say.
    pub notes: Vec<String>,
}

/// No QEMU that can run enclaves.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum DiscoverError {
    /// No QEMU found: install qemu-system-x86 (11 or newer), run `cargo xtask setup`, or set NITROXIDE_QEMU to the emulator's path.
    Missing,
    /// NITROXIDE_QEMU names {path}, which cannot be executed: {reason}. Set it to a qemu-system-x86_64, or unset it.
    NotExecutable {
        /// What the variable says.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// {path} does not answer like QEMU ({status}). It printed: {output}
    Broken {
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: String,
        /// What it printed, shortened.
        output: String,
    },
    /// {path} is too old for enclaves: it lacks vhost-user-vsock-device. Use QEMU 11 or newer.
    TooOld {
        /// The program.
        path: PathBuf,
    },
}

impl Qemu {
    /// Finds the QEMU to be used.
    ///
    /// # Errors
    ///
    /// [`DiscoverError`]: nothing found, or the user's own choice does not work.
    pub fn find(discovery: &Discovery) -> Result<Self, DiscoverError> {
        if let Some(chosen) = &discovery.chosen {
            return Self::chosen(chosen, discovery.answers.as_deref());
        }
        let mut notes = Vec::new();
        let mut second_best: Option<Self> = None;
        for place in in_path(discovery.path.as_ref()).into_iter().chain(in_setup(discovery.setup.as_deref())) {
            match Self::ask(place, discovery.answers.as_deref()) {
                Ok(mut qemu) if qemu.has_nsm_device => {
                    qemu.notes = notes;
                    return Ok(qemu);
                }
                Ok(qemu) => {
                    notes.push(format!(
                        "{} has no vhost-user-test-device (QEMU 11 has): without it enclaves have no /dev/nsm.",
                        qemu.path.display()
                    ));
                    second_best.get_or_insert(qemu);
                }
                Err(error) => notes.push(error.to_string()),
            }
        }
        match second_best {
            Some(qemu) => Ok(Self { notes, ..qemu }),
            None => Err(DiscoverError::Missing),
        }
    }

    /// A command that starts this QEMU by itself, to ask it something.
    pub fn command(&self) -> Command {
        Place { path: self.path.clone(), tree: self.tree.clone() }.command()
    }

    /// The folders with its firmware, for `-L`, where it belongs to an unpacked tree; an installed QEMU knows its own.
    #[must_use]
    pub fn firmware(&self) -> Vec<PathBuf> {
        self.tree.iter().flat_map(|tree| ["usr/share/qemu", "usr/share/seabios"].map(|folder| tree.join(folder))).collect()
    }

    /// What it says its version is, e.g. `11.1.3`; none where it does not say.
    pub fn version(&self) -> Option<String> {
        let mut command = self.command();
        command.arg("--version").stdin(Stdio::null());
        let output = output_within(command, ANSWER_PATIENCE).ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.split_once("version ")?.1.split_ascii_whitespace().next().map(str::to_owned)
    }

    fn chosen(path: &Path, answers: Option<&Path>) -> Result<Self, DiscoverError> {
        let refuse = |reason: String| DiscoverError::NotExecutable { path: path.to_owned(), reason };
        let metadata = std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?;
        if !metadata.is_file() {
            return Err(refuse("it is not a file".to_owned()));
        }
        if metadata.permissions().mode() & 0o111 == 0 {
            return Err(refuse("its mode does not allow execution".to_owned()));
        }
        let path = std::fs::canonicalize(path).map_err(|error| refuse(error.to_string()))?;
        let qemu = Self::ask(Place { tree: tree_of(&path), path }, answers)?;
        if qemu.has_nsm_device {
            return Ok(qemu);
        }
        let note = format!("{} has no vhost-user-test-device (QEMU 11 has): enclaves have no /dev/nsm.", qemu.path.display());
        Ok(Self { notes: vec![note], ..qemu })
    }

    fn ask(place: Place, answers: Option<&Path>) -> Result<Self, DiscoverError> {
        let key = Key::of(&place.path);
        let abilities = match key.as_ref().and_then(|key| answers::recall(key, answers)) {
            Some(abilities) => abilities,
            None => {
                let abilities = place.abilities()?;
                if let Some(key) = key {
                    answers::remember(&key, abilities, answers);
                }
                abilities
            }
        };
        if !abilities.vsock {
            return Err(DiscoverError::TooOld { path: place.path });
        }
        let parents = [(VFIO_USER, abilities.vfio_user), (VSOCK_PCI, abilities.vsock_pci)];
        Ok(Self {
            path: place.path,
            tree: place.tree,
            has_nsm_device: abilities.nsm,
            has_sandbox: abilities.sandbox,
            lacks_for_parents: parents.into_iter().filter_map(|(device, there)| (!there).then_some(device)).collect(),
            notes: Vec::new(),
        })
    }
}

/// A QEMU before it was asked anything.
#[derive(Debug, Clone)]
struct Place {
    path: PathBuf,
    tree: Option<PathBuf>,
}

impl Place {
    fn command(&self) -> Command {
        match &self.tree {
            None => Command::new(&self.path),
            Some(tree) => {
                let mut command = Command::new(loader(tree));
                command.arg("--library-path").arg(libraries(tree)).arg(&self.path);
                command
            }
        }
    }

    fn abilities(&self) -> Result<Abilities, DiscoverError> {
        let ask = |sandbox: bool| {
            let mut command = self.command();
            if sandbox {
                command.args(["-sandbox", SANDBOX]);
            }
            command.args(["-device", "help"]).stdin(Stdio::null()).env_clear();
            output_within(command, ANSWER_PATIENCE)
        };
        let broken = |status: String, output: &[u8]| {
            let text = String::from_utf8_lossy(output);
            let output = if text.trim().is_empty() { "nothing".to_owned() } else { text.trim().chars().take(400).collect() };
            DiscoverError::Broken { path: self.path.clone(), status, output }
        };
        let first = ask(true).map_err(|error| broken(error.to_string(), b""))?;
        let (sandbox, answer) =
            if first.status.success() { (true, first) } else { (false, ask(false).map_err(|error| broken(error.to_string(), b""))?) };
        if !answer.status.success() {
            return Err(broken(answer.status.to_string(), if answer.stderr.is_empty() { &answer.stdout } else { &answer.stderr }));
        }
        let text = String::from_utf8_lossy(&answer.stdout);
        if !text.contains("name \"") {
            return Err(broken("it lists no devices".to_owned(), &answer.stdout));
        }
        let has = |device: &str| text.contains(&format!("name \"{device}\""));
        Ok(Abilities {
            vsock: has("vhost-user-vsock-device"),
            nsm: has("vhost-user-test-device"),
            sandbox,
            vfio_user: has(VFIO_USER),
            vsock_pci: has(VSOCK_PCI),
        })
    }
}

/// Runs a program to its end, or kills it: one that hangs must not hang a launch, nor outlive it.
fn output_within(mut command: Command, patience: Duration) -> io::Result<Output> {
    child::end_with_thread(&mut command);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
    let begin = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if begin.elapsed() < patience => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) => break Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", patience.as_secs()))),
            Err(error) => break Err(error),
        }
    };
    if status.is_err() {
        let _already_gone = child.kill();
        let _status = child.wait();
    }
    let status = status?;
    // What it started may hold its pipes open for ever; what it said itself has come by then.
    let said = |pipe: Option<Receiver<Vec<u8>>>| pipe.and_then(|pipe| pipe.recv_timeout(PIPE_PATIENCE).ok()).unwrap_or_default();
    Ok(Output { status, stdout: said(stdout), stderr: said(stderr) })
}

/// Reads a pipe to its end on a thread of its own.
fn collect(pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _what_there_is = pipe.take(MAX_ANSWER_BYTES).read_to_end(&mut bytes);
        let _nobody_waits = sender.send(bytes);
    });
    receiver
}

/// The dynamic loader of an unpacked tree.
pub(crate) fn loader(tree: &Path) -> PathBuf {
    tree.join("usr/lib64/ld-linux-x86-64.so.2")
}

/// The folder with an unpacked tree's libraries.
pub(crate) fn libraries(tree: &Path) -> PathBuf {
    tree.join("usr/lib/x86_64-linux-gnu")
}

/// The tree a program belongs to, where it is one with its own loader and not the host's.
fn tree_of(path: &Path) -> Option<PathBuf> {
    let tree = path.parent().filter(|bin| bin.ends_with("usr/bin"))?.ancestors().nth(2)?;
    (tree != Path::new("/") && loader(tree).exists()).then(|| tree.to_owned())
}

fn in_path(path: Option<&OsString>) -> Vec<Place> {
    let Some(path) = path else { return Vec::new() };
    std::env::split_paths(path)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(NAME))
        .find(|file| std::fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0))
        .map(|path| Place { tree: tree_of(&path), path })
        .into_iter()
        .collect()
}

fn in_setup(setup: Option<&Path>) -> Option<Place> {
    // Its real place: the folder may be replaced by a newer one while enclaves run.
    let tree = std::fs::canonicalize(setup?).ok()?;
    let path = tree.join("usr/bin").join(NAME);
    path.exists().then_some(Place { path, tree: Some(tree) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Discovery {
        Discovery { chosen: None, path: None, setup: None, answers: None }
    }

    fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn nothing_anywhere_is_missing() {
        assert!(matches!(Qemu::find(&nothing()), Err(DiscoverError::Missing)));
        let empty = Discovery { path: Some("/nonexistent:relative".into()), setup: Some("/nonexistent".into()), ..nothing() };
        let error = Qemu::find(&empty).unwrap_err().to_string();
        assert!(error.contains("cargo xtask setup") && error.contains("NITROXIDE_QEMU"), "{error}");
    }

    #[test]
    fn a_choice_that_cannot_be_executed_is_named() {
        for (path, reason) in [("/nonexistent/qemu", "No such file"), ("/etc/passwd", "execution"), ("/tmp", "not a file")] {
            let error = Qemu::find(&Discovery { chosen: Some(path.into()), ..nothing() }).unwrap_err();
            assert!(matches!(error, DiscoverError::NotExecutable { .. }), "{error:?}");
            assert!(error.to_string().contains(path) && error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn a_choice_that_is_no_qemu_is_broken() {
        for path in ["/bin/false", "/bin/true"] {
            let error = Qemu::find(&Discovery { chosen: Some(path.into()), ..nothing() }).unwrap_err();
            assert!(matches!(error, DiscoverError::Broken { .. }), "{error:?}");
        }
    }

    #[test]
    fn one_that_never_answers_is_killed_and_what_it_started_does_not_hold_us_up() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let text = format!("echo $$ > {}; sleep 8 & wait", pid.display());
        let program = script(folder.path(), "hanging", &text);
        let error = output_within(Command::new(program), Duration::from_secs(3)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let pid = std::fs::read_to_string(pid).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[test]
    fn one_without_the_nsm_device_gives_way_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (path, tree) = (folder.path().join("path"), folder.path().join("tree"));
        for folder in [path.clone(), tree.join("usr/bin"), tree.join("usr/lib64")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        script(&path, NAME, "echo 'name \"vhost-user-vsock-device\"'");
        script(&tree.join("usr/bin"), NAME, "exit 1");
        // The "loader" gets --library-path and the emulator's path: it answers for it.
        script(&tree.join("usr/lib64"), "ld-linux-x86-64.so.2", "echo 'name \"vhost-user-vsock-device\" name \"vhost-user-test-device\"'");
        let discovery = Discovery { chosen: None, path: Some(path.clone().into()), setup: Some(tree.clone()), answers: None };
        let qemu = Qemu::find(&discovery).unwrap();
        assert_eq!(qemu.tree, Some(std::fs::canonicalize(&tree).unwrap()));
        assert!(qemu.notes[0].contains("vhost-user-test-device"), "{:?}", qemu.notes);

        let alone = Qemu::find(&Discovery { setup: None, ..discovery }).unwrap();
        assert!(!alone.has_nsm_device && alone.tree.is_none() && alone.notes.len() == 1, "{alone:?}");
    }

    #[test]
    fn one_without_vsock_is_too_old() {
        let folder = tempfile::tempdir().unwrap();
        let chosen = script(folder.path(), "old", "echo 'name \"virtio-blk-device\"'");
        assert!(matches!(Qemu::find(&Discovery { chosen: Some(chosen), ..nothing() }), Err(DiscoverError::TooOld { .. })));
    }

    #[test]
    fn an_answer_is_remembered_until_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let count = folder.path().join("count");
        let text = format!("echo x >> {}; echo 'name \"vhost-user-vsock-device\"'", count.display());
        let chosen = Discovery { chosen: Some(script(folder.path(), "qemu", &text)), ..nothing() };
        Qemu::find(&chosen).unwrap();
        Qemu::find(&chosen).unwrap();
        assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 1);
        script(folder.path(), "qemu", &format!("{text} # changed"));
        Qemu::find(&chosen).unwrap();
        assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 2);
    }
}
