//! nitroxide: run, inspect and debug Nitro enclaves on any Linux machine.
//!
//! [`arguments`] is the command line, [`commands`] are the commands, [`failure`] is how they fail; results go to standard output
//! ([`output`]), everything else to standard error ([`remarks`]). Called by the name `nitro-cli` it follows AWS's tool ([`Dialect`]).
//! docs/cli.md is the user's page.

mod arguments;
mod codes;
mod commands;
mod detach;
mod ending;
mod ending_signals;
mod failure;
mod heartbeat;
mod host;
mod image;
mod launch;
mod logging;
mod memory;
mod output;
mod owner;
mod remarks;
mod request;
mod shapes;
mod target;
mod world;

use std::{ffi::OsString, io::Write, path::Path, process::ExitCode};

use arguments::{Arguments, Command, Global};
use clap::{CommandFactory, FromArgMatches, error::ErrorKind};
use codes::ErrorCode;
use failure::Failure;
use remarks::Remarks;

/// Whose habits to follow where nitroxide's differ from nitro-cli's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Our own.
    Nitroxide,
    /// AWS's: required resources, memory of four times the image.
    NitroCli,
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let called = words.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    let dialect = if called == "nitro-cli" { Dialect::NitroCli } else { Dialect::Nitroxide };
    let arguments = match parse(&words, dialect) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    match run(arguments, dialect) {
        Ok(status) => status,
        Err(failure) => {
            let status = failure.code().exit_status();
            failure::report(failure);
            ExitCode::from(status)
        }
    }
}

/// Parses the command line. `Err` is the exit status when help, a version or a complaint was printed instead.
fn parse(words: &[OsString], dialect: Dialect) -> Result<Arguments, ExitCode> {
    let mut command = Arguments::command();
    if dialect == Dialect::NitroCli {
        command =
            command.bin_name("nitro-cli").display_name("Nitro CLI").version(concat!("1.5.0 (nitroxide ", env!("CARGO_PKG_VERSION"), ")"));
    }
    let result = command.try_get_matches_from(words).and_then(|matches| Arguments::from_arg_matches(&matches));
    result.map_err(|error| {
        // A closed standard output or error is no reason for anything else.
        let _ = error.print();
        if !error.use_stderr() {
            return ExitCode::SUCCESS;
        }
        let code = usage_code(error.kind());
        let _ = writeln!(std::io::stderr().lock(), "[{code}] {}", code.meaning().title);
        ExitCode::from(code.exit_status())
    })
}

/// The E-code of a command line that cannot be understood.
fn usage_code(kind: ErrorKind) -> ErrorCode {
    match kind {
        ErrorKind::MissingRequiredArgument | ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            ErrorCode::MISSING_ARGUMENT
        }
        ErrorKind::ArgumentConflict => ErrorCode::CONFLICTING_ARGUMENTS,
        ErrorKind::InvalidSubcommand => ErrorCode::INVALID_COMMAND,
        _ => ErrorCode::INVALID_ARGUMENT,
    }
}

fn run(arguments: Arguments, dialect: Dialect) -> Result<ExitCode, Failure> {
    let Global { device, quiet } = arguments.global;
    let remarks = Remarks::new(quiet);
    // A device tells why a guest's request came to nothing; its guest sees only a number.
    logging::begin(if matches!(arguments.command, Command::Device(_) | Command::Exec(_)) { "warn" } else { "error" });
    match arguments.command {
        Command::Run(arguments) => return commands::run::run(arguments, device, dialect, remarks),
        Command::RunEnclave(arguments) => commands::run_enclave::run(arguments, device, dialect, remarks)?,
        Command::DescribeEnclaves(arguments) => commands::describe_enclaves::run(&arguments, dialect)?,
        Command::TerminateEnclave(arguments) => commands::terminate::run(&arguments, remarks)?,
        Command::Console(arguments) => commands::console::console(&arguments, remarks)?,
        Command::Logs(arguments) => commands::console::logs(&arguments, remarks)?,
        Command::Wait(arguments) => commands::wait::run(&arguments, remarks)?,
        Command::DescribeEif(arguments) => commands::describe_eif::run(arguments, remarks)?,
        Command::SignEif(arguments) => commands::sign_eif::run(&arguments, remarks)?,
        Command::Pcr(arguments) => commands::pcr::run(&arguments)?,
        Command::Attestation(command) => commands::attestation::run(&command, remarks)?,
        Command::Vsock(command) => commands::vsock::run(&command, device, remarks)?,
        Command::Device(arguments) => return commands::device::run(&arguments, remarks),
        Command::Exec(arguments) => return commands::exec::run(&arguments),
        Command::Doctor(arguments) => return commands::doctor::run(&arguments),
        Command::Explain(arguments) => commands::explain::run(&arguments)?,
        Command::Completions(arguments) => commands::generate::completions(&arguments)?,
        Command::Man(arguments) => commands::generate::man(&arguments)?,
        Command::EnclaveProcess(_) => {
            // `run` has some of them blocked, and a child inherits that.
            nitroxide_guest_sys::signals::unblock_all();
            nitroxide_enclave::run_process()
                .map_err(|error| Failure::new(ErrorCode::ENCLAVE_PROCESS_CONNECTION, "The enclave's process failed").because(error))?;
        }
        Command::EnclaveOwner(_) => return Ok(owner::run()),
    }
    Ok(ExitCode::SUCCESS)
}
