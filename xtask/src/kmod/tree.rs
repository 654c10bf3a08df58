//! The kernel's tree in which modules are built: the stock kernel's source and configuration, its Rust crates compiled, and the proof that a
//! module built on them fits the stock kernel.
//!
//! Without CONFIG_MODVERSIONS nothing but names is compared when a module is loaded, and Rust's names carry a hash of the compiler's version: equal
//! lists of names say that compiler and configuration are the kernel's own.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use miette::{IntoDiagnostic, Result, WrapErr, bail};

use super::names_in;
use super::root::Root;
use super::toolchain::{Archives, Compilers, unpack};
use crate::context::Context;

/// Of the source what modules are built with; the rest, most of the drivers, stays packed (255 MB instead of 1.8 GB).
const UNWANTED: [&str; 14] = [
    "Documentation/*/*",
    "drivers/*.[cS]",
    "drivers/gpu/*.[ch]",
    "drivers/net/*.[ch]",
    "drivers/media/*.[ch]",
    "sound/*.[ch]",
    "fs/*.c",
    "net/*.c",
    "mm/*.c",
    "crypto/*.c",
    "tools/testing/*",
    "tools/perf/*",
    "arch/*.dts*",
    "arch/[!x]*/*.[chS]",
];

const SOURCE: &str = "/ksrc";
/// Where a tree's objects lie.
pub const OBJECTS: &str = "/kobj";
const MODULE: &str = "/mod";
const CLIPPY: &str = "/clippy";

/// Jobs of make: as many as CPUs, at most this many.
const MOST_JOBS: usize = 8;

/// Makes source and objects ready for modules, and checks that they are the stock kernel's.
pub fn prepare(root: &Root, kernel: &str, archives: &Archives) -> Result<()> {
    let headers = root.path("/headers");
    fs::create_dir_all(&headers).into_diagnostic().wrap_err("Making the folder of the headers")?;
    unpack(&archives.headers, &headers, &[])?;
    let headers = headers.join("usr/src").join(format!("linux-headers-{kernel}"));
    eprintln!("kmod: unpacking the source of Linux {}", archives.version);
    unpack_source(root, archives, &UNWANTED)?;
    eprintln!("kmod: compiling the kernel's Rust crates and build tools");
    let objects = root.path(OBJECTS);
    fs::create_dir_all(&objects).into_diagnostic().wrap_err("Making the folder of the objects")?;
    let copy = |name: &str| {
        fs::copy(headers.join(name), objects.join(name))
            .into_diagnostic()
            .wrap_err_with(|| format!("The headers of {kernel} hold no {name}"))
    };
    copy(".config")?;
    // Debian's makefile reads it.
    let variables = format!(
        "override ARCH = x86\noverride KERNELRELEASE = {kernel}\noverride CROSS_COMPILE = x86_64-linux-gnu-\nCC = $(CROSS_COMPILE)gcc-14\n"
    );
    fs::write(objects.join(".kernelvariables"), variables).into_diagnostic().wrap_err("Writing .kernelvariables")?;
    let log = root.path("/prepare.log");
    make(root, Compilers::Gnu, &log, &["olddefconfig", "rustavailable"])
        .wrap_err("Can this kernel take Rust modules? Of Debian's only those from trixie-backports on can (docs/kernel.md)")?;
    check_configuration(&headers, &objects)?;
    make(root, Compilers::Gnu, &log, &["modules_prepare"])?;
    check_symbols(&headers, &objects)?;
    copy("Module.symvers")?;
    // Types of the kernel, for the module's BTF.
    copy("vmlinux")?;
    Ok(())
}

/// Copies the module's sources into the root, where they changed, builds, and puts the stripped module at `place`.
pub fn build_module(context: &Context, root: &Root, compilers: Compilers, place: &Path) -> Result<()> {
    copy_sources(context, root, MODULE)?;
    make(root, compilers, &root.path("/module.log"), &[&format!("M={MODULE}"), "modules"])?;
    let stripped = root.path(MODULE).join("nitro_enclaves.stripped");
    root.run(
        &root.path("/strip.log"),
        &["strip", "--strip-debug", "-o", &format!("{MODULE}/nitro_enclaves.stripped"), &format!("{MODULE}/nitro_enclaves.ko")],
    )?;
    copy_if_changed(&stripped, place)
}

