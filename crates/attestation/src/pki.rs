//! The local PKI: a root of this user, made at first use, and the levels below it, in a folder of files.
//!
//! [`Pki`] names the folder. Each file holds a certificate with its key, is written beside its place and renamed into it, so that whoever
//! reads finds whole files, without a lock and after a crash at any moment; files that do not belong together are told by their signatures.
//! Whoever finds something missing or due locks the folder, reads everything again, makes it and writes it. Any number of processes may do
//! so at once; they end with one root. Nobody waits longer than [`MAX_WAIT`] for another. What is there but cannot be used is an error that says so: an existing
//! root is never replaced by itself. [`crate::import`] sets a root or intermediate of the user's own.

use crate::authority::{self, Authority};
use crate::certificate::{Certificate, CertificateFault, Timestamp};
use crate::import::{self, ImportError};
use crate::issue::{CertificateError, Link};
use crate::keyfile::{KeyFile, KeyFileError, MAX_PEM_BYTES};
use crate::level::Level;
use crate::signer::{Issuing, Signer, SignerError};
use rustix::fs::{Access, FlockOperation, Mode, OFlags};
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The file with the root, or with what was imported.
const AUTHORITY: &str = "authority.pem";
/// Held while files are written.
const LOCK: &str = "lock";

/// How long the lock is waited for. Writing four files takes milliseconds; a process that was stopped holds it for ever.
const MAX_WAIT: Duration = Duration::from_secs(2);
const WAIT_STEP: Duration = Duration::from_millis(10);

/// Why a PKI cannot be used.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum PkiError {
    /// There is no place for the local PKI: neither XDG_DATA_HOME nor HOME is set to an absolute path; set one of them.
    NoHome,
    /// {path} of the local PKI cannot be used ({doing}); give this user access to it, or set XDG_DATA_HOME to another place.
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// Another process has held {path} of the local PKI for two seconds, so nothing can be made or renewed; try again, or end that process (`fuser {path}` shows it).
    Busy {
        /// Which.
        path: PathBuf,
    },
    /// {path}, where the local PKI is or would be made, belongs to user {owner}, not to user {user} who runs this; run it as that user, give {path} to the right one, or set XDG_DATA_HOME to another place.
    Owner {
        /// Which.
        path: PathBuf,
        /// User id.
        owner: u32,
        /// User id.
        user: u32,
    },
    /// {path} of the local PKI has mode {mode:04o}, so others may have read its keys; if not, run `chmod {wanted:04o}` on it; else remove the folder, and a new root is made.
    Mode {
        /// Which.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Permission bits.
        wanted: u32,
    },
    /// {path} of the local PKI is damaged; put back a copy of it, or remove {remove} to have it made anew.
    Content {
        /// Which.
        path: PathBuf,
        /// What to remove.
        remove: String,
        /// What is wrong.
        #[source]
        error: KeyFileError,
    },
    /// {path} of the local PKI holds certificates and a key that do not belong together; put back a copy of it, or remove {remove} to have it made anew.
    Pieces {
        /// Which.
        path: PathBuf,
        /// What to remove.
        remove: String,
    },
    /// {path} of the local PKI is missing, while certificates below it are there; put back a copy of it, or remove the folder to begin with a new root.
    NoAuthority {
        /// Which.
        path: PathBuf,
    },
    /// The certificate `{subject}` in {path} does not count at this time; set the clock right, import another authority, or remove the folder to begin with a new root.
    Lapsed {
        /// Whose.
        subject: String,
        /// Where.
        path: PathBuf,
        /// Too early or too late.
        #[source]
        fault: CertificateFault,
    },
    /// The local PKI has a root already, and documents below it would no longer verify; say that it is to be replaced if you mean it.
    Exists,
    /// The certificate cannot be imported.
    Import(#[from] ImportError),
    /// A certificate of the local PKI could not be made.
    Certificate(#[from] CertificateError),
}

/// An error and all its causes in one line.
#[must_use]
pub fn in_one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // A sentence that goes on has no full stop.
        line.truncate(line.trim_end_matches('.').len());
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

/// The folder of a local PKI. Making a value does nothing yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pki {
    folder: PathBuf,
}

