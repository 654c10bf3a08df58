//! `attestation`: verifying and showing documents, and the local PKI that local documents hang from.
//!
//! What a document is, and when it is genuine, is the matter of `nitroxide-attestation`; here files are read and results printed.

mod input;
mod show;
mod verify;

use nitroxide_attestation::{Certificate, MAX_PEM_BYTES, Pki, PkiError, Timestamp, to_pem};
use serde_json::{Value, json};

use crate::{
    arguments::attestation::{AttestationCommand, ImportArguments, RootArguments},
    codes::ErrorCode,
    failure::Failure,
    image, output,
    remarks::Remarks,
};

/// Runs one of the commands.
pub fn run(command: &AttestationCommand, remarks: Remarks) -> Result<(), Failure> {
    match command {
        AttestationCommand::Verify(arguments) => verify::run(arguments, remarks),
        AttestationCommand::Show(arguments) => show::run(arguments),
        AttestationCommand::Root(arguments) => root(arguments, remarks),
        AttestationCommand::Import(arguments) => import(arguments, remarks),
    }
}

fn root(arguments: &RootArguments, remarks: Remarks) -> Result<(), Failure> {
    let pki = Pki::of_user().map_err(unusable)?;
    let is_new = pki.existing_root().map_err(unusable)?.is_none();
    let root = pki.root(Timestamp::now().0).map_err(unusable)?;
    if is_new {
        remarks.note(format!("A new root was made in {}", pki.folder().display()));
    }
    if arguments.der { output::bytes(root.der()) } else { output::bytes(to_pem(&root).as_bytes()) }
}

fn import(arguments: &ImportArguments, remarks: Remarks) -> Result<(), Failure> {
    let certificates = image::read_small(&arguments.certificate, MAX_PEM_BYTES as u64)?;
    let key = image::read_small(&arguments.private_key, MAX_PEM_BYTES as u64)?;
    let pki = Pki::of_user().map_err(unusable)?;
    let root = pki.import(&certificates, &key, arguments.replace, Timestamp::now().0).map_err(|error| match error {
        PkiError::Exists => Failure::new(ErrorCode::PKI, "Nothing was imported").because(error).help("Give --replace as well."),
        PkiError::Import(_) => Failure::new(ErrorCode::PKI, "Nothing was imported").because(error),
        error => unusable(error),
    })?;
    remarks.note("Enclaves that run already change to it when their certificates are renewed, within three hours.");
    output::json(&json!({ "Folder": pki.folder(), "Root": certificate(&root) }))
}

/// What is wrong with the local PKI.
fn unusable(error: PkiError) -> Failure {
    Failure::new(ErrorCode::PKI, "The local PKI cannot be used").because(error)
}

/// A certificate as JSON.
fn certificate(certificate: &Certificate) -> Value {
    json!({
        "Subject": certificate.subject(),
        "Issuer": certificate.issuer(),
        "SerialNumber": hex::encode(certificate.serial()),
        "NotBefore": certificate.begins().to_string(),
        "NotAfter": certificate.ends().to_string(),
        "Fingerprint": hex::encode(certificate.fingerprint()),
    })
}
