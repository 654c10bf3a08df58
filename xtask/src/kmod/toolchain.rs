//! Debian's compilers, unpacked below target/kmod/root, and the kernel's headers and source beside them.

use std::fs;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};

use super::root::Root;
use crate::context::Context;
use crate::setup::apt::{Apt, Package, source_version, style};
use crate::setup::tree::unpack_part;
use crate::setup::{self, KEYRING};

/// What the kernel's build calls: compilers and generators, and of the base system the shell and what makefiles use. openssl and python3 are needed
/// for the configuration to come out unchanged and for libbpf.
const TOOLS: [&str; 26] = [
    "base-files",
    "bash",
    "bc",
    "bindgen",
    "bison",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "flex",
    "gcc-14",
    "grep",
    "gzip",
    "kmod",
    "libelf-dev",
    "libssl-dev",
    "make",
    "mawk",
    "openssl",
    "pahole",
    "python3-minimal",
    "rust-src",
    "rustc",
    "sed",
    "xz-utils",
    "zlib1g-dev",
];

/// The compilers that a tree is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compilers {
    /// gcc, as the stock kernel.
    Gnu,
    /// clang and its neighbours: a kernel with Rust and KASAN wants them (init/Kconfig, `config RUST`).
    Llvm,
}

impl Compilers {
    /// Packages beside [`TOOLS`].
    const fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Gnu => &[],
            Self::Llvm => &["clang", "lld", "llvm"],
        }
    }

    /// Words of make(1) that choose them.
    pub const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Gnu => &[],
            Self::Llvm => &["LLVM=1"],
        }
    }
}

/// What is not unpacked: documentation, static libraries of LLVM, and of rust-src everything but the standard library.
const UNWANTED: [&str; 5] =
    ["./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/lib/llvm-*/lib/*.a", "./usr/src/rustc-*/[!l]*"];

/// Names that Debian's packages make when they are installed.
const LINKS: [(&str, &str); 2] = [("/usr/bin/awk", "mawk"), ("/usr/bin/cc", "gcc-14")];

/// The kernel's packages.
pub struct Archives {
    /// linux-headers-...: configuration, symbols, types.
    pub headers: PathBuf,
    /// linux-source-...
    pub source: PathBuf,
    /// The source's version as in the package's name, e.g. `7.3`.
    pub version: String,
}

/// Downloads what the cache lacks, and makes the toolchain's root anew.
pub fn bring(context: &Context, root: &Root, kernel: &str, compilers: Compilers) -> Result<Archives> {
    let _alone_in_cache = setup::lock_cache(context)?;
    let apt = Apt::open(&context.cache.join("apt"), KEYRING)?;
    let version = source_version(kernel);
    let wanted = [format!("linux-headers-{kernel}"), format!("linux-source-{version}")];
    let packages = apt.packages(&wanted).wrap_err_with(|| {
        format!("The mirror has the headers of Linux {kernel} no more: remove target/setup, run `cargo xtask setup`, then this again")
    })?;
    check_versions(&packages)?;
    let kernel_archives = apt.fetch(&packages, &context.cache.join("kmod/kernel"))?;
    let named = |name: &String| {
        let place = packages.iter().position(|package| package.name == *name);
        place.and_then(|index| kernel_archives.get(index)).cloned().ok_or_else(|| miette!("The package {name} did not arrive"))
    };
    let [headers, source] = [named(&wanted[0])?, named(&wanted[1])?];

    let release = apt.of_release()?;
    let tools = release.installation(&TOOLS)?;
    let mut archives = release.fetch(&tools, &context.cache.join("kmod/tools"))?;
    if !compilers.tools().is_empty() {
        // In a folder of their own: each holds one set.
        let mut further = release.installation(&[&TOOLS[..], compilers.tools()].concat())?;
        further.retain(|package| !tools.contains(package));
        archives.extend(release.fetch(&further, &context.cache.join("kmod/further-tools"))?);
    }
    apt.close();
    unpack_all(&archives, root)?;
    Ok(Archives { headers, source, version })
}

/// Downloads Debian's clippy, which only `--clippy` needs, where it is not there yet.
pub fn bring_clippy(context: &Context, root: &Root) -> Result<()> {
    if root.path("/usr/bin/clippy-driver").exists() {
        return Ok(());
    }
    let _alone_in_cache = setup::lock_cache(context)?;
    let apt = Apt::open(&context.cache.join("apt"), KEYRING)?;
    let release = apt.of_release()?;
    let archives = release.fetch(&release.packages(&["rust-clippy".to_owned()])?, &context.cache.join("kmod/clippy"))?;
    apt.close();
    archives.iter().try_for_each(|archive| unpack(archive, &root.path(""), &[]))
}

/// Headers and source of one version: the mirror may have moved on between them.
fn check_versions(packages: &[Package]) -> Result<()> {
    let versions: Vec<&str> = packages.iter().filter_map(|package| package.file.split('_').nth(1)).collect();
    if versions.windows(2).any(|pair| pair.first() != pair.last()) {
        bail!(
            "The mirror has headers and source of different versions ({}): remove target/setup, run `cargo xtask setup`, then this again",
            versions.join(", ")
        );
    }
    Ok(())
}

fn unpack_all(archives: &[PathBuf], root: &Root) -> Result<()> {
    let folder = root.path("");
    if folder.exists() {
        fs::remove_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", folder.display()))?;
    eprintln!("kmod: unpacking {} packages", archives.len());
    let bar = ProgressBar::new(archives.len() as u64).with_style(style("{bar:40} {pos}/{len} unpacked"));
    for archive in archives {
        unpack(archive, &folder, &[])?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    for (place, target) in LINKS {
        let place = root.path(place);
        if !place.is_symlink() {
            std::os::unix::fs::symlink(target, &place)
                .into_diagnostic()
                .wrap_err_with(|| format!("Making the link {}", place.display()))?;
        }
    }
    for name in ["dev", "proc", "tmp"] {
        fs::create_dir_all(root.path(name)).into_diagnostic()?;
    }
    Ok(())
}

/// Unpacks one archive, or of it what is named, without what nobody needs.
pub fn unpack(archive: &Path, folder: &Path, members: &[&str]) -> Result<()> {
    let patterns = ["--anchored", "--no-wildcards-match-slash"].map(str::to_owned);
    let unwanted = UNWANTED.map(|pattern| format!("--exclude={pattern}"));
    let arguments: Vec<String> = patterns.into_iter().chain(unwanted).chain(members.iter().map(|member| (*member).to_owned())).collect();
    unpack_part(archive, folder, &arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(file: &str) -> Package {
        Package { name: String::new(), file: file.to_owned(), size: 0, sha256: String::new() }
    }

    #[test]
    fn headers_and_source_of_different_versions_are_refused() {
        let same = [package("linux-headers-7.3.4_7.3.4-1_amd64.deb"), package("linux-source-7.3_7.3.4-1_all.deb")];
        assert!(check_versions(&same).is_ok());
        let different = [package("linux-headers-7.3.4_7.3.4-1_amd64.deb"), package("linux-source-7.3_7.3.5-1_all.deb")];
        assert!(check_versions(&different).is_err());
    }
}
