//! `doctor`: what this machine can do, what is missing, and what to do about it.
//!
//! Every check looks at one thing, changes nothing but what is stale anyway, and says something a user can act on. Text for people,
//! `--json` for programs; the exit status is 0 when enclaves can run at all.

mod attestation;
mod exec;
mod kernel_module;

use std::{fmt::Write as _, fs, io::IsTerminal, path::Path, process::ExitCode};

use nitroxide_engine::{Discovery, Engine, setup_root};
use nitroxide_world::World;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::{arguments::DoctorArguments, failure::Failure, output};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Note,
    /// Does not work.
    Missing,
}

/// One check's result.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    /// Can enclaves run in virtual machines of our own?
    local: bool,
    /// Can enclaves run on the real device?
    host: bool,
    checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Ok, text: text.into(), advice: None }
    }

    fn note(name: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, state: State::Note, text: text.into(), advice: Some(advice.into()) }
    }

    fn missing(name: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, state: State::Missing, text: text.into(), advice: Some(advice.into()) }
    }
}

/// Runs all checks.
pub fn run(arguments: &DoctorArguments) -> Result<ExitCode, Failure> {
    let host = host_device();
    let (engine, qemu) = qemu();
    let runtime = runtime_directory();
    let report = Report {
        local: qemu.state != State::Missing && runtime.iter().all(|check| check.state != State::Missing),
        host: host.state == State::Ok,
        checks: [host, kernel_module::check(), exec::check(), qemu]
            .into_iter()
            .chain(nsm(engine.as_ref()))
            .chain(parent_vm(engine.as_ref()))
            .chain([kvm(), kernel()])
            .chain(runtime)
            .chain([namespaces(), files(), memory(), attestation::check()])
            .collect(),
    };
    let works = report.local || report.host;
    if arguments.json {
        output::json(&report)?;
    } else {
        output::bytes(text(&report, std::io::stdout().is_terminal()).as_bytes())?;
    }
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(report: &Report, colour: bool) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let (mark, code) = match check.state {
            State::Ok => ("ok", "32"),
            State::Note => ("note", "33"),
            State::Missing => ("missing", "31"),
        };
        let mark = if colour { format!("\x1b[{code}m{mark:7}\x1b[0m") } else { format!("{mark:7}") };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark}  {:20} {}", check.name, check.text);
        if let Some(advice) = &check.advice {
            let _ = writeln!(text, "{:31}-> {advice}", "");
        }
    }
    let verdict = match (report.host, report.local) {
        (true, true) => "Enclaves can run here: on the real device, and in virtual machines (--device local).",
        (true, false) => "Enclaves can run here on the real device.",
        (false, true) => "Enclaves can run here, in virtual machines. Try: nitroxide run IMAGE.eif",
        (false, false) => "Enclaves cannot run here yet; see what is missing above.",
    };
    let _ = writeln!(text, "\n{verdict}");
    text
}

