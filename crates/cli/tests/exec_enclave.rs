//! `nitroxide exec` with real enclaves: programs of others, unmodified, boot the sample image as an ordinary user, talk to it and see its end.
//!
//! They need `cargo xtask setup --tests`, `cargo xtask guest` and the examples of crates/user-home; `cargo xtask test` runs all before.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use common::{
    processes::{all_processes, eventually},
    run, text,
    user::{qemu_in_shell, shell},
};
use nitroxide_testkit::{Setup, images::ImageSpec, ne_ioctl_sample};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

/// Enclaves of two tests at once would take each other's time.
static ALONE: Mutex<()> = Mutex::new(());

/// What an ordinary user can reach: the project's folders may be somebody else's.
struct Place {
    folder: tempfile::TempDir,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let place = Place { folder };
    let bring = |program: &Path, name: &str| shell("install -m 755 \"$1\" \"$2\"", [program, &place.path(name)]);
    let nitroxide = PathBuf::from(env!("CARGO_BIN_EXE_nitroxide"));
    bring(&nitroxide, "nitroxide");
    bring(&nitroxide.with_file_name("examples").join("launch"), "launch");
    bring(&ne_ioctl_sample(), "ne_ioctl_sample");
    let setup = Setup::locate().root().parent().unwrap().to_owned();
    shell("mkdir \"$2\" && cp -a \"$1/root\" \"$2/root\"", [&setup, &place.path("setup")]);
    shell("mkdir \"$2\" && tar --extract --file \"$1\" --directory \"$2\"", [&Setup::locate().programs(), &place.path("programs")]);
    ImageSpec::hello().build(&place.path("hello.eif"));
    place
});

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// An ordinary user; as root, nobody.
struct User {
    home: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl User {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
        Self { home, _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    fn runtime(&self) -> PathBuf {
        self.home.path().join("runtime")
    }

    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        if rustix::process::geteuid().is_root() {
            command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        }
        command.arg(PLACE.path("nitroxide")).current_dir("/").stdin(Stdio::null());
        command
            .env("NITROXIDE_SETUP", PLACE.path("setup"))
            .env("NITROXIDE_RUNTIME_DIR", self.runtime())
            .env("NITROXIDE_EXEC_LOG", self.home.path().join("exec.log"))
            .env("XDG_CACHE_HOME", self.home.path().join("cache"))
            .env("XDG_DATA_HOME", self.home.path().join("data"))
            .env_remove("NITROXIDE_QEMU")
            .env("NITROXIDE_DEVICE", "local")
            .env("NO_COLOR", "1");
        command
    }

    fn exec(&self, words: &[&str]) -> Command {
        let mut command = self.command();
        command.args(["exec", "--"]).args(words);
        command
    }

    fn image(&self) -> String {
        PLACE.path("hello.eif").to_str().unwrap().to_owned()
    }

    fn program(&self, name: &str) -> String {
        PLACE.path(name).to_str().unwrap().to_owned()
    }

    /// A shell's words that run a program of the unpacked packages.
    fn packaged(&self, name: &str) -> String {
        let tree = self.program("programs");
        format!("'{tree}/usr/lib64/ld-linux-x86-64.so.2' --library-path '{tree}/usr/lib/x86_64-linux-gnu' '{tree}/usr/bin/{name}'")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("exec.log")).unwrap_or_default()
    }

    fn enclaves(&self) -> Vec<Value> {
        let output = run(self.command().arg("describe-enclaves"));
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What the sample says to a line, by a client in an exec of its own; it listens a moment after its heartbeat.
    fn ask(&self, cid: &Value, question: &str) -> String {
        let question = format!("echo '{question}' | exec '{}' vsock connect {cid} 5005", self.program("nitroxide"));
        let answer = std::cell::RefCell::new(String::new());
        eventually("the enclave answers", || {
            let output = run(&mut self.exec(&["sh", "-c", &question]));
            *answer.borrow_mut() = text(&output.stdout);
            output.status.success()
        });
        answer.into_inner()
    }

    /// Everything of the enclaves is gone: processes, claims, sockets.
    fn nothing_is_left(&self) {
        let wanted = format!("NITROXIDE_RUNTIME_DIR={}", self.runtime().display());
        let is_ours = |pid: &u32| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == wanted.as_bytes()))
        };
        eventually("no process is left", || !all_processes().iter().any(is_ours));
        let rooms = ["slots", "cids", "cpus", "memory", "names", "enclaves", "vsock/0", "vsock/3"];
        let left: Vec<_> = rooms
            .iter()
            .flat_map(|room| fs::read_dir(self.runtime().join(room)).into_iter().flatten())
            .map(|file| file.unwrap().path())
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new());
    }
}

