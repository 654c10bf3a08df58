//! Ramdisks: what is written is what the system's own cpio reads, the same tree makes the same bytes, and hostile archives end in errors.

#![expect(clippy::unwrap_used, reason = "test helpers fail as tests do")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use nitroxide_eif::cpio::{
    Content, CpioError, Device, Entry, Node, Reader, TYPE_CHARACTER, TYPE_DIRECTORY, TYPE_FILE, TYPE_SYMLINK, Tree, Writer,
};
use proptest::prelude::*;

fn sample() -> Tree {
    let mut tree = Tree::new();
    tree.file("init", 0o755, "#!/bin/sh\n").unwrap();
    tree.file("/etc/hosts", 0o644, "127.0.0.1 localhost\n").unwrap();
    tree.directory("./tmp/", 0o1777).unwrap();
    tree.symlink("bin", "usr/bin").unwrap();
    tree.device("dev/console", 0o600, Device::Character, (5, 1)).unwrap();
    tree.file("empty", 0o600, "").unwrap();
    tree
}

fn entries(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, CpioError> {
    let mut reader = Reader::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let data = reader.data(1 << 20)?;
        entries.push((entry, data));
    }
    Ok(entries)
}

#[test]
fn tree_reads_back_sorted_with_fixed_owners_times_and_numbers() {
    let archive = sample().to_bytes().unwrap();
    assert_eq!(archive.len() % 512, 0);
    let entries = entries(&archive).unwrap();
    let names: Vec<_> = entries.iter().map(|(entry, _)| std::str::from_utf8(&entry.name).unwrap()).collect();
    assert_eq!(names, ["bin", "dev", "dev/console", "empty", "etc", "etc/hosts", "init", "tmp"]);
    let modes: Vec<_> = entries.iter().map(|(entry, _)| entry.mode).collect();
    assert_eq!(modes, [0o120_777, 0o040_755, 0o020_600, 0o100_600, 0o040_755, 0o100_644, 0o100_755, 0o041_777]);
    for (index, (entry, _)) in entries.iter().enumerate() {
        assert_eq!((entry.uid, entry.gid, entry.mtime, entry.ino as usize), (0, 0, 0, index + 1));
    }
    assert_eq!(entries[2].0.device, (5, 1));
    assert_eq!(entries[2].0.file_type(), TYPE_CHARACTER);
    assert_eq!(entries[0].1, b"usr/bin");
    assert_eq!(entries[5].1, b"127.0.0.1 localhost\n");
    assert_eq!(entries[6].1, b"#!/bin/sh\n");
}

#[test]
fn directory_of_this_machine_keeps_modes_and_links_but_not_owners_and_times() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::create_dir_all(root.join("a/deep/er")).unwrap();
    fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::write(root.join("a/run"), "x".repeat(300_000)).unwrap();
    fs::set_permissions(root.join("a/run"), fs::Permissions::from_mode(0o4755)).unwrap();
    symlink("/nowhere", root.join("a-link")).unwrap();
    let mut tree = Tree::new();
    tree.add_directory("rootfs", root).unwrap();
    let archive = tree.to_bytes().unwrap();
    let entries = entries(&archive).unwrap();
    let seen: Vec<_> = entries.iter().map(|(entry, data)| (std::str::from_utf8(&entry.name).unwrap(), entry.mode, data.len())).collect();
    let own = TYPE_DIRECTORY | fs::metadata(root).unwrap().permissions().mode() & 0o7777;
    let deep = TYPE_DIRECTORY | fs::metadata(root.join("a/deep")).unwrap().permissions().mode() & 0o7777;
    let expected = [
        ("rootfs", own, 0),
        ("rootfs/a", TYPE_DIRECTORY | 0o711, 0),
        ("rootfs/a-link", TYPE_SYMLINK | 0o777, 8),
        ("rootfs/a/deep", deep, 0),
        ("rootfs/a/deep/er", deep, 0),
        ("rootfs/a/run", TYPE_FILE | 0o4755, 300_000),
    ];
    assert_eq!(seen, expected);
    fs::write(root.join("a/deep/touched"), "").unwrap();
    fs::remove_file(root.join("a/deep/touched")).unwrap();
    let mut again = Tree::new();
    again.add_directory("/rootfs/", root).unwrap();
    assert_eq!(again.to_bytes().unwrap(), archive);
}

