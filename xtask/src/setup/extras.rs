//! What only parent VMs, tests and soaks need: a static busybox, the kernel's own sample program for Nitro Enclaves, socat and Python as programs of others that use
//! AF_VSOCK (the same Python judges attestation documents), and Go with a package for AF_VSOCK.
//!
//! [`bring`] puts them at target/setup/extra; [`unpack_go`] needs no copy there. The sample comes out of the package of the kernel's source (160 MiB), which is not
//! kept: the one extracted file stays in the cache, so that a second clone needs no download. Beside each file stands a [`Note`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};

use super::KEYRING;
use super::apt::{Apt, sha256_of, source_version};
use super::tree::{unpack, unpack_part};
use crate::context;

/// A file of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extra {
    name: &'static str,
    /// Of an archive: what it holds, with all that these packages depend on. None of a single file.
    packages: &'static [&'static str],
}

const BUSYBOX: Extra = Extra { name: "busybox", packages: &[] };
const SAMPLE: Extra = Extra { name: "ne_ioctl_sample.c", packages: &[] };
/// socat, and Python with libraries that read CBOR and verify certificates: a judge of attestation documents that shares nothing with ours.
const PROGRAMS: Extra = Extra { name: "programs.tar", packages: &["socat", "python3", "python3-cbor2", "python3-cryptography"] };
/// Go with what a client of AF_VSOCK is built from.
const GO: Extra = Extra { name: "go.tar", packages: &["golang-go", "golang-github-mdlayher-vsock-dev"] };
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
}

impl Extras {
    /// Whether all of it is at `place`.
    pub fn are_at(self, place: &Path) -> bool {
        self.list().iter().all(|extra| place.join(extra.name).is_file() && Note::of(&place.join(extra.name)).is_about(extra.packages))
    }

    fn list(self) -> &'static [Extra] {
        match self {
            Self::ParentVm => &[BUSYBOX],
            Self::Tests => &[BUSYBOX, SAMPLE, PROGRAMS],
        }
    }
}

/// Brings what is missing at `place`, from the cache where it has it.
pub fn bring(wanted: Extras, place: &Path, cache: &Path) -> Result<()> {
    let store = fill(wanted.list(), cache)?;
    for Extra { name, .. } in wanted.list() {
        let new = place.join(format!("{name}.new"));
        let copied = fs::copy(store.join(name), &new).and_then(|_| fs::rename(&new, place.join(name)));
        // Last: it says what the file is.
        let noted = copied.and_then(|()| fs::copy(note_file(&store.join(name)), note_file(&place.join(name))));
        noted.into_diagnostic().wrap_err_with(|| format!("Putting {name} at {}", place.display()))?;
    }
    let names: Vec<&str> = wanted.list().iter().map(|extra| extra.name).collect();
    eprintln!("setup: complete: {}", names.join(", "));
    Ok(())
}

/// Unpacks Go into a folder that is there.
pub fn unpack_go(folder: &Path, cache: &Path) -> Result<()> {
    let archive = fill(&[GO], cache)?.join(GO.name);
    context::run(Command::new("tar").arg("--extract").arg("--file").arg(archive).arg("--directory").arg(folder))
}