fn host_device() -> Check {
    const NAME: &str = "Nitro device";
    const DEVICE: &str = "/dev/nitro_enclaves";
    match fs::File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => {
            let pool = fs::read_to_string("/sys/module/nitro_enclaves/parameters/ne_cpus").unwrap_or_default();
            match pool.trim() {
                "" => Check::note(
                    NAME,
                    format!("{DEVICE} is there, but its CPU pool is empty"),
                    "Give the driver CPUs: nitro-enclaves-allocator, or write a list to ne_cpus",
                ),
                pool => Check::ok(NAME, format!("{DEVICE} with the CPU pool {pool}")),
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Check::note(
            NAME,
            "no /dev/nitro_enclaves: enclaves run in virtual machines of our own",
            "Nothing to do, unless this is an EC2 instance with enclaves enabled",
        ),
        Err(error) => Check::note(NAME, format!("{DEVICE} cannot be opened: {error}"), "Join the group `ne`, or use --device local"),
    }
}

fn qemu() -> (Option<Engine>, Check) {
    const NAME: &str = "QEMU";
    match Engine::discover(&Discovery::default()) {
        Ok(engine) => {
            let Some(qemu) = engine.qemu() else { return (None, Check::missing(NAME, "none", "Install qemu-system-x86")) };
            let version = qemu.command().arg("--version").output().ok();
            let version =
                version.and_then(|output| String::from_utf8(output.stdout).ok()).and_then(|text| text.lines().next().map(str::to_owned));
            let text = format!("{} ({})", version.unwrap_or_else(|| "QEMU of unknown version".to_owned()), qemu.path.display());
            let check = if qemu.notes.is_empty() {
                Check::ok(NAME, text)
            } else {
                Check { advice: Some(qemu.notes.join(" ")), ..Check::ok(NAME, text) }
            };
            (Some(engine), check)
        }
        Err(error) => (None, Check::missing(NAME, "none that can run enclaves", error.to_string())),
    }
}

fn nsm(engine: Option<&Engine>) -> Option<Check> {
    const NAME: &str = "NSM in enclaves";
    Some(if engine?.has_nsm_device() {
        Check::ok(NAME, "enclaves get /dev/nsm")
    } else {
        Check::note(
            NAME,
            "this QEMU has no vhost-user-test-device, so enclaves have no /dev/nsm",
            "Use QEMU 11 or newer, e.g. the one of `cargo xtask setup`",
        )
    })
}

/// Whether this QEMU can run a VM that `nitroxide device` makes a parent instance.
fn parent_vm(engine: Option<&Engine>) -> Option<Check> {
    const NAME: &str = "parent VMs";
    let lacking = &engine?.qemu()?.lacks_for_parents;
    Some(if lacking.is_empty() {
        Check::ok(NAME, "this QEMU can attach `nitroxide device` to a virtual machine")
    } else {
        Check::note(
            NAME,
            format!("this QEMU cannot attach `nitroxide device` to a virtual machine: it has no {}", lacking.join(" and no ")),
            "Use QEMU 11 or newer, e.g. the one of `cargo xtask setup`",
        )
    })
}

fn kvm() -> Check {
    const NAME: &str = "KVM";
    match Engine::kvm() {
        Ok(()) => Check::ok(NAME, "works: enclaves run at full speed"),
        Err(reason) => Check::note(NAME, reason, "Enclaves are emulated instead (TCG), which is slower"),
    }
}

fn kernel() -> Check {
    const NAME: &str = "sample kernel";
    let kernel = setup_root().and_then(|root| {
        let versions = fs::read_dir(root.join("usr/lib/modules")).ok()?;
        versions.flatten().map(|entry| entry.path().join("vmlinuz")).filter(|path| path.exists()).max()
    });
    match kernel {
        Some(path) => Check::ok(NAME, path.display().to_string()),
        None => {
            Check::note(NAME, "no kernel for the sample images", "Only needed for the demo and the tests: `cargo xtask setup` fetches one")
        }
    }
}

fn runtime_directory() -> Vec<Check> {
    const NAME: &str = "runtime directory";
    let world = match World::open_default() {
        Ok(world) => world,
        Err(error) => return vec![Check::missing(NAME, "cannot be used", error.to_string())],
    };
    let mut checks = vec![Check::ok(NAME, world.path().display().to_string())];
    // An unreadable directory shows in the sweep.
    let running = world.enclaves().unwrap_or_default().len();
    match world.sweep() {
        Ok(swept) => {
            let removed = swept.claims + swept.sockets;
            let text = format!(
                "{running} enclaves run{}",
                if removed > 0 { format!("; {removed} files of ended ones were removed") } else { String::new() }
            );
            checks.push(if swept.foreign.is_empty() {
                Check::ok("enclaves", text)
            } else {
                let foreign: Vec<_> = swept.foreign.iter().map(|path| path.display().to_string()).collect();
                Check::note("enclaves", text, format!("These files do not belong there; remove them: {}", foreign.join(", ")))
            });
        }
        Err(error) => checks.push(Check::missing("enclaves", "what ended enclaves left behind cannot be removed", error.to_string())),
    }
    checks
}

fn namespaces() -> Check {
    const NAME: &str = "namespaces";
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i64>().ok());
    let refusals = [
        ("/proc/sys/user/max_user_namespaces", number("/proc/sys/user/max_user_namespaces") == Some(0)),
        ("/proc/sys/kernel/unprivileged_userns_clone", number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0)),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1),
        ),
    ];
    let refused: Vec<&str> = refusals.iter().filter(|(_, refused)| *refused).map(|(path, _)| *path).collect();
    if !Path::new("/proc/self/ns/user").exists() {
        return Check::note(
            NAME,
            "this kernel has no user namespaces",
            "QEMU runs without them, confined only by its own system call filter",
        );
    }
    if refused.is_empty() || rustix::process::geteuid().is_root() {
        Check::ok(NAME, "the virtual machine's process can be confined in namespaces of its own")
    } else {
        Check::note(
            NAME,
            "users may not create namespaces",
            format!("QEMU runs without them, confined only by its own system call filter; see {}", refused.join(", ")),
        )
    }
}

fn files() -> Check {
    const NAME: &str = "open files";
    // Each vsock connection costs one, and a process raises its own limit up to the hard one.
    const ENOUGH: u64 = 4096;
    match getrlimit(Resource::Nofile).maximum {
        Some(limit) if limit < ENOUGH => Check::note(
            NAME,
            format!("at most {limit} per process"),
            format!("Enclaves with many vsock connections need more: raise the hard limit to {ENOUGH} or higher"),
        ),
        Some(limit) => Check::ok(NAME, format!("up to {limit} per process")),
        None => Check::ok(NAME, "no limit"),
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    // The smallest enclave with a distribution's kernel, with room for QEMU.
    const ENOUGH_MIB: u64 = 384;
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    match available.map(|kib| kib / 1024) {
        Some(mib) if mib < ENOUGH_MIB => {
            Check::note(NAME, format!("{mib} MiB available"), "Too little for most enclaves; end something else first")
        }
        Some(mib) => Check::ok(NAME, format!("{mib} MiB available")),
        None => Check::note(NAME, "/proc/meminfo does not say how much is available", "Is /proc mounted?"),
    }
}
