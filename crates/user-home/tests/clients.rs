//! Unmodified programs below the supervisor, in front of a device that starts nothing. Nothing of it needs root; as root, they are run as nobody.
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nitroxide_conformance::compare::{Difference, compare};
use nitroxide_conformance::random::DEFAULT_STEPS;
use nitroxide_conformance::record::{C_DRIVER_DIRECTED, C_DRIVER_RANDOM, expand};
use nitroxide_conformance::transcript::{Line, Transcript};
use nitroxide_testkit::guest_program;

/// A folder of an ordinary user, with the programs in it: that user may not be allowed to see the project's.
struct User {
    folder: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let user = Self { folder };
        user.bring("supervise", &example("supervise"));
        user
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bring(&self, name: &str, program: &Path) -> PathBuf {
        // By another process: of a file that this one had open, a child of another test could still have a descriptor, and then it is not executed.
        assert!(Command::new("install").args(["-m", "755"]).arg(program).arg(self.path(name)).status().unwrap().success());
        self.path(name)
    }

    fn command(&self) -> Command {
        let mut command = as_user();
        // Whoever runs the tests in the background may have signals ignored.
        command.args(["env", "--default-signal"]).arg(self.path("supervise")).arg(self.path("world")).current_dir("/").stdin(Stdio::null());
        command
    }

    /// Runs a client to its end.
    fn run<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Output {
        self.command().args(words).output().unwrap()
    }

    fn shell(&self, script: &str) -> Output {
        self.run(&["sh", "-c", script])
    }

    /// Claims of enclaves and their CPUs that are left.
    fn claims(&self) -> Vec<PathBuf> {
        let rooms = ["slots", "cids", "cpus", "memory"].map(|room| self.path("world").join(room));
        rooms.iter().flat_map(|room| fs::read_dir(room).into_iter().flatten()).map(|entry| entry.unwrap().path()).collect()
    }

    /// The processes that run this user's supervisor, or anything else from this folder.
    fn processes(&self) -> Vec<String> {
        let is_ours = |entry: &fs::DirEntry| {
            let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            program.starts_with(self.folder.path())
        };
        let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        entries.filter(is_ours).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    fn nothing_is_left(&self) {
        eventually("no process is left", || self.processes().is_empty());
        assert_eq!(self.claims(), Vec::<PathBuf>::new());
    }
}

/// What starts the rest of its words as an ordinary user; as root, as nobody.
fn as_user() -> Command {
    let mut command = Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    }
    command
}

fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).expect("tests lie in target/debug/deps").join("examples").join(name);
    assert!(program.exists(), "`cargo build -p nitroxide-user-home --examples` makes {}", program.display());
    program
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        // Only ends hangs.
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn wait_for_line(child: &mut Child) -> String {
    use std::io::BufRead as _;
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    line
}

#[test]
fn clients_end_is_the_commands_end() {
    let user = User::new();
    for status in [0, 3, 125, 255] {
        assert_eq!(user.shell(&format!("exit {status}")).status.code(), Some(status));
    }
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGSEGV, libc::SIGUSR1, libc::SIGPIPE] {
        let output = user.shell(&format!("kill -{signal} $$"));
        assert_eq!(output.status.signal(), Some(signal), "{output:?}");
    }
    user.nothing_is_left();
}

#[test]
fn programs_that_cannot_be_clients_are_refused_as_by_a_shell_and_say_why() {
    let user = User::new();
    let refused = |program: &str, status: i32, says: &str| {
        let output = user.run(&[program]);
        assert_eq!(output.status.code(), Some(status), "{program}: {output:?}");
        assert!(text(&output.stderr).contains(says), "{program}: {output:?}");
    };
    refused("/no/such/program", 127, "is not found");
    refused("no-such-program", 127, "is not found");
    refused("/etc/passwd", 126, "cannot be executed");
    // Another user's: this test's where it runs as root, else root's.
    let owned = user.path("owned");
    let set_uid = if rustix::process::geteuid().is_root() {
        let copied = Command::new("install").args(["-m", "4755", "/bin/true"]).arg(&owned).status().unwrap();
        assert!(copied.success());
        owned
    } else {
        let places = ["/bin/su", "/usr/bin/su", "/usr/bin/passwd", "/bin/mount"];
        PathBuf::from(places.into_iter().find(|path| fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o4000 != 0)).unwrap())
    };
    refused(set_uid.to_str().unwrap(), 126, "changes its privileges");
    user.nothing_is_left();
}

