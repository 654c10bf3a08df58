//! `cargo xtask guest`: the programs that run inside an enclave, and the sample image made of them.
//!
//! Static, for glibc's own target, so that nothing but what rustup installs by default is needed; in a target directory of their own
//! (`target/guest`), since other flags would otherwise rebuild everything. The image's recipe is `nitroxide_testkit::images`.

use std::fs;

use miette::{IntoDiagnostic, Result, WrapErr};
use nitroxide_testkit::images::ImageSpec;

use crate::context::{self, Context};

/// The packages whose programs run in a guest.
const PACKAGES: [&str; 6] =
    ["nitroxide-init", "nitroxide-hello", "nitroxide-guest", "nitroxide-probe", "nitroxide-parent", "nitroxide-conformance"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the programs (cargo skips what is up to date) and, where something changed, the image target/demo/hello.eif.
pub fn run(context: &Context) -> Result<()> {
    programs(context)?;
    let image = context.in_target("demo/hello.eif");
    let recipe = ImageSpec::hello();
    if recipe.is_up_to_date(&image) {
        return Ok(());
    }
    fs::create_dir_all(context.in_target("demo")).into_diagnostic().wrap_err("Making the folder of the sample image")?;
    let built = recipe.build(&image);
    eprintln!("{}: {} KiB", image.display(), built.size / 1024);
    Ok(())
}

/// Builds only the programs.
pub fn programs(context: &Context) -> Result<()> {
    let mut cargo = context.cargo(["build", "--quiet", "--profile", "guest", "--target", TARGET]);
    cargo.arg("--target-dir").arg(context.in_target("guest"));
    for package in PACKAGES {
        cargo.args(["--package", package]);
    }
    // Only for the target, so that build scripts and macros of the host stay dynamic.
    cargo.arg("--config").arg(format!("target.{TARGET}.rustflags={:?}", flags(context)));
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS"] {
        cargo.env_remove(name);
    }
    context::run(&mut cargo)
}

/// Static, and without this machine's paths in panic messages, so that two checkouts build the same bytes.
fn flags(context: &Context) -> [String; 3] {
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo"))).unwrap_or_default();
    [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={home}=/cargo"),
        format!("--remap-path-prefix={}=/nitroxide", context.root.display()),
    ]
}