/// Starts a client whose output is a terminal, so that it prints each line at once.
fn on_terminal(mut command: Command) -> (Child, BufReader<fs::File>) {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let client_end = fs::File::options().write(true).open(name.to_str().unwrap()).unwrap();
    let child = command.stdout(client_end).spawn().unwrap();
    (child, BufReader::new(terminal.into()))
}

/// Reads what a client prints until a line has these words.
fn read_until(lines: &mut impl BufRead, words: &str, log: impl Fn() -> String) -> String {
    let mut all = String::new();
    while !all.lines().next_back().is_some_and(|line| line.contains(words)) {
        let read = lines.read_line(&mut all).unwrap();
        assert!(read > 0, "{words:?} does not come: {all}\n{}", log());
    }
    all
}

#[test]
fn launch_path_of_the_crate_boots_an_enclave_to_its_heartbeat_and_talks_to_it() {
    let user = User::new();
    let output = run(&mut user.exec(&[&user.program("launch"), &user.image()]));
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}{}", text(&output.stderr), user.log());
    for line in ["heartbeat 0xb7, from the enclave: true", "from the parent: true", "hello from a parent", "console: true"] {
        assert!(said.contains(line), "no {line:?} in {said}");
    }
    user.nothing_is_left();
}

/// Threads, asyncio with connections that do not block and one that is refused, `/dev/vsock`, a signal in accept(); then the enclave.
const PYTHON: &str = r#"
import asyncio, fcntl, signal, socket, struct, sys, threading
def new():
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener = new()
listener.bind((socket.VMADDR_CID_ANY, 7500))
listener.listen()
def serve():
    for _ in range(20):
        client, (cid, port) = listener.accept()
        assert cid == 1 and client.getsockname() == (3, 7500)
        client.sendall(client.recv(100).upper())
        client.close()
thread = threading.Thread(target=serve)
thread.start()
for _ in range(20):
    client = new()
    client.settimeout(5)
    client.connect((3, 7500))
    assert client.getpeername() == (3, 7500)
    client.sendall(b'text')
    assert client.recv(100) == b'TEXT'
    client.close()
thread.join()
with open('/dev/vsock', 'rb') as device:
    answer = fcntl.ioctl(device, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, struct.pack('I', 0))
    assert struct.unpack('I', answer) == (3,)
async def main():
    async def handle(reader, writer):
        writer.write(b'you said ' + await reader.readline())
        await writer.drain()
        writer.close()
    loop = asyncio.get_running_loop()
    listener = new()
    listener.bind((3, 7501))
    listener.listen()
    listener.setblocking(False)
    server = await asyncio.start_server(handle, sock=listener)
    client = new()
    client.setblocking(False)
    await loop.sock_connect(client, (3, 7501))
    reader, writer = await asyncio.open_connection(sock=client)
    writer.write(b'this\n')
    assert await reader.read() == b'you said this\n'
    writer.close()
    server.close()
    client = new()
    client.setblocking(False)
    try:
        await loop.sock_connect(client, (3, 7502))
        raise SystemExit('connected to nobody')
    except ConnectionResetError:
        pass
asyncio.run(main())
class Rang(Exception):
    pass
def ring(*_):
    raise Rang()
signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    listener.accept()
    raise SystemExit('accepted nobody')
except Rang:
    pass
client = new()
client.connect((int(sys.argv[1]), 5005))
client.sendall(b'echo from Python\n')
print(client.recv(100).decode(), end='')
"#;

