//! `cargo xtask setup`.

use miette::Result;

use crate::context::Context;

/// Runs the chore.
pub fn run(_context: &Context) -> Result<()> {
    miette::bail!("not there yet")
}
