//! What happens before commands: file systems, modules, lines of the plan. What fails is reported on the console and left out.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use nitroxide_parent::plan::{self, Step};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::say;

/// The search path of everything that runs here.
pub const PATH: &str = "/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin";

/// In this order; the directories are made where they are missing.
const FILE_SYSTEMS: [(&str, &str, &std::ffi::CStr); 9] = [
    ("devtmpfs", "/dev", c"mode=0755"),
    ("proc", "/proc", c""),
    ("sysfs", "/sys", c""),
    ("tmpfs", "/run", c"mode=0755"),
    ("tmpfs", "/tmp", c"mode=1777"),
    ("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", c"mode=1777"),
    ("hugetlbfs", "/dev/hugepages", c""),
    ("debugfs", "/sys/kernel/debug", c""),
];

/// Mounts everything and opens the console, which the kernel could not before there was a /dev.
pub fn mounts() {
    let mut failures = Vec::new();
    for (kind, at, options) in FILE_SYSTEMS {
        // A failure shows in the mount that follows.
        let _ = fs::create_dir_all(at);
        if let Err(error) = mount(kind, at, kind, MountFlags::empty(), options)
            && error != Errno::BUSY
        {
            failures.push(format!("warning: cannot mount {kind} on {at}: {error}"));
        }
        if at == "/dev" {
            open_console();
        }
    }
    for (link, target) in [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")] {
        let _ = std::os::unix::fs::symlink(target, link);
    }
    for failure in failures {
        say!("{failure}");
    }
    if let Err(error) = nitroxide_guest_sys::net::loopback_up() {
        say!("warning: cannot set up lo: {error}");
    }
    // Names the machine in prompts and logs only.
    let _ = rustix::system::sethostname(b"parent");
}

fn open_console() {
    if let Ok(console) = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty()) {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

/// Does what the plan says, line by line.
pub fn carry_out_plan() {
    let plan = fs::read_to_string(plan::PLACE).unwrap_or_default();
    for line in plan.lines() {
        match Step::from_line(line) {
            Ok(Step::Module { name, parameters }) => {
                if let Err(error) = load(Path::new(&format!("/modules/{name}.ko")), &parameters) {
                    say!("warning: cannot load module {name} {parameters}: {error}");
                }
            }
            Ok(Step::Run(line)) => match Command::new("/bin/sh").args(["-c", &line]).env("PATH", PATH).status() {
                Ok(status) if status.success() => {}
                Ok(status) => say!("warning: `{line}`: {status}"),
                Err(error) => say!("warning: `{line}`: {error}"),
            },
            Err(line) => say!("warning: the plan has an unknown line: {line}"),
        }
    }
}

fn load(path: &Path, parameters: &str) -> std::io::Result<()> {
    let file = File::open(path)?;
    let parameters = std::ffi::CString::new(parameters)?;
    match rustix::system::finit_module(&file, &parameters, 0) {
        // EEXIST: built in or loaded already.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
