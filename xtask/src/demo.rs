//! `cargo xtask demo`: the main job, from a clean clone to a terminated enclave.
//!
//! Everything is done by the product's own commands, as a user would type them; each is shown, timed, and checked.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use miette::{IntoDiagnostic, Result, WrapErr, bail, ensure, miette};
use serde_json::Value;

use crate::context::{self, Context};
use crate::test::Steps;
use crate::{follow, guest, setup};

/// The port on which the sample application answers lines: `echo TEXT`, `pcrs`, `attest NONCEHEX`, `exit N`.
const SAMPLE_PORT: &str = "5005";
/// The last thing the sample application says before it serves.
const READY: &str = "hello: listening";
/// Bytes of the nonce that a document is asked for with.
const NONCE_BYTES: usize = 32;
/// The exit status of `attestation verify` for a document that is not to be believed.
const NOT_BELIEVED: i32 = 61;
/// How long a TCG boot on a loaded machine may take before the demo gives up.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs the demo.
pub fn run(context: &Context) -> Result<()> {
    let mut steps = Steps::default();
    steps.take("set up: QEMU and a Debian kernel", || setup::run(context))?;
    steps.take("build nitroxide", || context::run(&mut context.cargo(["build", "--release", "--package", "nitroxide-cli"])))?;
    steps.take("build the sample image", || guest::run(context))?;

    let nitroxide = context.in_target("release/nitroxide");
    let image = context.in_target("demo/hello.eif");
    let expected = steps.take("measure the image", || {
        let described = json(&nitroxide, &["describe-eif", "--eif-path", path(&image)?])?;
        let pcrs = pcrs_of(&described["Measurements"])?;
        for (name, value) in &pcrs {
            println!("   {name} {value}");
        }
        Ok(pcrs)
    })?;

    let enclave = steps.take("launch", || Enclave::launch(&nitroxide, &image))?;
    println!("   {} with CID {}", enclave.id, enclave.cid);
    steps.take("boot: its console until the application serves", || enclave.show_console())?;
    steps.take("vsock round trip from the host", || {
        let answer = enclave.ask("echo Is anybody in there?")?;
        println!("   sent `echo Is anybody in there?`, got `{}`", answer.trim());
        ensure!(answer.trim() == "Is anybody in there?", "The sample application echoed something else: {answer:?}");
        Ok(())
    })?;
    steps.take("compare: measured from the file, read from /dev/nsm inside", || {
        let answer = enclave.ask("pcrs")?;
        println!("{:<6}{:<34}{:<34}", "", "from the file", "from /dev/nsm inside");
        for (name, value) in &expected {
            let seen = answer
                .lines()
                .find_map(|line| line.trim().strip_prefix(name.as_str()))
                .map(str::trim)
                .ok_or_else(|| miette!("The sample application said nothing about {name}:\n{answer}"))?;
            let verdict = if seen == value { "the same" } else { "DIFFERENT" };
            println!("   {name} {}…  {}…  {verdict}", &value[..30.min(value.len())], &seen[..30.min(seen.len())]);
            ensure!(seen == value, "{name} inside the enclave is {seen}, but the file measures {value}");
        }
        println!("   They agree.");
        Ok(())
    })?;
    steps.take("attest: a document with a fresh nonce, verified against the local root", || enclave.attest(&expected))?;
    steps.take("terminate", || enclave.terminate())?;
    steps.report();
    println!("\nThe same by hand: {} run --eif-path {} --memory 256 --cpu-count 2", shown(&nitroxide), shown(&image));
    Ok(())
}

/// A running enclave of the demo; terminated when dropped, so that a failed demo leaves nothing.
struct Enclave<'a> {
    nitroxide: &'a Path,
    id: String,
    cid: String,
    ended: std::cell::Cell<bool>,
}

impl<'a> Enclave<'a> {
    fn launch(nitroxide: &'a Path, image: &Path) -> Result<Self> {
        let arguments = ["run-enclave", "--device", "local", "--eif-path", path(image)?, "--cpu-count", "2", "--memory", "256"];
        let launched = json(nitroxide, &arguments)?;
        let id = launched["EnclaveID"].as_str().ok_or_else(|| miette!("run-enclave's answer has no EnclaveID: {launched}"))?.to_owned();
        Ok(Self { nitroxide, id, cid: launched["EnclaveCID"].to_string(), ended: std::cell::Cell::new(false) })
    }

    fn show_console(&self) -> Result<()> {
        let mut command = Command::new(self.nitroxide);
        command.args(["logs", "--follow", "--enclave-id", &self.id]);
        follow::until(&mut command, READY, PATIENCE).wrap_err("The application does not serve")
    }

