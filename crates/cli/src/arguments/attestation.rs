//! `attestation`: what its commands take.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use nitroxide_attestation::{At, MAX_PCRS, Timestamp};

/// `attestation`.
#[derive(Debug, Subcommand)]
pub enum AttestationCommand {
    /// Verify a document: whose it is, whether it is whole, whether it says what is expected
    #[command(after_help = "Examples:\n  nitroxide attestation verify document.cbor --nonce 0a1b2c --pcr 0=cdb5...\n  \
        nitroxide attestation verify --at document --root root.pem old.cbor\n\n\
        Trusted by default: AWS's root, and this user's local root if there is one; the result says which it was. Exit status: 0, or 61 if the \
        document is not to be believed.")]
    Verify(VerifyArguments),
    /// Show what a document says, without verifying it
    #[command(
        after_help = "Examples:\n  nitroxide attestation show document.cbor\n  base64 -d < answer.txt | nitroxide attestation show --json -"
    )]
    Show(ShowArguments),
    /// Print the local root certificate, which whoever verifies local documents has to trust; it is made if there is none
    #[command(after_help = "Example:\n  nitroxide attestation root > root.pem")]
    Root(RootArguments),
    /// Use a root or intermediate of your own instead of the one made here
    #[command(after_help = "Example:\n  nitroxide attestation import --certificate ca-chain.pem --private-key ca-key.pem\n\n\
        P-384 keys and ecdsa-with-SHA384 only. A root needs room for three authorities below it, an intermediate below one root for two.")]
    Import(ImportArguments),
}

/// `attestation verify`.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// The document: raw, base64 or hex; - for standard input
    #[arg(value_name = "DOCUMENT")]
    pub document: PathBuf,
    /// Trust this root certificate (PEM or DER) and no other; may be given again
    #[arg(long, value_name = "FILE")]
    pub root: Vec<PathBuf>,
    /// A register must have this value, e.g. 0=cdb5...; may be given again
    #[arg(long, value_name = "INDEX=HEX", value_parser = parse_pcr)]
    pub pcr: Vec<(u8, Vec<u8>)>,
    /// The nonce that you sent
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    pub nonce: Option<Bytes>,
    /// The user data that you expect
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    pub user_data: Option<Bytes>,
    /// The public key that you expect
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    pub public_key: Option<Bytes>,
    /// Also take a document of an enclave in debug mode, which says nothing about what runs there
    #[arg(long)]
    pub allow_debug: bool,
    /// When certificates have to be valid: now, document (when it says to have been made), or a time such as 2026-11-24T06:00:00Z
    #[arg(long, value_name = "TIME", default_value = "now", value_parser = parse_at)]
    pub at: AtArgument,
}

/// `attestation show`.
#[derive(Debug, Args)]
pub struct ShowArguments {
    /// The document: raw, base64 or hex; - for standard input
    #[arg(value_name = "DOCUMENT")]
    pub document: PathBuf,
    /// JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// `attestation root`.
#[derive(Debug, Args)]
pub struct RootArguments {
    /// DER instead of PEM
    #[arg(long)]
    pub der: bool,
}

/// `attestation import`.
#[derive(Debug, Args)]
pub struct ImportArguments {
    /// The authority's certificate with all those above it up to the self-signed root, in PEM form, in any order
    #[arg(long, value_name = "PEM")]
    pub certificate: PathBuf,
    /// Its private key, in PEM form
    #[arg(long, value_name = "PEM")]
    pub private_key: PathBuf,
    /// Replace the root that is there: documents below it no longer verify
    #[arg(long)]
    pub replace: bool,
}

/// Bytes that were given in hex. A type of its own, because clap takes `Vec` for "several".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

/// The choice of `--at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtArgument {
    /// This machine's clock.
    Now,
    /// A time that the library knows.
    At(At),
}

fn parse_hex(text: &str) -> Result<Bytes, String> {
    hex::decode(text).map(Bytes).map_err(|error| format!("`{text}` is not hex: {error}"))
}

fn parse_pcr(text: &str) -> Result<(u8, Vec<u8>), String> {
    let wrong = |what: String| format!("`{text}` is no register with its value: {what}; write e.g. 0=cdb5...");
    let (index, value) = text.split_once('=').ok_or_else(|| wrong("it has no `=`".into()))?;
    let number = index.parse::<u8>().ok().filter(|number| u16::from(*number) < MAX_PCRS);
    let number = number.ok_or_else(|| wrong(format!("`{index}` is not a number from 0 to 31")))?;
    let value = hex::decode(value).map_err(|error| wrong(format!("the value is not hex: {error}")))?;
    if ![32, 48, 64].contains(&value.len()) {
        return Err(wrong(format!("the value has {} bytes, and registers have 48", value.len())));
    }
    Ok((number, value))
}

fn parse_at(text: &str) -> Result<AtArgument, String> {
    match text {
        "now" => Ok(AtArgument::Now),
        "document" => Ok(AtArgument::At(At::Document)),
        _ => match text.parse::<Timestamp>() {
            Ok(time) => Ok(AtArgument::At(At::Time(time))),
            Err(_) => Err(format!("`{text}` is neither now, document nor a time in UTC like 2026-11-24T06:00:00Z")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_with_their_values_and_others_are_refused() {
        assert_eq!(parse_pcr(&format!("31={}", "0a".repeat(48))), Ok((31, vec![10; 48])));
        for wrong in ["0", "0=", "0=0a", "32=0a", "-1=0a", "x=0a", "=", &format!("32={}", "0a".repeat(48))] {
            assert!(parse_pcr(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_read_and_others_are_refused() {
        assert_eq!(parse_at("2024-12-13T07:37:58Z"), Ok(AtArgument::At(At::Time(Timestamp(1_734_075_478_000)))));
        for wrong in ["", "yesterday", "2024-12-13", "2024-12-13T07:37:58", "1734075478"] {
            assert!(parse_at(wrong).is_err(), "{wrong}");
        }
    }
}