impl Pki {
    /// The PKI in a folder, which need not exist.
    #[must_use]
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The user's own: `$XDG_DATA_HOME/nitroxide/pki`, else `~/.local/share/nitroxide/pki`.
    ///
    /// # Errors
    ///
    /// [`PkiError::NoHome`] if neither variable holds an absolute path.
    pub fn of_user() -> Result<Self, PkiError> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
        Ok(Self::at(data.ok_or(PkiError::NoHome)?.join("nitroxide/pki")))
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A signer below this PKI, which is made if it is not there. `module_id`: parent instance, `-enc`, enclave as 16 hex digits.
    /// `now_ms`: milliseconds since 1970-01-01 UTC.
    ///
    /// # Errors
    ///
    /// [`SignerError::Pki`] if the files cannot be used, [`SignerError::Certificate`] for a name that cannot stand in a certificate.
    pub fn signer(&self, module_id: impl Into<String>, now_ms: u64) -> Result<Signer, SignerError> {
        Signer::of_pki(module_id.into(), self.clone(), Timestamp(now_ms))
    }

    /// As [`Self::signer`], for a PKI that cannot be used now: each document tries it again, and fails as long as that goes on.
    ///
    /// # Errors
    ///
    /// [`SignerError::Certificate`] for a name that cannot stand in a certificate, or without randomness.
    pub fn signer_later(&self, module_id: impl Into<String>) -> Result<Signer, SignerError> {
        Signer::of_pki_later(module_id.into(), self.clone())
    }

    /// The root; it is made if there is none.
    ///
    /// # Errors
    ///
    /// [`PkiError`] if the files cannot be used.
    pub fn root(&self, now_ms: u64) -> Result<Certificate, PkiError> {
        if let Some(root) = self.existing_root()? {
            return Ok(root);
        }
        self.alone(|| Ok(self.authority_or_new(Timestamp(now_ms))?.root().clone())).or_else(|error| {
            // Whoever holds the lock may have made one.
            self.existing_root()?.ok_or(error)
        })
    }

    /// The root if there is one: verifying makes none.
    ///
    /// # Errors
    ///
    /// As [`Self::root`].
    pub fn existing_root(&self) -> Result<Option<Certificate>, PkiError> {
        Ok(self.existing_authority()?.map(|authority| authority.root().clone()))
    }

    /// Whether documents can be made now, as far as a look at folder and root tells. Makes nothing.
    ///
    /// # Errors
    ///
    /// What would be wrong.
    pub fn look(&self, now_ms: u64) -> Result<(), PkiError> {
        if let Some(authority) = self.existing_authority()? {
            return self.check_authority(&authority, Timestamp(now_ms));
        }
        let (above, _) = self.nearest()?;
        rustix::fs::access(&above, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| PkiError::File {
            path: self.folder.clone(),
            doing: "making the folder",
            error: error.into(),
        })
    }

    /// Sets an authority of the user's own: PEM of its certificate with all those above it, up to the root, and of its key. Returns the root.
    ///
    /// With `replace`, what is there goes; without, it stays and this is an error.
    ///
    /// # Errors
    ///
    /// [`PkiError::Import`] says what does not fit, [`PkiError::Exists`] that there is one.
    pub fn import(&self, certificates: &[u8], key: &[u8], replace: bool, now_ms: u64) -> Result<Certificate, PkiError> {
        let authority = import::authority(certificates, key, Timestamp(now_ms))?;
        import::try_out(&authority, Timestamp(now_ms))?;
        self.alone(|| {
            let path = self.path(AUTHORITY);
            if !replace && path.try_exists().map_err(|error| PkiError::File { path, doing: "looking at it", error })? {
                return Err(PkiError::Exists);
            }
            self.write_authority(&authority)?;
            Ok(authority.root().clone())
        })
    }

    /// Who signs leaf certificates of an instance now; what is missing or due is made and written.
    pub(crate) fn issuing(&self, instance: &str, now: Timestamp) -> Result<Issuing, PkiError> {
        if let Some(issuing) = self.existing_issuing(instance, now, authority::due)? {
            return Ok(issuing);
        }
        self.alone(|| self.renewed_issuing(instance, now)).or_else(|error| {
            // Whoever holds the lock may have done it; and what is due counts for a while, e.g. in a folder that can only be read.
            match error {
                PkiError::Busy { .. } | PkiError::File { .. } => self.existing_issuing(instance, now, authority::lapsed)?.ok_or(error),
                error => Err(error),
            }
        })
    }

    /// As [`Self::issuing`], from what is there; None if something is missing, of another authority or `stale`.
    fn existing_issuing(&self, instance: &str, now: Timestamp, stale: authority::Stale) -> Result<Option<Issuing>, PkiError> {
        let Some(authority) = self.existing_authority()? else { return Ok(None) };
        self.check_authority(&authority, now)?;
        let links = authority::all_hold(&authority, self.links(&authority, instance)?, now, stale);
        Ok(links.map(|links| Issuing::new(&authority, &links)))
    }

