//! Programs of others below `nitroxide exec`, too large for every test run: AWS' own nitro-cli, built from its published source, and a static client in Go.
//!
//! They run on the release build, with real enclaves of the sample image. What each prints is checked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, bail, ensure, miette};
use serde_json::Value;

use crate::context::{self, Context};
use crate::setup;
use crate::test::Steps;

/// AWS' nitro-cli as it is published, and its version.
const NITRO_CLI: &str = "aws-nitro-enclaves-cli";
const NITRO_CLI_VERSION: &str = "1.5.2";
/// The port on which the sample application answers lines.
const SAMPLE_PORT: &str = "5005";
/// How long an enclave may boot on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Builds the clients and runs them.
pub fn run(context: &Context, steps: &mut Steps) -> Result<()> {
    steps.take("build nitroxide", || context::run(&mut context.cargo(["build", "--release", "--package", "nitroxide-cli"])))?;
    let place = Place { nitroxide: context.in_target("release/nitroxide"), image: context.in_target("demo/hello.eif") };
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

/// What the clients are run with.
struct Place {
    nitroxide: PathBuf,
    image: PathBuf,
}

impl Place {
    /// Runs a client to its end below an `exec` of its own, and gives its standard output.
    fn exec(&self, client: &Path, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.nitroxide);
        command.args(["exec", "--"]).arg(client).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit());
        println!("   $ {}", context::show(&command));
        let output = command.output().into_diagnostic().wrap_err("Starting nitroxide exec")?;
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
        let outcome = self.use_enclave(nitro_cli, go_client, id, &launched["EnclaveCID"].to_string());
        let terminated = self.json(nitro_cli, &["terminate-enclave", "--enclave-id", id])?;
        outcome?;
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
        let script = "timeout 3 \"$1\" console --enclave-id \"$2\"; true";
        let nitro_cli = nitro_cli.to_str().ok_or_else(|| miette!("The path {} is not UTF-8", nitro_cli.display()))?;
        let shown = self.exec(Path::new("sh"), &["-c", script, "sh", nitro_cli, id])?;
        ensure!(shown.contains("hello: I am an enclave"), "The console shows {shown:?}");
        Ok(())
    }
}
