//! `cargo xtask test`: everything that must hold, from formatting to guests; `cargo xtask prepush`: the quick part of it.
//!
//! Each step is named and timed, so that a slow one is seen. The first failing step ends the run, and its name is the last line.

use std::time::{Duration, Instant};

use miette::{Result, WrapErr};

use crate::context::{self, Context};
use crate::{guest, kmod, setup, style};

/// What part of the tests to run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only tests whose name contains this (style checks are left out)
    filter: Option<String>,
}

/// All tests.
pub fn run(context: &Context, options: &Options) -> Result<()> {
    let mut steps = Steps::default();
    if options.filter.is_none() {
        check_style(context, &mut steps)?;
    }
    steps.take("setup", || setup::run(context))?;
    steps.take("setup: what only tests need", || setup::extras(context, setup::Extras::Tests))?;
    steps.take("guest programs", || guest::run(context))?;
    steps.take("kernel module", || kmod::build(context))?;
    if options.filter.is_none() {
        steps.take("lints of the kernel module", || kmod::clippy(context))?;
    }
    steps.take("tests", || {
        let mut command = context.cargo(["test", "--workspace", "--no-fail-fast"]);
        if let Some(filter) = &options.filter {
            command.args(["--", filter]);
        }
        context::run(&mut command)
    })?;
    steps.report();
    Ok(())
}

/// Formatting, lints and documentation.
pub fn prepush(context: &Context) -> Result<()> {
    let mut steps = Steps::default();
    check_style(context, &mut steps)?;
    steps.report();
    Ok(())
}

fn check_style(context: &Context, steps: &mut Steps) -> Result<()> {
    steps.take("style", || style::run(context))?;
    steps.take("formatting", || {
        run_cargo(context, &["fmt", "--all", "--check"])?;
        // The module is no package of the workspace.
        let mut rustfmt = std::process::Command::new("rustfmt");
        rustfmt.current_dir(&context.root).args([
            "--check",
            "--edition",
            "2021",
            "--config-path",
            "kernel/rustfmt.toml",
            "kernel/src/main.rs",
        ]);
        context::run(&mut rustfmt)
    })?;
    steps.take("lints", || run_cargo(context, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    steps.take("documentation", || context::run(context.cargo(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings")))
}

fn run_cargo(context: &Context, args: &[&str]) -> Result<()> {
    context::run(&mut context.cargo(args))
}

/// The steps taken so far and how long each took.
#[derive(Debug, Default)]
pub struct Steps(Vec<(String, Duration)>);

impl Steps {
    /// Runs one step under its name.
    pub fn take<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("== {name}");
        let started = Instant::now();
        let outcome = step().wrap_err_with(|| format!("Step '{name}' failed"));
        self.0.push((name.to_owned(), started.elapsed()));
        outcome
    }

    /// Prints each step with its time.
    pub fn report(&self) {
        eprintln!("== all steps");
        for (name, took) in &self.0 {
            eprintln!("{:>8.1} s  {name}", took.as_secs_f64());
        }
    }
}
