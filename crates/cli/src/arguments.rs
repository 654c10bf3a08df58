//! The command line: every command, option and help text, as clap sees it.
//!
//! Help texts, man pages and completions come from here. What the values mean beyond their form is decided by the commands.

pub mod attestation;

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use nitroxide_client::Topology;
use nitroxide_world::{InstanceId, ParentIdentity, RoleArn};
use serde::{Deserialize, Serialize};

use crate::memory::parse_mib;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "nitroxide",
    version,
    about = "Run, inspect and debug Nitro enclaves on any Linux machine",
    long_about = "Run, inspect and debug Nitro enclaves on any Linux machine.\n\n\
        With the Nitro Enclaves driver (/dev/nitro_enclaves) enclaves run on it; elsewhere nitroxide brings driver, device and virtual \
        machine itself, without root. Results are JSON on standard output, everything else goes to standard error. The commands and \
        options of AWS's nitro-cli work as they do there; called by the name nitro-cli, nitroxide is a drop-in for it.",
    after_help = "Examples:\n  nitroxide run hello.eif                     boot an image, watch its console, get its exit status\n  \
        nitroxide run-enclave --eif-path hello.eif  start it in the background\n  nitroxide describe-enclaves                 what runs\n  \
        nitroxide doctor                            what this machine can do, and what is missing\n\n\
        Exit status: 0, or the number of the E-code shown (`nitroxide explain E29`); `run` gives the application's own.",
    disable_help_subcommand = false,
    max_term_width = 120
)]
pub struct Arguments {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Where enclaves run: on the real device (host), in virtual machines of our own (local), or on the real one if it is there (auto)
    #[arg(long, global = true, value_enum, default_value_t = DeviceKind::Auto, env = "NITROXIDE_DEVICE", help_heading = "General options")]
    pub device: DeviceKind,
    /// Say nothing on standard error but errors
    #[arg(long, short, global = true, help_heading = "General options")]
    pub quiet: bool,
}