#[test]
fn files_of_the_driver_are_seen_by_ordinary_programs() {
    let user = User::new();
    let output = user.shell(
        "test -c /dev/nitro_enclaves && test -r /dev/nitro_enclaves && test -w /dev/nitro_enclaves && ! test -x /dev/nitro_enclaves && echo there
         cat /sys/module/nitro_enclaves/parameters/ne_cpus
         (echo 2-3 > /sys/module/nitro_enclaves/parameters/ne_cpus) 2>/dev/null || echo refused
         cd /dev && ls -l nitro_enclaves | cut -c1-10
         test \"$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)\" -gt 100 && echo pages
         test -e /dev/nitro_enclaves2 || echo no other",
    );
    assert_eq!(text(&output.stdout), "there\n2-5\nrefused\ncrw-rw-rw-\npages\nno other\n", "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn daemon_of_a_client_keeps_the_device_and_the_command_does_not_wait_for_it() {
    let user = User::new();
    let seen = user.path("seen");
    let script = format!(
        "(while ! test -e {0}.go; do sleep 0.05; done; test -c /dev/nitro_enclaves && echo yes > {0}) >/dev/null 2>&1 & exit 4",
        seen.display()
    );
    // Standard output of the command ends with the client: none of its processes keeps it.
    let output = user.shell(&script);
    assert_eq!(output.status.code(), Some(4));
    assert!(!user.processes().is_empty());
    fs::write(user.path("seen.go"), "").unwrap();
    eventually("the daemon has looked", || fs::read_to_string(&seen).is_ok_and(|text| text == "yes\n"));
    user.nothing_is_left();
}

#[test]
fn signals_to_the_command_reach_the_client() {
    let user = User::new();
    let script = "trap 'exit 9' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done";
    let mut child = user.command().args(["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait_for_line(&mut child), "ready\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
    assert_eq!(wait_for_line(&mut child), "usr1\n");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
    user.nothing_is_left();
}

#[test]
fn killing_the_command_kills_the_client() {
    let user = User::new();
    let sleep = user.bring("sleep", Path::new("/bin/sleep"));
    let mut child = user.command().arg(sleep).arg("1000").spawn().unwrap();
    // setpriv becomes the command; supervisor, reaper and client are three more.
    eventually("all are there", || user.processes().len() == 4);
    child.kill().unwrap();
    child.wait().unwrap();
    user.nothing_is_left();
}

#[test]
fn killed_at_any_time_the_command_leaves_nothing() {
    let user = User::new();
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    let client = user.bring("client", &example("client"));
    // From before the filter is there to the middle of many calls; and with an enclave.
    for step in 0..40 {
        let mut command = user.command();
        if step % 2 == 0 {
            command.arg(&program).args(["random", "--seed", "3", "--sequences", "500"]);
        } else {
            command.arg(&client).args(["hold", "64"]);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(step * 4));
        child.kill().unwrap();
        child.wait().unwrap();
        eventually("no process is left", || user.processes().is_empty());
        assert_eq!(user.claims(), Vec::<PathBuf>::new(), "killed after {} ms", step * 4);
    }
}

#[test]
fn inner_command_is_part_of_the_outer_one() {
    let user = User::new();
    let inner = format!("exec {0} /nowhere sh -c 'test -c /dev/nitro_enclaves && exit 6'", user.path("supervise").display());
    assert_eq!(user.shell(&inner).status.code(), Some(6));
    assert!(!Path::new("/nowhere").exists());
}

#[test]
fn library_client_starts_an_enclave_and_nothing_is_left_however_it_ends() {
    let user = User::new();
    let client = user.bring("client", &example("client"));
    let words = [client.to_str().unwrap(), "hold", "128"];
    let output = user.run(&words);
    assert_eq!(text(&output.stdout), "slot 1 CID 16 CPUs 2 3 ended false\n", "{output:?}");
    user.nothing_is_left();
    // Killed while it has an enclave.
    let mut child = user.command().args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait_for_line(&mut child), "slot 1 CID 16 CPUs 2 3 ended false\n");
    assert!(!user.claims().is_empty());
    let is_client = |pid: &String| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program == client);
    let process = user.processes().into_iter().find(is_client).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(process.parse().unwrap()).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    user.nothing_is_left();
}

/// What differs from the C driver's record beside its weaknesses and the extension's commands, and why.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("descriptors/1", "0", "read() of /dev/null, which stands in for the device"),
    ("descriptors/6", "/dev/null", "the same"),
    ("descriptors/9", "EAGAIN", "an enclave's descriptor is a pipe"),
    ("create/4", "\"2-5\\n\"", "the pool cannot be written"),
];

