//! The file tree that a VM's process sees: its own program and libraries, a /proc with only itself in it, two or three device files; all read-only.
//!
//! [`OwnRoot::plan`] prepares it in the launching process; [`OwnRoot::collect`] and [`OwnRoot::enter`] run in the new one between clone and exec, where only
//! system calls are allowed: nothing here allocates after the plan. Every path is the same inside as outside, so that the command line holds either way.
//! Sources: open_tree(2), mount_setattr(2), pivot_root(2), mount_namespaces(7).

#![expect(unsafe_code, reason = "rustix has no mount_setattr")]

use std::ffi::{CStr, CString, c_long};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Result;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::discover::Qemu;

/// The most trees one root is made of.
const MAX_TREES: usize = 12;

/// Folders that hold programs and libraries on every distribution; some are links into /usr.
const SYSTEM: [&str; 5] = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"];

/// Where the new root is put before it becomes the root: any folder will do.
const STAND: &CStr = c"/tmp";

/// What the new root shall hold.
#[derive(Debug)]
pub(crate) struct OwnRoot {
    /// Folders to be made, parents first, relative to the root.
    folders: Vec<CString>,
    /// Links to be made: what they say and where they are.
    links: Vec<(CString, CString)>,
    trees: Vec<Tree>,
}

/// A file or folder of the host that the new root shows.
#[derive(Debug)]
struct Tree {
    source: CString,
    /// The same place, relative to the root.
    place: CString,
    is_file: bool,
}

/// The host's trees, copied as detached mounts.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    trees: [Option<OwnedFd>; MAX_TREES],
    proc: Option<OwnedFd>,
}

impl OwnRoot {
    /// The root for this QEMU; none where it lies in a place of which we do not know what it needs.
    pub(crate) fn plan(qemu: &Qemu, kvm: bool) -> Option<Self> {
        let mut root = Self { folders: Vec::new(), links: Vec::new(), trees: Vec::new() };
        match &qemu.tree {
            Some(tree) => root.add(tree)?,
            None if std::fs::canonicalize(&qemu.path).ok()?.starts_with("/usr") && qemu.path.starts_with("/usr") => {
                for place in SYSTEM.map(Path::new) {
                    match std::fs::read_link(place) {
                        Ok(target) => root.links.push((c_string(&target)?, relative(place)?)),
                        Err(_) if place.exists() => root.add(place)?,
                        Err(_) => {}
                    }
                }
            }
            None => return None,
        }
        root.add(Path::new("/dev/urandom"))?;
        if kvm {
            root.add(Path::new("/dev/kvm"))?;
        }
        root.folders.push(c"proc".to_owned());
        (root.trees.len() <= MAX_TREES).then_some(root)
    }

    fn add(&mut self, path: &Path) -> Option<()> {
        let is_file = !path.is_dir();
        let mut folders: Vec<PathBuf> = path.ancestors().skip(usize::from(is_file)).map(Path::to_owned).collect();
        folders.reverse();
        for folder in folders.into_iter().skip(1) {
            let folder = relative(&folder)?;
            if !self.folders.contains(&folder) {
                self.folders.push(folder);
            }
        }
        self.trees.push(Tree { source: c_string(path)?, place: relative(path)?, is_file });
        Some(())
    }

    /// Copies the host's trees, while whoever may read them is still allowed to. Call in the new mount namespace.
    pub(crate) fn collect(&self) -> Result<Collected> {
        let mut collected = Collected::default();
        for (tree, slot) in self.trees.iter().zip(&mut collected.trees) {
            let copied = copy(&tree.source)?;
            // Where the host's mount is limited further, it stays so.
            read_only(copied.as_fd(), tree.source.as_bytes().starts_with(b"/dev/"))?;
            *slot = Some(copied);
        }
        // Where a container covers parts of /proc the kernel refuses a fresh one; then the container's own, which shows no more.
        let proc = fresh_proc().or_else(|_| copy(c"/proc"))?;
        // Else an owner of /proc/sys could set what the host's kernel does, capabilities or not.
        read_only(proc.as_fd(), false)?;
        collected.proc = Some(proc);
        Ok(collected)
    }