/// Downloads what the cache lacks; returns where it has it.
fn fill(wanted: &[Extra], cache: &Path) -> Result<PathBuf> {
    let store = cache.join("extra");
    fs::create_dir_all(&store).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", store.display()))?;
    let missing: Vec<&Extra> = wanted.iter().filter(|extra| !is_kept(&store.join(extra.name), extra.packages)).collect();
    if missing.is_empty() {
        return Ok(store);
    }
    let apt = Apt::open(&cache.join("apt"), KEYRING)?;
    for extra in missing {
        let folders = Folders { archives: store.join(format!("{}.package", extra.name)), unpacked: store.join("unpacking") };
        let _ = fs::remove_dir_all(&folders.unpacked);
        fs::create_dir_all(&folders.unpacked).into_diagnostic().wrap_err("Making a folder for what is unpacked")?;
        let file = match *extra {
            BUSYBOX => fetch_busybox(&apt, &folders)?,
            SAMPLE => fetch_sample(&apt, &folders)?,
            archive => fetch_tree(&apt, archive, &folders)?,
        };
        keep(&file, &store.join(extra.name), extra.packages)?;
        for folder in [&folders.unpacked, &folders.archives] {
            fs::remove_dir_all(folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
        }
    }
    apt.close();
    Ok(store)
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

/// Packages with all that they depend on, as one archive.
fn fetch_tree(apt: &Apt, Extra { name, packages }: Extra, folders: &Folders) -> Result<PathBuf> {
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

/// Moves a file into the cache and writes its note beside it, last.
fn keep(file: &Path, place: &Path, packages: &[&str]) -> Result<()> {
    let keeping = || format!("Keeping {}", place.display());
    let note = [&[sha256_of(file)?.as_str()], packages].concat().join(" ");
    fs::rename(file, place).into_diagnostic().wrap_err_with(keeping)?;
    fs::write(note_file(place), note).into_diagnostic().wrap_err_with(keeping)
}

/// Whether the cache has the file as it was kept, made of these packages.
fn is_kept(place: &Path, packages: &[&str]) -> bool {
    let note = Note::of(place);
    note.is_about(packages) && sha256_of(place).is_ok_and(|hash| note.hash() == Some(&hash))
}

/// What stands beside a file: its SHA-256 in hex and, of an archive, the packages it was made of. With other packages it is another archive of the same name.
struct Note(String);

impl Note {
    /// The note beside a file; an empty one where there is none.
    fn of(place: &Path) -> Self {
        Self(fs::read_to_string(note_file(place)).unwrap_or_default())
    }

    fn hash(&self) -> Option<&str> {
        self.0.split_ascii_whitespace().next()
    }

    fn is_about(&self, packages: &[&str]) -> bool {
        self.0.split_ascii_whitespace().skip(1).eq(packages.iter().copied())
    }
}

fn note_file(place: &Path) -> PathBuf {
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
        assert!(!is_kept(&place, &[]));
        fs::write(&new, "content").unwrap();
        keep(&new, &place, &[]).unwrap();
        assert!(is_kept(&place, &[]));
        fs::write(&place, "other").unwrap();
        assert!(!is_kept(&place, &[]));
    }

    #[test]
    fn a_kept_archive_of_other_packages_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let (new, place) = (folder.path().join("new"), folder.path().join("kept"));
        fs::write(&new, "content").unwrap();
        keep(&new, &place, &["one", "two"]).unwrap();
        assert!(is_kept(&place, &["one", "two"]));
        for other in [&[][..], &["one"], &["two", "one"], &["one", "two", "three"]] {
            assert!(!is_kept(&place, other), "{other:?}");
        }
    }

    #[test]
    fn extras_of_the_cache_are_put_in_place_without_a_download() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, place) = (folder.path().join("cache"), folder.path().join("extra"));
        fs::create_dir_all(cache.join("extra")).unwrap();
        fs::create_dir_all(&place).unwrap();
        for Extra { name, packages } in Extras::Tests.list() {
            fs::write(folder.path().join("new"), name).unwrap();
            keep(&folder.path().join("new"), &cache.join("extra").join(name), packages).unwrap();
        }
        assert!(!Extras::Tests.are_at(&place));
        bring(Extras::Tests, &place, &cache).unwrap();
        assert!(Extras::Tests.are_at(&place) && Extras::ParentVm.are_at(&place));
        assert_eq!(fs::read_to_string(place.join(SAMPLE.name)).unwrap(), SAMPLE.name);
        // What an older list has put there is not what is wanted now.
        fs::write(note_file(&place.join(PROGRAMS.name)), "hash socat python3").unwrap();
        assert!(!Extras::Tests.are_at(&place));
    }

    #[test]
    fn go_is_unpacked_from_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        for name in ["tree", "cache", "cache/extra", "unpacked"] {
            fs::create_dir(place(name)).unwrap();
        }
        fs::write(place("tree/compiler"), "go").unwrap();
        let packed = Command::new("tar").arg("-cf").arg(place("new")).arg("-C").arg(place("tree")).arg(".").status();
        assert!(packed.unwrap().success());
        keep(&place("new"), &place("cache/extra").join(GO.name), GO.packages).unwrap();
        unpack_go(&place("unpacked"), &place("cache")).unwrap();
        assert_eq!(fs::read_to_string(place("unpacked/compiler")).unwrap(), "go");
    }
}