/// Figures that are right a moment after close(), or before the next call that needs what it gives back.
const FIGURES_OF_A_MOMENT: &[&str] = &["memory of slots", "commands to the device", "huge pages in use"];

#[test]
fn directed_conformance_cases_are_answered_as_by_the_c_driver() {
    let user = User::new();
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    let control = user.path("control");
    let words = [program.to_str().unwrap(), "run", "--control", control.to_str().unwrap()];
    let output = user.command().env("SUPERVISE_CONTROL", &control).args(words).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    // The pool is set by options here, so cases about it are left out.
    let transcript = |text: &str| {
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("pool-")).collect();
        Transcript::parse(&(lines.join("\n") + "\n")).unwrap()
    };
    let report = compare(&transcript(C_DRIVER_DIRECTED), &transcript(&text(&output.stdout)));
    assert_eq!(report.mismatch, None);
    let differences = report.differences.iter().filter(|difference| !FIGURES_OF_A_MOMENT.contains(&difference.left.call.as_str()));
    let found: Vec<(String, &str)> = differences
        .map(|difference| (format!("{}/{}", difference.right.case, difference.right.step), difference.right.answer.as_str()))
        .collect();
    let expected: Vec<(String, &str)> = DIFFERENCES.iter().map(|(step, answer, _)| ((*step).to_owned(), *answer)).collect();
    assert_eq!(found, expected);
    assert!(report.compared > 500, "only {} steps were compared", report.compared);
    println!("{} steps compared, {} left out, {} behind a weakness", report.compared, report.left_out, report.behind);
    user.nothing_is_left();
}

#[test]
fn a_page_is_given_once_however_it_comes_and_a_new_one_in_its_place_is_another() {
    const SAID: &str = "\
a page: 0
to another enclave: 262
when the first is closed: 0
a new page in its place: 0
the first of two that is taken: 14
a file's page: 0
under another address: 262
the file's next page: 0
a private page of a file: 0
one of another file in its place: 0
shared memory in a child: 262
private memory in a child: 0
what a closed enclave was given: 0
failures while stopped: 0
";
    let user = User::new();
    let program = user.bring("memory", &example("memory"));
    let output = user.run(&[program]);
    assert_eq!(text(&output.stdout), SAID, "{}", text(&output.stderr));
    user.nothing_is_left();
}

#[test]
fn in_a_container_what_its_profile_forbids_is_missing_and_named() {
    let user = User::new();
    let restricted = user.bring("restricted", &example("restricted"));
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    let run = |calls: &str, client: &[&str]| {
        let mut command = as_user();
        command.arg(&restricted).arg(calls).arg(user.path("supervise")).arg(user.path("world")).args(client).current_dir("/");
        command.output().unwrap()
    };
    // Docker's own: no AF_VSOCK, and what it leaves to those who may trace.
    let device = run("vsock,pidfd_getfd,kcmp", &["test", "-c", "/dev/nitro_enclaves"]);
    assert_eq!(device.status.code(), Some(0), "{}", text(&device.stderr));
    let sockets = |calls: &str| text(&run(calls, &[program.to_str().unwrap(), "vsock", "--filter", "socket"]).stdout);
    for calls in ["vsock,pidfd_getfd,kcmp", "pidfd_getfd"] {
        assert!(sockets(calls).contains("socket(STREAM) -> EPERM"), "{calls}: {}", sockets(calls));
    }
    // Podman's: all of it.
    assert!(sockets("kcmp").contains("socket(STREAM) -> descriptor"), "{}", sockets("kcmp"));
    let refused = run("process_vm_readv", &["true"]);
    assert_eq!(refused.status.code(), Some(125));
    assert!(text(&refused.stderr).contains("memory cannot be read") && text(&refused.stderr).contains("process_vm_readv"), "{refused:?}");
    user.nothing_is_left();
}