/// The choice of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum DeviceKind {
    /// The real device if there is one, else local.
    Auto,
    /// `/dev/nitro_enclaves`.
    Host,
    /// Driver, device and virtual machine of our own.
    Local,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot an image in the foreground: console on standard output, the application's exit status as ours
    #[command(after_help = "Examples:\n  nitroxide run hello.eif\n  nitroxide run --memory 1G --cpu-count 4 hello.eif\n\n\
        Ctrl-C ends the enclave. Exit status: the application's; 128 + n if signal n ended it; the E-code's number for failures of nitroxide itself.")]
    Run(RunArguments),
    /// Start an enclave in the background and print its id and CID
    #[command(after_help = "Examples:\n  nitroxide run-enclave --eif-path hello.eif --cpu-count 2 --memory 512\n  \
        nitroxide run-enclave --config enclave.json\n\nKeys of the JSON object in --config: eif_path, cpu_count or cpu_ids, memory_mib, enclave_cid, enclave_name, debug_mode, attach_console.")]
    RunEnclave(RunEnclaveArguments),
    /// List the running enclaves
    #[command(after_help = "Example:\n  nitroxide describe-enclaves | jq -r '.[].EnclaveID'")]
    DescribeEnclaves(DescribeEnclavesArguments),
    /// End an enclave
    #[command(after_help = "Examples:\n  nitroxide terminate-enclave hello\n  nitroxide terminate-enclave --all")]
    TerminateEnclave(TerminateArguments),
    /// Follow the console of an enclave that runs in debug mode
    #[command(after_help = "Example:\n  nitroxide console --enclave-name hello")]
    Console(ConsoleArguments),
    /// Show what an enclave has printed on its console (local enclaves, in any mode)
    #[command(after_help = "Examples:\n  nitroxide logs hello\n  nitroxide logs --follow hello")]
    Logs(LogsArguments),
    /// Wait until an enclave ends and print how it ended
    #[command(after_help = "Example:\n  nitroxide wait hello | jq .ExitCode")]
    Wait(TargetArguments),
    /// Show what an image is: measurements, checksum, metadata, signature
    #[command(after_help = "Example:\n  nitroxide describe-eif --eif-path hello.eif | jq -r .Measurements.PCR0")]
    DescribeEif(DescribeEifArguments),
    /// Sign an image, or sign it again
    #[command(after_help = "Example:\n  nitroxide sign-eif --eif-path hello.eif --signing-certificate cert.pem --private-key key.pem")]
    SignEif(SignEifArguments),
    /// Compute the PCR of a file or of a signing certificate
    #[command(after_help = "Examples:\n  nitroxide pcr --input secret.txt\n  nitroxide pcr --signing-certificate cert.pem")]
    Pcr(PcrArguments),
    /// Verify and show attestation documents; the local root
    #[command(subcommand)]
    Attestation(attestation::AttestationCommand),
    /// Talk to enclaves over vsock
    #[command(subcommand)]
    Vsock(VsockCommand),
    /// Run a client of the driver, unmodified, as if this machine had Nitro Enclaves
    #[command(
        after_help = "Examples:\n  nitroxide exec -- ./my-launcher hello.eif\n  nitroxide exec --fault start@1=-EIO -- ./my-launcher hello.eif\n\n\
        The client and all that it starts see /dev/nitro_enclaves, its CPU pool, and huge pages that nobody had to reserve. Exit status: the client's; \
        127 if it is not found, 126 if it cannot be run, 125 for failures of nitroxide itself."
    )]
    Exec(ExecArguments),
    /// Give a virtual machine a Nitro Enclaves device, so that it is a parent instance
    #[command(
        after_help = "Examples:\n  nitroxide device --socket ne.sock\n  nitroxide device --socket ne.sock --max-enclaves 1 --fault start@1=-EIO\n\n\
        It prints what to add to QEMU's command line. In the VM the distribution's nitro_enclaves driver finds the device; enclaves run in memory \
        that the VM has given away. Ctrl-C ends all of them."
    )]
    Device(DeviceArguments),
    /// Say what this machine can do, what is missing, and what to do about it
    #[command(after_help = "Example:\n  nitroxide doctor --json | jq '.checks[] | select(.state != \"ok\")'")]
    Doctor(DoctorArguments),
    /// Explain error codes
    #[command(after_help = "Examples:\n  nitroxide explain E29 E36\n  nitroxide explain NE_ERR_MEM_NOT_HUGE_PAGE")]
    Explain(ExplainArguments),
    /// Print completions for a shell
    #[command(after_help = "Example:\n  nitroxide completions bash > ~/.local/share/bash-completion/completions/nitroxide")]
    Completions(CompletionsArguments),
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man(ManArguments),
    /// The process of one enclave (started by others)
    #[command(hide = true)]
    EnclaveProcess(InternalArguments),
    /// The background owner of one enclave (started by run-enclave)
    #[command(hide = true)]
    EnclaveOwner(InternalArguments),
}

/// Resources and mode of an enclave that is started.
#[derive(Debug, Clone, Default, Args)]
pub struct Resources {
    /// Number of vCPUs, taken from the pool [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpu_count: Option<u32>,
    /// The vCPUs by their CPU numbers
    #[arg(long, value_name = "ID", num_args = 1.., value_delimiter = ',', conflicts_with = "cpu_count")]
    pub cpu_ids: Option<Vec<String>>,
    /// Memory in MiB; suffixes M, G, T [default: four times the image, at least 256]
    #[arg(long, value_name = "SIZE", value_parser = parse_mib)]
    pub memory: Option<u64>,
    /// The enclave's CID, 4 or higher; 0 for any that is free
    #[arg(long, value_name = "CID")]
    pub enclave_cid: Option<String>,
    /// Debug mode: the console can be attached; attestation shows zeroes instead of measurements
    #[arg(long)]
    pub debug_mode: bool,
    /// A name for the enclave [default: the image's file name without .eif]
    #[arg(long, value_name = "NAME")]
    pub enclave_name: Option<String>,
    /// How a local enclave's virtual machine is run
    #[command(flatten)]
    pub local: LocalArguments,
    /// The parent that a local enclave sees.
    #[command(flatten)]
    pub parent: ParentArguments,
}

/// Options that only local enclaves have.
#[derive(Debug, Clone, Default, Args)]
pub struct LocalArguments {
    /// What runs the virtual machine
    #[arg(long, value_enum, default_value_t = EngineKind::Auto, env = "NITROXIDE_ENGINE", help_heading = "Options for local enclaves")]
    pub engine: EngineKind,
    /// How the guest finds its devices: kernels without ACPI need cmdline
    #[arg(long, value_enum, default_value_t = Discovery::Acpi, help_heading = "Options for local enclaves")]
    pub virtio_discovery: Discovery,
}

