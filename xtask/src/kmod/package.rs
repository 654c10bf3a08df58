//! Debian packages of the module, for users without this repository: the sources for DKMS ([`dkms`]), and what the headers of a kernel lack ([`kit`]).
//!
//! Texts and scripts are in kernel/package; `@NAME@` in them is filled in. Files are laid out in a folder of target/kmod and packed by dpkg-deb, without
//! root; times and modes are fixed, so that the same commit gives the same bytes. docs/kernel-package.md.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use miette::{IntoDiagnostic, Result, WrapErr, miette};

use super::names_in;
use super::root::Root;
use super::tree::is_source;
use crate::context::{self, Context};
use crate::setup::apt::output;

/// The module's name and version for DKMS, and the package's.
pub const NAME: &str = "nitro-enclaves-nitroxide";
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The kernel release whose Rust interfaces the module is written for.
const RELEASE: &str = "7.3";

/// What of the kernel's build the kit has, beside all `rust/*.rmeta` and `rust/*.so`.
const TARGET: &str = "scripts/target.json";

/// Makes the DKMS package; returns its path.
pub fn dkms(context: &Context) -> Result<PathBuf> {
    let package = format!("{NAME}-dkms");
    let mut layout = Layout::new(context, &package, vec![("VERSION", VERSION.to_owned()), ("RELEASE", RELEASE.to_owned())])?;
    let source = format!("usr/src/{NAME}-{VERSION}");
    for (from, to) in [("kernel/src", "src"), ("crates/abi/src", "abi"), ("crates/driver/src", "driver")] {
        let from = context.root.join(from);
        for name in names_in(&from).iter().filter(|name| is_source(name)) {
            layout.copy(&from.join(name), &format!("{source}/{to}/{name}"))?;
        }
    }
    for file in ["kernel/Kbuild", "kernel/LICENSE-GPL-2.0", "LICENSE-MIT", "LICENSE-APACHE"] {
        let name = file.rsplit('/').next().unwrap_or(file);
        layout.copy(&context.root.join(file), &format!("{source}/{name}"))?;
    }
    for (template, place) in [
        ("dkms.conf", format!("{source}/dkms.conf")),
        ("prepare", format!("{source}/prepare")),
        ("udev.rules", format!("usr/lib/udev/rules.d/60-{NAME}.rules")),
        ("sysusers.conf", format!("usr/lib/sysusers.d/{NAME}.conf")),
        ("README", format!("usr/share/doc/{package}/README")),
        ("copyright", format!("usr/share/doc/{package}/copyright")),
        ("control", "DEBIAN/control".to_owned()),
        ("postinst", "DEBIAN/postinst".to_owned()),
        ("prerm", "DEBIAN/prerm".to_owned()),
    ] {
        layout.fill(template, &place)?;
    }
    layout.pack(&format!("{package}_{VERSION}_all.deb"))
}

/// Makes the kit, the package `linux-headers-KERNEL-rust`, from the kernel's tree that a module was built in; returns its path.
pub fn kit(context: &Context, root: &Root, kernel: &str) -> Result<PathBuf> {
    let folder = format!("usr/src/linux-headers-{kernel}");
    let headers = root.path("/headers").join(&folder);
    let read =
        |name: &str| fs::read_to_string(headers.join(name)).into_diagnostic().wrap_err_with(|| format!("Reading the headers' {name}"));
    let (versions, configuration) = (read("include/generated/package.h")?, read(".config")?);
    let odd = |what: &str| miette!("The headers of {kernel} do not say {what} as Debian's do: is this Debian's kernel?");
    let version = package_version(&versions).ok_or_else(|| odd("their version"))?;
    let rustc = compiler_version(&configuration).ok_or_else(|| odd("the compiler's version"))?;
    // The headers' `scripts` is a link into another package: dpkg wants the place itself.
    let scripts = fs::read_link(headers.join("scripts")).into_diagnostic().wrap_err("Reading the headers' link `scripts`")?;
    let build_tools = scripts.iter().rev().nth(1).and_then(|name| name.to_str()).ok_or_else(|| odd("where their scripts are"))?;

    let package = format!("linux-headers-{kernel}-rust");
    let values = vec![("KERNEL", kernel.to_owned()), ("HEADERS", version.to_owned()), ("RUSTC", rustc.to_owned())];
    let mut layout = Layout::new(context, &package, values)?;
    let objects = root.path("/kobj");
    for name in names_in(&objects.join("rust")).iter().filter(|name| name.ends_with(".rmeta") || name.ends_with(".so")) {
        layout.copy(&objects.join("rust").join(name), &format!("{folder}/rust/{name}"))?;
    }
    layout.copy(&objects.join(TARGET), &format!("usr/lib/{build_tools}/{TARGET}"))?;
    layout.fill("kit-copyright", &format!("usr/share/doc/{package}/copyright"))?;
    layout.fill("kit-control", "DEBIAN/control")?;
    layout.fill("kit-postinst", "DEBIAN/postinst")?;
    layout.pack(&format!("{package}_{version}_amd64.deb"))
}

/// `7.3.4-1~bpo13+1` of `#define LINUX_PACKAGE_ID " Debian 7.3.4-1~bpo13+1"`.
fn package_version(text: &str) -> Option<&str> {
    text.split_once("LINUX_PACKAGE_ID")?.1.split('"').nth(1)?.split_ascii_whitespace().nth(1)
}

