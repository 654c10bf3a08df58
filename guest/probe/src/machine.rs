//! The machine around a check that runs as init: file systems and modules before, power-off behind.

use std::{fs, io};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

/// Mounts /dev, /proc and /sys and loads `/modules/{virtio_mmio,nsm}.ko`, if this is the first process; `say` is told what fails.
pub fn prepare(say: &dyn Fn(&str)) {
    if std::process::id() != 1 {
        return;
    }
    for (kind, folder) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        let _ = fs::create_dir(folder);
        if let Err(error) = mount(kind, folder, kind, MountFlags::empty(), None) {
            say(&format!("{folder} cannot be mounted: {error}"));
        }
    }
    for name in ["virtio_mmio", "nsm"] {
        if let Err(error) = load(name) {
            say(&format!("{name} cannot be loaded: {error}"));
        }
    }
}

/// Loads `/modules/<name>.ko`.
///
/// # Errors
///
/// What open(2) and finit_module(2) give.
pub fn load(name: &str) -> io::Result<()> {
    let module = fs::File::open(format!("/modules/{name}.ko"))?;
    Ok(finit_module(module, c"", 0)?)
}

/// Ends the machine, if this is the first process.
pub fn power_off() {
    if std::process::id() == 1 {
        let _ = reboot(RebootCommand::PowerOff);
    }
}