#[test]
fn socat_and_python_talk_to_each_other_and_to_an_enclave() {
    let user = User::new();
    let (mut sample, mut terminal) = on_terminal(user.exec(&[&user.program("ne_ioctl_sample"), &user.image()]));
    read_until(&mut terminal, "Entering sleep", || user.log());
    let cid = user.enclaves()[0]["EnclaveCID"].clone();
    // It listens a moment after its heartbeat.
    assert_eq!(user.ask(&cid, "echo ready"), "ready\n", "{}", user.log());

    let script = user.home.path().join("client.py");
    fs::write(&script, PYTHON).unwrap();
    let python = format!("PYTHONHOME='{}/usr' exec {} '{}' {cid}", user.program("programs"), user.packaged("python3"), script.display());
    let output = run(&mut user.exec(&["sh", "-c", &python]));
    assert_eq!((text(&output.stdout).as_str(), output.status.success()), ("from Python\n", true), "{}", text(&output.stderr));

    let socat = user.packaged("socat");
    let script = format!(
        "{socat} VSOCK-LISTEN:7600,fork,reuseaddr EXEC:cat & listener=$!
         until echo through socat | {socat} - VSOCK-CONNECT:3:7600; do sleep 0.1; done
         kill $listener
         echo echo from socat | {socat} - VSOCK-CONNECT:{cid}:5005"
    );
    let output = run(&mut user.exec(&["sh", "-c", &script]));
    assert_eq!(text(&output.stdout), "through socat\nfrom socat\n", "{}", text(&output.stderr));

    kill_process(Pid::from_child(&sample), Signal::TERM).unwrap();
    sample.wait().unwrap();
    user.nothing_is_left();
}

#[test]
fn client_that_is_killed_while_its_enclave_boots_leaves_nothing() {
    let user = User::new();
    let mut client = user.exec(&[&user.program("ne_ioctl_sample"), &user.image()]).stdout(Stdio::null()).spawn().unwrap();
    eventually("the enclave is there", || !user.enclaves().is_empty());
    client.kill().unwrap();
    client.wait().unwrap();
    user.nothing_is_left();
}

#[test]
fn kernels_sample_boots_an_enclave_that_others_reach_and_sees_its_end() {
    let user = User::new();
    let (mut sample, mut terminal) = on_terminal(user.exec(&[&user.program("ne_ioctl_sample"), &user.image()]));
    let printed = read_until(&mut terminal, "Entering sleep", || user.log());
    assert!(!printed.contains("Error"), "{printed}");

    // Another exec finds it, and so does the tool.
    let enclaves = user.enclaves();
    assert_eq!(enclaves.len(), 1);
    let cid = &enclaves[0]["EnclaveCID"];
    assert!(printed.contains(&format!("Enclave started, CID {cid}")), "{printed}");
    assert_eq!(user.ask(cid, "exit 0"), "exiting with status 0\n", "{}", user.log());
    read_until(&mut terminal, "Received POLLHUP", || user.log());
    kill_process(Pid::from_child(&sample), Signal::TERM).unwrap();
    sample.wait().unwrap();
    user.nothing_is_left();
}

#[test]
fn qemu_as_a_client_boots_an_enclave_and_shows_its_console() {
    let user = User::new();
    let setup = Setup::locate().root().to_str().unwrap().to_owned();
    let qemu = qemu_in_shell().replace(&setup, PLACE.path("setup/root").to_str().unwrap());
    let script = format!(
        "exec {qemu} -M nitro -accel nitro,debug-mode=on -kernel '{}' -m 256M -smp 2 -nographic -trace 'nitro*' -monitor none 2>&1",
        user.image()
    );
    let mut command = user.exec(&["sh", "-c", &script]);
    let mut client = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(client.stdout.take().unwrap());
    let printed = read_until(&mut output, "hello: listening", || user.log());
    assert!(printed.contains("nitro_heartbeat_done") && printed.contains("nitro_enclave_started"), "{printed}");
    assert_eq!(user.enclaves().len(), 1);
    kill_process(Pid::from_child(&client), Signal::TERM).unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    client.wait().unwrap();
    user.nothing_is_left();
}
