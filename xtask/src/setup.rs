//! `cargo xtask setup`: brings QEMU and the enclaves' kernel, unpacked below target/setup/root.
//!
//! Works without root, by the system's own apt client with private lists, cache and state: [`apt`] finds the configured mirror, resolves and downloads,
//! [`tree`] unpacks and checks. Downloads outlive a clone in the user's cache. Done once it costs a file read: the stamp target/setup/complete says what is
//! there. On systems without Debian packages it says what to install instead. What only tests and parent VMs need is a second stage, [`extras()`].

pub mod apt;
mod extras;
pub mod tree;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, Result, WrapErr, bail};
use rustix::fs::FlockOperation;

use self::apt::{Apt, Package};
use crate::context::Context;

/// Changes whenever setup makes a different tree from the same packages; part of the stamp.
const RECIPE: &str = "recipe 1";

/// The keyring that Debian's archives are checked with.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The programs that setup needs, and the Debian package of each.
const TOOLS: [(&str, &str); 5] = [("apt-get", "apt"), ("apt-cache", "apt"), ("dpkg-deb", "dpkg"), ("tar", "tar"), ("xz", "xz-utils")];

const ADVICE: &str = "Nitroxide needs QEMU 11 or newer (Debian, Ubuntu: qemu-system-x86; Fedora: qemu-system-x86-core; Arch: qemu-system-x86; \
                      openSUSE: qemu-x86) and an x86-64 kernel 6.8 or newer with virtio-vsock, virtio-mmio and NSM drivers. Install them, then set \
                      NITROXIDE_QEMU to the emulator and NITROXIDE_KERNEL to the kernel (a bzImage).";

pub use extras::Extras;

/// What to bring.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Also what only the tests need: a static busybox, the kernel's sample program for Nitro Enclaves, socat, Python with libraries
    #[arg(long)]
    tests: bool,
}

/// Runs the chore.
pub fn chore(context: &Context, options: &Options) -> Result<()> {
    run(context)?;
    if options.tests { extras(context, Extras::Tests) } else { Ok(()) }
}

/// Brings what a parent VM or the tests need beside QEMU and kernel; costs a look at files where it is there.
pub fn extras(context: &Context, wanted: Extras) -> Result<()> {
    let place = context.in_target("setup/extra");
    if wanted.are_at(&place) {
        return Ok(());
    }
    check_system()?;
    fs::create_dir_all(&place).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", place.display()))?;
    let _alone = lock(&context.in_target("setup/lock"))?;
    let _alone_in_cache = lock_cache(context)?;
    extras::bring(wanted, &place, &context.cache)
}

/// Unpacks Go with a package for AF_VSOCK into a folder that is there.
pub fn unpack_go(context: &Context, folder: &Path) -> Result<()> {
    check_system()?;
    let _alone_in_cache = lock_cache(context)?;
    extras::unpack_go(folder, &context.cache)
}

/// Brings QEMU and the kernel.
pub fn run(context: &Context) -> Result<()> {
    if let (Some(qemu), Some(kernel)) = (chosen("NITROXIDE_QEMU")?, chosen("NITROXIDE_KERNEL")?) {
        eprintln!("setup: nothing to do: NITROXIDE_QEMU is {}, NITROXIDE_KERNEL is {}", qemu.display(), kernel.display());
        return Ok(());
    }
    let place = Place { setup: context.in_target("setup") };
    fs::create_dir_all(&place.setup).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", place.setup.display()))?;
    let _alone = lock(&place.setup.join("lock"))?;
    if let Some(summary) = place.complete() {
        eprintln!("setup: complete: {summary}");
        return Ok(());
    }
    check_system()?;

    let _alone_in_cache = lock_cache(context)?;
    let apt = Apt::open(&context.cache.join("apt"), KEYRING)?;
    let (packages, kernel) = select(&apt)?;
    let archives = apt.fetch(&packages, &context.cache.join("packages"))?;
    let summary = tree::build(&place.setup, &archives, &kernel)?;
    place.finish(&summary, &packages)?;
    apt.close();
    eprintln!("setup: complete: {summary}");
    Ok(())
}

