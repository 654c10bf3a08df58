//! The directory of a world: where it is, and why it can be trusted.
//!
//! [`World::open`] refuses a directory that another user owns or could enter. After that, everything is reached through the
//! directory's descriptor: nobody can move it away under a running program, and no path is resolved twice.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, mkdirat, openat, statat};
use rustix::io::Errno;

/// The environment variable that names a world's directory.
pub const DIR_VARIABLE: &str = "NITROXIDE_RUNTIME_DIR";

/// One parent's shared state. Cloning gives another handle of the same world.
#[derive(Clone)]
pub struct World {
    inner: Arc<Inner>,
}

/// The open directories. Having one proves: at the time of opening each was a real directory, owned by us, mode 0700.
/// It does not prove what lies in them: entries are checked one by one.
struct Inner {
    path: PathBuf,
    root: OwnedFd,
    slots: OwnedFd,
    cids: OwnedFd,
    cpus: OwnedFd,
    memory: OwnedFd,
    names: OwnedFd,
    enclaves: OwnedFd,
    vsock: OwnedFd,
    parent_ports: OwnedFd,
    hypervisor_ports: OwnedFd,
}

/// The directories of a world, by what lies in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Slots,
    Cids,
    Cpus,
    Memory,
    Names,
    Enclaves,
    Vsock,
    ParentPorts,
    HypervisorPorts,
}

impl Room {
    /// The directory's place below the world's own.
    pub(crate) fn place(self) -> &'static str {
        match self {
            Self::Slots => "slots",
            Self::Cids => "cids",
            Self::Cpus => "cpus",
            Self::Memory => "memory",
            Self::Names => "names",
            Self::Enclaves => "enclaves",
            Self::Vsock => "vsock",
            Self::ParentPorts => "vsock/3",
            Self::HypervisorPorts => "vsock/0",
        }
    }
}

/// Why a directory cannot be used as a world.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum OpenError {
    /// `{0}` is a symbolic link or no directory; remove it or set NITROXIDE_RUNTIME_DIR to a directory of your own.
    NotADirectory(PathBuf),
    /// `{path}` belongs to user {owner}, not to you ({user}); set NITROXIDE_RUNTIME_DIR to a directory of your own.
    ForeignOwner {
        /// The directory.
        path: PathBuf,
        /// The user id that owns it.
        owner: u32,
        /// The caller's effective user id.
        user: u32,
    },
    /// `{path}` has mode {mode:04o}, so that others may enter; run `chmod 700` on it if it is yours, or set NITROXIDE_RUNTIME_DIR.
    WrongMode {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// `{0}` cannot be created or written; set NITROXIDE_RUNTIME_DIR to a directory on a writable file system.
    NotWritable(PathBuf, #[source] std::io::Error),
    /// No space is left for `{0}`; free some, or set NITROXIDE_RUNTIME_DIR to a directory elsewhere.
    NoSpace(PathBuf),
    /// `{0}` cannot be opened.
    Io(PathBuf, #[source] std::io::Error),
    /// NITROXIDE_RUNTIME_DIR is `{0}`, but it must be an absolute path.
    RelativePath(PathBuf),
}

impl World {
    /// Opens the user's own world, at [`World::default_dir`], creating it when needed.
    ///
    /// # Errors
    ///
    /// As [`World::open`].
    pub fn open_default() -> Result<Self, OpenError> {
        Self::open(&Self::default_dir()?)
    }

    /// Where the user's own world is: `$NITROXIDE_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/nitroxide`, `/run/user/<uid>/nitroxide`,
    /// `/run/nitroxide` for root, `/tmp/nitroxide-<uid>`.
    ///
    /// # Errors
    ///
    /// [`OpenError::RelativePath`] when `$NITROXIDE_RUNTIME_DIR` is not absolute.
    pub fn default_dir() -> Result<PathBuf, OpenError> {
        let user = rustix::process::geteuid().as_raw();
        choose_dir(|name| std::env::var_os(name), user, Path::is_dir)
    }

    /// Opens the world in `path`, an absolute path of any length, creating directories that are missing with mode 0700.
    ///
    /// # Errors
    ///
    /// An [`OpenError`] that names the directory at fault; nothing outside `path` was changed.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let open_root = || openat(CWD, path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let root = match open_root() {
            Err(Errno::NOENT) => {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| sorted(path, error))?;
                open_root()
            }
            other => other,
        };
        Self::from_fd(root.map_err(|errno| sorted(path, errno.into()))?, path)
    }

    /// Makes a world of an open directory, for example one that another process passed on; `path` is only for messages.
    ///
    /// # Errors
    ///
    /// As [`World::open`].
    pub fn from_fd(root: OwnedFd, path: &Path) -> Result<Self, OpenError> {
        check_private(&root, path)?;
        let room = |room: Room| -> Result<OwnedFd, OpenError> { open_room(&root, path, room.place()) };
        let (slots, cids, cpus, memory) = (room(Room::Slots)?, room(Room::Cids)?, room(Room::Cpus)?, room(Room::Memory)?);
        let (names, enclaves, vsock) = (room(Room::Names)?, room(Room::Enclaves)?, room(Room::Vsock)?);
        let (parent_ports, hypervisor_ports) = (room(Room::ParentPorts)?, room(Room::HypervisorPorts)?);
        let path = path.to_path_buf();
        Ok(Self {
            inner: Arc::new(Inner { path, root, slots, cids, cpus, memory, names, enclaves, vsock, parent_ports, hypervisor_ports }),
        })
    }

    /// The path by which the world was opened: for messages, not for opening anything.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// A descriptor of the world's directory that another process can be given for [`World::from_fd`].
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.root.as_fd()
    }

    /// The descriptor of one of the world's directories.
    pub(crate) fn room(&self, room: Room) -> BorrowedFd<'_> {
        let inner = &*self.inner;
        match room {
            Room::Slots => inner.slots.as_fd(),
            Room::Cids => inner.cids.as_fd(),
            Room::Cpus => inner.cpus.as_fd(),
            Room::Memory => inner.memory.as_fd(),
            Room::Names => inner.names.as_fd(),
            Room::Enclaves => inner.enclaves.as_fd(),
            Room::Vsock => inner.vsock.as_fd(),
            Room::ParentPorts => inner.parent_ports.as_fd(),
            Room::HypervisorPorts => inner.hypervisor_ports.as_fd(),
        }
    }

    /// The path of an entry, for messages.
    pub(crate) fn display(&self, room: Room, name: &str) -> PathBuf {
        self.inner.path.join(room.place()).join(name)
    }
}

