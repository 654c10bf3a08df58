//! Directories that are not what they should be, and things in them that should not be there.
#![expect(clippy::unwrap_used, reason = "a failed expectation of a test is a panic")]

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use common::world;
use nitroxide_world::{BindError, ClaimError, Endpoint, OpenError, World};
use rustix::fs::{CWD, Mode, mkfifoat};

#[test]
fn a_directory_that_others_may_enter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o750)).unwrap();
    let error = World::open(dir.path()).unwrap_err();
    assert!(matches!(error, OpenError::WrongMode { mode: 0o750, .. }), "{error}");
}

#[test]
fn a_symbolic_link_or_a_file_is_no_world() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    drop(World::open(&real).unwrap());
    symlink(&real, dir.path().join("link")).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    for name in ["link", "file"] {
        let error = World::open(&dir.path().join(name)).unwrap_err();
        assert!(matches!(error, OpenError::NotADirectory(_)), "{name}: {error}");
    }
}

#[test]
fn a_world_whose_inner_directory_is_a_link_elsewhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("world");
    drop(World::open(&path).unwrap());
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::remove_dir(path.join("cids")).unwrap();
    symlink(elsewhere.path(), path.join("cids")).unwrap();
    let error = World::open(&path).unwrap_err();
    assert!(matches!(&error, OpenError::NotADirectory(at) if at.ends_with("cids")), "{error}");
}

#[test]
fn a_directory_of_another_user_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    if rustix::fs::chown(dir.path(), Some(rustix::fs::Uid::from_raw(12_345)), None).is_err() {
        eprintln!("not tested: only root can make a directory of another user");
        return;
    }
    let error = World::open(dir.path()).unwrap_err();
    assert!(matches!(error, OpenError::ForeignOwner { owner: 12_345, .. }), "{error}");
}

/// Puts a pipe, a link, a directory and a socket where claims are expected.
fn litter(dir: &Path, names: [&str; 4]) {
    mkfifoat(CWD, dir.join(names[0]), Mode::RWXU).unwrap();
    symlink("/etc/passwd", dir.join(names[1])).unwrap();
    std::fs::create_dir(dir.join(names[2])).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.join(names[3])).unwrap());
}

#[test]
fn claims_pass_by_what_is_no_claim_file() {
    let (dir, world) = world();
    litter(&dir.path().join("world/cids"), ["16", "17", "18", "19"]);
    assert_eq!(world.claim_cid(None).unwrap().cid, 20);
    for cid in 16..20 {
        let error = world.claim_cid(Some(cid)).unwrap_err();
        assert!(matches!(error, ClaimError::Foreign(_)), "{cid}: {error}");
        assert!(!world.is_cid_claimed(cid).unwrap());
    }
    litter(&dir.path().join("world/cpus"), ["1", "2", "3", "4"]);
    assert_eq!(world.claimed_cpus().unwrap(), [] as [u32; 0]);
    assert_eq!(world.sweep().unwrap().foreign.len(), 8);
}

#[test]
fn sockets_are_neither_bound_over_nor_looked_for_in_what_is_no_socket() {
    let (dir, world) = world();
    let ports = dir.path().join("world/vsock/3");
    let elsewhere = dir.path().join("elsewhere.sock");
    let _outside = std::os::unix::net::UnixListener::bind(&elsewhere).unwrap();
    mkfifoat(CWD, ports.join("1.sock"), Mode::RWXU).unwrap();
    symlink(&elsewhere, ports.join("2.sock")).unwrap();
    std::fs::create_dir(ports.join("3.sock")).unwrap();
    std::fs::write(ports.join("4.sock"), "").unwrap();
    for port in 1..=4 {
        assert!(matches!(world.bind(Endpoint::ParentPort(port)), Err(BindError::Foreign(_))), "{port}");
        let error = world.connect(Endpoint::ParentPort(port), None).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{port}");
    }
    assert_eq!(world.sweep().unwrap().foreign.len(), 4);
    assert!(elsewhere.exists());
}

#[test]
fn helper_on_a_small_disk() {
    let Some(path) = std::env::var_os("WORLD_TEST_DISK") else { return };
    let small = Path::new(&path).join("small");
    let error = World::open(&small).unwrap_err();
    assert!(matches!(error, OpenError::NoSpace(_)), "{error}");

    // The ten directories of a world fit, and one claim; the next does not, and is not left behind half made.
    let world = World::open(&Path::new(&path).join("tight")).unwrap();
    let _held = world.claim_cid(None).unwrap();
    let error = world.claim_cid(None).unwrap_err();
    assert!(matches!(error, ClaimError::NoSpace(_)), "{error}");
    let error = world.bind(Endpoint::ParentPort(1)).unwrap_err();
    assert!(matches!(error, BindError::NoSpace(_)), "{error}");

    let read_only = Path::new(&path).join("read-only");
    let error = World::open(&read_only.join("world")).unwrap_err();
    assert!(matches!(error, OpenError::NotWritable(..)), "{error}");
}

#[test]
fn a_full_or_read_only_disk_is_named_in_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let mount = "cd \"$WORLD_TEST_DISK\" && mkdir small tight read-only && mount -t tmpfs -o mode=700,nr_inodes=5 none small \
         && mount -t tmpfs -o mode=700,nr_inodes=11 none tight && mount -t tmpfs -o ro none read-only";
    let in_namespace = |then: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &format!("{mount} && {then}"), "sh"]);
        command.arg(std::env::current_exe().unwrap()).env("WORLD_TEST_DISK", dir.path());
        command
    };
    if !in_namespace("true").status().is_ok_and(|status| status.success()) {
        eprintln!("not tested: this machine does not let a user mount in a namespace of its own");
        return;
    }
    for name in ["small", "tight", "read-only"] {
        std::fs::remove_dir(dir.path().join(name)).unwrap();
    }
    let output = in_namespace("\"$1\" --exact helper_on_a_small_disk --nocapture").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
