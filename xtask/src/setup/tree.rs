//! The unpacked tree: made aside, checked by running it, then put in place in one step.
//!
//! [`build`] is the entry point. An interrupted run leaves a folder `new-*` that the next one removes; target/setup/root is never half a tree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use indicatif::ProgressBar;
use miette::{IntoDiagnostic, Result, WrapErr, bail};
use rustix::fs::{CWD, RenameFlags};

use super::apt::{output, style};

/// The emulator's place in the tree.
pub const QEMU: &str = "usr/bin/qemu-system-x86_64";

/// What is not unpacked: nothing that a program reads at run time.
const UNWANTED: [&str; 12] = [
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/share/lintian",
    "./usr/share/bug",
    "./usr/share/applications",
    "./usr/share/icons",
    "./usr/share/gdb",
    "./usr/lib/x86_64-linux-gnu/gconv",
    "./usr/lib/x86_64-linux-gnu/ossl-modules",
    // The same emulator for 32-bit guests.
    "./usr/bin/qemu-system-i386",
    "./etc",
];

/// The kernel modules that are kept, with what they depend on: enclaves need the first line, parents and experiments the others.
const MODULES: [&str; 21] = [
    "vsock",
    "vmw_vsock_virtio_transport",
    "vmw_vsock_virtio_transport_common",
    "virtio_mmio",
    "nsm",
    "virtio-rng",
    "nitro_enclaves",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_scsi",
    "virtio_balloon",
    "vsock_loopback",
    "vsock_diag",
    "vsockmon",
    "vhost_vsock",
    "pvpanic-mmio",
    "pvpanic-pci",
    "overlay",
    "tun",
    "9pnet_virtio",
];

/// Unpacks the archives, checks the result and puts it at `setup`/root. Returns what is there, for people.
pub fn build(setup: &Path, archives: &[PathBuf], kernel: &str) -> Result<String> {
    for stale in entries(setup).filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("new-"))) {
        fs::remove_dir_all(&stale).into_diagnostic().wrap_err_with(|| format!("Removing {}", stale.display()))?;
    }
    let new = setup.join(format!("new-{}", std::process::id()));
    let root = new.join("root");
    fs::create_dir_all(&root).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", root.display()))?;
    eprintln!("setup: unpacking {} packages", archives.len());
    let bar = ProgressBar::new(archives.len() as u64).with_style(style("{bar:40} {pos}/{len} unpacked"));
    for archive in archives {
        unpack(archive, &root)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    place_kernel(&root, kernel)?;
    keep_modules(&root.join("usr/lib/modules").join(kernel))?;
    let qemu = check(&root)?;
    replace(&root, &setup.join("root"))?;
    fs::remove_dir_all(&new).into_diagnostic().wrap_err_with(|| format!("Removing {}", new.display()))?;
    Ok(format!("QEMU {qemu}, Linux {kernel}"))
}

/// Unpacks one archive without its documentation.
pub fn unpack(archive: &Path, root: &Path) -> Result<()> {
    unpack_part(archive, root, &UNWANTED.map(|path| format!("--exclude={path}")))
}

/// Unpacks one archive, with further arguments of tar(1): what to leave out, how patterns are read, which members.
pub fn unpack_part(archive: &Path, root: &Path, arguments: &[String]) -> Result<()> {
    let failed = || format!("Unpacking {}", archive.display());
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .into_diagnostic()
        .wrap_err_with(failed)?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--no-same-owner", "--directory"]).arg(root).args(arguments);
    if let Some(stream) = reader.stdout.take() {
        tar.stdin(stream);
    }
    let unpacked = tar.status().into_diagnostic().wrap_err_with(failed)?;
    // Its end of the pipe is ours no more, so a dpkg-deb without reader ends too.
    drop(tar);
    let read = reader.wait().into_diagnostic().wrap_err_with(failed)?;
    if !unpacked.success() || !read.success() {
        bail!("{} cannot be unpacked: {read}, {unpacked}", archive.display());
    }
    Ok(())
}

/// Older packages have the kernel in boot/, newer ones beside its modules: here it is always there.
fn place_kernel(root: &Path, kernel: &str) -> Result<()> {
    let place = root.join("usr/lib/modules").join(kernel).join("vmlinuz");
    if !place.exists() {
        let old = root.join("boot").join(format!("vmlinuz-{kernel}"));
        fs::rename(&old, &place).into_diagnostic().wrap_err_with(|| format!("The kernel packages of {kernel} hold no kernel"))?;
    }
    Ok(())
}

/// Keeps the wanted modules and their dependencies, decompressed; removes the others.
fn keep_modules(folder: &Path) -> Result<()> {
    let mut all = BTreeMap::new();
    collect_modules(&folder.join("kernel"), &mut all);
    let mut kept: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut next: Vec<String> = MODULES.map(normal_name).to_vec();
    while !next.is_empty() {
        // A name that is not there is built into this kernel.
        let found: Vec<(String, PathBuf)> =
            next.iter().filter(|name| !kept.contains_key(*name)).filter_map(|name| Some((name.clone(), all.remove(name)?))).collect();
        next.clear();
        for (name, path) in decompress(found)? {
            let content = fs::read(&path).into_diagnostic().wrap_err_with(|| format!("Reading {}", path.display()))?;
            next.extend(dependencies(&content));
            kept.insert(name, path);
        }
    }
    if !kept.contains_key("vsock") || !kept.contains_key("nsm") {
        bail!("The kernel packages hold no modules vsock and nsm: {}", folder.display());
    }
    for path in all.into_values() {
        fs::remove_file(&path).into_diagnostic().wrap_err_with(|| format!("Removing {}", path.display()))?;
    }
    remove_empty_folders(&folder.join("kernel"));
    Ok(())
}

