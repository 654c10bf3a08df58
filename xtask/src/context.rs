//! Where things are: the repository, its target directory, the cache; and how a chore runs another program.
//!
//! Every chore gets a [`Context`]; none of them looks at the current directory.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};

/// The places a chore works in.
#[derive(Debug, Clone)]
pub struct Context {
    /// The repository's root.
    pub root: PathBuf,
    /// Cargo's target directory: everything that is built, unpacked or generated.
    pub target: PathBuf,
    /// Downloads that outlive a clone: `$XDG_CACHE_HOME/nitroxide`, else `~/.cache/nitroxide`.
    pub cache: PathBuf,
}

impl Context {
    /// Finds the repository from this program's own manifest, and the rest from the environment.
    pub fn find() -> Result<Self> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().ok_or_else(|| miette!("xtask's manifest has no parent folder"))?.to_path_buf();
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let cache = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
            (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache).join("nitroxide"),
            (_, Some(home)) => PathBuf::from(home).join(".cache/nitroxide"),
            _ => target.join("cache"),
        };
        Ok(Self { root, target, cache })
    }

    /// A `cargo` command in the repository.
    pub fn cargo<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root).args(args).env("CARGO_TARGET_DIR", &self.target);
        // Set by `cargo run` for xtask itself; a nested cargo must not take them for its own.
        for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
            command.env_remove(name);
        }
        command
    }

    /// A path below the target directory.
    pub fn in_target(&self, path: impl AsRef<Path>) -> PathBuf {
        self.target.join(path)
    }
}

/// Runs a command to its end; an exit status other than 0 is an error that shows the command.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.status().into_diagnostic().wrap_err_with(|| format!("Starting `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed: {status}");
    }
    Ok(())
}

/// A command as a person would type it.
pub fn show(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
