//! Whether a QEMU can run a virtual machine that `nitroxide device` makes a parent instance, and how that QEMU is started. For `doctor` and `device`.

use std::process::Stdio;

use nitroxide_engine::Qemu;

/// What attaches the two sockets of `nitroxide device`.
const NEEDED: [&str; 2] = ["vfio-user-pci", "vhost-user-vsock-pci"];

/// The devices of [`NEEDED`] that this QEMU does not have; none where it does not answer.
pub fn lacking(qemu: &Qemu) -> Option<Vec<&'static str>> {
    let answer = qemu.command().args(["-device", "help"]).stdin(Stdio::null()).output().ok().filter(|answer| answer.status.success())?;
    let listed = String::from_utf8_lossy(&answer.stdout).into_owned();
    Some(NEEDED.into_iter().filter(|device| !listed.contains(&format!("\"{device}\""))).collect())
}

/// The words that start it from a shell.
pub fn words(qemu: &Qemu) -> Vec<String> {
    let command = qemu.command();
    let mut words: Vec<String> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy().into_owned()).collect();
    // Firmware is beside it, not where it was built for.
    for folder in qemu.tree.iter().flat_map(|tree| ["usr/share/qemu", "usr/share/seabios"].map(|folder| tree.join(folder))) {
        words.extend(["-L".to_owned(), folder.to_string_lossy().into_owned()]);
    }
    words
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn qemu(path: &str, tree: Option<&str>) -> Qemu {
        Qemu { path: path.into(), tree: tree.map(PathBuf::from), has_nsm_device: true, has_sandbox: true, notes: Vec::new() }
    }

    #[test]
    fn an_installed_qemu_is_started_by_its_path_and_an_unpacked_one_by_its_loader_with_its_firmware() {
        assert_eq!(words(&qemu("/usr/bin/qemu-system-x86_64", None)), ["/usr/bin/qemu-system-x86_64"]);
        assert_eq!(
            words(&qemu("/t/usr/bin/qemu-system-x86_64", Some("/t"))).join(" "),
            "/t/usr/lib64/ld-linux-x86-64.so.2 --library-path /t/usr/lib/x86_64-linux-gnu /t/usr/bin/qemu-system-x86_64 \
             -L /t/usr/share/qemu -L /t/usr/share/seabios"
        );
    }

    #[test]
    fn a_program_that_is_no_qemu_has_no_answer() {
        assert_eq!(lacking(&qemu("/bin/false", None)), None);
        assert_eq!(lacking(&qemu("/nonexistent", None)), None);
        assert_eq!(lacking(&qemu("/bin/true", None)), Some(NEEDED.to_vec()));
    }
}
