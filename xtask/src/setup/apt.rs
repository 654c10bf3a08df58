//! The system's apt client, with private lists, cache and state: it needs no root and changes nothing of the system.
//!
//! [`Apt::open`] takes the mirror that the system is configured with; [`Apt::packages`] asks for size and hash of what is wanted; [`Apt::fetch`] downloads
//! what the cache lacks. What apt downloads it checks against the index, and the index against Debian's keyring; what the cache holds is checked by hash.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};
use sha2::{Digest, Sha256};

use crate::context;

/// The release that QEMU's libraries are of, and the suite with the newer QEMU and kernel.
const RELEASE: &str = "trixie";
const NEWER: &str = "trixie-backports";

/// Settings of the system's apt that say how to reach its mirror, and nothing else of it (hooks would act on the system).
const TRANSPORT: [&str; 7] = [
    "Acquire::http",
    "Acquire::https",
    "Acquire::proxy",
    "Acquire::Retries",
    "Acquire::ForceIPv",
    // Mirrors of one day in the past need these two; signatures are checked all the same.
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
];

/// A package to be unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// The archive's file name, as apt stores it.
    pub file: String,
    /// The archive's size in bytes.
    pub size: u64,
    /// The archive's SHA-256 in hex, from the signed index.
    pub sha256: String,
}

/// An apt client that is ready to be asked.
pub struct Apt {
    folder: PathBuf,
    configuration: PathBuf,
}

