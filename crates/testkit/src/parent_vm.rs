//! A parent VM: a small Linux with the stock Nitro Enclaves driver, in front of `nitroxide device`, which runs commands for the host.
//!
//! [`ParentVm::builder`] says what is in it, [`Builder::boot`] starts it in seconds, [`ParentVm::run`] runs one command after the other. Dropped, it ends
//! with everything that it started, also when a test panics or is killed. docs/parent-vm.md describes it.
//!
//! `initramfs` and `libraries` put it together, `process` starts QEMU and the device, `control` talks to its init (guest/parent), `terminal` is for people.

mod control;
mod initramfs;
mod libraries;
mod process;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nitroxide_engine::Engine;
use nitroxide_parent::PORT_NAME;
use nitroxide_parent::plan::Step;
use tempfile::TempDir;

use control::Control;
pub use control::{Job, JobError, JobInput, Output};
use initramfs::Initramfs;
pub use process::{Log, Process};

use crate::Setup;

/// How long a start may take on a busy machine. It only ends hangs.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
/// How long one command may take, as [`ParentVm::run`] waits. It only ends hangs.
const COMMAND_PATIENCE: Duration = Duration::from_secs(300);

/// Which driver serves /dev/nitro_enclaves in the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Driver {
    /// The distribution kernel's own module.
    C,
    /// Our own module, the file that `cargo xtask kmod` builds; it lies at /modules/nitroxide.ko.
    Rust(PathBuf),
    /// None is loaded; the module lies at /modules/nitro_enclaves.ko.
    None,
}

/// What a parent VM is to be. The defaults: 1 GiB of memory, 4 CPUs of which 1 and 2 are for enclaves, 160 huge pages of 2 MiB, the C driver.
#[derive(Debug, Clone)]
pub struct Builder {
    memory_mib: u64,
    cpus: u32,
    threads_per_core: u32,
    hugepages: u64,
    pool: String,
    driver: Driver,
    kernel: Option<PathBuf>,
    files: Vec<(PathBuf, String)>,
    programs: Vec<PathBuf>,
    modules: Vec<String>,
    lines: Vec<String>,
    kernel_parameters: String,
    device: Option<PathBuf>,
    device_arguments: Vec<OsString>,
    device_environment: Vec<(OsString, OsString)>,
    qemu_arguments: Vec<OsString>,
    may_reboot: bool,
}

impl Builder {
    /// Memory of the VM in MiB; the huge pages are part of it.
    #[must_use]
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// CPUs of the VM; each is a core, but for [`Builder::threads_per_core`].
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// How many of the CPUs make a core; a divisor of their number.
    #[must_use]
    pub fn threads_per_core(mut self, threads: u32) -> Self {
        self.threads_per_core = threads;
        self
    }

    /// How many huge pages of 2 MiB are set aside at boot.
    #[must_use]
    pub fn hugepages(mut self, pages: u64) -> Self {
        self.hugepages = pages;
        self
    }

    /// The driver's CPU pool, e.g. `1-2`.
    #[must_use]
    pub fn pool(mut self, pool: impl Into<String>) -> Self {
        self.pool = pool.into();
        self
    }

    /// Which driver is loaded; without a device none is.
    #[must_use]
    pub fn driver(mut self, driver: Driver) -> Self {
        self.driver = driver;
        self
    }

    /// Another kernel than the distribution's: a folder with its `bzImage`, and `<name>.ko` of each module that it has not built in.
    #[must_use]
    pub fn kernel(mut self, folder: impl Into<PathBuf>) -> Self {
        self.kernel = Some(folder.into());
        self
    }

    /// Puts a file or folder of the host into the VM.
    #[must_use]
    pub fn file(mut self, host: impl Into<PathBuf>, guest: impl Into<String>) -> Self {
        self.files.push((host.into(), guest.into()));
        self
    }

    /// Puts a program of the host or of the unpacked tree into the VM, at /bin, with its libraries.
    #[must_use]
    pub fn program(mut self, host: impl Into<PathBuf>) -> Self {
        self.programs.push(host.into());
        self
    }

    /// Puts a further module of the kernel into /modules; it is not loaded.
    #[must_use]
    pub fn module(mut self, name: impl Into<String>) -> Self {
        self.modules.push(name.into());
        self
    }

