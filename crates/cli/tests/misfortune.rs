//! What can go wrong at a launch, with the real program: bad images, sizes, CPUs and CIDs, a QEMU that is missing or dies, a directory that cannot be used,
//! a full disk, and kill -9 of everybody concerned.
//!
//! Each failure is one clear message on standard error with its E-code, which is also the exit status, and nothing on standard output; of the
//! enclave no process, socket or file is left. The cases with a virtual machine need `cargo xtask setup` and `cargo xtask guest`.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    processes::files,
    run, small_image, text,
    user::{BACKGROUND, FOREGROUND, User, assert_failure, executable, qemu_in_shell, shell},
};
use nitroxide_testkit::images::ImageSpec;
use rustix::process::geteuid;

/// The traditional user without rights, and its group.
const NOBODY: u32 = 65_534;

#[test]
fn damaged_images_are_refused_wherever_the_damage_is() {
    let user = User::new();
    let whole = fs::read(&user.image).unwrap();
    let kernel = whole.windows(5000).position(|window| window.iter().all(|byte| *byte == 1)).unwrap();
    let damaged = user.path("damaged.eif");
    for length in [0, 1, 4, 100, 547, 548, 555, 560, kernel + 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&damaged, &whole[..length]).unwrap();
        user.both_refused(&damaged, &[], 35, &["damaged.eif"]);
    }
    // Magic, version, flags, default memory and CPUs, number of sections, an offset, a size, unused, the checksum itself, a section's header, payloads.
    for at in [0, 3, 5, 7, 15, 16, 27, 35, 291, 541, 544, 547, 549, 559, kernel, kernel + 4999, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&damaged, &bytes).unwrap();
        user.both_refused(&damaged, &[], 35, &["damaged.eif"]);
    }
}

#[test]
fn what_is_no_image_or_too_large_is_refused() {
    let user = User::new();
    user.both_refused(&user.path("missing.eif"), &[], 19, &["missing.eif", "No such file"]);
    user.both_refused(user.directory.path(), &[], 19, &["is not a file"]);
    user.both_refused(Path::new("/dev/zero"), &[], 19, &["/dev/zero", "is not a file"]);
    user.both_refused(Path::new("/etc/passwd"), &[], 35, &["/etc/passwd is not an enclave image"]);
    let pipe = user.path("pipe.eif");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    user.both_refused(&pipe, &[], 19, &["is not a file"]);
    let looped = user.path("loop.eif");
    symlink(&looped, &looped).unwrap();
    user.both_refused(&looped, &[], 19, &["loop.eif"]);

    let large = user.path("large.eif");
    nitroxide_eif::Builder::new(vec![1_u8; 60 << 20], "console=ttyS0").write_file(&large).unwrap();
    user.both_refused(&large, &["--memory", "64"], 26, &["64 MiB is too little: the image does not fit", "--memory"]);
    // Bytes behind the image do not belong to it and are not looked at, however many they are.
    fs::File::options().append(true).open(&user.image).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(user.start(&[])["MemoryMiB"], 64);
    assert!(run(user.without_machine().args(["terminate-enclave", "small"])).status.success());
}

