//! `sign-eif`: signs an image with a private key and its certificate, or signs it again.
//!
//! The file is replaced as a whole, so that a failure leaves it as it was. The result is nitro-cli's: the measurements, with PCR8.

use nitroxide_eif::{SignError, Signer, certificate::MAX_PEM_BYTES, sign_file};
use serde_json::json;

use crate::{arguments::SignEifArguments, codes::ErrorCode, failure::Failure, image, output, remarks::Remarks, shapes::MeasurementsJson};

/// Signs and prints the measurements.
pub fn run(arguments: &SignEifArguments, remarks: Remarks) -> Result<(), Failure> {
    // Says what is wrong with the file in the words of the other commands.
    image::open(&arguments.eif_path)?;
    if arguments.private_key.to_string_lossy().starts_with("arn:") {
        return Err(Failure::new(ErrorCode::EIF_SIGNING, "Keys of AWS's key service cannot be used here")
            .help("Give the private key as a PEM file."));
    }
    let certificate = image::read_small(&arguments.signing_certificate, MAX_PEM_BYTES as u64)?;
    let key = image::read_small(&arguments.private_key, MAX_PEM_BYTES as u64)?;
    let failure = |error: SignError| {
        Failure::new(ErrorCode::EIF_SIGNING, format!("{} cannot be signed", arguments.eif_path.display())).because(error)
    };
    let signer = Signer::from_pem(&String::from_utf8_lossy(&key), &certificate).map_err(failure)?;
    if let Err(error) = signer.certificate().check_validity(std::time::SystemTime::now()) {
        remarks.note(format!("Note: {error}"));
    }
    let progress = remarks.spinner("Signing");
    let (measurements, _) = sign_file(&arguments.eif_path, &signer).map_err(failure)?;
    drop(progress);
    output::json(&json!({ "Measurements": MeasurementsJson::from(&measurements) }))
}