#[test]
fn file_that_changes_after_it_was_added_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "four").unwrap();
    let mut tree = Tree::new();
    tree.file_from("file", 0o644, &path).unwrap();
    for content in ["fives", "two"] {
        fs::write(&path, content).unwrap();
        assert!(matches!(tree.to_bytes(), Err(CpioError::SourceChanged { path: named }) if named == path));
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(tree.to_bytes(), Err(CpioError::Source { path: named, .. }) if named == path));
    let size = Node::File { permissions: 0o644, content: Content::File { path, size: 4 } };
    assert_eq!(tree.nodes().next(), Some((&b"file"[..], &size)));
}

#[test]
fn names_that_leave_the_tree_or_clash_are_refused() {
    let mut tree = sample();
    for name in ["", "/", ".", "..", "a/../b", "a\0b", &"x".repeat(4096)] {
        assert!(matches!(tree.file(name, 0o644, ""), Err(CpioError::InvalidName { .. })), "{name:?}");
    }
    assert!(matches!(tree.file("bin/sh", 0o755, ""), Err(CpioError::Obstacle { obstacle, .. }) if obstacle == "bin"));
    assert!(matches!(tree.file("etc", 0o644, ""), Err(CpioError::Obstacle { obstacle, .. }) if obstacle == "etc"));
    assert!(matches!(tree.directory("init", 0o755), Err(CpioError::Obstacle { .. })));
    tree.file("etc-more", 0o644, "").unwrap();
    tree.file("tmp", 0o644, "an empty directory gives way").unwrap();
    tree.directory("etc", 0o700).unwrap();
    assert_eq!(tree.nodes().find(|(name, _)| *name == b"etc").unwrap().1, &Node::Directory { permissions: 0o700 });
}

#[test]
fn foreign_names_become_paths_that_stay_inside_or_none() {
    let path = |name: &str| Entry { name: name.into(), ..Entry::default() }.relative_path().map(|path| path.display().to_string());
    assert_eq!(path("/etc//./passwd").as_deref(), Some("etc/passwd"));
    assert_eq!(path(".").as_deref(), Some(""));
    assert_eq!(path("a/../../etc/passwd"), None);
    assert_eq!(path("a/..b/c").as_deref(), Some("a/..b/c"));
}

#[test]
fn archives_behind_each_other_are_read_as_the_kernel_reads_them() {
    let mut second = Tree::new();
    second.file("second", 0o644, "2").unwrap();
    let both = [sample().to_bytes().unwrap(), vec![0; 16], second.to_bytes().unwrap()].concat();
    let entries = entries(&both).unwrap();
    assert_eq!(entries.len(), 9);
    assert_eq!(entries[8].0.name, b"second");
    let compressed = [sample().to_bytes().unwrap(), b"\x1f\x8b\x08".to_vec()].concat();
    let at = compressed.len() as u64 - 3;
    let mut reader = Reader::new(compressed.as_slice());
    let error = std::iter::from_fn(|| reader.next_entry().map(|entry| entry.map(drop)).transpose()).find_map(Result::err);
    assert!(matches!(error, Some(CpioError::NotCpio { offset }) if offset == at));
    assert!(reader.next_entry().unwrap().is_none());
}

#[test]
fn every_truncation_of_an_archive_is_noticed() {
    let mut writer = Writer::new(Vec::new());
    writer.file(b"a", 0o644, b"12345").unwrap();
    writer.symlink(b"b", b"a").unwrap();
    let (archive, size) = writer.finish().unwrap();
    assert_eq!(size, archive.len() as u64);
    let trailer = archive.windows(10).position(|window| window == b"TRAILER!!!").unwrap();
    for size in 0..trailer + 10 {
        assert!(matches!(entries(&archive[..size]), Err(CpioError::Truncated { .. })), "{size} bytes");
    }
    assert_eq!(entries(&archive[..trailer + 14]).unwrap().len(), 2);
}

