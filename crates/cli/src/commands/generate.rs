//! `completions` and `man`: made from the same definitions as the command line itself.

use std::fs;

use clap::CommandFactory;

use crate::{
    arguments::{Arguments, CompletionsArguments, ManArguments},
    codes::ErrorCode,
    failure::Failure,
    output,
};

/// Prints the completions for a shell.
pub fn completions(arguments: &CompletionsArguments) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "nitroxide", &mut text);
    output::bytes(&text)
}

/// Writes `nitroxide.1` and a page per visible command, e.g. `nitroxide-run-enclave.1`.
pub fn man(arguments: &ManArguments) -> Result<(), Failure> {
    fs::create_dir_all(&arguments.directory).map_err(|error| {
        Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot make the directory {}", arguments.directory.display())).because(error)
    })?;
    clap_mangen::generate_to(Arguments::command(), &arguments.directory).map_err(|error| {
        Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot write into {}", arguments.directory.display())).because(error)
    })
}
