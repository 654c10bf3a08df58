//! `attestation verify`: is the document genuine, and does it say what is expected?
//!
//! The result is JSON; whose root it was stands on standard error as well, where nobody overlooks it.

use nitroxide_attestation::{At, CertificateFault, MAX_PEM_BYTES, Pki, RootKind, TrustedRoot, Verified, Verifier, VerifyError};
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
    let verifier = verifier(arguments, remarks)?;
    let document = input::read(&arguments.document)?;
    let at = match arguments.at {
        AtArgument::Now => At::now(),
        AtArgument::At(at) => at,
    };
    let verified = verifier.verify(&document, at).map_err(|error| failure(arguments, error))?;
    remarks.note(format!("The document is genuine. Its root: {}", verified.root));
    if verified.document.is_debug() {
        remarks.note("Note: its enclave ran in debug mode; the document says nothing about what ran there");
    }
    report(&verified)
}

fn verifier(arguments: &VerifyArguments, remarks: Remarks) -> Result<Verifier, Failure> {
    let mut roots = Vec::new();
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
            Ok(Some(root)) => roots.push(TrustedRoot::local(root.der())),
            Ok(None) => {}
            Err(error) => remarks.note(format!("Note: only AWS's root is trusted, because the local one cannot be read: {error}")),
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
    Ok(verifier)
}

fn failure(arguments: &VerifyArguments, error: VerifyError) -> Failure {
    let help = match &error {
        VerifyError::UnknownRoot { .. } if arguments.root.is_empty() => {
            Some("Trusted are AWS's root and this user's local one. If you trust that one, give its certificate with --root.")
        }
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