/// Decompresses what is compressed, all in one call; returns the paths as they are then.
fn decompress(modules: Vec<(String, PathBuf)>) -> Result<Vec<(String, PathBuf)>> {
    let is_compressed = |path: &Path| path.extension().is_some_and(|ending| ending == "xz");
    let compressed: Vec<&PathBuf> = modules.iter().map(|(_, path)| path).filter(|path| is_compressed(path)).collect();
    if !compressed.is_empty() {
        output(Command::new("xz").arg("--decompress").arg("--").args(compressed))?;
    }
    Ok(modules.into_iter().map(|(name, path)| (name, if is_compressed(&path) { path.with_extension("") } else { path })).collect())
}

/// The modules that a module's information section names (`depends=a,b`, include/linux/module.h).
fn dependencies(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(start) = module.windows(FIELD.len()).position(|window| window == FIELD) else { return Vec::new() };
    let list = module.get(start + FIELD.len()..).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(list).split(',').filter(|name| !name.is_empty()).map(normal_name).collect()
}

/// Modules are named with dashes in files and with underscores in dependencies.
fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

fn collect_modules(folder: &Path, found: &mut BTreeMap<String, PathBuf>) {
    for path in entries(folder) {
        if path.is_dir() {
            collect_modules(&path, found);
        } else if let Some((name, _)) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once(".ko")) {
            found.insert(normal_name(name), path.clone());
        }
    }
}

fn remove_empty_folders(folder: &Path) {
    for path in entries(folder).filter(|path| path.is_dir()) {
        remove_empty_folders(&path);
        // Fails for those that are not empty.
        let _ = fs::remove_dir(path);
    }
}

/// Runs what was unpacked; returns QEMU's version.
fn check(root: &Path) -> Result<String> {
    let usr = root.join("usr");
    let loader = || {
        let mut command = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(usr.join("lib/x86_64-linux-gnu"));
        command
    };
    let libraries = output(loader().arg("--list").arg(root.join(QEMU)))?;
    let missing: Vec<&str> = libraries.lines().filter(|line| line.contains("not found")).map(str::trim).collect();
    if !missing.is_empty() {
        bail!("The unpacked QEMU lacks libraries: {}", missing.join("; "));
    }
    // A library of the host would work here and fail elsewhere.
    if let Some(foreign) = libraries.lines().find(|line| line.contains(" => ") && !line.contains(&*usr.to_string_lossy())) {
        bail!("The unpacked QEMU takes a library of the host: {}", foreign.trim());
    }
    let version = output(loader().arg(root.join(QEMU)).arg("--version"))?;
    let version = version.split_ascii_whitespace().nth(3).unwrap_or_default().to_owned();
    let devices = output(loader().arg(root.join(QEMU)).args(["-device", "help"]))?;
    if !devices.contains("\"vhost-user-test-device\"") {
        bail!("The unpacked QEMU {version} has no vhost-user-test-device: the mirror's QEMU is older than 11");
    }
    Ok(version)
}

/// Puts the new tree in place of the old one, which may be a link, in one step.
fn replace(new: &Path, place: &Path) -> Result<()> {
    let failed = || format!("Putting the new tree at {}", place.display());
    if !place.exists() && !place.is_symlink() {
        return fs::rename(new, place).into_diagnostic().wrap_err_with(failed);
    }
    // The old one then stands at `new`.
    rustix::fs::renameat_with(CWD, new, CWD, place, RenameFlags::EXCHANGE).into_diagnostic().wrap_err_with(failed)?;
    if new.is_symlink() {
        fs::remove_file(new).into_diagnostic().wrap_err_with(failed)?;
    }
    Ok(())
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_a_modules_information() {
        let module = b"\x7fELF..\0license=GPL\0depends=vsock,vmw-common\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["vsock", "vmw_common"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }

    #[test]
    fn a_new_tree_takes_the_place_of_none_of_a_link_and_of_an_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let (new, place, elsewhere) = (folder.path().join("new"), folder.path().join("root"), folder.path().join("elsewhere"));
        let make = |content: &str| {
            fs::create_dir_all(&new).unwrap();
            fs::write(new.join("file"), content).unwrap();
        };
        make("1");
        replace(&new, &place).unwrap();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "1");
        make("2");
        replace(&new, &place).unwrap();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "2");
        fs::remove_dir_all(&new).unwrap();
        fs::rename(&place, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &place).unwrap();
        make("3");
        replace(&new, &place).unwrap();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "3");
        assert!(!place.is_symlink() && !new.is_symlink());
        assert_eq!(fs::read_to_string(elsewhere.join("file")).unwrap(), "2");
    }
}