impl Apt {
    /// Makes a private apt in `folder` and fetches the index of the first configured mirror that has the wanted suites.
    pub fn open(folder: &Path, keyring: &str) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "log"] {
            fs::create_dir_all(folder.join(part)).into_diagnostic().wrap_err_with(|| format!("Making folders in {}", folder.display()))?;
        }
        let apt = Self { folder: folder.to_owned(), configuration: folder.join("apt.conf") };
        fs::write(folder.join("status"), "").into_diagnostic()?;
        fs::write(&apt.configuration, configuration(folder, &output(Command::new("apt-config").arg("dump"))?)).into_diagnostic()?;
        let mirrors = mirrors(&output(Command::new("apt-get").args(["update", "--print-uris"]))?);
        let mut refusals = String::new();
        for mirror in &mirrors {
            eprintln!("setup: fetching the package index of {mirror}");
            let sources = [RELEASE, NEWER].map(|suite| format!("deb [arch=amd64 signed-by={keyring}] {mirror} {suite} main\n")).concat();
            fs::write(folder.join("sources.list"), sources).into_diagnostic()?;
            match output(&mut apt.command("apt-get", &["--quiet=2", "update"])) {
                Ok(_) => return Ok(apt),
                Err(error) => refusals += &format!("\n{error}"),
            }
        }
        if mirrors.is_empty() {
            bail!("This system's apt has no package source configured: add a Debian mirror to /etc/apt/sources.list. {}", super::ADVICE);
        }
        bail!(
            "No mirror this system's apt is configured with gives Debian's {NEWER}, signed by its archive key. {}{refusals}",
            super::ADVICE
        )
    }

    /// The same client, which takes what is not asked for by version from the release instead of the newer suite.
    pub fn of_release(&self) -> Result<Self> {
        let settings = fs::read_to_string(&self.configuration).into_diagnostic()?;
        let configuration = self.folder.join("apt-release.conf");
        fs::write(&configuration, settings + &format!("APT::Default-Release \"{RELEASE}\";\n")).into_diagnostic()?;
        Ok(Self { folder: self.folder.clone(), configuration })
    }

    /// These packages and everything that they depend on: what an empty system would have to install.
    pub fn installation(&self, names: &[&str]) -> Result<Vec<Package>> {
        let mut command = self.command("apt-get", &["--quiet=2", "--yes", "--no-install-recommends", "--print-uris"]);
        let list = output(command.args(["-o", "Acquire::ForceHash=SHA256", "install"]).args(names))?;
        let packages: Vec<Package> = list.lines().filter_map(package_of_line).collect();
        if packages.len() < names.len() {
            bail!("The mirror's index names {} of at least {} packages with a SHA-256 hash:\n{list}", packages.len(), names.len());
        }
        Ok(packages)
    }

    /// Ends its use: removes the parsed index (80 MiB), which the next use makes anew.
    pub fn close(self) {
        let _ = fs::remove_file(self.folder.join("cache/pkgcache.bin"));
    }

    /// The newest kernel for clouds: what `linux-image-cloud-amd64` stands for, e.g. `7.3.4+deb13-cloud-amd64`.
    pub fn kernel_version(&self) -> Result<String> {
        let stanzas = self.show(&["linux-image-cloud-amd64".to_owned()])?;
        stanzas
            .iter()
            .flat_map(|stanza| stanza.depends.iter().flatten())
            .find_map(|name| name.strip_prefix("linux-image-").filter(|version| version.starts_with(|first: char| first.is_ascii_digit())))
            .map(str::to_owned)
            .ok_or_else(|| miette!("The package linux-image-cloud-amd64 of {NEWER} names no kernel: the mirror's index is not as expected"))
    }

    /// The packages that hold this kernel and its modules: one, or two of its dependencies.
    pub fn kernel_packages(&self, version: &str) -> Result<Vec<String>> {
        let image = format!("linux-image-{version}");
        let stanzas = self.show(std::slice::from_ref(&image))?;
        let parts = stanzas
            .iter()
            .flat_map(|stanza| stanza.depends.iter().flatten())
            .filter(|name| ["linux-binary-", "linux-modules-"].iter().any(|kind| name.strip_prefix(kind) == Some(version)));
        Ok(parts.cloned().chain([image.clone()]).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// The package and all libraries that it depends on, directly or not.
    pub fn with_libraries(&self, package: &str) -> Result<Vec<String>> {
        let mut known: BTreeSet<String> = BTreeSet::new();
        let mut next: Vec<String> = vec![package.to_owned()];
        while !next.is_empty() {
            let stanzas = self.show(&next)?;
            known.extend(stanzas.iter().map(|stanza| stanza.name.clone()));
            // Of alternatives the first: Debian's own choice.
            let dependencies = stanzas.iter().flat_map(|stanza| stanza.depends.iter().filter_map(|names| names.first()));
            let libraries = dependencies.filter(|name| is_library(name) && !known.contains(*name));
            next = libraries.cloned().collect::<BTreeSet<_>>().into_iter().collect();
        }
        if !known.contains(package) {
            bail!("The mirror has no package {package}");
        }
        Ok(known.into_iter().collect())
    }

    /// File, size and hash of each package, from the signed index.
    pub fn packages(&self, names: &[String]) -> Result<Vec<Package>> {
        let list = output(self.command("apt-get", &["--quiet=2", "download", "--print-uris"]).args(names))?;
        let packages: Vec<Package> = list.lines().filter_map(package_of_line).collect();
        if packages.len() != names.len() {
            bail!("The mirror's index names {} of {} packages with a SHA-256 hash:\n{list}", packages.len(), names.len());
        }
        Ok(packages)
    }

    /// Downloads what `store` lacks; returns the archives' paths, every one checked.
    pub fn fetch(&self, packages: &[Package], store: &Path) -> Result<Vec<PathBuf>> {
        let incoming = store.join("incoming");
        fs::create_dir_all(&incoming).into_diagnostic().wrap_err_with(|| format!("Making the folder {}", incoming.display()))?;
        // What an interrupted run left behind: whole files count, the rest comes again.
        keep_whole(packages, &incoming, store)?;
        let mut missing = Vec::new();
        for package in packages {
            if !is_whole(&store.join(&package.file), package)? {
                missing.push(package);
            }
        }
        let bytes: u64 = missing.iter().map(|package| package.size).sum();
        eprintln!("setup: {} packages, {} to download ({} MiB)", packages.len(), missing.len(), bytes >> 20);
        if !missing.is_empty() {
            self.download(&missing, bytes, &incoming)?;
            keep_whole(packages, &incoming, store)?;
        }
        for package in packages {
            if !is_whole(&store.join(&package.file), package)? {
                bail!("{} did not arrive as the index describes it: run `cargo xtask setup` again", package.file);
            }
        }
        let _ = fs::remove_dir_all(&incoming);
        remove_superseded(packages, store);
        Ok(packages.iter().map(|package| store.join(&package.file)).collect())
    }

    fn download(&self, missing: &[&Package], bytes: u64, incoming: &Path) -> Result<()> {
        let mut command = self.command("apt-get", &["--quiet=2", "download"]);
        command.args(missing.iter().map(|package| package.name.as_str())).current_dir(incoming).stdin(Stdio::null());
        let messages = incoming.join("messages");
        let log = File::create(&messages).into_diagnostic()?;
        command.stdout(log.try_clone().into_diagnostic()?).stderr(log);
        let mut child = command.spawn().into_diagnostic().wrap_err("Starting apt-get")?;
        let bar = ProgressBar::new(bytes).with_style(style("{bar:40} {bytes}/{total_bytes} {bytes_per_sec}"));
        let status = loop {
            if let Some(status) = child.try_wait().into_diagnostic()? {
                break status;
            }
            bar.set_position(missing.iter().filter_map(|package| Some(fs::metadata(incoming.join(&package.file)).ok()?.len())).sum());
            std::thread::sleep(Duration::from_millis(100));
        };
        bar.finish_and_clear();
        if !status.success() {
            let text = fs::read_to_string(&messages).unwrap_or_default();
            bail!("Downloading failed ({status}); what has arrived is kept, so `cargo xtask setup` goes on from there.\n{}", text.trim());
        }
        Ok(())
    }

    /// The newest stanza of each package that exists.
    fn show(&self, names: &[String]) -> Result<Vec<Stanza>> {
        let mut command = self.command("apt-cache", &["show", "--no-all-versions"]);
        // Status 100 where one of them does not exist; the others are shown all the same.
        let output = command.args(names).output().into_diagnostic().wrap_err("Starting apt-cache")?;
        Ok(stanzas(&String::from_utf8_lossy(&output.stdout)))
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env("APT_CONFIG", &self.configuration).env("LC_ALL", "C.UTF-8");
        command
    }
}

/// The look of a progress bar; indicatif shows none where standard error is no terminal.
pub fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The private apt's settings: nothing of the system's but how to reach its mirror.
fn configuration(folder: &Path, system: &str) -> String {
    let folder = folder.display();
    let mut text = String::new();
    for (name, value) in [
        ("Dir::Etc::Parts", "/dev/null"),
        ("Dir::Etc::Main", "/dev/null"),
        ("Dir::Etc::SourceParts", "/dev/null"),
        ("Dir::Etc::Preferences", "/dev/null"),
        ("Dir::Etc::PreferencesParts", "/dev/null"),
        ("Dir::Etc::Trusted", "/dev/null"),
        ("Dir::Etc::TrustedParts", "/dev/null"),
        ("Dir::Etc::SourceList", &format!("{folder}/sources.list")),
        ("Dir::State", &format!("{folder}")),
        ("Dir::State::Lists", &format!("{folder}/lists")),
        ("Dir::State::status", &format!("{folder}/status")),
        ("Dir::Cache", &format!("{folder}/cache")),
        ("Dir::Log", &format!("{folder}/log")),
        ("APT::Architecture", "amd64"),
        ("APT::Default-Release", NEWER),
        // As root apt would become a user who cannot see a private cache; all it does here is below that folder.
        ("APT::Sandbox::User", "root"),
        ("APT::Get::AllowUnauthenticated", "false"),
        ("Acquire::AllowInsecureRepositories", "false"),
        ("Acquire::Languages", "none"),
        // The index stays compressed and its parsed form is written only once: 20 MiB instead of 140.
        ("Acquire::GzipIndexes", "true"),
        ("Dir::Cache::srcpkgcache", ""),
    ] {
        text += &format!("{name} \"{value}\";\n");
    }
    text += "APT::Architectures { \"amd64\"; };\n";
    for line in system.lines().filter(|line| TRANSPORT.iter().any(|wanted| line.starts_with(wanted))) {
        text += &format!("{line}\n");
    }
    text
}

/// The mirrors among what `apt-get update` would fetch: those of a distribution's main archive first, security archives never.
fn mirrors(uris: &str) -> Vec<String> {
    let mut mirrors: Vec<String> = Vec::new();
    for uri in uris.lines().filter_map(|line| line.strip_prefix('\'')?.split_once('\'')) {
        let Some((mirror, suite)) = uri.0.strip_suffix("/InRelease").and_then(|rest| rest.rsplit_once("/dists/")) else { continue };
        let mirror = mirror.to_owned();
        if !suite.contains("security") && !mirrors.contains(&mirror) {
            mirrors.push(mirror);
        }
    }
    mirrors.sort_by_key(|mirror| !mirror.ends_with("/debian"));
    mirrors
}

/// One package's description.
#[derive(Debug, PartialEq, Eq)]
struct Stanza {
    name: String,
    /// Each dependency's alternatives, names only.
    depends: Vec<Vec<String>>,
}

/// Reads apt-cache's stanzas; of several of one package the first.
fn stanzas(text: &str) -> Vec<Stanza> {
    let mut found: BTreeMap<String, Stanza> = BTreeMap::new();
    for paragraph in text.split("\n\n") {
        let field = |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let Some(name) = field("Package:") else { continue };
        let depends = ["Pre-Depends:", "Depends:"].into_iter().filter_map(field).flat_map(|list| list.split(',')).map(|alternatives| {
            let names = alternatives.split('|').filter_map(|one| one.split([' ', '(', ':']).find(|word| !word.is_empty()));
            names.map(str::to_owned).collect()
        });
        found.entry(name.to_owned()).or_insert_with(|| Stanza { name: name.to_owned(), depends: depends.collect() });
    }
    found.into_values().collect()
}

/// Whether a package holds a shared library, by Debian's naming; base packages' scripts and tools are not needed to start a program.
fn is_library(name: &str) -> bool {
    name.starts_with("lib") && name != "libc-bin" || name == "zlib1g"
}

/// Reads `'URI' FILE SIZE SHA256:HASH`.
fn package_of_line(line: &str) -> Option<Package> {
    let mut words = line.strip_prefix('\'')?.split_once("' ")?.1.split_ascii_whitespace();
    let file = words.next().filter(|file| !file.contains('/'))?.to_owned();
    let size = words.next()?.parse().ok()?;
    let sha256 = words.next()?.strip_prefix("SHA256:").filter(|hash| hash.len() == 64)?.to_ascii_lowercase();
    let name = file.split('_').next()?.to_owned();
    Some(Package { name, file, size, sha256 })
}

/// Moves those files of `incoming` into `store` that are as the index says.
fn keep_whole(packages: &[Package], incoming: &Path, store: &Path) -> Result<()> {
    for package in packages {
        let new = incoming.join(&package.file);
        if is_whole(&new, package)? {
            fs::rename(&new, store.join(&package.file)).into_diagnostic().wrap_err_with(|| format!("Moving {}", new.display()))?;
        }
    }
    Ok(())
}

/// Removes what an older index brought: the cache holds one set of archives.
fn remove_superseded(packages: &[Package], store: &Path) {
    for file in fs::read_dir(store).into_iter().flatten().flatten() {
        if !packages.iter().any(|package| *package.file == file.file_name()) {
            let _ = fs::remove_file(file.path());
        }
    }
}

/// Whether the file is there with this size and hash.
fn is_whole(path: &Path, package: &Package) -> Result<bool> {
    let Ok(metadata) = fs::metadata(path) else { return Ok(false) };
    Ok(metadata.len() == package.size && sha256_of(path)? == package.sha256)
}

/// A file's SHA-256 in hex.
pub fn sha256_of(path: &Path) -> Result<String> {
    let reading = || format!("Reading {}", path.display());
    let mut file = File::open(path).into_diagnostic().wrap_err_with(reading)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).into_diagnostic().wrap_err_with(reading)? {
            0 => return Ok(hex::encode(hash.finalize())),
            length => hash.update(buffer.get(..length).unwrap_or_default()),
        }
    }
}

