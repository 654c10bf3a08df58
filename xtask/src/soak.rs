//! `cargo xtask soak`: loops that are too long for every test run.

use miette::Result;

use crate::context::Context;

/// Runs the heavy loops.
pub fn run(_context: &Context) -> Result<()> {
    miette::bail!("not there yet")
}
