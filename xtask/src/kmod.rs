//! `cargo xtask kmod`: builds our Linux module for the kernel of target/setup, at target/kmod/nitro_enclaves.ko.
//!
//! A module fits a stock kernel only if it was made by the very compiler and configuration that the kernel was made by: [`toolchain`] brings Debian's,
//! [`tree`] prepares the kernel's tree and proves that both are the same.
//! No root is needed where the system allows user namespaces ([`root`]). docs/kernel.md. [`package`] makes packages for users, [`package_check`] tries them
//! (docs/kernel-package.md). [`debug`] is the chore `kmod-debug`, which builds a kernel too.

pub mod debug;
mod package;
mod package_check;
mod root;
mod toolchain;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};

use self::root::Root;
use self::toolchain::Compilers;
use crate::context::Context;
use crate::setup;

/// Changes whenever the same packages give another toolchain or tree.
const RECIPE: &str = "recipe 1";

/// What to do beside building.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Runs clippy with the kernel's settings over it; a warning is an error
    #[arg(long)]
    clippy: bool,
    /// Makes the DKMS package of the sources instead of the module
    #[arg(long)]
    package: bool,
    /// Makes the package that a kernel's headers lack for modules in Rust: linux-headers-KERNEL-rust
    #[arg(long)]
    kit: bool,
    /// Installs both packages in a Debian below target/kmod-package, builds, signs and loads the module, and provokes every refusal
    #[arg(long, requires = "package")]
    check: bool,
}

/// Runs the chore.
pub fn run(context: &Context, options: &Options) -> Result<()> {
    if options.check {
        return package_check::run(context);
    }
    if options.package {
        package::dkms(context)?;
    }
    if options.kit {
        kit(context)?;
    }
    if options.package || options.kit {
        return Ok(());
    }
    build(context)?;
    if options.clippy {
        clippy(context)?;
    }
    eprintln!("{}", fits(&kernel_of_setup(context)?, &running()));
    Ok(())
}

/// Clippy with the kernel's settings over the module, which is built; a warning is an error.
pub fn clippy(context: &Context) -> Result<()> {
    let root = Root::new(context.in_target("kmod/root"));
    toolchain::bring_clippy(context, &root)?;
    tree::clippy(context, &root)?;
    eprintln!("kmod: clippy has no warnings");
    Ok(())
}

/// Makes the kit of the kernel of target/setup.
fn kit(context: &Context) -> Result<PathBuf> {
    build(context)?;
    package::kit(context, &Root::new(context.in_target("kmod/root")), &kernel_of_setup(context)?)
}

/// The release of the kernel that runs here.
fn running() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Whether the module, which is for `kernel`, is of use on this machine, and what is if it is not.
fn fits(kernel: &str, running: &str) -> String {
    if kernel == running {
        return "kmod: that is the kernel that runs here: docs/kernel-package.md says how the module is installed".to_owned();
    }
    format!(
        "kmod: this machine runs Linux {running}, which cannot load it. `nitroxide doctor` says whether a module in Rust is possible here at all; \
         `cargo xtask parent-vm --driver rust` runs this one in a VM, and nitroxide's user-space home needs no module"
    )
}

/// Builds what is not built yet; returns the module's path.
pub fn build(context: &Context) -> Result<PathBuf> {
    let started = Instant::now();
    setup::run(context)?;
    let place = context.in_target("kmod");
    fs::create_dir_all(&place).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", place.display()))?;
    let _alone = setup::lock(&place.join("lock"))?;
    let kernel = kernel_of_setup(context)?;
    let root = Root::new(place.join("root"));
    let stamp = format!("{RECIPE}\n{kernel}\n");
    if fs::read_to_string(place.join("complete")).ok().as_deref() != Some(&*stamp) {
        setup::check_system()?;
        root.check()?;
        let archives = toolchain::bring(context, &root, &kernel, Compilers::Gnu)?;
        eprintln!("kmod: toolchain after {:.0} s", started.elapsed().as_secs_f64());
        tree::prepare(&root, &kernel, &archives)?;
        eprintln!("kmod: kernel tree after {:.0} s", started.elapsed().as_secs_f64());
        fs::write(place.join("complete"), stamp).into_diagnostic().wrap_err("Writing the stamp of kmod")?;
    }
    let module = place.join("nitro_enclaves.ko");
    tree::build_module(context, &root, Compilers::Gnu, &module)?;
    let size = fs::metadata(&module).into_diagnostic()?.len() >> 10;
    eprintln!("kmod: {} for Linux {kernel}: {size} KiB, after {:.1} s", module.display(), started.elapsed().as_secs_f64());
    Ok(module)
}

/// The version of the kernel that setup has brought, e.g. `7.3.4+deb13-cloud-amd64`.
fn kernel_of_setup(context: &Context) -> Result<String> {
    let modules = context.in_target("setup/root/usr/lib/modules");
    if !modules.is_dir() {
        bail!(
            "A module is built for the kernel that `cargo xtask setup` brings, and with NITROXIDE_QEMU and NITROXIDE_KERNEL set it brings none: unset them"
        );
    }
    let mut names = names_in(&modules);
    names.sort();
    names.pop().ok_or_else(|| miette!("{} holds no kernel: remove target/setup, then run `cargo xtask setup`", modules.display()))
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_running_kernel_is_told_what_to_do() {
        assert!(fits("7.3.4", "7.3.4").contains("installed"));
        let text = fits("7.3.4", "6.12.0");
        assert!(text.contains("6.12.0") && text.contains("cannot load it") && text.contains("doctor"), "{text}");
    }
}