    /// Builds the root and goes there; the old one is out of reach then. Call as the user who is to own it.
    pub(crate) fn enter(&self, collected: &Collected) -> Result<()> {
        let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(context.as_fd(), c"mode", c"0755")?;
        rustix::mount::fsconfig_set_string(context.as_fd(), c"size", c"1m")?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        let limits = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, limits)?;
        attach(root.as_fd(), CWD, STAND)?;
        for folder in &self.folders {
            rustix::fs::mkdirat(&root, folder.as_c_str(), Mode::from_raw_mode(0o755))?;
        }
        for (target, place) in &self.links {
            rustix::fs::symlinkat(target.as_c_str(), &root, place.as_c_str())?;
        }
        for (tree, copied) in self.trees.iter().zip(&collected.trees) {
            if tree.is_file {
                rustix::fs::openat(
                    &root,
                    tree.place.as_c_str(),
                    OFlags::CREATE | OFlags::CLOEXEC | OFlags::WRONLY,
                    Mode::from_raw_mode(0o444),
                )?;
            }
            if let Some(copied) = copied {
                attach(copied.as_fd(), root.as_fd(), &tree.place)?;
            }
        }
        if let Some(proc) = &collected.proc {
            attach(proc.as_fd(), root.as_fd(), c"proc")?;
        }
        read_only(root.as_fd(), false)?;
        rustix::process::fchdir(&root)?;
        // Old root and new one at the same place, the old one on top (pivot_root(2), NOTES): taken off, it is gone.
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)
    }
}

/// A detached copy of the mounts at and below a path.
fn copy(path: &CStr) -> Result<OwnedFd> {
    rustix::mount::open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE)
}

/// A /proc of the new process namespace, in which only its own processes are.
fn fresh_proc() -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let limits = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, limits)
}

fn attach(mount: BorrowedFd<'_>, folder: BorrowedFd<'_>, place: &CStr) -> Result<()> {
    rustix::mount::move_mount(mount, c"", folder, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Takes writing, set-user-id programs and (but for a device file itself) devices away from a mount.
fn read_only(mount: BorrowedFd<'_>, is_device: bool) -> Result<()> {
    let attributes = libc::mount_attr {
        attr_set: if is_device {
            libc::MOUNT_ATTR_NOSUID
        } else {
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV
        },
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = c_long::from(libc::AT_EMPTY_PATH);
    // SAFETY: the path is an empty string, the attributes are a whole structure of the size given; both outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, &raw const attributes, size_of_val(&attributes))
    };
    if result == 0 {
        Ok(())
    } else {
        Err(rustix::io::Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(rustix::io::Errno::INVAL))
    }
}

fn c_string(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

fn relative(path: &Path) -> Option<CString> {
    c_string(path.strip_prefix("/").ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu(path: &str, tree: Option<&str>) -> Qemu {
        Qemu { path: path.into(), tree: tree.map(PathBuf::from), ..Qemu::default() }
    }

    #[test]
    fn a_tree_is_shown_at_its_own_place() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().to_str().unwrap();
        let root = OwnRoot::plan(&qemu(&format!("{tree}/usr/bin/q"), Some(tree)), true).unwrap();
        let text = |string: &CString| string.to_str().unwrap().to_owned();
        let places: Vec<String> = root.trees.iter().map(|tree| text(&tree.place)).collect();
        assert_eq!(places, [tree.trim_start_matches('/'), "dev/urandom", "dev/kvm"]);
        let folders: Vec<String> = root.folders.iter().map(text).collect();
        assert_eq!(folders.first().map(String::as_str), Some("tmp"));
        assert_eq!(folders.iter().filter(|folder| *folder == "dev").count(), 1);
        assert!(folders.contains(&tree.trim_start_matches('/').to_owned()) && folders.contains(&"proc".to_owned()));
    }

    #[test]
    fn an_installed_program_gets_the_systems_folders_and_another_none() {
        let root = OwnRoot::plan(&qemu("/usr/bin/env", None), false).unwrap();
        assert!(root.trees.iter().any(|tree| tree.source.as_c_str() == c"/usr"));
        assert!(!root.trees.iter().any(|tree| tree.source.as_c_str() == c"/dev/kvm"));
        assert!(OwnRoot::plan(&qemu("/proc/self/exe", None), false).is_none());
        assert!(OwnRoot::plan(&qemu("/nonexistent", None), false).is_none());
    }
}
