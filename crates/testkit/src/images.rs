//! Enclave images for tests and the demo: a Debian kernel, an init, modules, and an application.
//!
//! [`ImageSpec`] is the recipe: [`ImageSpec::hello`] is the sample image that `cargo xtask guest` writes, [`ImageSpec::probe`] makes images that
//! end or misbehave in a chosen way. The same parts make the same bytes. What init reads is described in docs/guest-init.md.

use std::path::{Path, PathBuf};

use nitroxide_eif::{Builder, Built, Metadata, cpio::Device, cpio::Tree};

use crate::{Setup, guest_program};

/// The sample image's kernel command line: console, quick end after a panic or restart, no PCI (there is none).
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t pci=off random.trust_cpu=on";
/// What Debian's kernel has as modules of what an enclave needs, in loading order.
pub const MODULES: [&str; 5] = ["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "nsm"];

/// Where the application's files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Below `rootfs/`, as in AWS's images.
    Rootfs,
    /// In the ramdisk itself.
    Ramdisk,
}

/// A recipe. The fields may be changed before [`ImageSpec::build`].
#[derive(Debug, Clone)]
pub struct ImageSpec {
    /// The image's name in its metadata.
    pub name: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// The guest program that is `/init`.
    pub init: String,
    /// Modules in `/modules`.
    pub modules: Vec<String>,
    /// Where programs and files go.
    pub layout: Layout,
    /// Guest programs as (path in the application's root, name of the program).
    pub programs: Vec<(String, String)>,
    /// Further files as (path in the application's root, content), mode 0644.
    pub files: Vec<(String, Vec<u8>)>,
    /// `/entrypoint`: words before `command`.
    pub entrypoint: Vec<String>,
    /// `/cmd`: program and arguments.
    pub command: Vec<String>,
    /// `/env` as `NAME=value`.
    pub environment: Vec<String>,
    /// `/workdir`.
    pub directory: Option<String>,
    /// `/user`.
    pub user: Option<String>,
}

impl ImageSpec {
    /// An image with our init and one guest program as its application, at `/bin/<program>`.
    pub fn new(name: &str, program: &str, arguments: &[&str]) -> Self {
        let path = format!("/bin/{program}");
        Self {
            name: name.to_owned(),
            cmdline: CMDLINE.to_owned(),
            init: "nitroxide-init".to_owned(),
            modules: MODULES.map(str::to_owned).to_vec(),
            layout: Layout::Rootfs,
            programs: vec![(path.clone(), program.to_owned())],
            files: Vec::new(),
            entrypoint: Vec::new(),
            command: std::iter::once(path).chain(arguments.iter().map(|word| (*word).to_owned())).collect(),
            environment: Vec::new(),
            directory: None,
            user: None,
        }
    }

    /// The sample image: `nitroxide-hello`.
    pub fn hello() -> Self {
        Self::new("hello", "nitroxide-hello", &[])
    }

    /// An image whose application does what the words say (see `guest/probe`): `&["exit", "42"]`, `&["panic"]`, `&["hang"]` …
    pub fn probe(words: &[&str]) -> Self {
        Self::new("probe", "nitroxide-probe", words)
    }

    /// The same image with an init that does only what AWS's own does.
    pub fn with_aws_init(mut self) -> Self {
        "aws-init".clone_into(&mut self.init);
        self
    }

    /// The files of this machine that the image is made of.
    pub fn inputs(&self) -> Vec<PathBuf> {
        let setup = Setup::locate();
        let mut inputs = vec![setup.kernel(), guest_program(&self.init)];
        inputs.extend(self.modules.iter().map(|module| setup.module(module)));
        inputs.extend(self.programs.iter().map(|(_, program)| guest_program(program)));
        inputs
    }

    /// The first ramdisk, as a tree: init and modules.
    ///
    /// # Panics
    ///
    /// Where a part is missing: run `cargo xtask setup` and `cargo xtask guest`.
    pub fn bootstrap(&self) -> Tree {
        let setup = Setup::locate();
        let mut tree = Tree::new();
        tree.directory("dev", 0o755).expect("a valid name");
        // The kernel opens it before init can mount devtmpfs.
        tree.device("dev/console", 0o600, Device::Character, (5, 1)).expect("a valid name");
        tree.file_from("init", 0o755, guest_program(&self.init)).expect("the guest program can be read");
        for module in &self.modules {
            tree.file(format!("modules/{module}.ko"), 0o644, setup.module_bytes(module)).expect("a valid name");
        }
        tree
    }

    /// The second ramdisk, as a tree: the application.
    ///
    /// # Panics
    ///
    /// Where a program was not built, or a path of the recipe cannot be a name.
    pub fn application(&self) -> Tree {
        let mut tree = Tree::new();
        let prefix = match self.layout {
            Layout::Rootfs => "rootfs/",
            Layout::Ramdisk => "",
        };
        for directory in ["dev", "run", "sys", "var", "proc", "tmp"] {
            tree.directory(format!("{prefix}{directory}"), 0o755).expect("a valid name");
        }
        for (path, program) in &self.programs {
            let path = format!("{prefix}{}", path.trim_start_matches('/'));
            tree.file_from(path, 0o755, guest_program(program)).expect("the guest program can be read");
        }
        for (path, content) in &self.files {
            tree.file(format!("{prefix}{}", path.trim_start_matches('/')), 0o644, content.clone()).expect("a valid path in the recipe");
        }
        for (name, list) in [("entrypoint", &self.entrypoint), ("cmd", &self.command), ("env", &self.environment)] {
            // AWS's images always have cmd and env, empty or not.
            if !list.is_empty() || name != "entrypoint" {
                tree.file(name, 0o644, lines(list)).expect("a valid name");
            }
        }
        for (name, value) in [("workdir", &self.directory), ("user", &self.user)] {
            if let Some(value) = value {
                tree.file(name, 0o644, format!("{value}\n")).expect("a valid name");
            }
        }
        tree
    }

    /// Writes the image.
    ///
    /// # Panics
    ///
    /// Where a part is missing or the file cannot be written.
    pub fn build(&self, path: &Path) -> Built {
        let kernel = Setup::locate().kernel();
        let mut metadata = Metadata::new(self.name.clone(), env!("CARGO_PKG_VERSION"));
        let version = kernel.parent().and_then(Path::file_name).map(|version| version.to_string_lossy().into_owned());
        metadata.build_metadata.kernel_version = version.unwrap_or_default();
        Builder::new(kernel, self.cmdline.clone())
            .metadata(metadata)
            .ramdisk(self.bootstrap())
            .ramdisk(self.application())
            .write_file(path)
            .unwrap_or_else(|error| panic!("cannot build the image {}: {error}: {:?}", path.display(), std::error::Error::source(&error)))
    }

    /// Whether `path` exists and is newer than everything it is made of.
    pub fn is_up_to_date(&self, path: &Path) -> bool {
        let changed = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
        let Some(built) = changed(path) else { return false };
        // The recipe itself is part of the running program.
        let inputs = self.inputs().into_iter().chain(std::env::current_exe().ok());
        inputs.into_iter().all(|input| changed(&input).is_some_and(|changed| changed < built))
    }
}

/// A list file: lines, or NUL-separated where a value has a line end or is empty.
fn lines(values: &[String]) -> String {
    let separator = if values.iter().any(|value| value.is_empty() || value.contains('\n')) { '\0' } else { '\n' };
    values.iter().map(|value| format!("{value}{separator}")).collect()
}