    /// A line of shell that init runs before the driver is loaded.
    #[must_use]
    pub fn at_start(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }

    /// Further words of the kernel's command line.
    #[must_use]
    pub fn kernel_parameters(mut self, words: impl Into<String>) -> Self {
        self.kernel_parameters = words.into();
        self
    }

    /// The `nitroxide` program whose `device` command is the PCI device and the vsock of this VM. Without it the VM has neither.
    #[must_use]
    pub fn device_program(mut self, nitroxide: impl Into<PathBuf>) -> Self {
        self.device = Some(nitroxide.into());
        self
    }

    /// Further arguments of `nitroxide device`.
    #[must_use]
    pub fn device_arguments<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.device_arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// A variable in the device's environment.
    #[must_use]
    pub fn device_environment(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.device_environment.push((name.into(), value.into()));
        self
    }

    /// Further arguments of QEMU.
    #[must_use]
    pub fn qemu_arguments<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.qemu_arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// A restart of the guest starts it anew, see [`ParentVm::reboot`]; otherwise it ends the VM.
    #[must_use]
    pub fn may_reboot(mut self) -> Self {
        self.may_reboot = true;
        self
    }

    /// Starts the device and the VM, and returns once it takes commands.
    ///
    /// # Panics
    ///
    /// Where a part is missing, or the VM does not come up in two attempts; with the logs then. Emulated kernels have hung in their first second on a busy machine,
    /// before any driver is loaded; the causes that are known are avoided (docs/engine.md, "The clock").
    pub fn boot(self) -> ParentVm {
        self.attempt()
            .or_else(|first| {
                eprintln!("A second attempt, since {first}");
                self.attempt()
            })
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Starts the device and the VM once.
    fn attempt(&self) -> Result<ParentVm, String> {
        let started = Instant::now();
        let setup = Setup::locate();
        let setup = match &self.kernel {
            Some(kernel) => setup.with_kernel(kernel),
            None => setup,
        };
        let folder = tempfile::Builder::new().prefix("parent-vm.").tempdir().expect("a temporary folder");
        self.initramfs(&setup).write(&folder.path().join("initramfs"));
        let device = self.device.as_ref().map(|program| self.start_device(program, folder.path()));
        let listener = UnixListener::bind(folder.path().join("control")).expect("a socket in the temporary folder");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let mut qemu = Process::start(&self.qemu(&setup, folder.path(), device.is_some())).expect("the program setpriv starts");
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) if qemu.status().is_none() && started.elapsed() < BOOT_PATIENCE => std::thread::sleep(Duration::from_millis(5)),
                Err(_) => {
                    let device = device.map(|device| device.log().text()).unwrap_or_default();
                    return Err(format!("QEMU did not start: {:?}\n{}\ndevice:\n{device}", qemu.status(), qemu.log().text()));
                }
            }
        };
        stream.set_nonblocking(false).expect("a socket can be blocking");
        let control = Control::new(stream).expect("a descriptor can be copied");
        let mut vm = ParentVm { control, qemu, device, folder, started_after: Duration::ZERO, kernel_ms: 0 };
        let Some(kernel_ms) = vm.control.wait_ready(1, BOOT_PATIENCE) else {
            return Err(format!("the parent VM did not come up\n{}", vm.everything()));
        };
        vm.kernel_ms = kernel_ms;
        vm.started_after = started.elapsed();
        Ok(vm)
    }

    fn initramfs(&self, setup: &Setup) -> Initramfs {
        let cache = setup.root().with_file_name("stripped");
        let mut initramfs = Initramfs::new(setup, cache);
        for name in &self.modules {
            initramfs.module(name);
        }
        for program in &self.programs {
            initramfs.program(program);
        }
        for (host, guest) in &self.files {
            initramfs.file(host, guest);
        }
        let module = |name: &str, parameters: String| Step::Module { name: name.to_owned(), parameters };
        for name in initramfs::modules(setup).filter(|name| *name != "nitro_enclaves") {
            initramfs.step(module(name, String::new()));
        }
        for line in &self.lines {
            initramfs.step(Step::Run(line.clone()));
        }
        if let Driver::Rust(file) = &self.driver {
            initramfs.file(file, "modules/nitroxide.ko");
        }
        let driver = match self.driver {
            Driver::C => Some("nitro_enclaves"),
            Driver::Rust(_) => Some("nitroxide"),
            Driver::None => None,
        };
        if let Some(name) = driver.filter(|_| self.device.is_some()) {
            initramfs.step(module(name, format!("ne_cpus={}", self.pool)));
        }
        initramfs
    }

    fn start_device(&self, program: &Path, folder: &Path) -> Process {
        let (socket, vsock) = (folder.join("ne.sock"), folder.join("vsock.sock"));
        let mut command = Command::new(program);
        command.arg("device").arg("--socket").arg(&socket).arg("--vsock").arg(&vsock).args(&self.device_arguments);
        // Worlds and sockets of this device stay in the VM's own folder, and vanish with it.
        command
            .env("XDG_RUNTIME_DIR", folder)
            .env("XDG_DATA_HOME", folder.join("data"))
            .env_remove("NITROXIDE_RUNTIME_DIR")
            .envs(self.device_environment.iter().map(|(name, value)| (name, value)));
        let mut device = Process::start(&command).expect("the program setpriv starts");
        let started = Instant::now();
        let is_ready = |device: &Process| device.log().text().lines().any(|line| line.starts_with("{\"Socket\""));
        while !is_ready(&device) {
            if device.status().is_some() || started.elapsed() > BOOT_PATIENCE {
                panic!("`nitroxide device` is not ready: {:?}\n{}", device.status(), device.log().text());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        device
    }

    fn qemu(&self, setup: &Setup, folder: &Path, has_device: bool) -> Command {
        let place = |name: &str| folder.join(name).display().to_string();
        let mut command = setup.qemu();
        let uses_kvm = Engine::kvm().is_ok();
        if uses_kvm {
            command.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
        }
        let cpus = format!("{},sockets=1,cores={},threads={}", self.cpus, self.cpus / self.threads_per_core, self.threads_per_core);
        command.args(["-machine", "q35,memory-backend=ram", "-smp", &cpus, "-m", &format!("{}M", self.memory_mib)]);
        // Shared, so that the device's processes see the same pages.
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={}M,share=on", self.memory_mib)]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", &format!("file:{}", place("console"))]);
        if !self.may_reboot {
            command.arg("-no-reboot");
        }
        command.args(["-device", "virtio-serial-pci", "-chardev", &format!("socket,id=control,path={}", place("control"))]);
        command.args(["-device", &format!("virtserialport,chardev=control,name={PORT_NAME}")]);
        if has_device {
            let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#, place("ne.sock"));
            command.args(["-device", &device]);
            command.args(["-chardev", &format!("socket,id=vsock,path={}", place("vsock.sock"))]);
            command.args(["-device", "vhost-user-vsock-pci,chardev=vsock"]);
        }
        // Warnings and worse are shown; panic=-1 restarts at once after a panic, which ends the VM.
        let mut line = format!("console=ttyS0 quiet loglevel=5 panic=-1 hugepagesz=2M hugepages={}", self.hugepages);
        if let (false, Some(khz)) = (uses_kvm, Engine::counter_khz()) {
            // Both keep a guest on a busy host from hanging while it starts (docs/engine.md, "The clock").
            line += &format!(" tsc=nowatchdog tsc_early_khz={khz}");
        }
        if !self.kernel_parameters.is_empty() {
            line += &format!(" {}", self.kernel_parameters);
        }
        command.arg("-kernel").arg(setup.kernel()).args(["-initrd", &place("initramfs"), "-append", &line]).args(&self.qemu_arguments);
        command
    }
}

