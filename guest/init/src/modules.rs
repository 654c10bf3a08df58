//! Kernel modules of the image: what the kernel has not built in of vsock, NSM and virtio-mmio.
//!
//! They lie in `/modules` (any names, compressed or not) and, as in AWS's images, at `/nsm.ko`. Modules that need each other are
//! sorted out by trying again as long as a round loads at least one.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::say;

/// Tried in this order; whatever else is there comes after them, by name.
const ORDER: [&str; 6] = ["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "rng-core", "nsm"];

/// `MODULE_INIT_COMPRESSED_FILE` (Linux `include/uapi/linux/module.h`).
const COMPRESSED_FILE: i32 = 4;

/// Loads every module of the image and removes the files (they would only take the application's memory).
pub fn load_all() {
    let mut waiting = files(Path::new("/modules"));
    if Path::new("/nsm.ko").is_file() {
        waiting.push(PathBuf::from("/nsm.ko"));
    }
    let mut loaded = Vec::new();
    loop {
        let before = waiting.len();
        let mut failed = Vec::new();
        for path in waiting {
            match load(&path) {
                Ok(()) => loaded.push(name(&path)),
                Err(error) => failed.push((path, error)),
            }
        }
        if failed.is_empty() || failed.len() == before {
            for (path, error) in &failed {
                say!("warning: cannot load module {}: {error}", path.display());
            }
            break;
        }
        waiting = failed.into_iter().map(|(path, _)| path).collect();
    }
    if !loaded.is_empty() {
        say!("modules: {}", loaded.join(" "));
    }
    // Neither has to be there.
    let _ = fs::remove_file("/nsm.ko");
    let _ = fs::remove_dir_all("/modules");
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort_by_key(|path| rank(&name(path)));
    files
}

/// Position in [`ORDER`], then the name.
fn rank(name: &str) -> (usize, String) {
    (ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len()), name.to_owned())
}

/// `/modules/vsock.ko.xz` is `vsock`.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split(".ko").next().unwrap_or_default().to_owned()
}

fn load(path: &Path) -> Result<(), Errno> {
    let mut file = File::open(path).map_err(|error| errno(&error))?;
    let mut magic = [0_u8; 4];
    // A file that is too short is refused by the kernel below.
    let _ = file.read(&mut magic);
    let is_elf = magic == *b"\x7fELF";
    match rustix::system::finit_module(&file, c"", if is_elf { 0 } else { COMPRESSED_FILE }) {
        // EEXIST: built in or loaded already.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_modules_come_in_dependency_order_and_others_last_by_name() {
        let mut names = ["zram", "nsm", "vsock", "aes", "vmw_vsock_virtio_transport", "virtio_mmio", "vmw_vsock_virtio_transport_common"];
        names.sort_by_key(|name| rank(name));
        assert_eq!(
            names,
            ["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "nsm", "aes", "zram"]
        );
    }

    #[test]
    fn name_of_a_compressed_module_has_no_suffix() {
        assert_eq!(name(Path::new("/modules/vsock.ko.xz")), "vsock");
        assert_eq!(name(Path::new("/nsm.ko")), "nsm");
    }
}