#[test]
fn claims_of_size_cost_nothing() {
    let header = |name_size: u32, size: u32| format!("070701{:048x}{size:08x}{:032x}{name_size:08x}{:08x}", 0, 0, 0);
    let big_name = header(u32::MAX, 0);
    assert!(matches!(Reader::new(big_name.as_bytes()).next_entry(), Err(CpioError::BadName { offset: 0, size: u32::MAX })));
    let big_data = format!("{}a\0", header(2, u32::MAX));
    let mut reader = Reader::new(big_data.as_bytes());
    assert_eq!(reader.next_entry().unwrap().unwrap().size, u32::MAX);
    assert!(matches!(reader.data(u64::MAX), Err(CpioError::Truncated { .. })));
    let mut reader = Reader::new(big_data.as_bytes());
    reader.next_entry().unwrap();
    assert!(matches!(reader.data(4095), Err(CpioError::DataTooBig { limit: 4095, .. })));
    for (name_size, text) in [(0, ""), (1, "\0"), (4, "a\0b\0"), (2, "ab")] {
        let archive = format!("{}{text}\0\0\0\0\0\0\0\0", header(name_size, 0));
        assert!(Reader::new(archive.as_bytes()).next_entry().is_err(), "{name_size} {text:?}");
    }
    assert!(matches!(Reader::new(header(2, 0).replace("070701", "07070x").as_bytes()).next_entry(), Err(CpioError::NotCpio { offset: 0 })));
    let bad_number = header(2, 0).replacen("00000000", "0000+000", 1);
    assert!(matches!(Reader::new(bad_number.as_bytes()).next_entry(), Err(CpioError::BadNumber { offset: 0 })));
}

/// The system's own cpio as a second opinion, where it is installed.
#[test]
fn system_cpio_lists_the_same_tree() {
    let child = Command::new("cpio").args(["-itv", "--numeric-uid-gid", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("skipped: no cpio on this machine (Debian: apt-get install cpio)");
        return;
    };
    let archive = sample().to_bytes().unwrap();
    std::io::copy(&mut archive.as_slice(), &mut child.stdin.take().unwrap()).unwrap();
    let mut listing = String::new();
    child.stdout.take().unwrap().read_to_string(&mut listing).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(listing.lines().count(), 8, "{listing}");
    assert!(listing.contains("bin -> usr/bin"), "{listing}");
    assert!(
        listing.lines().any(|line| line.starts_with("crw-------") && line.contains("5,   1") && line.ends_with("dev/console")),
        "{listing}"
    );
    assert!(listing.lines().any(|line| line.starts_with("drwxrwxrwt") && line.ends_with("tmp")), "{listing}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_tree_reads_back(files in prop::collection::btree_map("[a-z]{1,3}(/[a-z]{1,9}){0,3}", prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
        let mut tree = Tree::new();
        for (name, content) in &files {
            // A file where another one's directory is: refused, and nothing changes.
            let _ = tree.file(name, 0o640, content.clone());
        }
        let archive = tree.to_bytes().unwrap();
        let read = entries(&archive).unwrap();
        prop_assert_eq!(read.len(), tree.nodes().count());
        for ((entry, data), (name, node)) in read.iter().zip(tree.nodes()) {
            prop_assert_eq!(&entry.name, name);
            match node {
                Node::File { content: Content::Bytes(bytes), .. } => prop_assert_eq!(bytes, data),
                _ => prop_assert_eq!(entry.file_type(), TYPE_DIRECTORY),
            }
        }
    }

    #[test]
    fn damaged_archives_end(at in 0_usize..2048, value: u8) {
        let mut archive = sample().to_bytes().unwrap();
        let at = at % archive.len();
        archive[at] = value;
        let _ = entries(&archive);
    }
}