/// Who the made-up parent of local enclaves is to those that read attestation documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct IdentityArguments {
    /// The parent's instance id, in the ids of enclaves and in PCR4, e.g. i-0123456789abcdef0 [default: i-0000000000000000]
    #[arg(long, value_name = "ID", env = "NITROXIDE_INSTANCE_ID", help_heading = "Options for local enclaves")]
    pub instance_id: Option<InstanceId>,
    /// The ARN of the parent's IAM role, in PCR3, e.g. arn:aws:iam::123456789012:role/Webserver [default: none, PCR3 is zero]
    #[arg(long, value_name = "ARN", env = "NITROXIDE_IAM_ROLE", help_heading = "Options for local enclaves")]
    pub iam_role: Option<RoleArn>,
}

impl IdentityArguments {
    /// The parent: what was asked for, or the one that has always the same id and no role.
    pub fn identity(&self) -> ParentIdentity {
        ParentIdentity { instance_id: self.instance_id.clone().unwrap_or_default(), role: self.iam_role.clone() }
    }
}

/// The made-up parent of local enclaves.
#[derive(Debug, Clone, Default, Args)]
pub struct ParentArguments {
    /// The parent's CPUs and how many of them make a core, e.g. cpus=6,threads=2 [default: cpus=64,threads=1]
    #[arg(long, value_name = "CPUS", value_parser = parse_topology, help_heading = "Options for local enclaves")]
    pub topology: Option<Topology>,
    /// The CPUs that enclaves may have, e.g. 2-5, as whole cores and without the first [default: all others than the first core]
    #[arg(long, value_name = "LIST", help_heading = "Options for local enclaves")]
    pub pool: Option<String>,
    /// Who it is.
    #[command(flatten)]
    pub identity: IdentityArguments,
}

impl ParentArguments {
    /// The parent's CPUs.
    pub fn topology(&self) -> Topology {
        self.topology.unwrap_or_default()
    }

    /// The pool: what was asked for, or all cores but the first.
    pub fn pool(&self) -> String {
        let topology = self.topology();
        self.pool.clone().unwrap_or_else(|| format!("{}-{}", topology.threads, topology.cpus.saturating_sub(1)))
    }
}

/// Reads `cpus=6,threads=2`, in any order; threads are 1 if left out.
fn parse_topology(text: &str) -> Result<Topology, String> {
    let wrong = |what: &str| format!("`{text}` is no topology: {what}; write e.g. cpus=6,threads=2");
    let (mut cpus, mut threads) = (None, None);
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| wrong(&format!("`{part}` has no `=`")))?;
        let number: u32 = value.parse().map_err(|_| wrong(&format!("`{value}` is not a number")))?;
        let place = match key {
            "cpus" => &mut cpus,
            "threads" => &mut threads,
            _ => return Err(wrong(&format!("`{key}` is neither cpus nor threads"))),
        };
        if place.replace(number).is_some() {
            return Err(wrong(&format!("`{key}` stands twice")));
        }
    }
    let (Some(cpus), threads) = (cpus, threads.unwrap_or(1)) else { return Err(wrong("cpus is missing")) };
    let topology = Topology { cpus, threads };
    if topology.is_valid() { Ok(topology) } else { Err(wrong("2 to 4096 CPUs make whole cores of 1 to 8 threads")) }
}

/// The choice of `--engine`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum EngineKind {
    /// KVM where it works, else emulation.
    #[default]
    Auto,
    /// QEMU with KVM.
    Kvm,
    /// QEMU's emulation.
    Tcg,
    /// No virtual machine at all: for tests of everything around it.
    None,
}

/// The choice of `--virtio-discovery`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Discovery {
    /// ACPI tables.
    #[default]
    Acpi,
    /// The kernel's command line.
    Cmdline,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// The enclave image (EIF)
    #[arg(value_name = "IMAGE", required_unless_present = "eif_path", conflicts_with = "eif_path")]
    pub image: Option<PathBuf>,
    /// The enclave image, as run-enclave takes it
    #[arg(long, value_name = "FILE", hide = true)]
    pub eif_path: Option<PathBuf>,
    /// Resources and mode.
    #[command(flatten)]
    pub resources: Resources,
}

