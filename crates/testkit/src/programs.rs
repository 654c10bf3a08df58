//! Programs that run inside a guest: static, built beforehand by `cargo xtask guest`.

use std::path::PathBuf;

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