impl fmt::Debug for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("World").field(&self.inner.path).finish()
    }
}

/// Picks the default directory from the environment `variable`, the user id and what exists.
fn choose_dir(variable: impl Fn(&str) -> Option<OsString>, user: u32, is_dir: impl Fn(&Path) -> bool) -> Result<PathBuf, OpenError> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set(DIR_VARIABLE) {
        return if path.is_absolute() { Ok(path) } else { Err(OpenError::RelativePath(path)) };
    }
    // The XDG specification: a value that is not absolute is to be ignored.
    if let Some(path) = set("XDG_RUNTIME_DIR").filter(|path| path.is_absolute()) {
        return Ok(path.join("nitroxide"));
    }
    let session = PathBuf::from(format!("/run/user/{user}"));
    if is_dir(&session) {
        return Ok(session.join("nitroxide"));
    }
    Ok(if user == 0 { PathBuf::from("/run/nitroxide") } else { PathBuf::from(format!("/tmp/nitroxide-{user}")) })
}

/// Opens `place` below `root`, creating it when it is missing.
fn open_room(root: &OwnedFd, world: &Path, place: &str) -> Result<OwnedFd, OpenError> {
    let path = world.join(place);
    match mkdirat(root, place, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(sorted(&path, errno.into())),
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(root, place, flags, Mode::empty()).map_err(|errno| sorted(&path, errno.into()))?;
    check_private(&dir, &path)?;
    Ok(dir)
}

/// Checks that a directory is ours alone.
fn check_private(dir: &OwnedFd, path: &Path) -> Result<(), OpenError> {
    let stat = fstat(dir).map_err(|errno| OpenError::Io(path.to_path_buf(), errno.into()))?;
    let user = rustix::process::geteuid().as_raw();
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(OpenError::NotADirectory(path.to_path_buf()));
    }
    if stat.st_uid != user {
        return Err(OpenError::ForeignOwner { path: path.to_path_buf(), owner: stat.st_uid, user });
    }
    match stat.st_mode & 0o777 {
        0o700 => Ok(()),
        mode => Err(OpenError::WrongMode { path: path.to_path_buf(), mode }),
    }
}

/// Turns an operating system's error into the one that says what to do.
fn sorted(path: &Path, error: std::io::Error) -> OpenError {
    let path = path.to_path_buf();
    match Errno::from_io_error(&error) {
        // O_DIRECTORY|O_NOFOLLOW on a symbolic link gives ENOTDIR, or ELOOP from older kernels.
        Some(Errno::LOOP | Errno::NOTDIR | Errno::EXIST) => OpenError::NotADirectory(path),
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => OpenError::NotWritable(path, error),
        Some(Errno::NOSPC | Errno::DQUOT) => OpenError::NoSpace(path),
        _ => OpenError::Io(path, error),
    }
}

/// Whether `name` in `dir` is still the very file that `file` has open.
pub(crate) fn is_same_file(dir: impl AsFd, name: &str, file: impl AsFd) -> rustix::io::Result<bool> {
    let open = fstat(file)?;
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(entry) => Ok(entry.st_dev == open.st_dev && entry.st_ino == open.st_ino),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(variables: &[(&str, &str)], user: u32, session: bool) -> PathBuf {
        let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        choose_dir(variable, user, |_| session).unwrap()
    }

    #[test]
    fn default_directory_follows_the_documented_order() {
        let all = [("NITROXIDE_RUNTIME_DIR", "/a"), ("XDG_RUNTIME_DIR", "/x")];
        assert_eq!(chosen(&all, 7, true), Path::new("/a"));
        assert_eq!(chosen(&all[1..], 7, true), Path::new("/x/nitroxide"));
        assert_eq!(chosen(&[("XDG_RUNTIME_DIR", "")], 7, true), Path::new("/run/user/7/nitroxide"));
        assert_eq!(chosen(&[("XDG_RUNTIME_DIR", "relative")], 7, false), Path::new("/tmp/nitroxide-7"));
        assert_eq!(chosen(&[], 0, false), Path::new("/run/nitroxide"));
    }

    #[test]
    fn relative_directory_is_refused() {
        let result = choose_dir(|_| Some(OsString::from("here")), 7, |_| false);
        assert!(matches!(result, Err(OpenError::RelativePath(_))));
    }
}