/// `run-enclave`.
#[derive(Debug, Args)]
pub struct RunEnclaveArguments {
    /// The enclave image (EIF)
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    pub eif_path: Option<PathBuf>,
    /// Resources and mode.
    #[command(flatten)]
    pub resources: Resources,
    /// Follow the console after the start; implies --debug-mode
    #[arg(long)]
    pub attach_console: bool,
    /// Return when the enclave runs, without waiting for its heartbeat
    #[arg(long)]
    pub no_wait: bool,
    /// All of the above from a JSON file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["eif_path", "cpu_count", "cpu_ids", "memory", "enclave_cid", "debug_mode", "enclave_name", "attach_console"])]
    pub config: Option<PathBuf>,
}

/// `describe-enclaves`.
#[derive(Debug, Args)]
pub struct DescribeEnclavesArguments {
    /// Also show the metadata of each enclave's image
    #[arg(long)]
    pub metadata: bool,
}

/// Which enclave is meant.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct TargetArguments {
    /// An enclave's id or name
    #[arg(value_name = "ENCLAVE")]
    pub enclave: Option<String>,
    /// The enclave's id
    #[arg(long, value_name = "ID")]
    pub enclave_id: Option<String>,
    /// The enclave's name
    #[arg(long, value_name = "NAME")]
    pub enclave_name: Option<String>,
}

/// `terminate-enclave`.
#[derive(Debug, Args)]
pub struct TerminateArguments {
    /// Which enclave.
    #[command(flatten)]
    pub target: TargetArguments,
    /// All enclaves of this user
    #[arg(long, group = "TargetArguments")]
    pub all: bool,
}

/// `console`.
#[derive(Debug, Args)]
pub struct ConsoleArguments {
    /// Which enclave.
    #[command(flatten)]
    pub target: TargetArguments,
    /// Stop following after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub disconnect_timeout: Option<u64>,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct LogsArguments {
    /// Which enclave.
    #[command(flatten)]
    pub target: TargetArguments,
    /// Go on until the enclave ends
    #[arg(long, short)]
    pub follow: bool,
}

/// `describe-eif`.
#[derive(Debug, Args)]
pub struct DescribeEifArguments {
    /// The enclave image (EIF)
    #[arg(long, value_name = "FILE", required_unless_present = "image", conflicts_with = "image")]
    pub eif_path: Option<PathBuf>,
    /// The enclave image (EIF)
    #[arg(value_name = "IMAGE")]
    pub image: Option<PathBuf>,
    /// Also show architecture, kernel command line and sections
    #[arg(long)]
    pub sections: bool,
}

/// `sign-eif`.
#[derive(Debug, Args)]
pub struct SignEifArguments {
    /// The enclave image (EIF); it is replaced by the signed one
    #[arg(long, value_name = "FILE")]
    pub eif_path: PathBuf,
    /// The certificate of the key, in PEM form
    #[arg(long, value_name = "PEM")]
    pub signing_certificate: PathBuf,
    /// The private key (P-256, P-384 or P-521), in PEM form
    #[arg(long, value_name = "PEM")]
    pub private_key: PathBuf,
}

/// `pcr`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct PcrArguments {
    /// The PCR of a file's content
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// PCR8 of a signing certificate
    #[arg(long, value_name = "PEM")]
    pub signing_certificate: Option<PathBuf>,
}

/// `vsock`.
#[derive(Debug, Subcommand)]
pub enum VsockCommand {
    /// Connect to a port of an enclave (or of the parent, CID 3); standard input and output are the stream
    #[command(after_help = "Example:\n  echo pcrs | nitroxide vsock connect 16 5005")]
    Connect {
        /// The CID to connect to
        cid: u32,
        /// The port there
        port: u32,
    },
    /// Listen on a port of the parent (CID 3) and take one connection; standard input and output are the stream
    #[command(after_help = "Example:\n  nitroxide vsock listen 7000 < answer.txt > request.txt")]
    Listen {
        /// The port on CID 3
        port: u32,
        /// Take one connection after the other and only receive; standard input is not read
        #[arg(long)]
        keep: bool,
    },
}

