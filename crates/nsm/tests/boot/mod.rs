//! A machine whose first process is one of `guest/probe`'s NSM programs: a stock kernel, our NSM behind QEMU's vhost-user device.
//!
//! [`Guest`] boots it, [`Lines`] is what the program printed behind its mark (`nsm-check: `). Guest memory comes in ten regions, more than a backend without
//! CONFIGURE_MEM_SLOTS could take. Needs `cargo xtask setup` and `cargo xtask guest`.
#![allow(dead_code, reason = "each test program uses a part")]

use nitroxide_eif::cpio::{Device, Tree};
use nitroxide_nsm::{InitialPcrs, NsmBackend, NsmConfig};
use nitroxide_testkit::{Setup, guest_program};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Duration;

pub const INSTANCE_ID: &str = "i-0123456789abcdef0";
pub const MODULE_ID: &str = "i-0123456789abcdef0-enc0123456789abcdef";

const REGIONS: u32 = 10; // more than the 8 that one SET_MEM_TABLE message holds
const REGION_MIB: u32 = 26; // arbitrary; Debian's kernel needs 96 MiB altogether

/// Only ends a run that hangs; a boot takes about ten seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// What is measured where a test does not care.
pub fn some_pcrs() -> InitialPcrs {
    InitialPcrs::of_image([0x11; 48], [0x22; 48], [0x33; 48], Some([0x88; 48])).with_instance_id(INSTANCE_ID)
}

/// A booting machine and its NSM.
pub struct Guest {
    program: &'static str,
    qemu: Child,
    /// The NSM, which has to serve as long as the machine runs.
    pub nsm: NsmBackend,
    _folder: tempfile::TempDir,
}

impl Guest {
    /// Boots a machine whose first process is that program.
    pub fn boot(program: &'static str, debug: bool, pcrs: impl FnOnce() -> InitialPcrs + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let initrd = folder.path().join("initrd");
        write_initrd(&initrd, program);
        let nsm = nitroxide_nsm::spawn(NsmConfig { module_id: MODULE_ID.into(), pcrs: Box::new(pcrs), debug, pki: None }).unwrap();
        let frontend = nsm.take_frontend().unwrap();
        let qemu = start(&initrd, &frontend);
        Self { program, qemu, nsm, _folder: folder }
    }

    /// Waits for the machine's end; `seen` is told every line of the program when it comes.
    pub fn lines(mut self, seen: impl FnMut(&str)) -> Lines {
        let lines = Lines::read_from(&mut self.qemu, self.program, seen);
        self.qemu.wait().unwrap();
        lines
    }
}

/// The lines that the program printed, without its mark.
pub struct Lines(pub Vec<String>);

impl Lines {
    /// Reads to the end of QEMU's output, telling `seen` every line when it comes. A QEMU that does not end is ended.
    fn read_from(qemu: &mut Child, program: &str, mut seen: impl FnMut(&str)) -> Self {
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (line, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for text in output.split(b'\n').map_while(Result::ok) {
                let _ = line.send(String::from_utf8_lossy(&text).trim_end().to_owned());
            }
        });
        let mut all = Vec::new();
        let mut ours = Vec::new();
        loop {
            match lines.recv_timeout(PATIENCE) {
                Ok(text) => {
                    if let Some(text) = text.strip_prefix(program).and_then(|text| text.strip_prefix(": ")) {
                        seen(text);
                        ours.push(text.to_owned());
                    }
                    all.push(text);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    qemu.kill().unwrap();
                    panic!("the guest hangs; it said:\n{}", all.join("\n"));
                }
            }
        }
        reader.join().unwrap();
        assert!(ours.iter().any(|line| line.starts_with("done")), "the guest did not come to its end; it said:\n{}", all.join("\n"));
        Self(ours)
    }

    /// What stands behind the name in its line.
    pub fn word(&self, name: &str) -> String {
        let found = self.0.iter().find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(' ')));
        found.unwrap_or_else(|| panic!("no line {name} in:\n{}", self.0.join("\n"))).trim().to_owned()
    }

    /// That a line says so.
    pub fn says(&self, name: &str, words: &str) {
        assert_eq!(self.word(name), words, "{name}");
    }
}

fn write_initrd(path: &Path, program: &str) {
    let setup = Setup::locate();
    let mut tree = Tree::new();
    tree.file_from("init", 0o755, guest_program(program)).unwrap();
    tree.device("dev/console", 0o600, Device::Character, (5, 1)).unwrap();
    for module in ["virtio_mmio", "nsm"] {
        tree.file(format!("modules/{module}.ko"), 0o644, setup.module_bytes(module)).unwrap();
    }
    tree.write_to(File::create(path).unwrap()).unwrap();
}

fn start(initrd: &Path, nsm: &impl std::os::fd::AsFd) -> Child {
    let setup = Setup::locate();
    let mut qemu = setup.qemu();
    qemu.args(["-M", "microvm,acpi=on", "-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none"]);
    qemu.args(["-serial", "stdio", "-no-reboot", "-smp", "2", "-m", &format!("{}M", REGIONS * REGION_MIB)]);
    for region in 0..REGIONS {
        qemu.args(["-object", &format!("memory-backend-memfd,id=m{region},size={REGION_MIB}M,share=on")]);
        qemu.args(["-numa", &format!("node,memdev=m{region}{}", if region == 0 { ",cpus=0-1" } else { "" })]);
    }
    // Without its clock's speed a guest under TCG hangs on a busy host.
    let khz = tsc_khz();
    let cmdline = format!("console=ttyS0 quiet panic=-1 tsc_early_khz={khz} lpj={}", 2 * khz);
    qemu.arg("-kernel").arg(setup.kernel()).arg("-initrd").arg(initrd).args(["-append", &cmdline]);
    let fd = nsm.as_fd();
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap(); // QEMU inherits it
    qemu.args(["-chardev", &format!("socket,id=nsm,fd={}", fd.as_raw_fd())]);
    qemu.args(["-device", "vhost-user-test-device,chardev=nsm,virtio-id=33,num_vqs=1"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

fn tsc_khz() -> u64 {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpus.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a clock speed")]
    mhz.map_or(2_500_000, |mhz| (mhz * 1000.0) as u64)
}