#[test]
fn memory_cpus_and_cids_out_of_range_or_taken_are_refused() {
    let user = User::new();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--memory", "63"], 26, &["63 MiB is too little", "64"]),
        (&["--memory", "2"], 26, &["64"]),
        (&["--memory", "0"], 3, &["an enclave without memory is not possible"]),
        (&["--memory", "-64"], 3, &[]),
        (&["--memory", "1.5G"], 3, &["not a memory size"]),
        // More than can be counted, than can be addressed, and than the machine has.
        (&["--memory", "99999999999999999999"], 3, &["memory size"]),
        (&["--memory", "17592186044415"], 3, &["17592186044415 MiB is more memory than an enclave can have"]),
        (&["--memory", "4294967296"], 27, &["4294967296 MiB of memory are not to be had"]),
        (&["--memory", "200T"], 27, &["MiB of memory are not to be had"]),
        (&["--memory", "100T"], 27, &["MiB of memory are not to be had: this machine has"]),
        (&["--cpu-count", "0"], 3, &["0 is not in 1.."]),
        (&["--cpu-count", "64"], 22, &["64 vCPUs were asked for, but the pool has only 63 left"]),
        (&["--cpu-count", "4294967295"], 22, &["only 63 left"]),
        (&["--cpu-count", "4294967296"], 3, &["4294967296"]),
        (&["--cpu-ids", "0"], 21, &["CPU 0 stays with the parent"]),
        (&["--cpu-ids", "64"], 21, &["CPU 64 is not in the pool"]),
        (&["--cpu-ids", "4294967295"], 21, &["CPU 4294967295 is not in the pool"]),
        (&["--cpu-ids", "4294967296"], 23, &["`4294967296` in --cpu-ids is not a CPU number"]),
        (&["--cpu-ids", "5", "5"], 23, &["CPU 5 stands twice"]),
        (&["--enclave-cid", "1"], 3, &["1 cannot be an enclave's CID", "4 to 4294967294"]),
        (&["--enclave-cid", "2"], 3, &["2 cannot be an enclave's CID"]),
        (&["--enclave-cid", "3"], 3, &["3 cannot be an enclave's CID", "the parent"]),
        (&["--enclave-cid", "4294967295"], 3, &["4294967295 cannot be an enclave's CID"]),
        (&["--enclave-cid", "4294967296"], 3, &["4294967296"]),
    ];
    for (words, code, says) in cases {
        user.both_refused(&user.image, words, *code, says);
    }

    user.start(&["--cpu-ids", "7", "--enclave-cid", "77"]);
    for (words, code, says) in [
        (["--cpu-ids", "7"], 21, "CPU 7 is not in the pool, or belongs to another enclave"),
        (["--cpu-count", "63"], 22, "63 vCPUs were asked for"),
        (["--enclave-cid", "77"], 29, "CID 77 is in use"),
    ] {
        for way in [FOREGROUND, BACKGROUND] {
            user.refused(user.without_machine().args(way).arg(&user.image).args(words), code, &[says]);
        }
    }
    assert!(run(user.without_machine().args(["terminate-enclave", "--all"])).status.success());
    assert_eq!(files(&user.runtime()), BTreeSet::new());
}

#[test]
fn a_qemu_that_is_missing_broken_or_dies_at_its_start_is_named() {
    let user = User::new();
    let image = user.path("hello.eif");
    ImageSpec::hello().build(&image);
    let plain = user.path("plain-file");
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    let real = qemu_in_shell();
    let asked = "case \"$*\" in *'-device help'*)";
    let dies = executable(&user.path("dies"), &format!("{asked} exec {real} \"$@\";; esac\necho 'out of luck' >&2\nexit 1"));
    let quiet = executable(&user.path("quiet"), &format!("{asked} exec {real} \"$@\";; esac\nexit 0"));
    let no_program = user.path("no-program");
    shell("printf '#!%s\n' \"$2\" > \"$1\" && chmod 755 \"$1\"", [&no_program, Path::new("/nonexistent/shell")]);
    for (qemu, says) in [
        (Path::new("/nonexistent/qemu"), ["NITROXIDE_QEMU names /nonexistent/qemu", "No such file"]),
        (&plain, ["NITROXIDE_QEMU names", "plain-file, which cannot be executed"]),
        (user.directory.path(), ["NITROXIDE_QEMU names", "it is not a file"]),
        (Path::new("/bin/false"), ["does not answer like QEMU", "exit status: 1"]),
        (Path::new("/bin/true"), ["does not answer like QEMU", "it lists no devices"]),
        (&no_program, ["no-program does not answer like QEMU", "No such file"]),
        (&dies, ["dies ended before its guest ran. QEMU ended with status 1.", "out of luck"]),
        (&quiet, ["quiet ended before its guest ran.", "It wrote no message"]),
    ] {
        for way in [FOREGROUND, BACKGROUND] {
            user.refused(user.nitroxide().env("NITROXIDE_QEMU", qemu).args(way).arg(&image), 36, &says);
        }
    }
    // None at all: neither chosen, nor in the path, nor unpacked.
    let mut command = user.nitroxide();
    command.env("NITROXIDE_SETUP", user.path("no-setup")).env("PATH", "/nonexistent");
    user.refused(command.arg("run").arg(&image), 36, &["No QEMU found", "NITROXIDE_QEMU", "cargo xtask setup"]);
}

