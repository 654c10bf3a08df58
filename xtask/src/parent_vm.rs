//! `cargo xtask parent-vm`: a parent VM on this machine, with the stock driver in front of `nitroxide device`; a command in it, or a shell.
//!
//! The VM is `nitroxide_testkit::parent_vm`, as the tests use it; docs/parent-vm.md says what is in it.

use std::io::IsTerminal;
use std::path::PathBuf;

use miette::{IntoDiagnostic, Result, WrapErr, bail, miette};
use nitroxide_testkit::parent_vm::{Driver as InVm, ParentVm};
use nitroxide_testkit::{Setup, ne_ioctl_sample};

use crate::context::{self, Context};
use crate::{guest, setup};

/// Programs that go into the VM where they were built.
const STATIC_PROGRAMS: [&str; 1] = ["nitroxide-conformance"];

/// What is left to the guest itself beside the huge pages, in MiB.
const GUEST_MIB: u64 = 448;

/// What the VM is to be.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The driver in the VM: the kernel's own, or ours as `cargo xtask kmod` has built it
    #[arg(long, value_enum, default_value = "c")]
    driver: Driver,
    /// Memory of the VM in MiB; all but 448 MiB of it is huge pages for enclaves
    #[arg(long, default_value_t = 1280, value_parser = clap::value_parser!(u64).range(768..=1 << 20))]
    memory: u64,
    /// CPUs of the VM; all but the first and the last are for enclaves
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(3..=64))]
    cpus: u32,
    /// Puts a file or folder of this machine into the VM
    #[arg(long = "file", value_name = "HERE:THERE")]
    files: Vec<String>,
    /// Puts the emulator into the VM, for `qemu-system-x86_64 -M nitro -accel nitro`
    #[arg(long)]
    qemu: bool,
    /// Further arguments of `nitroxide device`, e.g. --device-argument=--memory=zero-copy
    #[arg(long = "device-argument", value_name = "ARGUMENT", allow_hyphen_values = true)]
    device_arguments: Vec<String>,
    /// What to run in the VM with `sh -c`; without it a shell
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Driver {
    C,
    Rust,
}

/// Boots the VM and runs the command; its exit status becomes this program's.
pub fn run(context: &Context, options: &Options) -> Result<()> {
    let module = context.in_target("kmod/nitro_enclaves.ko");
    if options.driver == Driver::Rust && !module.is_file() {
        bail!("The project's own kernel module is not built: run `cargo xtask kmod`, or use --driver c");
    }
    let files = options.files.iter().map(|pair| file(pair)).collect::<Result<Vec<_>>>()?;
    setup::run(context)?;
    if std::env::var_os("NITROXIDE_SETUP").is_none() && !context.in_target("setup/root").exists() {
        bail!(
            "A parent VM needs kernel modules and the QEMU of `cargo xtask setup`; unset NITROXIDE_QEMU and NITROXIDE_KERNEL, so that they are brought"
        );
    }
    setup::extras(context, setup::Extras::ParentVm)?;
    guest::run(context)?;
    context::run(&mut context.cargo(["build", "--quiet", "--package", "nitroxide-cli"]))?;

    let nitroxide = context.in_target("debug/nitroxide");
    let mut builder = ParentVm::builder()
        .memory_mib(options.memory)
        .hugepages((options.memory - GUEST_MIB) / 2)
        .cpus(options.cpus)
        .pool(format!("1-{}", options.cpus - 2))
        .driver(match options.driver {
            Driver::C => InVm::C,
            Driver::Rust => InVm::Rust(module),
        })
        .device_program(&nitroxide)
        .device_arguments(&options.device_arguments)
        .program(&nitroxide)
        .file(context.in_target("demo/hello.eif"), "/root/hello.eif");
    for name in STATIC_PROGRAMS {
        let program = context.in_target("guest/x86_64-unknown-linux-gnu/guest").join(name);
        if program.is_file() {
            builder = builder.program(program);
        }
    }
    let setup = Setup::locate();
    if setup.has_ne_ioctl_sample() {
        builder = builder.program(ne_ioctl_sample());
    }
    if options.qemu {
        builder = builder.program(setup.root().join("usr/bin/qemu-system-x86_64"));
    }
    for (here, there) in files {
        builder = builder.file(here, there);
    }
    let vm = builder.boot();
    let (all, kernel) = vm.boot_times();
    eprintln!("parent-vm: up after {:.1} s, of which the guest took {:.1} s", all.as_secs_f64(), kernel.as_secs_f64());
    if options.command.is_empty() && std::io::stdin().is_terminal() {
        eprintln!("parent-vm: try `nitroxide run-enclave --eif-path hello.eif --memory 256 --cpu-count 2`; leave with `exit`");
    }
    let outcome = vm.interact(&options.command.join(" ")).into_diagnostic().wrap_err("The command in the parent VM");
    let log = vm.device_log();
    if outcome.is_err() {
        eprintln!("{}\n{log}", vm.console());
    }
    drop(vm);
    match outcome? {
        0 => Ok(()),
        status =>
        {
            #[expect(clippy::exit, reason = "the command's exit status is this chore's; the VM is gone already")]
            std::process::exit(status)
        }
    }
}

fn file(pair: &str) -> Result<(PathBuf, String)> {
    let (here, there) =
        pair.split_once(':').ok_or_else(|| miette!("--file wants HERE:THERE, e.g. --file my.eif:/root/my.eif, not {pair}"))?;
    if !PathBuf::from(here).exists() {
        bail!("--file names {here}, which is not there");
    }
    Ok((PathBuf::from(here), there.to_owned()))
}