    /// As [`Self::issuing`], for whoever holds the lock. Another process may have been faster: everything is read again.
    fn renewed_issuing(&self, instance: &str, now: Timestamp) -> Result<Issuing, PkiError> {
        let authority = self.authority_or_new(now)?;
        self.check_authority(&authority, now)?;
        let completed = authority::complete(&authority, self.links(&authority, instance)?, instance, now)?;
        for (level, link) in authority.levels().iter().zip(&completed.links).skip(completed.kept) {
            self.write(&file_name(*level, instance), &KeyFile::write([&link.certificate], &link.key))?;
        }
        Ok(Issuing::new(&authority, &completed.links))
    }

    fn check_authority(&self, authority: &Authority, now: Timestamp) -> Result<(), PkiError> {
        let Some((certificate, fault)) = authority.lapsed(now) else { return Ok(()) };
        Err(PkiError::Lapsed { subject: certificate.subject(), path: self.path(AUTHORITY), fault })
    }

    fn authority_or_new(&self, now: Timestamp) -> Result<Authority, PkiError> {
        if let Some(authority) = self.authority()? {
            return Ok(authority);
        }
        let authority = Authority::new_root(now)?;
        self.write_authority(&authority)?;
        Ok(authority)
    }

    fn write_authority(&self, authority: &Authority) -> Result<(), PkiError> {
        self.write(AUTHORITY, &KeyFile::write(authority.certificates(), &authority.link.key))
    }

    fn existing_authority(&self) -> Result<Option<Authority>, PkiError> {
        if self.folder_exists()? { self.authority() } else { Ok(None) }
    }

    /// The authority as it is in its file.
    fn authority(&self) -> Result<Option<Authority>, PkiError> {
        let remove = || format!("the folder {}", self.folder.display());
        let mut file = self.read(AUTHORITY, remove())?;
        if file.is_none() {
            if !self.has_certificates()? {
                return Ok(None);
            }
            // What is below an authority is written after it: if another process has just made both, it is there now.
            file = self.read(AUTHORITY, remove())?;
        }
        let file = file.ok_or_else(|| PkiError::NoAuthority { path: self.path(AUTHORITY) })?;
        let (above, link) = self.pieces(AUTHORITY, file, remove())?;
        Ok(Some(Authority { above, link }))
    }