/// Runs clippy with the kernel's settings over the module, in a folder of its own.
///
/// # Errors
///
/// Its warnings: there must be none.
pub fn clippy(context: &Context, root: &Root) -> Result<()> {
    // What is compiled already is not looked at again.
    let folder = root.path(CLIPPY);
    if folder.exists() {
        fs::remove_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
    }
    copy_sources(context, root, CLIPPY)?;
    let log = root.path("/clippy.log");
    make(root, Compilers::Gnu, &log, &[&format!("M={CLIPPY}"), "CLIPPY=1", "modules"])?;
    let text = fs::read_to_string(&log).into_diagnostic().wrap_err("Reading clippy's log")?;
    match text.lines().filter(|line| line.starts_with("warning")).count() {
        0 => Ok(()),
        count => bail!("clippy has {count} warnings:\n{text}"),
    }
}

fn copy_sources(context: &Context, root: &Root, to: &str) -> Result<()> {
    for (from, part) in [("kernel/src", "src"), ("crates/abi/src", "abi"), ("crates/driver/src", "driver")] {
        mirror(&context.root.join(from), &root.path(to).join(part))?;
    }
    copy_if_changed(&context.root.join("kernel/Kbuild"), &root.path(to).join("Kbuild"))
}

/// Runs the kernel's makefile.
pub fn make(root: &Root, compilers: Compilers, log: &Path, arguments: &[&str]) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, |count| count.get().min(MOST_JOBS));
    let (objects, jobs) = (format!("O={OBJECTS}"), format!("-j{jobs}"));
    let words = ["make", "-C", SOURCE, &objects, &jobs];
    root.run(log, &[&words[..], compilers.words(), arguments].concat())
}

/// Unpacks the source without the files of these patterns. The archive holds a compressed tar; both are read as streams.
pub fn unpack_source(root: &Root, archives: &Archives, unwanted: &[&str]) -> Result<()> {
    let failed = || format!("Unpacking {}", archives.source.display());
    let name = format!("linux-source-{}", archives.version);
    let mut deb = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(&archives.source)
        .stdout(Stdio::piped())
        .spawn()
        .into_diagnostic()
        .wrap_err_with(failed)?;
    let mut outer_tar = Command::new("tar");
    outer_tar.args(["--extract", "--to-stdout"]).arg(format!("./usr/src/{name}.tar.xz"));
    outer_tar.stdin(deb.stdout.take().map_or_else(Stdio::null, Stdio::from)).stdout(Stdio::piped());
    let mut outer = outer_tar.spawn().into_diagnostic().wrap_err_with(failed)?;
    let mut inner = Command::new("tar");
    inner.args(["--extract", "--xz", "--no-same-owner", "--directory"]).arg(root.path(""));
    inner.args(unwanted.iter().map(|pattern| format!("--exclude={name}/{pattern}")));
    inner.stdin(outer.stdout.take().map_or_else(Stdio::null, Stdio::from));
    let status = inner.status().into_diagnostic().wrap_err_with(failed)?;
    drop((outer_tar, inner));
    let ended = [outer.wait().into_diagnostic()?, deb.wait().into_diagnostic()?];
    if !status.success() || ended.iter().any(|status| !status.success()) {
        bail!("{} cannot be unpacked", archives.source.display());
    }
    fs::rename(root.path(&name), root.path(SOURCE)).into_diagnostic().wrap_err_with(failed)
}

/// The toolchain's features are part of the configuration: if one differs, so does the line.
fn check_configuration(headers: &Path, objects: &Path) -> Result<()> {
    let read = |folder: &Path| fs::read_to_string(folder.join(".config")).into_diagnostic().wrap_err("Reading the kernel's configuration");
    let (stock, ours) = (read(headers)?, read(objects)?);
    let differences: Vec<&str> = ours.lines().filter(|line| !stock.lines().any(|other| other == *line)).collect();
    if stock != ours {
        bail!("The toolchain is not the one that the kernel was built with; the configuration changed:\n{}", differences.join("\n"));
    }
    if !stock.lines().any(|line| line == "CONFIG_RUST=y") {
        bail!("This kernel was built without CONFIG_RUST: no module in Rust can be loaded into it");
    }
    Ok(())
}

