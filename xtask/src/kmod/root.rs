//! The toolchain's own root directory, and how programs run in it: [`Root`].

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use miette::{IntoDiagnostic, Result, WrapErr, bail};

/// Enters the folder that `$0` names with /dev and /proc of this system.
const ENTER: &str = r#"mount --rbind /dev "$0/dev" && mount --rbind /proc "$0/proc" && exec chroot "$0" "$@""#;

/// A folder with a system of its own.
pub struct Root {
    folder: PathBuf,
}

impl Root {
    /// The system in this folder, which may be empty yet.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// A path of this machine for a path in the system.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.folder.join(inside.trim_start_matches('/'))
    }

    /// Can programs be run in such a folder here?
    ///
    /// # Errors
    ///
    /// What to do where they cannot.
    pub fn check(&self) -> Result<()> {
        let mut command = unshare();
        let status = command.arg("true").stderr(Stdio::null()).status();
        if !status.is_ok_and(|status| status.success()) {
            bail!(
                "The kernel's build runs in a root directory of its own, and this system lets no user make one: run `cargo xtask kmod` as root, or allow \
                 user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; the program unshare is in util-linux)"
            );
        }
        Ok(())
    }

    /// Runs a program of the system; what it prints goes to `log`.
    ///
    /// # Errors
    ///
    /// Its exit status, with the last lines of the log.
    pub fn run(&self, log: &Path, arguments: &[&str]) -> Result<()> {
        let shown = arguments.join(" ");
        let file = std::fs::File::create(log).into_diagnostic().wrap_err_with(|| format!("Writing {}", log.display()))?;
        let mut command = unshare();
        command.args(["sh", "-c", ENTER]).arg(&self.folder).args(arguments);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root").env("LC_ALL", "C.UTF-8");
        command.stdin(Stdio::null()).stdout(file.try_clone().into_diagnostic()?).stderr(file);
        let status = command.status().into_diagnostic().wrap_err_with(|| format!("Starting `{shown}`"))?;
        if !status.success() {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default().join("\n");
            bail!("`{shown}` failed ({status}); the whole log is {}\n{last}", log.display());
        }
        Ok(())
    }
}

/// A program with its own mounts; as a root of its own where the user is none.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg("--mount");
    command
}
