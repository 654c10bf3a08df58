//! The user's world of local enclaves, for commands.

use std::{io, os::fd::OwnedFd, path::Path};

use nitroxide_world::{OpenError, World};
use rustix::fs::{FlockOperation, flock};

use crate::{codes::ErrorCode, failure::Failure};

/// The folder of worlds that belong to one device each (`nitroxide device`).
pub const PARENTS: &str = "parents";

/// Opens the world; the directory is made when it is missing. What killed devices left in it is removed.
pub fn open() -> Result<World, Failure> {
    let world = World::open_default().map_err(unusable)?;
    sweep(&world.path().join(PARENTS));
    Ok(world)
}

/// Removes what an enclave left whose process ended in the middle of its start, as far as that can be done now: the next command does the rest.
pub fn sweep_up() {
    if let Ok(world) = World::open_default() {
        let _ = world.sweep();
    }
}

/// Locks a folder without waiting. The lock ends with the descriptor, and with the process.
pub fn lock(folder: &Path) -> io::Result<OwnedFd> {
    let descriptor: OwnedFd = std::fs::File::open(folder)?.into();
    flock(&descriptor, FlockOperation::NonBlockingLockExclusive)?;
    Ok(descriptor)
}

/// Removes the worlds of devices that were killed: those that nobody has locked. While a device makes a new one, nothing is done.
fn sweep(parents: &Path) {
    let Ok(_parents) = lock(parents) else { return };
    for entry in std::fs::read_dir(parents).into_iter().flatten().flatten() {
        let path = entry.path();
        if lock(&path).is_ok() {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

/// Why not.
pub fn unusable(error: OpenError) -> Failure {
    Failure::new(ErrorCode::READ_DISK, "The runtime directory cannot be used").because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_killed_devices_are_swept_and_used_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let (dead, live) = (folder.path().join("1"), folder.path().join("2"));
        std::fs::create_dir_all(dead.join("vsock/3")).unwrap();
        std::fs::create_dir(&live).unwrap();
        let _lock = lock(&live).unwrap();
        sweep(folder.path());
        assert!(!dead.exists() && live.exists());
    }
}