/// What a device allows that is made here, and what goes wrong with it.
#[derive(Debug, Args)]
pub struct BehaviourArguments {
    /// How many pieces of memory an enclave may have [default: 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_regions: Option<u32>,
    /// How many enclaves there may be at a time [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_enclaves: Option<u32>,
    /// Commands of the driver that go wrong on purpose, e.g. start@1=-EIO or stop=delay:5s (docs/device.md, "Faults")
    #[arg(long, value_name = "RULES", default_value = "", hide_default_value = true)]
    pub fault: String,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct ExecArguments {
    /// The client and its arguments
    #[arg(last = true, required = true, value_name = "CLIENT")]
    pub client: Vec<OsString>,
    /// What the device allows, and what goes wrong with it.
    #[command(flatten)]
    pub behaviour: BehaviourArguments,
    /// The parent that the client sees.
    #[command(flatten)]
    pub parent: ParentArguments,
    /// How an enclave's virtual machine is run.
    #[command(flatten)]
    pub launch: LocalArguments,
}

/// `device`.
#[derive(Debug, Args)]
pub struct DeviceArguments {
    /// Where QEMU's vfio-user-pci connects to
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Where QEMU's vhost-user-vsock-pci connects to [default: the other path and .vsock]
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// What becomes of memory that the VM gives to an enclave
    #[arg(long, value_enum, default_value_t = MemoryKind::Isolated)]
    pub memory: MemoryKind,
    /// What the device allows, and what goes wrong with it.
    #[command(flatten)]
    pub behaviour: BehaviourArguments,
    /// The directory for what the VM's enclaves share [default: a fresh one below the runtime directory]
    #[arg(long, value_name = "DIRECTORY")]
    pub world: Option<PathBuf>,
    /// Let programs in the VM steer the device (docs/device-pci.md, "Test control")
    #[arg(long, hide = true)]
    pub test_control: bool,
    /// How an enclave's virtual machine is run.
    #[command(flatten)]
    pub launch: LocalArguments,
    /// Who the virtual machine is as a parent.
    #[command(flatten)]
    pub identity: IdentityArguments,
}

/// The choice of `device --memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MemoryKind {
    /// Its content is copied and its pages are taken from the VM, which can neither read nor change its enclave.
    Isolated,
    /// The enclave runs in the very pages: nothing is copied, and the VM can read and change it.
    ZeroCopy,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// `explain`.
#[derive(Debug, Args)]
pub struct ExplainArguments {
    /// Codes: E29, or a driver's code by name or number (256 to 276)
    #[arg(value_name = "CODE", required_unless_present = "error_code")]
    pub codes: Vec<String>,
    /// Codes, as nitro-cli takes them
    #[arg(long, value_name = "CODE", num_args = 1..)]
    pub error_code: Vec<String>,
}

/// `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArguments {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `man`.
#[derive(Debug, Args)]
pub struct ManArguments {
    /// Where the pages go; one per command
    #[arg(value_name = "DIRECTORY")]
    pub directory: PathBuf,
}

/// What an internal command gets from the one that starts it.
#[derive(Debug, Args)]
pub struct InternalArguments {
    /// As the starting side wants it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_visible_command_has_help_and_an_example() {
        for command in Arguments::command().get_subcommands().filter(|command| !command.is_hide_set() && !command.has_subcommands()) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            assert!(command.get_after_help().is_some_and(|help| help.to_string().contains("Example")), "{}", command.get_name());
        }
    }

    #[test]
    fn nitro_cli_command_lines_are_understood() {
        for line in [
            "nitroxide run-enclave --cpu-count 2 --memory 1024 --eif-path a.eif --enclave-cid 16 --debug-mode --attach-console --enclave-name a",
            "nitroxide run-enclave --cpu-ids 2 3 --memory 512 --eif-path a.eif",
            "nitroxide run-enclave --config c.json",
            "nitroxide terminate-enclave --enclave-id i-0-enc1",
            "nitroxide terminate-enclave --all",
            "nitroxide describe-enclaves --metadata",
            "nitroxide console --enclave-name a --disconnect-timeout 5",
            "nitroxide describe-eif --eif-path a.eif",
            "nitroxide pcr --input f",
            "nitroxide explain --error-code E29",
        ] {
            assert!(Arguments::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }
}
