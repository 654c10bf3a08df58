//! What only parent VMs, tests and soaks need: a static busybox, the kernel's own sample program for Nitro Enclaves, programs of others that use AF_VSOCK, a Python
//! that judges attestation documents, and Go with a package for AF_VSOCK.
//!
//! [`bring`] puts them at target/setup/extra. The sample comes out of the package of the kernel's source (160 MiB), which is not kept: the one extracted file
//! stays in the cache with its hash, so that a second clone needs no download.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};

use super::KEYRING;
use super::apt::{Apt, sha256_of, source_version};
use super::tree::{unpack, unpack_part};

const BUSYBOX: &str = "busybox";
const SAMPLE: &str = "ne_ioctl_sample.c";
/// socat and Python with all that they need, to be unpacked somewhere.
const CLIENTS: &str = "clients.tar";
const CLIENT_PACKAGES: [&str; 2] = ["socat", "python3"];
/// Go with what a client of AF_VSOCK is built from, to be unpacked somewhere.
pub const GO: &str = "go.tar";
const GO_PACKAGES: [&str; 2] = ["golang-go", "golang-github-mdlayher-vsock-dev"];
/// Python with libraries that read CBOR and verify certificates: a judge of attestation documents that shares nothing with ours.
const JUDGE: &str = "judge.tar";
const JUDGE_PACKAGES: [&str; 3] = ["python3", "python3-cbor2", "python3-cryptography"];
/// Of their packages what nothing needs to run.
const UNWANTED: [&str; 3] = ["./usr/share/doc", "./usr/share/man", "./usr/share/locale"];
/// Where the sample is in the kernel's source.
const SAMPLE_IN_SOURCE: &str = "samples/nitro_enclaves/ne_ioctl_sample.c";

/// For what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extras {
    /// A parent VM: busybox.
    ParentVm,
    /// The tests: all of it but Go.
    Tests,
    /// Soaks: Go.
    Soak,
}

impl Extras {
    /// Whether all of it is at `place`.
    pub fn are_at(self, place: &Path) -> bool {
        self.names().iter().all(|name| place.join(name).is_file())
    }

    fn names(self) -> &'static [&'static str] {
        match self {
            Self::ParentVm => &[BUSYBOX],
            Self::Tests => &[BUSYBOX, SAMPLE, CLIENTS, JUDGE],
            Self::Soak => &[GO],
        }
    }
}

/// Brings what is missing at `place`, from the cache where it has it.
pub fn bring(wanted: Extras, place: &Path, cache: &Path) -> Result<()> {
    let store = cache.join("extra");
    fs::create_dir_all(&store).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", store.display()))?;
    let missing = |name: &&&str| !is_kept(&store.join(name));
    let names: Vec<&str> = wanted.names().iter().filter(missing).copied().collect();
    if !names.is_empty() {
        let apt = Apt::open(&cache.join("apt"), KEYRING)?;
        for name in names {
            let folders = Folders { archives: store.join(format!("{name}.package")), unpacked: store.join("unpacking") };
            let _ = fs::remove_dir_all(&folders.unpacked);
            fs::create_dir_all(&folders.unpacked).into_diagnostic().wrap_err("Making a folder for what is unpacked")?;
            let file = match name {
                BUSYBOX => fetch_busybox(&apt, &folders)?,
                SAMPLE => fetch_sample(&apt, &folders)?,
                JUDGE => fetch_tree(&apt, JUDGE, &JUDGE_PACKAGES, &folders)?,
                GO => fetch_tree(&apt, GO, &GO_PACKAGES, &folders)?,
                _ => fetch_tree(&apt, CLIENTS, &CLIENT_PACKAGES, &folders)?,
            };
            keep(&file, &store.join(name))?;
            for folder in [&folders.unpacked, &folders.archives] {
                fs::remove_dir_all(folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
            }
        }
        apt.close();
    }
    for name in wanted.names() {
        let new = place.join(format!("{name}.new"));
        let copied = fs::copy(store.join(name), &new).and_then(|_| fs::rename(&new, place.join(name)));
        copied.into_diagnostic().wrap_err_with(|| format!("Putting {name} at {}", place.display()))?;
    }
    eprintln!("setup: complete: {}", wanted.names().join(", "));
    Ok(())
}

/// Where one package is worked on, in the cache.
struct Folders {
    /// The download; it survives an interrupted run, which goes on with it.
    archives: PathBuf,
    /// What comes out of it; made anew by every run.
    unpacked: PathBuf,
}

fn fetch_busybox(apt: &Apt, folders: &Folders) -> Result<PathBuf> {
    let archive = fetch(apt, "busybox-static", folders)?;
    let folder = &folders.unpacked;
    unpack(&archive, folder)?;
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| folder.join(place));
    places.into_iter().find(|file| file.is_file()).ok_or_else(|| miette!("The package busybox-static holds no busybox"))
}