#[test]
fn command_that_its_user_may_execute_but_not_read_offers_everything() {
    let user = User::new();
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    fs::set_permissions(user.path("supervise"), fs::Permissions::from_mode(0o111)).unwrap();
    let output = user.run(&[program.to_str().unwrap(), "vsock", "--filter", "socket"]);
    assert!(text(&output.stdout).contains("socket(STREAM) -> descriptor"), "{output:?}");
    user.nothing_is_left();
}

#[test]
fn asynchronous_clients_and_their_server_meet() {
    let user = User::new();
    let program = user.bring("asynchronous", &example("asynchronous"));
    let output = user.run(&[program]);
    assert_eq!(
        text(&output.stdout),
        "100 clients had 49500000 bytes back\nnobody there: Err(ConnectionReset)\n",
        "{}",
        text(&output.stderr)
    );
    user.nothing_is_left();
}

/// What differs in random sequences: the call, the C driver's answer, the one here, and why.
const RANDOM_DIFFERENCES: &[(&str, &str, &str, &str)] = &[
    ("device Read", "EINVAL", "0", "read() of /dev/null"),
    (" Read", "EINVAL", "EAGAIN", "an enclave's descriptor is a pipe"),
    (" Read", "EINVAL", "0", "whose other end is closed when the enclave has ended"),
    (" Write", "EINVAL", "EBADF", "its end for reading"),
    (" Seek", "0", "errno 29", "which has no place"),
];

/// Random cases of the record in which the pool is written; it cannot be here.
fn is_about_the_pool(lines: &[Line]) -> bool {
    lines.iter().any(|line| line.call.starts_with("pool "))
}

#[test]
fn random_sequences_are_answered_as_by_the_c_driver() {
    let user = User::new();
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    let control = user.path("control");
    let words =
        [program.to_str().unwrap(), "random", "--control", control.to_str().unwrap(), "--compact", "--seed", "1", "--sequences", "2000"];
    let output = user.command().env("SUPERVISE_CONTROL", &control).args(words).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let [recorded, answered] = [C_DRIVER_RANDOM, &text(&output.stdout)].map(|text| expand(text, DEFAULT_STEPS).unwrap());
    let left_out: BTreeSet<_> = recorded
        .lines
        .chunk_by(|a, b| a.case == b.case)
        .filter(|lines| is_about_the_pool(lines))
        .map(|lines| lines[0].case.clone())
        .collect();
    let [recorded, answered] = [recorded, answered].map(|mut transcript| {
        transcript.lines.retain(|line| !left_out.contains(&line.case));
        transcript
    });
    let report = compare(&recorded, &answered);
    assert_eq!(report.mismatch, None);
    let is_known = |difference: &Difference| {
        let (call, answers) = (difference.left.call.as_str(), (difference.left.answer.as_str(), difference.right.answer.as_str()));
        let known = RANDOM_DIFFERENCES.iter().any(|(end, left, right, _)| call.ends_with(end) && answers == (*left, *right));
        known || FIGURES_OF_A_MOMENT.contains(&call)
    };
    let differences: Vec<_> = report.differences.iter().filter(|difference| !is_known(difference)).collect();
    println!("{report}");
    assert!(differences.is_empty(), "{} differences, among them {:#?}", differences.len(), &differences[..differences.len().min(20)]);
    user.nothing_is_left();
}

