//! An init that does what AWS's own init does, step by step, and nothing more: for testing that such images boot here.
//!
//! The sequence is that of aws-nitro-enclaves-sdk-bootstrap's `init/init.c` as documented in docs/guest-init.md. It differs in two
//! points: a missing cgroup version 1 controller is reported instead of being fatal, since current kernels have none
//! (issue 49 there), and modules in `/modules` are loaded first, since AWS's kernel has vsock and virtio-mmio built in and a
//! distribution's has not. The exit status of the application is dropped, as there.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::Command,
    time::Duration,
};

use nitroxide_guest_sys::vsock;
use rustix::{
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{WaitOptions, wait},
    system::{RebootCommand, reboot},
};

fn main() {
    if std::process::id() != 1 {
        let mut arguments = std::env::args_os().skip(1);
        let Some(program) = arguments.next() else { return };
        nitroxide_guest_sys::signals::unblock_all();
        // Already a session leader is no error here.
        let _ = rustix::process::setsid();
        println!("aws-init: cannot execute: {}", Command::new(program).args(arguments).exec());
        return;
    }
    match run() {
        Ok(()) => println!("aws-init: application ended"),
        Err(error) => println!("aws-init: {error}"),
    }
    // RB_AUTOBOOT, not power off.
    let _ = reboot(RebootCommand::Restart);
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let _signals = nitroxide_guest_sys::signals::Signals::block_all()?;
    ignore_busy(mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c""))?;
    for name in ["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"] {
        if let Ok(module) = File::open(format!("/modules/{name}.ko")) {
            rustix::system::finit_module(&module, c"", 0)?;
        }
    }
    if let Ok(module) = File::open("/nsm.ko") {
        rustix::system::finit_module(&module, c"", 0)?;
        fs::remove_file("/nsm.ko")?;
    }
    heartbeat()?;
    let environment = fs::read_to_string("/env")?;
    let command = fs::read_to_string("/cmd")?;
    fs::remove_file("/env")?;
    fs::remove_file("/cmd")?;
    mount_bind("/rootfs", "/rootfs")?;
    rustix::process::chdir("/rootfs")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    mounts()?;
    Command::new("/proc/self/exe")
        .args(command.lines())
        .env_clear()
        .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
        .envs(environment.lines().filter_map(|line| line.split_once('=')))
        .spawn()?;
    // Until nobody is left.
    while wait(WaitOptions::empty()).is_ok() {}
    Ok(())
}

/// Fatal when it fails, as there.
fn heartbeat() -> std::io::Result<()> {
    let mut stream = vsock::connect(vsock::PARENT_CID, 9000, Duration::from_secs(60))?;
    stream.write_all(&[0xB7])?;
    let mut answer = [0_u8];
    stream.read_exact(&mut answer)?;
    if answer == [0xB7] { Ok(()) } else { Err(std::io::Error::other("wrong heartbeat")) }
}

fn mounts() -> std::io::Result<()> {
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    ignore_busy(mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c""))?;
    mount("proc", "/proc", "proc", flags, c"")?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        // devtmpfs is the one mounted before.
        let _ = std::os::unix::fs::symlink(target, link);
    }
    mount("tmpfs", "/run", "tmpfs", flags, c"mode=0755")?;
    mount("tmpfs", "/tmp", "tmpfs", flags, c"")?;
    fs::create_dir_all("/dev/shm")?;
    mount("shm", "/dev/shm", "tmpfs", flags, c"mode=1777")?;
    fs::create_dir_all("/dev/pts")?;
    mount("devpts", "/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, c"")?;
    mount("sysfs", "/sys", "sysfs", flags, c"")?;
    mount("cgroup_root", "/sys/fs/cgroup", "tmpfs", flags, c"mode=0755")?;
    let controllers = fs::read_to_string("/proc/cgroups")?;
    for line in controllers.lines().filter(|line| !line.starts_with('#')) {
        let mut fields = line.split_whitespace();
        let (Some(name), Some(enabled)) = (fields.next(), fields.nth(2)) else { continue };
        if enabled == "1" {
            let at = format!("/sys/fs/cgroup/{name}");
            fs::create_dir_all(&at)?;
            let options = std::ffi::CString::new(name)?;
            if let Err(error) = mount(name, at.as_str(), "cgroup", flags, options.as_c_str()) {
                println!("aws-init: cgroup version 1 controller {name}: {error} (fatal with AWS's init)");
            }
        }
    }
    Ok(())
}

fn ignore_busy(result: Result<(), rustix::io::Errno>) -> Result<(), rustix::io::Errno> {
    match result {
        Err(rustix::io::Errno::BUSY) => Ok(()),
        other => other,
    }
}
