//! File systems: what a Linux program expects to find, and the application's root directory.

use std::{fs, io, path::Path};

use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    mount::{MountFlags, mount, mount_bind, mount_move},
};

use crate::say;

/// Where the application's files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootKind {
    /// `/rootfs`, as in AWS's images.
    Directory,
    /// The ramdisk itself.
    Ramdisk,
}

struct FileSystem {
    kind: &'static str,
    at: &'static str,
    options: &'static std::ffi::CStr,
    flags: MountFlags,
}

const fn system(kind: &'static str, at: &'static str, options: &'static std::ffi::CStr, flags: MountFlags) -> FileSystem {
    FileSystem { kind, at, options, flags }
}

const NO_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_PROGRAMS: MountFlags = NO_DEVICES.union(MountFlags::NOEXEC);

/// In this order; the directories are made where they are missing.
const COMPLETE: [FileSystem; 8] = [
    system("devtmpfs", "/dev", c"mode=0755", MountFlags::NOSUID),
    system("proc", "/proc", c"", NO_PROGRAMS),
    system("sysfs", "/sys", c"", NO_PROGRAMS),
    system("tmpfs", "/run", c"mode=0755", NO_DEVICES),
    system("tmpfs", "/tmp", c"mode=1777", NO_DEVICES),
    system("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666", MountFlags::NOSUID.union(MountFlags::NOEXEC)),
    system("tmpfs", "/dev/shm", c"mode=1777", NO_DEVICES),
    // Version 2 only: kernels since 2016 have it, while version 1 is being removed and its absence stops AWS's own init.
    system("cgroup2", "/sys/fs/cgroup", c"", NO_PROGRAMS),
];

/// What init itself needs before it knows the application: devices, the kernel's command line.
pub fn early() {
    for file_system in COMPLETE.iter().take(2) {
        mount_one(file_system);
    }
}

/// Opens `/dev/console` again as standard input, output and error: the kernel's own attempt comes before devtmpfs and may have failed.
pub fn reopen_console() {
    if let Ok(console) = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty()) {
        // Without a console the old descriptors simply stay.
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

/// Makes the application's files the root directory, as AWS's init does: a move mount, then chroot (the ramdisk cannot be pivoted away).
///
/// # Errors
///
/// What mount(2) and chroot(2) give.
pub fn enter_root(root: RootKind) -> io::Result<()> {
    if root == RootKind::Ramdisk {
        return Ok(());
    }
    mount_bind("/rootfs", "/rootfs")?;
    rustix::process::chdir("/rootfs")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Mounts everything below the application's root. What fails is reported and left out: the application may not need it.
pub fn complete() {
    for file_system in &COMPLETE {
        mount_one(file_system);
    }
    for (link, target) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2"), ("/dev/ptmx", "pts/ptmx")]
    {
        // They exist already when devtmpfs is the same one as before.
        let _ = std::os::unix::fs::symlink(target, link);
    }
}

/// Lets the application's user open the console again through /dev/stdout and the like, which many images do.
pub fn give_console(uid: u32, gid: u32) {
    // Only a convenience: the descriptors that are open work in any case.
    let _ = rustix::fs::chown("/dev/console", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
}

fn mount_one(file_system: &FileSystem) {
    let at = Path::new(file_system.at);
    if !at.is_dir() {
        // A failure shows in the mount that follows.
        let _ = fs::create_dir_all(at);
    }
    match mount(file_system.kind, at, file_system.kind, file_system.flags, file_system.options) {
        // EBUSY: it is there already.
        Ok(()) | Err(rustix::io::Errno::BUSY) => {}
        Err(error) => say!("warning: cannot mount {} on {}: {error}", file_system.kind, file_system.at),
    }
}