    fn ask(&self, question: &str) -> Result<String> {
        let output = self.feed(&["vsock", "connect", &self.cid, SAMPLE_PORT], &format!("{question}\n"))?;
        ensure!(output.status.success(), "nitroxide vsock connect failed: {}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a command of nitroxide with this on its standard input.
    fn feed<S: AsRef<OsStr>>(&self, arguments: &[S], text: &str) -> Result<Output> {
        let mut command = Command::new(self.nitroxide);
        let mut program = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .into_diagnostic()
            .wrap_err_with(|| format!("Starting `{}`", context::show(&command)))?;
        let mut input = program.stdin.take().ok_or_else(|| miette!("`{}` has no input", context::show(&command)))?;
        input.write_all(text.as_bytes()).into_diagnostic()?;
        drop(input);
        program.wait_with_output().into_diagnostic()
    }

    /// Has the application ask its NSM for a document, and verifies it; a copy with one changed hex digit has to be refused.
    fn attest(&self, expected: &[(String, String)]) -> Result<()> {
        let mut random = [0; NONCE_BYTES];
        let mut source = File::open("/dev/urandom").into_diagnostic().wrap_err("Opening the source of random numbers")?;
        source.read_exact(&mut random).into_diagnostic()?;
        let nonce: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let document = self.ask(&format!("attest {nonce}"))?;
        let document = document.trim();
        println!("   asked for a document with the nonce {nonce}, got {} bytes", document.len() / 2);
        let mut arguments = vec!["attestation".to_owned(), "verify".to_owned(), "-".to_owned(), "--nonce".to_owned(), nonce];
        for (name, value) in expected {
            arguments.extend(["--pcr".to_owned(), format!("{}={value}", name.trim_start_matches("PCR"))]);
        }
        let shown: Vec<_> = arguments.iter().map(|word| if word.len() > 40 { format!("{}…", &word[..40]) } else { word.clone() }).collect();
        println!("   $ nitroxide {}", shown.join(" "));
        ensure!(self.verifies(&arguments, document)?, "The enclave's document does not verify");
        let middle = document.len() / 2;
        let changed = |(at, digit)| if at == middle { if digit == '0' { '1' } else { '0' } } else { digit };
        let tampered: String = document.char_indices().map(changed).collect();
        println!("   the same of a copy with one hex digit changed");
        ensure!(!self.verifies(&arguments, &tampered)?, "A document that was changed verifies");
        println!("   refused, as it must be");
        Ok(())
    }

    /// Whether a document, given on standard input, is believed; anything but a judgement is an error.
    fn verifies(&self, arguments: &[String], document: &str) -> Result<bool> {
        let status = self.feed(arguments, document)?.status;
        match status.code() {
            Some(0) => Ok(true),
            Some(NOT_BELIEVED) => Ok(false),
            _ => bail!("nitroxide attestation verify failed: {status}"),
        }
    }

    fn terminate(&self) -> Result<()> {
        self.ended.set(true);
        let answer = json(self.nitroxide, &["terminate-enclave", "--enclave-id", &self.id])?;
        ensure!(answer["Terminated"] == Value::Bool(true), "terminate-enclave answered {answer}");
        let left = json(self.nitroxide, &["describe-enclaves"])?;
        let is_ours = |enclave: &Value| enclave["EnclaveID"] == Value::String(self.id.clone());
        ensure!(!left.as_array().is_some_and(|enclaves| enclaves.iter().any(is_ours)), "The enclave is still described: {left}");
        println!("   terminated, nothing is left of it");
        Ok(())
    }
}

impl Drop for Enclave<'_> {
    fn drop(&mut self) {
        if !self.ended.get() {
            let _best_effort =
                Command::new(self.nitroxide).args(["terminate-enclave", "--enclave-id", &self.id]).stdout(Stdio::null()).status();
        }
    }
}

fn json(nitroxide: &Path, arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new(nitroxide);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit());
    println!("   $ nitroxide {}", arguments.join(" "));
    let output = command.output().into_diagnostic().wrap_err_with(|| format!("Starting `{}`", context::show(&command)))?;
    ensure!(output.status.success(), "`nitroxide {}` failed: {}", arguments.join(" "), output.status);
    serde_json::from_slice(&output.stdout).into_diagnostic().wrap_err("Its answer is not JSON")
}

fn pcrs_of(measurements: &Value) -> Result<Vec<(String, String)>> {
    ["PCR0", "PCR1", "PCR2"]
        .into_iter()
        .map(|name| {
            let value = measurements[name].as_str().ok_or_else(|| miette!("The image's description has no {name}"))?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| miette!("The path {} is not UTF-8", path.display()))
}

/// A path as one would type it from the repository.
fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}
