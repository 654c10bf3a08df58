//! `attestation verify`: is the document genuine, and does it say what is expected?
//!
//! The result is JSON; whose root it was stands on standard error as well, where nobody overlooks it.

use nitroxide_attestation::{
    At, CertificateFault, MAX_PEM_BYTES, Pki, RootKind, TrustedRoot, Verified, Verifier, VerifyError, in_one_line,
};
use serde_json::json;

use super::{certificate, input, show};
use crate::{
    arguments::attestation::{AtArgument, VerifyArguments},
    codes::ErrorCode,
    failure::Failure,
    image, output,
    remarks::Remarks,
};

/// Verifies, prints.
pub fn run(arguments: &VerifyArguments, remarks: Remarks) -> Result<(), Failure> {
    check_registers(&arguments.pcr)?;
    let (verifier, local) = verifier(arguments, remarks)?;
    let document = input::read(&arguments.document)?;
    let at = match arguments.at {
        AtArgument::Now => At::now(),
        AtArgument::At(at) => at,
    };
    let verified = verifier.verify(&document, at).map_err(|error| failure(arguments, error, local))?;
    remarks.note(format!("The document is genuine. Its root: {}", verified.root));
    if verified.document.is_debug() {
        remarks.note("Note: its enclave ran in debug mode; the document says nothing about what ran there");
    }
    report(&verified)
}

/// Whoever gives a register twice has made a mistake, and a document with both values does not exist.
fn check_registers(pcrs: &[(u8, Vec<u8>)]) -> Result<(), Failure> {
    let is_repeated = |number: usize, index: u8| pcrs.iter().take(number).any(|(earlier, _)| *earlier == index);
    match pcrs.iter().enumerate().find(|(number, (index, _))| is_repeated(*number, *index)) {
        Some((_, (index, _))) => Err(Failure::new(ErrorCode::INVALID_ARGUMENT, format!("--pcr names register {index} twice"))
            .help("Give each register once, with the value that it must have.")),
        None => Ok(()),
    }
}

fn verifier(arguments: &VerifyArguments, remarks: Remarks) -> Result<(Verifier, Local), Failure> {
    let (mut roots, mut local) = (Vec::new(), Local::Missing);
    for path in &arguments.root {
        let content = image::read_small(path, MAX_PEM_BYTES as u64)?;
        roots.extend(TrustedRoot::read(&content).map_err(|error| {
            Failure::new(ErrorCode::INVALID_ARGUMENT, format!("{} is not a root certificate that can be used", path.display()))
                .because(error)
        })?);
    }
    if arguments.root.is_empty() {
        roots.push(TrustedRoot::AWS);
        match Pki::of_user().and_then(|pki| pki.existing_root()) {
            Ok(Some(root)) => {
                roots.push(TrustedRoot::local(root.der()));
                local = Local::Trusted;
            }
            Ok(None) => {}
            Err(error) => {
                local = Local::Unreadable;
                let error = in_one_line(&error);
                remarks.note(format!("Note: only AWS's root is trusted, because the local one cannot be read: {error}"));
            }
        }
    }
    let mut verifier = Verifier::new(roots).allow_debug(arguments.allow_debug);
    for (index, value) in &arguments.pcr {
        verifier = verifier.pcr(*index, value.clone());
    }
    if let Some(nonce) = &arguments.nonce {
        verifier = verifier.nonce(nonce.0.clone());
    }
    if let Some(user_data) = &arguments.user_data {
        verifier = verifier.user_data(user_data.0.clone());
    }
    if let Some(public_key) = &arguments.public_key {
        verifier = verifier.public_key(public_key.0.clone());
    }
    Ok((verifier, local))
}

/// What became of the local root where none was given.
#[derive(Clone, Copy)]
enum Local {
    Trusted,
    Missing,
    Unreadable,
}

fn failure(arguments: &VerifyArguments, error: VerifyError, local: Local) -> Failure {
    let error = match error {
        VerifyError::Document(error) => return input::no_document(&arguments.document).because(error),
        error => error,
    };
    let help = match &error {
        VerifyError::UnknownRoot { .. } if arguments.root.is_empty() => Some(match local {
            Local::Trusted => "Trusted are AWS's root and this user's local one. If you trust that one, give its certificate with --root.",
            Local::Missing => {
                "Trusted is AWS's root alone: this user has no local one. If you trust that one, give its certificate with --root."
            }
            Local::Unreadable => {
                "Trusted is AWS's root alone: this user's local one cannot be read. If you trust that one, give its certificate with --root."
            }
        }),
        VerifyError::Certificate { fault: CertificateFault::Expired { .. }, .. } if arguments.at == AtArgument::Now => {
            Some("Documents count for at most three hours. Whether it was good when it was made: --at document.")
        }
        VerifyError::Debug => Some("To take it all the same: --allow-debug."),
        _ => None,
    };
    let failure =
        Failure::new(ErrorCode::ATTESTATION, format!("{} is not to be believed", input::name(&arguments.document))).because(error);
    match help {
        Some(help) => failure.help(help),
        None => failure,
    }
}

fn report(verified: &Verified) -> Result<(), Failure> {
    let kind = match verified.root {
        RootKind::Aws => "aws",
        RootKind::Local => "local",
        RootKind::Given => "given",
    };
    output::json(&json!({
        "Verified": true,
        "Root": kind,
        "RootMeaning": verified.root.to_string(),
        "CheckedAt": verified.at.to_string(),
        "Debug": verified.document.is_debug(),
        "Document": show::document(&verified.document),
        "Chain": verified.chain.iter().map(certificate).collect::<Vec<_>>(),
    }))
}