/// A running parent VM.
#[derive(Debug)]
pub struct ParentVm {
    control: Control,
    // In the order in which they are to end: the VM, the device, the folder with their sockets.
    qemu: Process,
    device: Option<Process>,
    folder: TempDir,
    started_after: Duration,
    kernel_ms: u64,
}

impl ParentVm {
    /// What to boot.
    pub fn builder() -> Builder {
        Builder {
            memory_mib: 1024,
            cpus: 4,
            threads_per_core: 1,
            hugepages: 160,
            pool: "1-2".to_owned(),
            driver: Driver::C,
            kernel: None,
            files: Vec::new(),
            programs: Vec::new(),
            modules: Vec::new(),
            lines: Vec::new(),
            kernel_parameters: String::new(),
            device: None,
            device_arguments: Vec::new(),
            device_environment: Vec::new(),
            qemu_arguments: Vec::new(),
            may_reboot: false,
        }
    }

    /// Runs a command with `sh -c` and waits for its end.
    ///
    /// # Panics
    ///
    /// Where it does not end in minutes, or the VM ends under it; with the logs.
    pub fn run(&self, script: &str) -> Output {
        self.try_run(script, COMMAND_PATIENCE).unwrap_or_else(|error| panic!("`{script}` in the parent VM: {error}\n{}", self.everything()))
    }