    fn has_certificates(&self) -> Result<bool, PkiError> {
        let failed = |error| PkiError::File { path: self.folder.clone(), doing: "listing it", error };
        for entry in std::fs::read_dir(&self.folder).map_err(failed)? {
            if Path::new(&entry.map_err(failed)?.file_name()).extension().is_some_and(|extension| extension == "pem") {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The levels below, as far as there are files. Whether they belong to this authority is not looked at here.
    fn links(&self, authority: &Authority, instance: &str) -> Result<Vec<Option<Link>>, PkiError> {
        authority.levels().iter().map(|level| self.link(&file_name(*level, instance))).collect()
    }

    fn link(&self, name: &str) -> Result<Option<Link>, PkiError> {
        let remove = || "it".to_owned();
        let Some(file) = self.read(name, remove())? else { return Ok(None) };
        match self.pieces(name, file, remove())? {
            (above, link) if above.is_empty() => Ok(Some(link)),
            _ => Err(PkiError::Pieces { path: self.path(name), remove: remove() }),
        }
    }

    /// The last certificate of a file with its key, and the certificates before it.
    fn pieces(&self, name: &str, file: KeyFile, remove: String) -> Result<(Vec<Certificate>, Link), PkiError> {
        let path = self.path(name);
        let KeyFile { mut certificates, key } = file;
        match (certificates.pop(), key) {
            (None, _) => Err(PkiError::Content { path, remove, error: KeyFileError::NoCertificate }),
            (_, None) => Err(PkiError::Content { path, remove, error: KeyFileError::NoKey }),
            (Some(certificate), Some(key)) if certificate.key() != key.verifying_key() => Err(PkiError::Pieces { path, remove }),
            (Some(certificate), Some(key)) => Ok((certificates, Link { certificate, key })),
        }
    }

    fn read(&self, name: &str, remove: String) -> Result<Option<KeyFile>, PkiError> {
        let path = self.path(name);
        let failed = |error| PkiError::File { path: path.clone(), doing: "reading", error };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        check_access(&path, &file.metadata().map_err(failed)?, 0o600)?;
        let mut text = Vec::new();
        file.take(MAX_PEM_BYTES as u64 + 1).read_to_end(&mut text).map_err(failed)?;
        KeyFile::parse(&text).map(Some).map_err(|error| PkiError::Content { path: path.clone(), remove, error })
    }

    /// Writes a file beside its place and renames it into it. The folder is locked, so nobody else does the same.
    fn write(&self, name: &str, text: &str) -> Result<(), PkiError> {
        let (path, new) = (self.path(name), self.path(&format!("{name}.new")));
        let failed = |error| PkiError::File { path: path.clone(), doing: "writing", error };
        // What a crash left behind, whatever its mode.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(failed)?;
        let folder = File::open(&self.folder).map_err(failed)?;
        hand_over(&file, &folder).and_then(|()| file.write_all(text.as_bytes())).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&new, &path).and_then(|()| folder.sync_all()).map_err(failed)
    }

    /// The folder, else the nearest one above it that is there, and what is missing from there on, nearest last.
    fn nearest(&self) -> Result<(PathBuf, Vec<OsString>), PkiError> {
        let mut missing = Vec::new();
        for path in self.folder.ancestors() {
            match std::fs::metadata(path) {
                Ok(_) => return Ok((path.to_path_buf(), missing)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing.extend(path.file_name().map(OsStr::to_owned)),
                Err(error) => return Err(PkiError::File { path: path.to_path_buf(), doing: "looking at it", error }),
            }
        }
        Ok((PathBuf::from("/"), missing))
    }

    /// Makes the folder. What root makes below another user's folder (as with `sudo -E`) is that user's, who would be locked out else.
    fn make_folder(&self) -> Result<(), PkiError> {
        let failed = |error| PkiError::File { path: self.folder.clone(), doing: "making the folder", error };
        let (nearest, missing) = self.nearest()?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        // Step by step, so that a link that somebody puts in the way is not followed.
        let mut above = rustix::fs::open(&nearest, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        for name in missing.iter().rev() {
            let made = match rustix::fs::mkdirat(&above, name, Mode::RWXU) {
                Ok(()) => true,
                Err(rustix::io::Errno::EXIST) => false,
                Err(error) => return Err(failed(error.into())),
            };
            let folder = rustix::fs::openat(&above, name, flags | OFlags::NOFOLLOW, Mode::empty()).map_err(|error| failed(error.into()))?;
            if made {
                hand_over(&folder, &above).map_err(failed)?;
            }
            above = folder;
        }
        self.folder_exists().map(|_| ())
    }

    /// Whether the folder is there; an error if it is not ours alone.
    fn folder_exists(&self) -> Result<bool, PkiError> {
        match std::fs::metadata(&self.folder) {
            Ok(metadata) => check_access(&self.folder, &metadata, 0o700).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(PkiError::File { path: self.folder.clone(), doing: "looking at it", error }),
        }
    }

    /// Does something while nobody else writes; makes the folder.
    fn alone<T>(&self, act: impl FnOnce() -> Result<T, PkiError>) -> Result<T, PkiError> {
        self.make_folder()?;
        let _lock = self.lock()?;
        act()
    }

    fn lock(&self) -> Result<File, PkiError> {
        let path = self.path(LOCK);
        let failed = |error| PkiError::File { path: path.clone(), doing: "locking", error };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
        File::open(&self.folder).and_then(|folder| hand_over(&file, &folder)).map_err(failed)?;
        let begun = Instant::now();
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < MAX_WAIT => thread::sleep(WAIT_STEP),
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(PkiError::Busy { path }),
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// `instance` has been checked to be a name that is no path ([`crate::issue::check_names`]).
fn file_name(level: Level, instance: &str) -> String {
    match level {
        Level::Root | Level::Leaf => AUTHORITY.to_owned(),
        Level::Region => "region.pem".to_owned(),
        Level::Zonal => "zonal.pem".to_owned(),
        Level::Instance => format!("instance-{instance}.pem"),
    }
}

/// Gives what root has made to whoever owns the folder around it.
fn hand_over(made: impl AsFd, around: impl AsFd) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = rustix::fs::fstat(around)?;
    Ok(rustix::fs::fchown(made, Some(rustix::fs::Uid::from_raw(owner.st_uid)), Some(rustix::fs::Gid::from_raw(owner.st_gid)))?)
}

/// Root uses anybody's.
fn check_owner(path: &Path, metadata: &std::fs::Metadata) -> Result<(), PkiError> {
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner == user || user == 0 { Ok(()) } else { Err(PkiError::Owner { path: path.to_path_buf(), owner, user }) }
}

fn check_access(path: &Path, metadata: &std::fs::Metadata, wanted: u32) -> Result<(), PkiError> {
    check_owner(path, metadata)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PkiError::Mode { path: path.to_path_buf(), mode, wanted });
    }
    Ok(())
}