/// Packages with all that they depend on, as one archive of that name.
fn fetch_tree(apt: &Apt, name: &str, packages: &[&str], folders: &Folders) -> Result<PathBuf> {
    let release = apt.of_release()?;
    let archives = release.fetch(&release.installation(packages)?, &folders.archives)?;
    let tree = folders.unpacked.join("tree");
    fs::create_dir_all(&tree).into_diagnostic().wrap_err("Making a folder for what is unpacked")?;
    for archive in archives {
        unpack_part(&archive, &tree, &UNWANTED.map(|path| format!("--exclude={path}")))?;
    }
    let file = folders.unpacked.join(name);
    let packed = Command::new("tar").arg("--create").arg("--file").arg(&file).arg("--directory").arg(&tree).arg(".").status();
    if !packed.into_diagnostic().wrap_err("Starting tar")?.success() {
        bail!("{} cannot be made", file.display());
    }
    Ok(file)
}

fn fetch_sample(apt: &Apt, folders: &Folders) -> Result<PathBuf> {
    let source = format!("linux-source-{}", source_version(&apt.kernel_version()?));
    let archive = fetch(apt, &source, folders)?;
    let folder = &folders.unpacked;
    eprintln!("setup: extracting one file of {source}");
    // Archive, tar in it, tar in that: nothing is unpacked but the one file, and reading ends with it.
    let mut deb = pipe(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(&archive))?;
    let mut outer_tar = Command::new("tar");
    outer_tar.args(["--extract", "--to-stdout"]).arg(format!("./usr/src/{source}.tar.xz"));
    outer_tar.stdin(deb.stdout.take().map_or_else(Stdio::null, Stdio::from));
    let mut outer = pipe(&mut outer_tar)?;
    let mut inner_tar = Command::new("tar");
    inner_tar.args(["--extract", "--xz", "--occurrence=1", "--no-same-owner", "--directory"]).arg(folder);
    inner_tar.arg(format!("{source}/{SAMPLE_IN_SOURCE}")).stdin(outer.stdout.take().map_or_else(Stdio::null, Stdio::from));
    let status = inner_tar.status().into_diagnostic().wrap_err("Starting tar");
    // These hold the pipes' read ends too: without them both writers end now. That they could not write everything is no failure.
    drop((outer_tar, inner_tar));
    let _ = (outer.wait(), deb.wait());
    let file = folder.join(&source).join(SAMPLE_IN_SOURCE);
    if !status?.success() || !file.is_file() {
        bail!("{source} holds no {SAMPLE_IN_SOURCE}");
    }
    Ok(file)
}

/// Downloads one package, checked.
fn fetch(apt: &Apt, name: &str, folders: &Folders) -> Result<PathBuf> {
    let archives = apt.fetch(&apt.packages(&[name.to_owned()])?, &folders.archives)?;
    archives.into_iter().next().ok_or_else(|| miette!("The package {name} did not arrive"))
}

fn pipe(command: &mut Command) -> Result<std::process::Child> {
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().into_diagnostic().wrap_err("Starting a program that unpacks")
}

/// Moves a file into the cache and writes its hash beside it, last.
fn keep(file: &Path, place: &Path) -> Result<()> {
    let keeping = || format!("Keeping {}", place.display());
    let hash = sha256_of(file)?;
    fs::rename(file, place).into_diagnostic().wrap_err_with(keeping)?;
    fs::write(hash_file(place), hash).into_diagnostic().wrap_err_with(keeping)
}

/// Whether the cache has the file as it was kept.
fn is_kept(place: &Path) -> bool {
    let kept = fs::read_to_string(hash_file(place)).unwrap_or_default();
    sha256_of(place).is_ok_and(|hash| hash == kept.trim())
}

fn hash_file(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(".sha256");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_file_is_taken_and_a_damaged_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (new, place) = (folder.path().join("new"), folder.path().join("kept"));
        assert!(!is_kept(&place));
        fs::write(&new, "content").unwrap();
        keep(&new, &place).unwrap();
        assert!(is_kept(&place));
        fs::write(&place, "other").unwrap();
        assert!(!is_kept(&place));
    }

    #[test]
    fn extras_of_the_cache_are_put_in_place_without_a_download() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, place) = (folder.path().join("cache"), folder.path().join("extra"));
        fs::create_dir_all(cache.join("extra")).unwrap();
        fs::create_dir_all(&place).unwrap();
        for name in Extras::Tests.names() {
            fs::write(folder.path().join("new"), *name).unwrap();
            keep(&folder.path().join("new"), &cache.join("extra").join(name)).unwrap();
        }
        assert!(!Extras::Tests.are_at(&place));
        bring(Extras::Tests, &place, &cache).unwrap();
        assert!(Extras::Tests.are_at(&place) && Extras::ParentVm.are_at(&place));
        assert_eq!(fs::read_to_string(place.join(SAMPLE)).unwrap(), SAMPLE);
    }
}
