//! Programs that run inside a guest: static, built beforehand by `cargo xtask guest`; the module that `cargo xtask kmod` builds; and the kernel's own sample,
//! compiled when it is first asked for.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Setup;

/// The static guest program of that name, e.g. `nitroxide-init`.
///
/// # Panics
///
/// Where it was not built: `cargo xtask guest` builds all of them.
pub fn guest_program(name: &str) -> PathBuf {
    let program = std::env::current_exe().expect("the running program has a path");
    program
        .ancestors()
        .map(|folder| folder.join("guest/x86_64-unknown-linux-gnu/guest").join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("the guest program {name} was not built: run `cargo xtask guest` first"))
}

/// Our Linux module, `target/kmod/nitro_enclaves.ko`.
///
/// # Panics
///
/// Where it was not built: `cargo xtask kmod` builds it.
pub fn kernel_module() -> PathBuf {
    let program = std::env::current_exe().expect("the running program has a path");
    program
        .ancestors()
        .map(|folder| folder.join("kmod/nitro_enclaves.ko"))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("the kernel module was not built: run `cargo xtask kmod` first"))
}

/// The kernel's own sample program for Nitro Enclaves (`samples/nitro_enclaves/ne_ioctl_sample.c`, unmodified), static, compiled against this
/// project's header (include/uapi).
///
/// # Panics
///
/// Where its source was not brought (`cargo xtask setup --tests`) or the C compiler refuses it.
pub fn ne_ioctl_sample() -> PathBuf {
    let source = Setup::locate().ne_ioctl_sample_source();
    let program = source.with_extension("");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include/uapi");
    let changed = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let inputs = [source.clone(), include.join("linux/nitro_enclaves.h")];
    if changed(&program).is_some_and(|built| inputs.iter().all(|input| changed(input).is_some_and(|input| input < built))) {
        return program;
    }
    // Made aside: another test may do the same at this moment.
    let new = program.with_extension(format!("new-{}-{:?}", std::process::id(), std::thread::current().id()));
    let output = Command::new("cc").args(["-static", "-O2", "-pthread", "-I"]).arg(include).arg("-o").arg(&new).arg(&source).output();
    let output = output.expect("the C compiler cc starts");
    assert!(output.status.success(), "cc refuses {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&new, &program).expect("a file can be renamed in its folder");
    program
}
