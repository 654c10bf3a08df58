//! `cargo xtask bench`: every benchmark of the project; method and results are written down in docs/benchmarks.md.
//!
//! Each is an ordinary `cargo bench` target beside the code that it measures; this file names them and sees that what they need is there.

use miette::{Result, ensure};

use crate::context::{self, Context};
use crate::test::Steps;
use crate::{guest, kmod, setup};

/// The benchmarks: package, target, what it measures.
const BENCHES: [(&str, &str, &str); 13] = [
    ("nitroxide-eif", "measure", "measuring an image beside raw SHA-384"),
    ("nitroxide-device", "device_command", "a command of the device"),
    ("nitroxide-enclave", "donate", "512 MiB of a parent VM given to an enclave"),
    ("nitroxide-nsm", "requests", "an NSM request"),
    ("nitroxide-nsm", "documents", "attestation documents as a real guest gets them"),
    ("nitroxide-attestation", "document", "an attestation document beside one bare signature"),
    ("nitroxide-vsock", "device", "the vsock device without a guest"),
    ("nitroxide-vsock", "throughput", "vsock throughput and round trip of a real guest"),
    ("nitroxide-cli", "launch", "a launch, split into our share, QEMU's and the guest kernel's"),
    ("nitroxide-device-pci", "register_command", "a command through the PCI function"),
    ("nitroxide-user-home", "exec", "system calls and a compilation below `nitroxide exec`"),
    ("nitroxide-conformance", "drivers", "each call on Linux' own driver and on ours, and their accesses to registers"),
    ("nitroxide-cli", "parent", "a launch in a parent VM with the distribution's driver, isolated and zero-copy"),
];

/// Which benchmarks to run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only benchmarks whose package or name contains this
    pub filter: Option<String>,
}

/// Runs the benchmarks one after the other: they would disturb each other.
pub fn run(context: &Context, options: &Options) -> Result<()> {
    let wanted = |package: &str, target: &str| options.filter.as_ref().is_none_or(|filter| format!("{package}/{target}").contains(filter));
    let chosen: Vec<_> = BENCHES.iter().filter(|(package, target, _)| wanted(package, target)).collect();
    ensure!(!chosen.is_empty(), "No benchmark's name contains {:?}", options.filter);
    let mut steps = Steps::default();
    steps.take("setup", || setup::run(context))?;
    if chosen.iter().any(|(_, target, _)| ["parent", "drivers"].contains(target)) {
        steps.take("setup: what only parent VMs need", || setup::extras(context, setup::Extras::ParentVm))?;
    }
    if chosen.iter().any(|(_, target, _)| *target == "drivers") {
        steps.take("our kernel module", || kmod::build(context))?;
    }
    if chosen.iter().any(|(_, target, _)| *target == "exec") {
        let words = ["build", "--quiet", "--release", "--package", "nitroxide-user-home", "--examples"];
        steps.take("clients", || context::run(&mut context.cargo(words)))?;
    }
    steps.take("guest programs", || guest::run(context))?;
    for (package, target, what) in chosen {
        steps.take(&format!("{package}/{target}: {what}"), || {
            context::run(&mut context.cargo(["bench", "--package", package, "--bench", target]))
        })?;
    }
    steps.report();
    Ok(())
}
