//! `cargo xtask soak`: loops that are too long for every test run.
//!
//! The same tests with larger numbers: they read `NITROXIDE_SOAK` (20 enclaves at once, five minutes of stress on our kernel module) and the driver model's own
//! variables. [`clients`] are programs of others that take long to build; they come last.

mod clients;

use miette::Result;

use crate::context::{self, Context};
use crate::test::Steps;
use crate::{guest, kmod, setup};

/// Random call sequences of the driver core against its model; the ordinary run has 100 000.
const DRIVER_SEQUENCES: &str = "3000000";

/// Which loops to run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only loops whose name contains this: enclaves, driver, vsock, stress, clients
    filter: Option<String>,
}

/// Runs the heavy loops.
pub fn run(context: &Context, options: &Options) -> Result<()> {
    let wanted = |name: &str| options.filter.as_deref().is_none_or(|part| name.contains(part));
    let mut steps = Steps::default();
    if wanted("clients") {
        // They come last; what they lack is told now.
        steps.take("what the clients are built with", || clients::check(context))?;
    }
    steps.take("setup", || setup::run(context))?;
    steps.take("setup: what only tests need", || setup::extras(context, setup::Extras::Tests))?;
    steps.take("guest programs", || guest::run(context))?;
    if wanted("enclaves") {
        steps.take("20 enclaves at once", || {
            context::run(context.cargo(["test", "--package", "nitroxide-cli", "--test", "many"]).env("NITROXIDE_SOAK", "1"))
        })?;
    }
    if wanted("driver") {
        steps.take("the driver core against its model", || {
            let mut command = context.cargo(["test", "--package", "nitroxide-driver", "--test", "model"]);
            context::run(command.env("NITROXIDE_MODEL_SEQUENCES", DRIVER_SEQUENCES))
        })?;
    }
    if wanted("vsock") {
        steps.take("vsock through a real guest, five times", || {
            for _ in 0..5 {
                context::run(&mut context.cargo(["test", "--package", "nitroxide-vsock", "--test", "guest"]))?;
            }
            Ok(())
        })?;
    }
    if wanted("stress") {
        steps.take("our kernel module", || kmod::build(context))?;
        steps.take("five minutes of many calls at once on our kernel module", || {
            let mut command =
                context.cargo(["test", "--package", "nitroxide-conformance", "--examples", "--test", "drivers", "--", "stress"]);
            context::run(command.env("NITROXIDE_SOAK", "1"))
        })?;
    }
    if wanted("clients") {
        clients::run(context, &mut steps)?;
    }
    steps.report();
    Ok(())
}
