//! The initramfs of a parent VM: init, busybox, modules, the plan, and what a test adds.

use std::path::{Path, PathBuf};

use nitroxide_eif::cpio::{Device, Tree};
use nitroxide_parent::plan::{self, Step};

use super::libraries;
use crate::{Setup, guest_program};

/// What is in every parent VM, in loading order; `nitro_enclaves` is loaded last, where it is wanted.
const MODULES: [&str; 4] = ["vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "nitro_enclaves"];

/// Those of [`MODULES`] that the kernel has not built in.
pub fn modules(setup: &Setup) -> impl Iterator<Item = &'static str> {
    MODULES.into_iter().filter(|name| !setup.is_built_in(name))
}

/// Where the unpacked QEMU lies in a parent VM.
const QEMU_ROOT: &str = "qemu";

/// A tree that grows.
#[derive(Debug)]
pub struct Initramfs {
    tree: Tree,
    cache: PathBuf,
    setup: Setup,
    plan: Vec<Step>,
}

impl Initramfs {
    /// Init, busybox and modules; `cache` is a folder for stripped copies.
    ///
    /// # Panics
    ///
    /// Where a part is missing.
    pub fn new(setup: &Setup, cache: PathBuf) -> Self {
        let mut tree = Tree::new();
        for (directory, mode) in [("dev", 0o755), ("root", 0o700), ("tmp", 0o1777), ("var", 0o755), ("etc", 0o755), ("run", 0o755)] {
            tree.directory(directory, mode).expect("a valid name");
        }
        // The kernel opens it before init can mount devtmpfs.
        tree.device("dev/console", 0o600, Device::Character, (5, 1)).expect("a valid name");
        tree.file_from("init", 0o755, guest_program("nitroxide-parent")).expect("the guest program can be read");
        tree.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n").expect("a valid name");
        tree.file("etc/group", 0o644, "root:x:0:\nne:x:990:\nnogroup:x:65534:\n").expect("a valid name");
        add_busybox(&mut tree, &setup.busybox());
        for module in modules(setup) {
            tree.file(format!("modules/{module}.ko"), 0o644, setup.module_bytes(module)).expect("a valid name");
        }
        Self { tree, cache, setup: setup.clone(), plan: Vec::new() }
    }

    /// Adds a step of the plan.
    pub fn step(&mut self, step: Step) {
        self.plan.push(step);
    }

    /// Adds a further module of the unpacked kernel, at `/modules/<name>.ko`.
    pub fn module(&mut self, name: &str) {
        self.tree.file(format!("modules/{name}.ko"), 0o644, self.setup.module_bytes(name)).expect("a valid name");
    }

    /// Adds a file or, with all that is below it, a folder of the host.
    ///
    /// # Panics
    ///
    /// Where it cannot be read.
    pub fn file(&mut self, from: &Path, to: &str) {
        if from.is_dir() {
            self.tree.add_directory(to, from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
            return;
        }
        let mode = from.metadata().map_or(0o644, |metadata| std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777);
        self.tree.file_from(to, mode, from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    }

    /// Adds a program as `/bin/<its name>`, with what it needs.
    ///
    /// # Panics
    ///
    /// Where it or a library cannot be found.
    pub fn program(&mut self, program: &Path) {
        let name = program.file_name().expect("a program has a name").to_string_lossy().into_owned();
        if program.starts_with(self.setup.root()) {
            self.setup_program(program, &name);
            return;
        }
        for file in libraries::of_host_program(program) {
            let to = file.to_string_lossy().into_owned();
            self.tree.file_from(to, 0o755, &file).expect("a library can be read");
        }
        let stripped = libraries::stripped(program, &self.cache);
        self.tree.file_from(format!("bin/{name}"), 0o755, &stripped).unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    }

    /// A program of the unpacked tree keeps its place in it, and its own C library; `/bin/<its name>` starts it through its own loader.
    fn setup_program(&mut self, program: &Path, name: &str) {
        let files = libraries::of_setup_program(&self.setup, program);
        for file in files.iter().map(PathBuf::as_path).chain([program]) {
            let place = file.strip_prefix(self.setup.root()).expect("a file of the tree");
            let stripped = libraries::stripped(file, &self.cache);
            self.tree.file_from(format!("{QEMU_ROOT}/{}", place.display()), 0o755, stripped).expect("a file of the tree can be read");
        }
        let place = program.strip_prefix(self.setup.root()).expect("a file of the tree").display();
        let data = if name.starts_with("qemu-system") {
            let keymap = "usr/share/qemu/keymaps/en-us";
            self.file(&self.setup.root().join(keymap), &format!("{QEMU_ROOT}/{keymap}"));
            format!(" -L /{QEMU_ROOT}/usr/share/qemu")
        } else {
            String::new()
        };
        let wrapper = format!(
            "#!/bin/sh\nexec /{QEMU_ROOT}/usr/lib64/ld-linux-x86-64.so.2 --library-path /{QEMU_ROOT}/usr/lib/x86_64-linux-gnu \
             /{QEMU_ROOT}/{place}{data} \"$@\"\n"
        );
        self.tree.file(format!("bin/{name}"), 0o755, wrapper).expect("a valid name");
    }

    /// Writes the archive.
    ///
    /// # Panics
    ///
    /// Where it cannot be written.
    pub fn write(mut self, path: &Path) {
        let plan: String = self.plan.iter().map(|step| step.to_line() + "\n").collect();
        self.tree.file(plan::PLACE, 0o644, plan).expect("a valid name");
        let file = std::fs::File::create(path).expect("the initramfs can be made");
        self.tree.write_to(std::io::BufWriter::with_capacity(1 << 20, file)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// Busybox and a link for each of its tools.
fn add_busybox(tree: &mut Tree, busybox: &Path) {
    tree.file_from("bin/busybox", 0o755, busybox).expect("busybox can be read");
    let list = std::process::Command::new(busybox).arg("--list").output().expect("busybox is static and starts on the host");
    for tool in String::from_utf8_lossy(&list.stdout).lines().filter(|tool| *tool != "busybox" && *tool != "init") {
        tree.symlink(format!("bin/{tool}"), "busybox").expect("a tool's name is a valid name");
    }
    for folder in ["sbin", "usr/bin", "usr/sbin"] {
        tree.symlink(folder, "/bin").expect("a valid name");
    }
}
