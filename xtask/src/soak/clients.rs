//! Programs of others below `nitroxide exec`, too large for every test run: AWS' own nitro-cli, built from its published source, and a static client in Go.
//!
//! They run on the release build, with real enclaves of the sample image, in a world of their own. What each prints is checked. [`check`] says what their build
//! needs and this machine lacks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, bail, ensure, miette};
use serde_json::Value;

use crate::context::{self, Context};
use crate::test::Steps;
use crate::{follow, setup};

/// AWS' nitro-cli as it is published, and its version.
const NITRO_CLI: &str = "aws-nitro-enclaves-cli";
const NITRO_CLI_VERSION: &str = "1.5.2";
/// The oldest rustc, of version 1, that builds it.
const NITRO_CLI_RUSTC_MINOR: u32 = 94;
/// What the sample application prints first.
const GREETING: &str = "hello: I am an enclave";
/// The port on which the sample application answers lines.
const SAMPLE_PORT: &str = "5005";
/// How long an enclave may boot on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What of the user's environment would change what a client meets.
const VARIABLES: [&str; 6] = [
    "NITROXIDE_ENGINE",
    "NITROXIDE_DEVICE",
    "NITROXIDE_INSTANCE_ID",
    "NITROXIDE_IAM_ROLE",
    "NITRO_CLI_SOCKETS_PATH",
    "NITRO_CLI_LOGS_PATH",
];

/// Whether the clients can be built here.
///
/// # Errors
///
/// One sentence that names all that is missing.
pub fn check(context: &Context) -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let rustc = Command::new(rustc).current_dir(&context.root).arg("--version").output().into_diagnostic().wrap_err("Starting rustc")?;
    let openssl = Command::new("pkg-config").args(["--exists", "openssl"]).status().ok().map(|status| status.success());
    let missing = missing(&String::from_utf8_lossy(&rustc.stdout), openssl);
    ensure!(
        missing.is_empty(),
        "AWS' nitro-cli {NITRO_CLI_VERSION}, a client of the soak, cannot be built here: install {} (or choose other loops, e.g. `cargo xtask soak stress`).",
        missing.join(" and ")
    );
    Ok(())
}

/// What to install, by what rustc says of its version and whether pkg-config, where there is one, knows OpenSSL.
fn missing(rustc: &str, openssl: Option<bool>) -> Vec<String> {
    let version = rustc.split_ascii_whitespace().nth(1).unwrap_or("unknown");
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    let (major, minor) = (numbers.next().flatten().unwrap_or(0), numbers.next().flatten().unwrap_or(0));
    let mut missing = Vec::new();
    if (major, minor) < (1, NITRO_CLI_RUSTC_MINOR) {
        missing.push(format!("rustc 1.{NITRO_CLI_RUSTC_MINOR} or newer (this one is {version}; `rustup update`)"));
    }
    match openssl {
        // Whether OpenSSL is there cannot be asked without pkg-config.
        None => missing.push("Debian's packages pkg-config and libssl-dev".to_owned()),
        Some(false) => missing.push("Debian's package libssl-dev".to_owned()),
        Some(true) => {}
    }
    missing
}

/// Builds the clients and runs them.
pub fn run(context: &Context, steps: &mut Steps) -> Result<()> {
    steps.take("build nitroxide", || context::run(&mut context.cargo(["build", "--release", "--package", "nitroxide-cli"])))?;
    let place = Place::new(context.in_target("release/nitroxide"), context.in_target("demo/hello.eif"))?;
    let go_client = steps.take("build a client in Go", || build_go_client(context))?;
    steps.take("the client in Go", || {
        ensure!(place.exec(&go_client, &["many"])? == "1000 connections\n", "go-client many says something else");
        ensure!(place.exec(&go_client, &["http"])? == "5 requests\n", "go-client http says something else");
        Ok(())
    })?;
    let nitro_cli = steps.take("build AWS' nitro-cli", || build_nitro_cli(context))?;
    steps.take("AWS' nitro-cli, and an enclave that the client in Go asks", || place.run_nitro_cli(&nitro_cli, &go_client))
}

fn build_go_client(context: &Context) -> Result<PathBuf> {
    let folder = context.in_target("soak/go");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).into_diagnostic().wrap_err("Making a folder for Go")?;
    setup::unpack_go(context, &folder)?;
    let go_root = entry(&folder.join("usr/lib"), "go-")?;
    let program = context.in_target("soak/go-client");
    let mut build = Command::new(go_root.join("bin/go"));
    build.arg("build").arg("-o").arg(&program).arg(context.root.join("tools/go-client/main.go"));
    // The packages are Debian's, which are laid out for a compiler without modules.
    build.env("GO111MODULE", "off").env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local").env("GOROOT", &go_root);
    build.env("GOPATH", folder.join("usr/share/gocode")).env("GOCACHE", context.in_target("soak/go-cache"));
    context::run(&mut build)?;
    fs::remove_dir_all(&folder).into_diagnostic().wrap_err_with(|| format!("Removing {}", folder.display()))?;
    Ok(program)
}

/// The one folder whose name begins so.
fn entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).into_diagnostic().wrap_err_with(|| format!("Looking into {}", folder.display()))?;
    let mut found = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).map(|entry| entry.path());
    found.next().ok_or_else(|| miette!("{} holds no {prefix}*", folder.display()))
}

