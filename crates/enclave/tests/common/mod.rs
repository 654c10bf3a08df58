//! What the tests of this crate share: a world, a parent's memory, a launcher whose processes are this very test program.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]
#![allow(clippy::cast_possible_truncation, reason = "pages of small memories")]

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nitroxide_abi::Gpa;
use nitroxide_device::{EndedNotifier, Launcher, MemoryRun, Slot, StartRequest};
use nitroxide_enclave::{EngineChoice, LaunchOptions, ParentMemory, ProcessLauncher, Program};
use nitroxide_engine::FileRange;
use nitroxide_world::World;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;

/// Only ends a hang.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What is promised after a kill: everything else is gone. Generous, for loaded machines; the promise itself is one second.
pub const GONE: Duration = Duration::from_secs(10);

/// The memory of one parent: one file, in which guest-physical addresses are offsets.
pub struct Memory {
    pub file: Arc<OwnedFd>,
    pub size: u64,
}

impl Memory {
    pub fn new(size: u64) -> Arc<Self> {
        let file = memfd_create("parent", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        Arc::new(Self { file: Arc::new(file), size })
    }

    pub fn write(&self, mut bytes: &[u8], mut offset: u64) {
        while !bytes.is_empty() {
            let count = pwrite(&*self.file, bytes, offset).unwrap();
            bytes = &bytes[count..];
            offset += count as u64;
        }
    }
}

impl ParentMemory for Memory {
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
        let end = run.gpa.0.checked_add(run.size)?;
        (end <= self.size).then(|| vec![FileRange { file: Arc::clone(&self.file), offset: run.gpa.0, size: run.size }])
    }
}

/// Memory in two files that take turns every 2 MiB, as a client's huge pages may lie: as many pieces as there are pages.
pub struct Scattered {
    files: [Arc<OwnedFd>; 2],
}

impl Scattered {
    const PAGE: u64 = 2 << 20;

    /// A copy of another memory.
    pub fn of(memory: &Memory) -> Arc<Self> {
        let pages = memory.size / Self::PAGE;
        let files = [(); 2].map(|()| Memory::new((pages / 2 + 1) * Self::PAGE));
        let mut page = vec![0; Self::PAGE as usize];
        for index in 0..pages {
            rustix::io::pread(&*memory.file, &mut page, index * Self::PAGE).unwrap();
            if page.iter().any(|byte| *byte != 0) {
                files[index as usize % 2].write(&page, index / 2 * Self::PAGE);
            }
        }
        Arc::new(Self { files: files.map(|memory| Arc::clone(&memory.file)) })
    }
}

impl ParentMemory for Scattered {
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
        let pages = run.gpa.0 / Self::PAGE..(run.gpa.0 + run.size) / Self::PAGE;
        let piece = |index: u64| {
            let file = Arc::clone(&self.files[index as usize % 2]);
            FileRange { file, offset: index / 2 * Self::PAGE, size: Self::PAGE }
        };
        Some(pages.map(piece).collect())
    }
}

/// A launcher of a new world.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub world: World,
    pub memory: Arc<Memory>,
    pub launcher: ProcessLauncher,
}

impl Place {
    pub fn new(memory_bytes: u64, change: impl FnOnce(&mut LaunchOptions)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = World::open(&dir.path().join("world")).unwrap();
        let memory = Memory::new(memory_bytes);
        let mut options = options();
        change(&mut options);
        let launcher = ProcessLauncher::new(world.clone(), Arc::clone(&memory) as Arc<dyn ParentMemory>, options);
        Self { dir, world, memory, launcher }
    }

    /// The same place with its memory in many pieces.
    pub fn scattered(self, change: impl FnOnce(&mut LaunchOptions)) -> Self {
        let mut options = options();
        change(&mut options);
        let launcher = ProcessLauncher::new(self.world.clone(), Scattered::of(&self.memory), options);
        Self { launcher, ..self }
    }

    /// A slot with all of the parent's memory.
    pub fn slot(&self) -> Box<dyn Slot> {
        let mut slot = self.launcher.reserve_slot().unwrap();
        slot.add_memory(MemoryRun { gpa: Gpa(0), size: self.memory.size }).unwrap();
        slot
    }
}

/// Options whose enclave process is this test program.
pub fn options() -> LaunchOptions {
    let mut options = LaunchOptions::new("test");
    options.engine = EngineChoice::None;
    options.program = Program { path: None, arguments: role("role_enclave_process") };
    options
}

/// Whether this process was started to play a role of another test; in an ordinary run a role does nothing.
pub fn is_role(name: &str) -> bool {
    std::env::args().any(|argument| argument == name)
}

/// The arguments that run one test of this program, and by which it knows that it is to play its role.
pub fn role(name: &str) -> Vec<std::ffi::OsString> {
    ["--exact", name, "--nocapture", "--test-threads=1"].map(Into::into).to_vec()
}

pub fn request() -> StartRequest {
    StartRequest { cid: None, debug: false, vcpus: 1, cpus: vec![nitroxide_abi::CpuId(1)] }
}

/// A notifier and where it is heard.
pub fn notifier() -> (EndedNotifier, Receiver<()>) {
    let (sender, receiver) = channel();
    let sender = Mutex::new(sender);
    let notifier = EndedNotifier::from_fn(move || sender.lock().unwrap().send(()).unwrap_or_default());
    (notifier, receiver)
}

/// Waits until something holds.
pub fn eventually(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < patience, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process is there (and not only waiting to be waited for).
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// That nothing of any enclave is left in a world but files that a sweep removes.
pub fn assert_clean(world: &World) {
    // A process whose first thread is gone may still have others that hold its files.
    eventually("the end of control sockets", GONE, || world.enclaves().unwrap().is_empty());
    eventually("the end of claims", GONE, || !world.is_cid_claimed(16).unwrap());
    assert_eq!(world.claim_name("test").unwrap().name, "test");
    world.sweep().unwrap();
    let swept = world.sweep().unwrap();
    assert_eq!((swept.claims, swept.sockets, swept.foreign.len()), (0, 0, 0), "{swept:?}");
}
