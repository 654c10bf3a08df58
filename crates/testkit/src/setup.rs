//! What `cargo xtask setup` unpacked: a QEMU with its own dynamic loader, a Debian kernel, its modules.
//!
//! [`Setup::locate`] finds it from the running program; tests that need it fail with a message that says what to run.

use std::path::{Path, PathBuf};
use std::process::Command;

/// An unpacked tree of Debian packages.
#[derive(Debug, Clone)]
pub struct Setup {
    root: PathBuf,
    /// Where another kernel than the tree's lies.
    kernel: Option<PathBuf>,
}

impl Setup {
    /// Finds the tree: `$NITROXIDE_SETUP/root`, else the nearest `setup/root` above the running program.
    ///
    /// # Panics
    ///
    /// Where there is none: a test that needs it must not pass in silence.
    pub fn locate() -> Self {
        let named = std::env::var_os("NITROXIDE_SETUP").map(|setup| PathBuf::from(setup).join("root"));
        let root = named.or_else(|| {
            let program = std::env::current_exe().ok()?;
            program.ancestors().map(|folder| folder.join("setup/root")).find(|root| root.join("usr/bin/qemu-system-x86_64").exists())
        });
        let root = root.expect("no unpacked QEMU and kernel found: run `cargo xtask setup` first");
        Self { root, kernel: None }
    }

    /// The same tree with another kernel: a folder with its `bzImage`, and `<name>.ko` of each module that it has not built in.
    #[must_use]
    pub fn with_kernel(self, folder: impl Into<PathBuf>) -> Self {
        Self { kernel: Some(folder.into()), ..self }
    }

    /// The tree's root folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The kernel (a bzImage): the distribution's is `usr/lib/modules/<version>/vmlinuz`.
    ///
    /// # Panics
    ///
    /// Where the tree has none.
    pub fn kernel(&self) -> PathBuf {
        if let Some(folder) = &self.kernel {
            return folder.join("bzImage");
        }
        entries(&self.root.join("usr/lib/modules"))
            .into_iter()
            .map(|version| version.join("vmlinuz"))
            .filter(|kernel| kernel.exists())
            .max()
            .expect("the unpacked tree has no kernel: run `cargo xtask setup` again")
    }

    /// A static busybox, which is a parent VM's shell and tools.
    ///
    /// # Panics
    ///
    /// Where the second stage of setup has not run: `cargo xtask setup --tests`.
    pub fn busybox(&self) -> PathBuf {
        self.extra("busybox")
    }

    /// The C source of the kernel's own sample for Nitro Enclaves.
    ///
    /// # Panics
    ///
    /// As [`Setup::busybox`].
    pub fn ne_ioctl_sample_source(&self) -> PathBuf {
        self.extra("ne_ioctl_sample.c")
    }

    /// A tar archive of socat and of Python 3 with `cbor2` and `cryptography`, with all that they need, for a folder of its own; run through that tree's own
    /// dynamic loader.
    ///
    /// # Panics
    ///
    /// As [`Setup::busybox`].
    pub fn programs(&self) -> PathBuf {
        self.extra("programs.tar")
    }

    /// Whether the sample's source is there.
    pub fn has_ne_ioctl_sample(&self) -> bool {
        self.extras().join("ne_ioctl_sample.c").exists()
    }

    fn extras(&self) -> PathBuf {
        self.root.with_file_name("extra")
    }

    fn extra(&self, name: &str) -> PathBuf {
        let path = self.extras().join(name);
        assert!(path.exists(), "{} is not there: run `cargo xtask setup --tests` first", path.display());
        path
    }

    /// A kernel module by its name without ending, e.g. `vsock`; possibly still compressed (`.ko.xz`).
    ///
    /// # Panics
    ///
    /// Where the tree has none of that name.
    pub fn module(&self, name: &str) -> PathBuf {
        self.find_module(name).unwrap_or_else(|| panic!("the unpacked tree has no module {name}: run `cargo xtask setup` again"))
    }

    /// Whether the kernel has this module built in. The distribution's is taken to have none of those that are asked for.
    pub fn is_built_in(&self, name: &str) -> bool {
        self.kernel.is_some() && self.find_module(name).is_none()
    }

    fn find_module(&self, name: &str) -> Option<PathBuf> {
        let wanted = |path: &Path| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            file == format!("{name}.ko") || file == format!("{name}.ko.xz")
        };
        let mut folders = vec![self.kernel.clone().unwrap_or_else(|| self.root.join("usr/lib/modules"))];
        while let Some(folder) = folders.pop() {
            for path in entries(&folder) {
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else if wanted(&path) {
                    return Some(path);
                }
            }
        }
        None
    }

    /// The module's bytes, decompressed with the `xz` program where they are compressed.
    ///
    /// # Panics
    ///
    /// Where the module cannot be read.
    pub fn module_bytes(&self, name: &str) -> Vec<u8> {
        let path = self.module(name);
        if path.extension().is_some_and(|ending| ending == "xz") {
            let output = Command::new("xz").arg("--decompress").arg("--stdout").arg(&path).output().expect("the program xz runs");
            assert!(output.status.success(), "xz cannot decompress {}", path.display());
            return output.stdout;
        }
        std::fs::read(&path).expect("a module of the unpacked tree can be read")
    }

    /// A command that starts the unpacked QEMU through its own dynamic loader, with its firmware paths set.
    pub fn qemu(&self) -> Command {
        let usr = self.root.join("usr");
        let mut command = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(usr.join("lib/x86_64-linux-gnu")).arg(usr.join("bin/qemu-system-x86_64"));
        command.arg("-L").arg(usr.join("share/qemu")).arg("-L").arg(usr.join("share/seabios"));
        command
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect()).unwrap_or_default()
}