    /// Runs a command that has to succeed, and returns what it prints.
    ///
    /// # Panics
    ///
    /// As [`ParentVm::run`], and for another exit status than 0.
    pub fn check(&self, script: &str) -> String {
        let output = self.run(script);
        assert_eq!(output.status, 0, "`{script}` in the parent VM failed and printed:\n{}\n{}", output.stdout, self.everything());
        output.stdout
    }

    /// Runs a command for at most `patience`; it is killed then.
    ///
    /// # Errors
    ///
    /// [`JobError`].
    pub fn try_run(&self, script: &str, patience: Duration) -> Result<Output, JobError> {
        let mut job = self.start(script);
        job.close_input();
        job.wait(patience)
    }

    /// Starts a command that runs beside others; its standard input is open until it is closed.
    pub fn start(&self, script: &str) -> Job {
        self.control.start(script)
    }

    /// As [`ParentVm::start`], on a terminal: for programs that print line by line only there.
    pub fn start_on_terminal(&self, script: &str) -> Job {
        self.control.start_on_terminal(script, (50, 200))
    }

    /// Writes a file in the VM.
    ///
    /// # Panics
    ///
    /// Where that fails.
    pub fn write_file(&self, path: &str, content: &[u8]) {
        let mut job = self.start(&format!("cat > '{path}'"));
        job.input(content);
        job.close_input();
        let written = job.wait(COMMAND_PATIENCE);
        assert!(matches!(&written, Ok(output) if output.status == 0), "writing {path} in the parent VM: {written:?}");
    }

    /// Connects the user's terminal to a command in the VM, or to a shell where it is empty; returns its exit status.
    ///
    /// # Errors
    ///
    /// What the terminal gives, and `Other` where the VM ends under it.
    pub fn interact(&self, script: &str) -> std::io::Result<i32> {
        terminal::interact(&self.control, script)
    }

    /// Restarts the guest at once, as a crash of it would, and waits until it is up again. Needs [`Builder::may_reboot`].
    ///
    /// # Panics
    ///
    /// Where it does not come up.
    pub fn reboot(&self) {
        let starts = self.control.starts();
        let _never_answers = self.start("reboot -f");
        if self.control.wait_ready(starts + 1, BOOT_PATIENCE).is_none() {
            panic!("the parent VM did not come up again\n{}", self.everything());
        }
    }

    /// What the guest's kernel and init have printed on the console.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// What `nitroxide device` has printed; empty without one.
    pub fn device_log(&self) -> String {
        self.device.as_ref().map(|device| device.log().text()).unwrap_or_default()
    }

    /// The process `nitroxide device`.
    pub fn device(&mut self) -> Option<&mut Process> {
        self.device.as_mut()
    }

    /// The process QEMU.
    pub fn qemu(&mut self) -> &mut Process {
        &mut self.qemu
    }

    /// The folder with the VM's sockets; also the device's `XDG_RUNTIME_DIR`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// How long it took from the call until commands could be run, and how much of it the guest's kernel and init took.
    pub fn boot_times(&self) -> (Duration, Duration) {
        (self.started_after, Duration::from_millis(self.kernel_ms))
    }

    /// Kills QEMU at once, as a crash of the whole parent would; the device goes on.
    pub fn kill(&mut self) {
        self.qemu.signal(rustix::process::Signal::KILL);
        let _ = self.qemu.wait(BOOT_PATIENCE);
    }

    /// Everything that a failed test wants to show.
    pub fn everything(&self) -> String {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let last = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default().join("\n");
        format!("console:\n{last}\nQEMU:\n{}\ndevice:\n{}", self.qemu.log().text(), self.device_log())
    }
}