/// Runs a command and returns what it prints; where it fails, an error with its messages.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = context::show(command);
    let output = command.stdin(Stdio::null()).output().into_diagnostic().wrap_err_with(|| format!("Starting `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` failed ({}):\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The version in the name of the package with a kernel's source: `7.3` of `7.3.4+deb13-cloud-amd64`.
pub fn source_version(kernel: &str) -> String {
    kernel.split(['.', '-', '+']).take(2).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_archive_comes_first_and_security_archives_never() {
        let uris = "'http://a/vendor/dists/stable/InRelease' a 0 \n\
                    'http://m/debian-security/dists/bookworm-security/InRelease' b 0 \n\
                    'http://m/debian/dists/bookworm/InRelease' c 0 \n\
                    'http://m/debian/dists/bookworm-updates/InRelease' d 0 \n\
                    'http://m/debian/dists/bookworm/main/binary-amd64/Packages.xz' e 0 \n";
        assert_eq!(mirrors(uris), ["http://m/debian", "http://a/vendor"]);
    }

    #[test]
    fn only_transport_settings_of_the_system_are_taken() {
        let system = "APT::Update::Post-Invoke:: \"rm -f /x\";\nAcquire::http::Proxy \"http://p:1\";\nAcquire::AllowInsecureRepositories \"true\";\nDir \"/\";\n";
        let text = configuration(Path::new("/c"), system);
        assert!(text.contains("Acquire::http::Proxy \"http://p:1\";"));
        assert!(!text.contains("Post-Invoke") && !text.contains("AllowInsecureRepositories \"true\"") && !text.contains("Dir \"/\""));
        assert!(text.contains("Dir::State::Lists \"/c/lists\";"));
    }

    #[test]
    fn dependencies_are_read_with_alternatives_versions_and_architectures() {
        let text = "Package: a\nPre-Depends: libc6 (>= 2.38)\nDepends: libx:any, liby1 | liby2 (<< 3), tool\nVersion: 2\n\nPackage: a\nDepends: old\n\nX: y\n";
        let names =
            |list: &[&[&str]]| list.iter().map(|names| names.iter().map(ToString::to_string).collect()).collect::<Vec<Vec<String>>>();
        let expected = Stanza { name: "a".to_owned(), depends: names(&[&["libc6"], &["libx"], &["liby1", "liby2"], &["tool"]]) };
        assert_eq!(stanzas(text), [expected]);
    }

    #[test]
    fn a_download_line_is_read_and_nothing_else() {
        let hash = "a".repeat(64);
        let line = format!("'http://m/pool/q_1%2b2.deb' q_1%3a1+2_amd64.deb 123 SHA256:{hash}");
        assert_eq!(
            package_of_line(&line),
            Some(Package { name: "q".to_owned(), file: "q_1%3a1+2_amd64.deb".to_owned(), size: 123, sha256: hash.clone() })
        );
        for bad in ["", "'u' f 1", "'u' f x SHA256:00", "'u' f 1 MD5Sum:00", &format!("'u' ../f 1 SHA256:{hash}")] {
            assert_eq!(package_of_line(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_file_is_whole_only_with_its_size_and_hash() {
        let folder = tempfile::tempdir().unwrap();
        let (incoming, store) = (folder.path().join("incoming"), folder.path().join("store"));
        fs::create_dir_all(&incoming).unwrap();
        fs::create_dir_all(&store).unwrap();
        // SHA-256 of "abc": FIPS 180-4's example.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".to_owned();
        let package = Package { name: "p".to_owned(), file: "p.deb".to_owned(), size: 3, sha256 };
        for (content, whole) in [("ab", false), ("abd", false), ("abc", true)] {
            fs::write(incoming.join("p.deb"), content).unwrap();
            keep_whole(std::slice::from_ref(&package), &incoming, &store).unwrap();
            assert_eq!(store.join("p.deb").exists(), whole, "{content}");
        }
        assert!(is_whole(&store.join("p.deb"), &package).unwrap());
        assert!(!is_whole(&incoming.join("p.deb"), &package).unwrap());

        fs::write(store.join("older.deb"), "x").unwrap();
        remove_superseded(std::slice::from_ref(&package), &store);
        assert!(store.join("p.deb").exists() && !store.join("older.deb").exists());
    }
}