/// Where AF_VSOCK differs from Linux' own (crates/conformance/record/linux-vsock.txt), and why.
const VSOCK_DIFFERENCES: &[(&str, &str, &str)] = &[
    ("fresh/6", "OUT|HUP", "a UNIX socket hangs up until it is connected"),
    ("fresh/8", "EINVAL", "a UNIX socket that is not connected"),
    ("options/36", "5 s 250000 us", "Linux rounds to ticks of its clock"),
    ("bind/9", "0", "CID 2 is taken for the parent's"),
    ("bind/10", "2:7000, length 16", "the same"),
    ("bind/25", "OUT|HUP", "as fresh/6"),
    ("listen/11", "EINVAL", "as fresh/8"),
    ("refused/3", "OUT|HUP", "as fresh/6"),
    ("refused/8", "OUT|HUP", "the same"),
    ("refused/17", "OUT|HUP", "the same"),
    ("connection/30", "1", "UNIX sockets have data out of band"),
    ("connection/32", "IN|PRI|OUT", "the same"),
    ("ends/2", "OUT", "a UNIX socket stays writable, with EPIPE"),
    ("ends/8", "IN|OUT|HUP|RDHUP", "the same"),
    ("ends/12", "3:7040, length 16", "a UNIX socket stays connected to who is gone"),
    ("ends/13", "IN|OUT|HUP|RDHUP", "the same"),
    ("reset/0", "IN|OUT|ERR|HUP|RDHUP", "a UNIX socket tells of data that were not read"),
    ("reset/1", "ECONNRESET", "the same"),
    ("reset/3", "IN|OUT|ERR|HUP|RDHUP", "the same"),
    ("reset/4", "ECONNRESET", "the same"),
    ("not-blocking/9", "IN|OUT|ERR|HUP|RDHUP", "a UNIX socket whose connection was refused"),
    ("not-blocking/13", "EPIPE", "the same"),
    ("not-blocking/16", "ETIMEDOUT", "the same; Linux connects it when it is asked for the third time"),
];

#[test]
fn vsock_answers_as_linux_does() {
    let user = User::new();
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    let output = user.run(&[program.to_str().unwrap(), "vsock"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let record = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/record/linux-vsock.txt");
    let (recorded, answered) = (steps(&fs::read_to_string(record).unwrap()), steps(&text(&output.stdout)));
    assert_eq!(recorded.keys().collect::<Vec<_>>(), answered.keys().collect::<Vec<_>>());
    let differences: BTreeMap<_, _> = answered.iter().filter(|(step, answer)| recorded[*step] != **answer).collect();
    let expected: Vec<_> = VSOCK_DIFFERENCES.iter().map(|(step, answer, _)| (step.to_string(), answer.to_string())).collect();
    let mut found: Vec<_> = differences.into_iter().map(|(step, (_, answer))| (step.clone(), answer.clone())).collect();
    found.sort_by_key(|(step, _)| expected.iter().position(|(known, _)| known == step));
    assert_eq!(found, expected);
    user.nothing_is_left();
    let sockets = fs::read_dir(user.path("world/vsock/3")).unwrap().count();
    assert_eq!(sockets, 0, "ports are left");
}

#[test]
fn random_conformance_sequences_leave_nothing() {
    let user = User::new();
    let program = user.bring("nitroxide-conformance", &guest_program("nitroxide-conformance"));
    // The shell's parent is the reaper, whose parent is the supervisor.
    let script = format!(
        "parent() {{ sed -n 's/^PPid:\t//p' /proc/$1/status; }}
         supervisor=$(parent $(parent $$)); open() {{ ls /proc/$supervisor/fd | wc -l; }}
         {0} random --seed 7 --sequences 20 > /dev/null; sleep 1; before=$(open)
         {0} random --seed 1 --sequences 10000 | wc -l; sleep 1; echo $(($(open) - before))",
        program.display()
    );
    let output = user.shell(&script);
    let said = text(&output.stdout);
    let numbers: Vec<i64> = said.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert!(numbers[0] > 200_000, "{output:?}");
    assert_eq!(numbers[1], 0, "descriptors are left in the supervisor");
    user.nothing_is_left();
}

fn steps(transcript: &str) -> BTreeMap<String, (String, String)> {
    let lines = transcript.lines().filter(|line| !line.starts_with('#'));
    let parts = lines.filter_map(|line| {
        let (left, answer) = line.split_once(" -> ")?;
        let (step, call) = left.split_once(": ")?;
        Some((step.to_owned(), (call.to_owned(), answer.to_owned())))
    });
    parts.collect()
}