/// Every Rust symbol that the stock kernel exports must have the same name here, and no more must be there.
fn check_symbols(headers: &Path, objects: &Path) -> Result<()> {
    let text = fs::read_to_string(headers.join("Module.symvers")).into_diagnostic().wrap_err("Reading the kernel's symbols")?;
    let stock = stock_symbols(&text);
    let mut ours = BTreeSet::new();
    for name in names_in(&objects.join("rust")).iter().filter(|name| name.starts_with("exports_") && name.ends_with("_generated.h")) {
        let text = fs::read_to_string(objects.join("rust").join(name)).into_diagnostic().wrap_err_with(|| format!("Reading {name}"))?;
        ours.extend(exported_symbols(&text).map(str::to_owned));
    }
    let differing = stock.symmetric_difference(&ours).count();
    if stock.is_empty() || differing != 0 {
        bail!(
            "{differing} of the kernel's {} Rust symbols have another name here: the module would not load. The compiler is not the kernel's",
            stock.len()
        );
    }
    eprintln!("kmod: all {} Rust symbols are those of the stock kernel", stock.len());
    Ok(())
}

/// Lines of Module.symvers: checksum, name, who exports it, how.
fn stock_symbols(text: &str) -> BTreeSet<String> {
    let fields = text.lines().filter_map(|line| {
        let mut words = line.split('\t').skip(1);
        Some((words.next()?, words.next()?))
    });
    fields
        .filter(|(name, of)| *of == "vmlinux" && (name.starts_with("_R") || name.starts_with("rust_")))
        .map(|(name, _)| name.to_owned())
        .collect()
}

fn exported_symbols(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix("EXPORT_SYMBOL_RUST_GPL(")?.strip_suffix(");"))
}

/// Is this a file that the module is made of, and not one that a build has put beside them?
pub fn is_source(name: &str) -> bool {
    [".rs", ".c", ".h"].iter().any(|ending| name.ends_with(ending)) && !name.ends_with(".mod.c")
}

/// Makes the files of `to` those of `from`, except for what a build has put there; unchanged files keep their times.
fn mirror(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", to.display()))?;
    let names = names_in(from);
    for stale in names_in(to).iter().filter(|name| is_source(name) && !names.contains(name)) {
        fs::remove_file(to.join(stale)).into_diagnostic().wrap_err_with(|| format!("Removing {stale}"))?;
    }
    names.iter().filter(|name| is_source(name)).try_for_each(|name| copy_if_changed(&from.join(name), &to.join(name)))
}

/// Copies a file unless it is there already; an unchanged one keeps its time.
pub fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let content = fs::read(from).into_diagnostic().wrap_err_with(|| format!("Reading {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    fs::write(to, content).into_diagnostic().wrap_err_with(|| format!("Writing {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rust_symbols_of_the_kernel_itself_are_found_and_others_are_not() {
        let text = "0x0\t_RNvabc\tvmlinux\tEXPORT_SYMBOL_GPL\t\n0x0\trust_helper_x\tvmlinux\tEXPORT_SYMBOL_GPL\t\n0x0\tkfree\tvmlinux\tEXPORT_SYMBOL\t\n\
                    0x0\t_RNvother\tdrivers/x\tEXPORT_SYMBOL_GPL\t\n";
        assert_eq!(stock_symbols(text).into_iter().collect::<Vec<_>>(), ["_RNvabc", "rust_helper_x"]);
        assert_eq!(exported_symbols("x\nEXPORT_SYMBOL_RUST_GPL(_RNvabc);\n").collect::<Vec<_>>(), ["_RNvabc"]);
    }

    #[test]
    fn a_mirror_has_the_sources_and_leaves_what_was_built() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(&from).unwrap();
        fs::create_dir_all(&to).unwrap();
        for (place, name) in [(&from, "a.rs"), (&from, "a.c"), (&from, "a.h"), (&from, "a.md"), (&to, "old.rs"), (&to, "a.o")] {
            fs::write(place.join(name), name).unwrap();
        }
        mirror(&from, &to).unwrap();
        let mut names = names_in(&to);
        names.sort();
        assert_eq!(names, ["a.c", "a.h", "a.o", "a.rs"]);
    }

    #[test]
    fn a_changed_configuration_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (stock, ours) = (folder.path().join("stock"), folder.path().join("ours"));
        for (place, text) in [(&stock, "CONFIG_RUST=y\nCONFIG_A=y\n"), (&ours, "CONFIG_RUST=y\nCONFIG_A=n\n")] {
            fs::create_dir_all(place).unwrap();
            fs::write(place.join(".config"), text).unwrap();
        }
        assert!(check_configuration(&stock, &stock).is_ok());
        let error = check_configuration(&stock, &ours).unwrap_err().to_string();
        assert!(error.contains("CONFIG_A=n") && !error.contains("CONFIG_RUST"), "{error}");
    }
}
