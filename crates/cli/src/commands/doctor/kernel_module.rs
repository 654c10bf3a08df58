//! Doctor's look at the driver as a kernel module: which one is loaded or there, and whether this kernel could take nitroxide's own (docs/kernel-package.md).
//!
//! [`check`] looks, [`judge`] says what that comes to.

use std::{fs, path::Path, process::Command};

use super::Check;

const NAME: &str = "kernel module";

/// The driver that this kernel has.
#[derive(Debug, PartialEq, Eq)]
enum Driver {
    /// Nitroxide's own is loaded; its version.
    Own(String),
    /// Another is loaded: the kernel's.
    Loaded,
    /// One could be loaded.
    Installed,
    None,
}

/// Looks at this machine.
pub(super) fn check() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let takes_rust = configuration(&release).map(|text| text.lines().any(|line| line == "CONFIG_RUST=y"));
    judge(&driver(Path::new("/sys/module/nitro_enclaves"), &Path::new("/lib/modules").join(&release)), &release, takes_rust)
}

fn driver(loaded: &Path, modules: &Path) -> Driver {
    let lists = |name: &str| fs::read_to_string(modules.join(name)).is_ok_and(|text| text.contains("/nitro_enclaves.ko"));
    match fs::read_to_string(loaded.join("version")) {
        // Mainline's module has no version.
        Ok(version) if version.starts_with("nitroxide") => Driver::Own(version.trim_end().to_owned()),
        _ if loaded.exists() => Driver::Loaded,
        _ if lists("modules.dep") || lists("modules.builtin") => Driver::Installed,
        _ => Driver::None,
    }
}

/// The running kernel's configuration; none where it is nowhere.
fn configuration(release: &str) -> Option<String> {
    let files = [format!("/boot/config-{release}"), format!("/lib/modules/{release}/config")];
    files.iter().find_map(|file| fs::read_to_string(file).ok()).or_else(|| {
        let output = Command::new("gzip").args(["--decompress", "--stdout", "/proc/config.gz"]).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    })
}

fn judge(driver: &Driver, release: &str, takes_rust: Option<bool>) -> Check {
    let there = match driver {
        Driver::Own(version) => return Check::ok(NAME, format!("nitroxide's own driver is loaded ({version})")),
        Driver::Loaded => "the kernel's own driver is loaded",
        Driver::Installed => "a driver is there, but not loaded",
        Driver::None => "this kernel brings no driver",
    };
    match takes_rust {
        Some(true) => Check {
            advice: Some(
                "Nitroxide's driver may fit it: docs/kernel-package.md says for which kernels, and how it is installed".to_owned(),
            ),
            ..Check::ok(NAME, format!("{there}; Linux {release} takes modules in Rust"))
        },
        Some(false) => Check::note(
            NAME,
            format!("{there}; Linux {release} cannot take modules in Rust, since it was built without CONFIG_RUST"),
            "Nothing to do: nitroxide needs no module, enclaves run in virtual machines of our own (--device local)",
        ),
        None => Check::note(
            NAME,
            format!("{there}; whether Linux {release} takes modules in Rust is not known, since its configuration is nowhere to be read"),
            "Nothing to do, unless you want nitroxide's own driver: then look for CONFIG_RUST=y in this kernel's configuration",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn the_own_driver_is_known_by_its_version_and_others_by_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let (loaded, modules) = (folder.path().join("loaded"), folder.path().join("modules"));
        fs::create_dir_all(&modules).unwrap();
        assert_eq!(driver(&loaded, &modules), Driver::None);
        fs::write(modules.join("modules.dep"), "kernel/drivers/virt/nitro_enclaves/nitro_enclaves.ko.xz:\n").unwrap();
        assert_eq!(driver(&loaded, &modules), Driver::Installed);
        fs::create_dir_all(&loaded).unwrap();
        assert_eq!(driver(&loaded, &modules), Driver::Loaded);
        fs::write(loaded.join("version"), "nitroxide-0.1.0\n").unwrap();
        assert_eq!(driver(&loaded, &modules), Driver::Own("nitroxide-0.1.0".to_owned()));
    }

    #[test]
    fn a_kernel_without_rust_gets_a_note_that_nothing_is_lost_and_one_with_it_the_way() {
        let without = judge(&Driver::Loaded, "6.12.1", Some(false));
        assert_eq!(without.state, State::Note);
        assert!(without.text.contains("6.12.1 cannot take modules in Rust"), "{}", without.text);
        assert!(without.advice.unwrap().contains("--device local"));
        let with = judge(&Driver::Installed, "7.3.4", Some(true));
        assert_eq!(with.state, State::Ok);
        assert!(with.advice.unwrap().contains("docs/kernel-package.md"));
        assert_eq!(judge(&Driver::None, "7.3.4", None).state, State::Note);
        let own = judge(&Driver::Own("nitroxide-0.1.0".to_owned()), "7.3.4", None);
        assert_eq!(own.state, State::Ok);
        assert!(own.text.contains("nitroxide-0.1.0"), "{}", own.text);
    }
}
