//! `cargo xtask kmod-debug`: builds a small kernel that checks itself, our module for it, and tries the module in a parent VM with it.
//!
//! The kernel is of the same source as the stock one, with the answers of kernel/debug.config: KASAN, lockdep, kmemleak and their like. KASAN with Rust
//! wants clang, so it has a toolchain of its own below target/kmod-debug. [`exercise`] says what is done in the VM, [`complaints`] finds what the kernel says
//! about it. Not part of `cargo xtask test`: it takes too long. docs/kernel-debug.md.

mod complaints;
mod exercise;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use miette::{IntoDiagnostic, Result, WrapErr, bail};

use super::root::Root;
use super::toolchain::{self, Compilers};
use super::{kernel_of_setup, tree};
use crate::context::Context;
use crate::setup;

/// Changes whenever the same packages give another toolchain or source.
const RECIPE: &str = "recipe 1";

/// Of the source what this kernel's configuration can never ask for.
const UNWANTED: [&str; 12] = [
    "Documentation/*/*",
    "drivers/gpu/*.[ch]",
    "drivers/iio/*.[ch]",
    "drivers/infiniband/*.[ch]",
    "drivers/media/*.[ch]",
    "drivers/net/*/*.[ch]",
    "drivers/scsi/*.[ch]",
    "sound/*.[ch]",
    "tools/testing/*",
    "tools/perf/*",
    "arch/*.dts*",
    "arch/[!x]*/*.[chS]",
];

/// What to do.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Builds kernel and module, and boots nothing
    #[arg(long)]
    build_only: bool,
    /// Only exercises whose name contains one of these
    #[arg(value_name = "NAME")]
    filters: Vec<String>,
}

/// What was built.
struct Built {
    /// `bzImage` and the modules of this kernel, mainline's driver among them.
    kernel: PathBuf,
    /// Our module.
    module: PathBuf,
}

/// Runs the chore.
pub fn run(context: &Context, options: &Options) -> Result<()> {
    let built = build(context)?;
    if options.build_only { Ok(()) } else { exercise::run(context, &built, &options.filters) }
}

/// Builds what is not built yet.
fn build(context: &Context) -> Result<Built> {
    let started = Instant::now();
    setup::run(context)?;
    let place = context.in_target("kmod-debug");
    let built = Built { kernel: place.join("kernel"), module: place.join("nitro_enclaves.ko") };
    fs::create_dir_all(&built.kernel).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", built.kernel.display()))?;
    let _alone = setup::lock(&place.join("lock"))?;
    let root = Root::new(place.join("root"));
    let release = kernel_of_setup(context)?;
    once(&place.join("unpacked"), &format!("{RECIPE}\n{release}\n"), || {
        setup::check_system()?;
        root.check()?;
        let archives = toolchain::bring(context, &root, &release, Compilers::Llvm)?;
        eprintln!("kmod-debug: unpacking the source of Linux {}", archives.version);
        tree::unpack_source(&root, &archives, &UNWANTED)?;
        eprintln!("kmod-debug: toolchain and source after {:.0} s", started.elapsed().as_secs_f64());
        Ok(())
    })?;
    let answers = context.root.join("kernel/debug.config");
    let text = fs::read_to_string(&answers).into_diagnostic().wrap_err_with(|| format!("Reading {}", answers.display()))?;
    once(&place.join("complete"), &format!("{RECIPE}\n{release}\n{text}"), || {
        eprintln!("kmod-debug: building the kernel");
        build_kernel(&root, &text, &built.kernel)?;
        eprintln!("kmod-debug: kernel after {:.0} s", started.elapsed().as_secs_f64());
        Ok(())
    })?;
    tree::build_module(context, &root, Compilers::Llvm, &built.module)?;
    eprintln!("kmod-debug: {} for {}, after {:.1} s", built.module.display(), built.kernel.display(), started.elapsed().as_secs_f64());
    Ok(built)
}

/// Does something unless the stamp says that it was done.
fn once(place: &Path, stamp: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    if fs::read_to_string(place).ok().as_deref() == Some(stamp) {
        return Ok(());
    }
    act()?;
    fs::write(place, stamp).into_diagnostic().wrap_err_with(|| format!("Writing {}", place.display()))
}

/// Configures, builds, and copies what a VM needs into `to`.
fn build_kernel(root: &Root, answers: &str, to: &Path) -> Result<()> {
    let objects = root.path(tree::OBJECTS);
    fs::create_dir_all(&objects).into_diagnostic().wrap_err("Making the folder of the objects")?;
    fs::write(root.path("/debug.config"), answers).into_diagnostic().wrap_err("Writing the answers for the configuration")?;
    let make = |log: &str, words: &[&str]| tree::make(root, Compilers::Llvm, &root.path(log), words);
    make("/configure.log", &["KCONFIG_ALLCONFIG=/debug.config", "allnoconfig"])?;
    let configuration = fs::read_to_string(objects.join(".config")).into_diagnostic().wrap_err("Reading the kernel's configuration")?;
    let refused = refused(answers, &configuration);
    if !refused.is_empty() {
        bail!("This kernel cannot be configured as kernel/debug.config says; without an effect are:\n{}", refused.join("\n"));
    }
    make("/kernel.log", &["bzImage", "modules"])?;
    for file in ["arch/x86/boot/bzImage", "drivers/virt/nitro_enclaves/nitro_enclaves.ko"] {
        let from = objects.join(file);
        tree::copy_if_changed(&from, &to.join(from.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

/// Answers that the configuration does not have: a dependency of theirs is not there.
fn refused<'a>(answers: &'a str, configuration: &str) -> Vec<&'a str> {
    let is_answer = |line: &&str| line.starts_with("CONFIG_");
    answers.lines().filter(is_answer).filter(|answer| !configuration.lines().any(|line| line == *answer)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_without_an_effect_are_named() {
        let answers = "# Why.\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=12\n\n";
        assert_eq!(refused(answers, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=120\n"), ["CONFIG_B=y", "CONFIG_C=12"]);
        assert!(refused(answers, "CONFIG_C=12\nCONFIG_B=y\nCONFIG_A=y\n").is_empty());
    }

    #[test]
    fn what_was_done_is_not_done_again_and_a_failure_is() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("stamp");
        let count = std::cell::Cell::new(0);
        let act = |fails: bool| {
            count.set(count.get() + 1);
            if fails { bail!("no") } else { Ok(()) }
        };
        assert!(once(&place, "a", || act(true)).is_err());
        once(&place, "a", || act(false)).unwrap();
        once(&place, "a", || act(false)).unwrap();
        assert_eq!(count.get(), 2);
        once(&place, "b", || act(false)).unwrap();
        assert_eq!(count.get(), 3);
    }
}