/// What to download: QEMU with the libraries it depends on, its firmware, and the kernel. Returns the kernel's version too.
fn select(apt: &Apt) -> Result<(Vec<Package>, String)> {
    let kernel = apt.kernel_version()?;
    let mut wanted = apt.with_libraries("qemu-system-x86")?;
    wanted.extend(["qemu-system-data".to_owned(), "seabios".to_owned()]);
    wanted.extend(apt.kernel_packages(&kernel)?);
    Ok((apt.packages(&wanted)?, kernel))
}

/// The folder target/setup.
struct Place {
    setup: PathBuf,
}

impl Place {
    /// The stamp's first line after the recipe, where everything is there and of this recipe.
    fn complete(&self) -> Option<String> {
        let stamp = fs::read_to_string(self.stamp()).ok()?;
        let mut lines = stamp.lines();
        (lines.next()? == RECIPE && self.setup.join("root").join(tree::QEMU).exists()).then_some(())?;
        lines.next().map(str::to_owned)
    }

    /// Writes the stamp, whole or not at all.
    fn finish(&self, summary: &str, packages: &[Package]) -> Result<()> {
        let list: String = packages.iter().map(|package| format!("{} {}\n", package.sha256, package.file)).collect();
        let new = self.setup.join("complete.new");
        fs::write(&new, format!("{RECIPE}\n{summary}\n{list}")).into_diagnostic().wrap_err("Writing the stamp of setup")?;
        fs::rename(&new, self.stamp()).into_diagnostic().wrap_err("Writing the stamp of setup")
    }

    fn stamp(&self) -> PathBuf {
        self.setup.join("complete")
    }
}

/// A file that the user names instead of ours; an error where it is not there.
fn chosen(variable: &str) -> Result<Option<PathBuf>> {
    let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from) else { return Ok(None) };
    if !path.is_file() {
        bail!("{variable} names {}, which is not a file: correct it or unset it", path.display());
    }
    Ok(Some(path))
}

/// Whether this is a system whose apt can bring the packages.
pub fn check_system() -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("setup brings programs for x86-64 only, and this machine is {}. {ADVICE}", std::env::consts::ARCH);
    }
    if find_program("apt-get").is_none() {
        bail!("This system has no apt, so setup cannot bring Debian's packages. {ADVICE}");
    }
    for (tool, package) in TOOLS {
        if find_program(tool).is_none() {
            bail!("setup needs the program {tool}: install the package {package}, then run `cargo xtask setup` again");
        }
    }
    if !Path::new(KEYRING).exists() {
        bail!(
            "setup checks signatures with {KEYRING}, which is not there: install the package debian-archive-keyring. Without it: {ADVICE}"
        );
    }
    Ok(())
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Makes the cache and waits until no other setup uses it.
pub fn lock_cache(context: &Context) -> Result<File> {
    fs::create_dir_all(&context.cache)
        .into_diagnostic()
        .wrap_err_with(|| format!("Making the folder {}: set XDG_CACHE_HOME to a place you can write to", context.cache.display()))?;
    lock(&context.cache.join("lock"))
}

/// Waits until no other setup works here; released when the file is closed.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).into_diagnostic().wrap_err_with(|| format!("Opening {}", path.display()))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("setup: waiting for another setup ({})", path.display());
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .into_diagnostic()
            .wrap_err_with(|| format!("Locking {}", path.display()))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_of_another_recipe_or_without_its_tree_is_incomplete() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { setup: folder.path().to_owned() };
        assert_eq!(place.complete(), None);
        place.finish("QEMU 11", &[]).unwrap();
        assert_eq!(place.complete(), None);
        let qemu = folder.path().join("root").join(tree::QEMU);
        fs::create_dir_all(qemu.parent().unwrap()).unwrap();
        fs::write(qemu, "").unwrap();
        assert_eq!(place.complete().as_deref(), Some("QEMU 11"));
        fs::write(place.stamp(), "recipe 0\nQEMU 11\n").unwrap();
        assert_eq!(place.complete(), None);
    }

    #[test]
    fn a_lock_is_held_until_its_file_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = lock(&path).unwrap();
        let other = File::open(&path).unwrap();
        assert!(rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(held);
        assert!(rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).is_ok());
    }
}
