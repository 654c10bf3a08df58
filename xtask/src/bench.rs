//! `cargo xtask bench`: every benchmark of the project; method and results are written down in docs/benchmarks.md.

use miette::Result;

use crate::context::Context;

/// Which benchmarks to run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only benchmarks whose name contains this
    pub filter: Option<String>,
}

/// Runs the benchmarks.
pub fn run(_context: &Context, _options: &Options) -> Result<()> {
    miette::bail!("not there yet")
}