/// `1.85.1` of `CONFIG_RUSTC_VERSION_TEXT="rustc 1.85.1 (4eb161250 2025-03-15)"`.
fn compiler_version(configuration: &str) -> Option<&str> {
    let text = configuration.lines().find_map(|line| line.strip_prefix("CONFIG_RUSTC_VERSION_TEXT="))?;
    text.split_ascii_whitespace().nth(1)
}

/// A package's files as they will lie on the user's system, and what it is called.
struct Layout<'a> {
    context: &'a Context,
    folder: PathBuf,
    values: Vec<(&'static str, String)>,
    bytes: u64,
}

impl<'a> Layout<'a> {
    fn new(context: &'a Context, package: &str, values: Vec<(&'static str, String)>) -> Result<Self> {
        let folder = context.in_target("kmod/package").join(package);
        if folder.exists() {
            fs::remove_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
        }
        Ok(Self { context, folder, values, bytes: 0 })
    }

    fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        let content = fs::read(from).into_diagnostic().wrap_err_with(|| format!("Reading {}", from.display()))?;
        self.write(&content, to, 0o644)
    }

    /// A file of kernel/package with its values; scripts stay scripts.
    fn fill(&mut self, template: &str, to: &str) -> Result<()> {
        let path = self.context.root.join("kernel/package").join(template);
        let text = fs::read_to_string(&path).into_diagnostic().wrap_err_with(|| format!("Reading {}", path.display()))?;
        let filled = fill(&text, &self.values);
        self.write(filled.as_bytes(), to, if text.starts_with("#!") { 0o755 } else { 0o644 })
    }

    fn write(&mut self, content: &[u8], to: &str, mode: u32) -> Result<()> {
        let place = self.folder.join(to);
        let failed = || format!("Writing {}", place.display());
        for folder in place.ancestors().skip(1).take_while(|folder| folder.starts_with(&self.folder)) {
            fs::create_dir_all(folder).into_diagnostic().wrap_err_with(failed)?;
            // Whatever the user's umask is.
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).into_diagnostic().wrap_err_with(failed)?;
        }
        fs::write(&place, content).into_diagnostic().wrap_err_with(failed)?;
        fs::set_permissions(&place, fs::Permissions::from_mode(mode)).into_diagnostic().wrap_err_with(failed)?;
        self.bytes += content.len() as u64;
        Ok(())
    }

    fn pack(mut self, file: &str) -> Result<PathBuf> {
        let control = self.folder.join("DEBIAN/control");
        let text = fs::read_to_string(&control).into_diagnostic().wrap_err("Reading the package's description")?;
        let text = text.replacen("Section:", &format!("Installed-Size: {}\nSection:", self.bytes.div_ceil(1024)), 1);
        self.write(text.as_bytes(), "DEBIAN/control", 0o644)?;
        let place = self.context.in_target("kmod").join(file);
        let mut command = Command::new("dpkg-deb");
        // Level 1: of the kit's 180 MB better levels save a tenth, and take six times as long.
        command.args(["--root-owner-group", "-Zxz", "-z1", "--build"]).arg(&self.folder).arg(&place);
        // dpkg-deb takes no later time than this for any file; all of these were written just now.
        command.env("SOURCE_DATE_EPOCH", epoch(self.context)?);
        output(&mut command)?;
        fs::remove_dir_all(&self.folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", self.folder.display()))?;
        let size = fs::metadata(&place).into_diagnostic()?.len() >> 10;
        eprintln!("kmod: {}: {size} KiB", place.display());
        Ok(place)
    }
}

fn fill(text: &str, values: &[(&str, String)]) -> String {
    values.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value))
}

/// The time that all files of a package have, in seconds of 1970: `SOURCE_DATE_EPOCH`, else the commit's.
fn epoch(context: &Context) -> Result<String> {
    if let Some(epoch) = std::env::var("SOURCE_DATE_EPOCH").ok().filter(|text| !text.is_empty()) {
        return Ok(epoch);
    }
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%ct"]).current_dir(&context.root);
    let shown = context::show(&git);
    let time = output(&mut git).wrap_err_with(|| format!("`{shown}` gives the packages their time; without git set SOURCE_DATE_EPOCH"))?;
    Ok(time.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versions_of_headers_and_compiler_are_read() {
        assert_eq!(package_version("#define LINUX_PACKAGE_ID \" Debian 7.3.4-1~bpo13+1\"\n"), Some("7.3.4-1~bpo13+1"));
        assert_eq!(package_version("#define LINUX_PACKAGE_ID \"\"\n"), None);
        let text = "CONFIG_RUSTC_VERSION=108501\nCONFIG_RUSTC_VERSION_TEXT=\"rustc 1.85.1 (4eb161250 2025-03-15)\"\n";
        assert_eq!(compiler_version(text), Some("1.85.1"));
        assert_eq!(compiler_version("# CONFIG_RUST is not set\n"), None);
    }

    #[test]
    fn every_value_is_filled_in_and_no_placeholder_stays() {
        let values = ["VERSION", "RELEASE", "KERNEL", "HEADERS", "RUSTC"].map(|name| (name, "1".to_owned()));
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel/package");
        let names = names_in(&folder);
        assert!(names.len() > 10, "{names:?}");
        for name in names {
            let text = fill(&fs::read_to_string(folder.join(&name)).unwrap(), &values);
            assert!(!text.contains("@V") && !text.contains("@R") && !text.contains("@K") && !text.contains("@H"), "{name}: {text}");
        }
    }
}