#[test]
fn a_runtime_directory_that_cannot_be_used_is_named() {
    let user = User::new();
    let runtime = user.runtime();
    let refused = |says: &[&str]| {
        for way in [FOREGROUND, BACKGROUND] {
            user.refused(user.without_machine().args(way).arg(&user.image), 7, says);
        }
        let name = says[0];
        user.refused(user.without_machine().arg("describe-enclaves"), 7, &[name]);
    };
    fs::write(&runtime, "a file").unwrap();
    refused(&["runtime", "directory"]);
    assert_eq!(fs::read(&runtime).unwrap(), b"a file");
    fs::remove_file(&runtime).unwrap();
    symlink(user.directory.path(), &runtime).unwrap();
    refused(&["runtime", "directory"]);
    fs::remove_file(&runtime).unwrap();
    fs::create_dir(&runtime).unwrap();
    for mode in [0o500, 0o755, 0o770, 0o000] {
        fs::set_permissions(&runtime, fs::Permissions::from_mode(mode)).unwrap();
        refused(&["runtime"]);
        assert_eq!(fs::metadata(&runtime).unwrap().permissions().mode() & 0o7777, mode, "somebody else's mode is not changed");
    }
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o700)).unwrap();
    if geteuid().is_root() {
        chown(&runtime, Some(NOBODY), Some(NOBODY)).unwrap();
        refused(&["runtime", "65534"]);
    } else {
        eprintln!("not tested: only root can make a directory of another user");
    }
    user.refused(user.without_machine().env("NITROXIDE_RUNTIME_DIR", "relative").arg("run").arg(&user.image), 7, &["relative", "absolute"]);
    user.refused(
        user.without_machine().env("NITROXIDE_RUNTIME_DIR", "/proc/nitroxide").arg("run").arg(&user.image),
        7,
        &["/proc/nitroxide"],
    );
    // A path too long for a socket's address is no obstacle.
    let long = user.path(&"long/".repeat(60));
    fs::create_dir_all(&long).unwrap();
    let mut command = user.without_machine();
    command.env("NITROXIDE_RUNTIME_DIR", long.join("runtime"));
    let output = run(command.args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&user.image));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut command = user.without_machine();
    command.env("NITROXIDE_RUNTIME_DIR", long.join("runtime"));
    assert!(run(command.args(["terminate-enclave", "--all"])).status.success());
    assert_eq!(files(&long), BTreeSet::new());
}

/// What the next test does on a disk of a given size; not a test by itself.
#[test]
fn helper_on_a_small_disk() {
    let Some(place) = std::env::var_os("MISFORTUNE_DISK").map(PathBuf::from) else { return };
    let mut user = User::new();
    user.image = small_image(user.directory.path());
    let at = |disk: &str| {
        let mut command = user.without_machine();
        command.env("NITROXIDE_RUNTIME_DIR", place.join(disk).join("world"));
        command
    };
    let (mut refused, mut started) = (0, 0);
    for inodes in 2..24 {
        let disk = inodes.to_string();
        let output = run(at(&disk).args(["run-enclave", "--memory", "64", "--eif-path"]).arg(&user.image));
        if output.status.success() {
            started += 1;
            let output = run(at(&disk).args(["terminate-enclave", "--all"]));
            assert!(output.status.success(), "{disk}: {}", text(&output.stderr));
        } else {
            refused += 1;
            let code = output.status.code().unwrap();
            assert!([7, 29, 36].contains(&code), "{disk}: {} {}", code, text(&output.stderr));
            assert_failure(&output, code, &["pace is left"], &disk);
        }
        assert_eq!(files(&place.join(&disk)), BTreeSet::new(), "{disk}");
    }
    assert!(refused > 10 && started > 0, "{refused} {started}");
    let output = run(at("read-only").arg("run").arg(&user.image));
    assert_failure(&output, 7, &["read-only", "writable"], "read-only");
}

#[test]
fn a_full_or_read_only_disk_is_told_and_nothing_is_left_half_made() {
    let directory = tempfile::tempdir().unwrap();
    let mount = "cd \"$MISFORTUNE_DISK\" && for n in $(seq 2 23); do mkdir $n && mount -t tmpfs -o mode=700,nr_inodes=$n none $n || exit 1; done \
         && mkdir read-only && mount -t tmpfs -o ro none read-only";
    let in_namespace = |then: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &format!("{mount} && {then}"), "sh"]);
        command.arg(std::env::current_exe().unwrap()).env("MISFORTUNE_DISK", directory.path());
        command
    };
    if !in_namespace("true").status().is_ok_and(|status| status.success()) {
        eprintln!("not tested: this machine does not let a user mount in a namespace of its own");
        return;
    }
    for folder in fs::read_dir(directory.path()).unwrap().flatten() {
        fs::remove_dir(folder.path()).unwrap();
    }
    let output = in_namespace("\"$1\" --exact helper_on_a_small_disk --nocapture").output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "{}", text(&output.stdout));
}
