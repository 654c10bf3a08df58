//! `nitroxide-guest`: what a script inside an enclave needs from `/dev/nsm`, as one small static program.
//!
//! Results go to standard output, errors to standard error. Exit status: 0; 1 if it could not be done; 2 for a command line that is not understood.
//! [`commands`] is what it can do, [`arguments`] how the command line is read, [`mod@format`] how bytes are shown, [`failure`] what went wrong and what to
//! do, `entry` where it begins. No argument parser, for its size. For users: docs/guest-tools.md.

#![cfg_attr(not(test), no_main)]

mod arguments;
mod commands;
#[cfg(not(test))]
mod entry;
mod failure;
mod format;

/// The help text.
const HELP: &str = "\
Asks the Nitro Secure Module of this enclave (/dev/nsm).

  nitroxide-guest attest [--nonce DATA] [--user-data DATA] [--public-key DATA] [--format raw|base64|hex]
                                 an attestation document with these fields; base64 unless told otherwise
  nitroxide-guest describe       what the module is
  nitroxide-guest pcr [N]        a register's value in hex; without N all, each with `locked` or `open`
  nitroxide-guest extend N DATA  hashes DATA into register N (16 to 31) and prints the new value
  nitroxide-guest lock N         locks register N for ever; `lock --below N` all registers below N
  nitroxide-guest random BYTES [--format raw|base64|hex]
                                 so many random bytes; hex unless told otherwise
  nitroxide-guest help | version (also --help behind any command)

DATA is hex (00ff…), @FILE for the bytes of a file, or - for standard input.
Exit status: 0; 1 if it could not be done; 2 for a command line that is not understood.
";

/// Only so that unit tests, which have a `main` of their own, see the rest used.
#[cfg(test)]
fn main() {
    let _ = run();
}

/// Runs the command line; returns the exit status.
fn run() -> u8 {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments::parse(&words).and_then(commands::run) {
        Ok(()) => 0,
        Err(failure) => {
            eprintln!("nitroxide-guest: {failure}");
            failure.exit_status()
        }
    }
}
