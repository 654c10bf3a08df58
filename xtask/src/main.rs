//! The project's chores, one word each: `cargo xtask demo`, `cargo xtask test`.
//!
//! One file per chore; [`Context`] says where things are. Nothing here is part of the product.

mod bench;
mod context;
mod demo;
mod follow;
mod guest;
mod kmod;
mod parent_vm;
mod setup;
mod soak;
mod style;
mod test;

use clap::{Parser, Subcommand};
use context::Context;
use miette::Result;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Nitroxide's chores", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Brings what is missing: QEMU and a Debian kernel, unpacked below target/setup (no root needed)
    Setup(setup::Options),
    /// Builds the programs that run inside an enclave, and the sample image target/demo/hello.eif
    Guest,
    /// The main job: boots a real enclave image, shows its console, talks to it, compares its measurements
    Demo,
    /// All tests: formatting, lints, documentation, unit, property, process and guest tests
    Test(test::Options),
    /// Quick checks before a push: formatting, lints, documentation
    Prepush,
    /// Benchmarks; their method and results are in docs/benchmarks.md
    Bench(bench::Options),
    /// A virtual machine with the Nitro Enclaves driver and our device: runs a command in it, or gives a shell
    ParentVm(parent_vm::Options),
    /// Builds the kernel module target/kmod/nitro_enclaves.ko for the kernel of target/setup (brings a toolchain of 1.5 GiB)
    Kmod(kmod::Options),
    /// Builds a kernel that checks itself (KASAN, lockdep) and tries the module in it; not part of test (docs/kernel-debug.md)
    KmodDebug(kmod::debug::Options),
    /// Heavy loops that are too long for every test run: 20 enclaves at once, gigabytes over vsock
    Soak(soak::Options),
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let context = Context::find()?;
    match arguments.chore {
        Chore::Setup(options) => setup::chore(&context, &options),
        Chore::Guest => guest::run(&context),
        Chore::Demo => demo::run(&context),
        Chore::Test(options) => test::run(&context, &options),
        Chore::Prepush => test::prepush(&context),
        Chore::Bench(options) => bench::run(&context, &options),
        Chore::ParentVm(options) => parent_vm::run(&context, &options),
        Chore::Kmod(options) => kmod::run(&context, &options),
        Chore::KmodDebug(options) => kmod::debug::run(&context, &options),
        Chore::Soak(options) => soak::run(&context, &options),
    }
}