fn build_nitro_cli(context: &Context) -> Result<PathBuf> {
    let root = context.in_target("soak/nitro-cli");
    let mut install = context.cargo(["install", NITRO_CLI, "--version", NITRO_CLI_VERSION, "--locked", "--root"]);
    install.arg(&root).arg("--target-dir").arg(context.in_target("soak/nitro-cli-build"));
    context::run(&mut install)?;
    Ok(root.join("bin/nitro-cli"))
}

/// What the clients are run with: a world and a PKI of their own, of which nothing is left when it is dropped.
struct Place {
    nitroxide: PathBuf,
    image: PathBuf,
    /// Outside of target/, whose path may be too long for sockets.
    folder: tempfile::TempDir,
}

impl Place {
    fn new(nitroxide: PathBuf, image: PathBuf) -> Result<Self> {
        let folder = tempfile::tempdir().into_diagnostic().wrap_err("Making a folder for the clients' enclaves")?;
        Ok(Self { nitroxide, image, folder })
    }

    /// A command of nitroxide in this world.
    fn nitroxide(&self) -> Command {
        let mut command = Command::new(&self.nitroxide);
        command.env("NITROXIDE_RUNTIME_DIR", self.folder.path().join("runtime")).env("XDG_DATA_HOME", self.folder.path().join("data"));
        for variable in VARIABLES {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null());
        command
    }

    fn exec_command(&self, client: &Path, arguments: &[&str]) -> Command {
        let mut command = self.nitroxide();
        command.args(["exec", "--"]).arg(client).args(arguments);
        println!("   $ {}", context::show(&command));
        command
    }

    /// Runs a client to its end below an `exec` of its own, and gives its standard output.
    fn exec(&self, client: &Path, arguments: &[&str]) -> Result<String> {
        let mut command = self.exec_command(client, arguments);
        let output = command.stderr(Stdio::inherit()).output().into_diagnostic().wrap_err("Starting nitroxide exec")?;
        ensure!(output.status.success(), "`{}` failed: {}", context::show(&command), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn json(&self, client: &Path, arguments: &[&str]) -> Result<Value> {
        let said = self.exec(client, arguments)?;
        serde_json::from_str(&said).into_diagnostic().wrap_err_with(|| format!("Its answer is not JSON: {said}"))
    }

    fn run_nitro_cli(&self, nitro_cli: &Path, go_client: &Path) -> Result<()> {
        let image = self.image.to_str().ok_or_else(|| miette!("The path {} is not UTF-8", self.image.display()))?;
        let launch = ["run-enclave", "--eif-path", image, "--cpu-count", "2", "--memory", "256", "--debug-mode"];
        let launched = self.json(nitro_cli, &launch)?;
        let id = launched["EnclaveID"].as_str().ok_or_else(|| miette!("run-enclave's answer has no EnclaveID: {launched}"))?;
        let used = self.use_enclave(nitro_cli, go_client, id, &launched["EnclaveCID"].to_string());
        let terminated = self.terminate(nitro_cli, id);
        // What comes first is told first: the other may follow from it.
        used.and(terminated)
    }

    fn terminate(&self, nitro_cli: &Path, id: &str) -> Result<()> {
        let terminated = self.json(nitro_cli, &["terminate-enclave", "--enclave-id", id])?;
        ensure!(terminated["Terminated"] == Value::Bool(true), "terminate-enclave answered {terminated}");
        let left = self.json(nitro_cli, &["describe-enclaves"])?;
        ensure!(left == Value::Array(Vec::new()), "After its termination there is {left}");
        Ok(())
    }

    fn use_enclave(&self, nitro_cli: &Path, go_client: &Path, id: &str, cid: &str) -> Result<()> {
        let described = self.json(nitro_cli, &["describe-enclaves"])?;
        let [only] = described.as_array().map_or(&[][..], Vec::as_slice) else { bail!("describe-enclaves answered {described}") };
        ensure!(
            only["EnclaveID"] == id && only["State"] == "RUNNING" && only["Flags"] == "DEBUG_MODE",
            "describe-enclaves answered {only}"
        );
        let begun = Instant::now();
        loop {
            match self.exec(go_client, &["ask", cid, SAMPLE_PORT, "echo hello from Go"]) {
                Ok(answer) => break ensure!(answer == "hello from Go\n", "The sample application answered {answer:?}"),
                Err(error) if begun.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_secs(1)),
            }
        }
        // It shows the console until it is ended.
        follow::until(&mut self.exec_command(nitro_cli, &["console", "--enclave-id", id]), GREETING, PATIENCE)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nothing to end where all went well. Otherwise a client's enclave would go on in the background.
        let _best_effort = self.nitroxide().args(["terminate-enclave", "--all"]).stdout(Stdio::null()).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUSTC: &str = "rustc 1.94.0 (0123456789 2026-03-01)";

    #[test]
    fn nothing_is_missing_with_the_oldest_rustc_and_newer_ones() {
        for rustc in [RUSTC, "rustc 1.100.0-nightly (0123456789 2026-12-01)", "rustc 2.0.0"] {
            assert!(missing(rustc, Some(true)).is_empty(), "{rustc}");
        }
    }

    #[test]
    fn all_that_is_missing_is_named() {
        let old = missing("rustc 1.93.1 (0123456789 2026-02-01)", Some(false)).join(" and ");
        assert_eq!(old, "rustc 1.94 or newer (this one is 1.93.1; `rustup update`) and Debian's package libssl-dev");
        assert_eq!(missing(RUSTC, None), ["Debian's packages pkg-config and libssl-dev"]);
        assert_eq!(missing("", Some(true)), ["rustc 1.94 or newer (this one is unknown; `rustup update`)"]);
    }
}
