//! A real guest for tests and benchmarks: the distribution's kernel in a VM, `guest/probe`'s `vsock-load` as its init, our device at its vsock.
//!
//! [`Guest::ask`] gives the guest a command and its answer; [`Ports`] is the router: the guest connects to ports that a test listens on.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nitroxide_engine::{Accelerator, Discovery, Engine, FileRange, VirtioDiscovery, Vm, VmSpec};
use nitroxide_testkit::Setup;
use nitroxide_testkit::images::ImageSpec;
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockBackend, VsockConfig, spawn};
use rustix::fs::MemfdFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[path = "../../../../guest/probe/src/vsock_load.rs"]
pub mod load;

/// The guest's port with its services.
pub const SERVICE: u32 = 7000;
const CONTROL: u32 = 1;
const CID: u32 = 16; // arbitrary

/// Ends a hanging test; no verdict depends on it otherwise.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// RAM as many donated runs make it: more regions than the 8 that vhost-user has without memory slots.
const RUNS: u64 = 60;
const RUN_BYTES: u64 = 4 << 20;
const LAST_RUN_BYTES: u64 = 64 << 20;

/// What comes to a port, as the router gives it.
pub type Connections = Receiver<(ConnectRequest, UnixStream)>;

/// Who waits for the answer to which command.
type Answers = Arc<Mutex<HashMap<u64, Sender<String>>>>;

/// A router whose ports are channels.
#[derive(Debug, Default)]
pub struct Ports {
    listeners: Mutex<HashMap<u32, Sender<(ConnectRequest, UnixStream)>>>,
}

impl Ports {
    /// Takes connections to `port` from now on.
    pub fn listen(&self, port: u32) -> Connections {
        let (sender, receiver) = channel();
        self.listeners.lock().unwrap().insert(port, sender);
        receiver
    }
}

impl Router for Ports {
    fn connect(&self, request: ConnectRequest) -> io::Result<Route> {
        let listeners = self.listeners.lock().unwrap();
        let listener = listeners.get(&request.port).ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_read_timeout(Some(PATIENCE))?;
        theirs.set_write_timeout(Some(PATIENCE))?;
        listener.send((request, theirs)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours.into())
    }
}

/// A running guest with our device.
pub struct Guest {
    pub ports: Arc<Ports>,
    pub backend: VsockBackend,
    pub vm: Vm,
    socket: PathBuf,
    _directory: tempfile::TempDir,
    /// The stream with the commands, and where the next one comes from.
    control: Mutex<(UnixStream, Connections)>,
    answers: Answers,
    next: Mutex<u64>,
}

impl Guest {
    /// Boots one and waits until its init is ready.
    pub fn boot() -> Self {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("guest.sock");
        let ports = Arc::new(Ports::default());
        let control = ports.listen(CONTROL);
        let backend = spawn(VsockConfig {
            listener: Some(UnixListener::bind(&socket).unwrap()),
            ..VsockConfig::new(CID, Arc::clone(&ports) as Arc<dyn Router>)
        })
        .unwrap();
        let mut vm = launch(backend.take_frontend().unwrap());
        print_console(&mut vm);
        let answers = Answers::default();
        let stream = follow(&control, &answers);
        Self { ports, backend, vm, socket, _directory: directory, control: Mutex::new((stream, control)), answers, next: Mutex::new(0) }
    }

    /// Lets the guest unload and load its vsock driver; returns when it is ready again.
    pub fn reload_driver(&self) {
        let mut control = self.control.lock().unwrap();
        control.0.write_all(b"0 reload\n").unwrap();
        control.0 = follow(&control.1, &self.answers);
    }

    /// Gives the guest a command; the answer comes through the channel: `ok <words>` or `error <errno>`.
    pub fn ask(&self, command: &str) -> Receiver<String> {
        let (sender, receiver) = channel();
        let id = {
            let mut next = self.next.lock().unwrap();
            *next += 1;
            *next
        };
        self.answers.lock().unwrap().insert(id, sender);
        self.control.lock().unwrap().0.write_all(format!("{id} {command}\n").as_bytes()).unwrap();
        receiver
    }

    /// Connects to a port of the guest through the listener; `None` if it is refused.
    pub fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            match stream.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                _ => return None,
            }
        }
        assert!(line.starts_with(b"OK "), "{line:?}");
        Some(stream)
    }

    /// Connects to the guest's service `letter` with its two numbers.
    pub fn service(&self, letter: u8, bytes: u64, seed: u64) -> UnixStream {
        let mut stream = self.connect(SERVICE).expect("the guest accepts");
        let mut ask = vec![letter];
        ask.extend(bytes.to_le_bytes());
        ask.extend(seed.to_le_bytes());
        stream.write_all(&ask).unwrap();
        stream
    }
}

/// Takes the guest's control connection and hands its answers out from now on.
fn follow(control: &Connections, answers: &Answers) -> UnixStream {
    let (_, stream) = control.recv_timeout(PATIENCE).expect("the guest boots and connects");
    stream.set_read_timeout(None).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let waiting = Arc::clone(answers);
    std::thread::spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            let (id, answer) = line.split_once(' ').unwrap();
            if let Some(sender) = waiting.lock().unwrap().remove(&id.parse().unwrap()) {
                let _ = sender.send(answer.to_owned());
            }
        }
        waiting.lock().unwrap().clear(); // whoever waits sees that no answer comes
    });
    stream
}

/// The words of an answer that is `ok`.
pub fn words(answer: &Receiver<String>) -> Vec<String> {
    let answer = answer.recv_timeout(PATIENCE).expect("the guest answers");
    let words = answer.strip_prefix("ok").unwrap_or_else(|| panic!("the guest failed: {answer}"));
    words.split_whitespace().map(str::to_owned).collect()
}

fn launch(vsock: OwnedFd) -> Vm {
    let setup = Setup::locate();
    let engine = Engine::discover(&Discovery { chosen: None, path: None, setup: Some(setup.root().to_owned()), answers: None }).unwrap();
    let mut image = ImageSpec::new("vsock", "vsock-load", &[]);
    image.init = "vsock-load".to_owned();
    image.modules.retain(|module| module != "nsm");
    let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, RUNS * RUN_BYTES + LAST_RUN_BYTES).unwrap();
    let memory = Arc::new(memory);
    let range = |offset, size| FileRange { file: Arc::clone(&memory), offset, size };
    let mut ranges: Vec<_> = (0..RUNS).map(|run| range(run * RUN_BYTES, RUN_BYTES)).collect();
    ranges.push(range(RUNS * RUN_BYTES, LAST_RUN_BYTES));
    let spec = VmSpec {
        memory: ranges,
        vcpus: 1,
        kernel: File::open(setup.kernel()).unwrap().into(),
        initrd: Some(memfd_of(&image.bootstrap().to_bytes().unwrap())),
        cmdline: b"console=ttyS0 quiet panic=-1".to_vec(),
        vsock: Some(vsock),
        nsm: None,
        accelerator: Accelerator::Auto,
        discovery: VirtioDiscovery::Acpi,
    };
    engine.launch(spec).unwrap()
}

fn memfd_of(content: &[u8]) -> OwnedFd {
    let mut file = File::from(rustix::fs::memfd_create("part", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// Shows what the guest says, line by line, among the test's own output.
fn print_console(vm: &mut Vm) {
    let console = BufReader::new(File::from(vm.take_console().unwrap()));
    std::thread::spawn(move || {
        for line in console.split(b'\n').map_while(Result::ok) {
            eprintln!("guest: {}", String::from_utf8_lossy(&line).trim_end());
        }
    });
}
