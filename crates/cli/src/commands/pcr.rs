//! `pcr`: the value a register gets when a file or a signing certificate is measured into it.

use std::path::Path;

use nitroxide_eif::{Certificate, certificate::MAX_PEM_BYTES, measure_file};
use serde_json::json;

use crate::{arguments::PcrArguments, codes::ErrorCode, failure::Failure, image, output};

/// Prints `{"PCR": hex}` or `{"PCR8": hex}`.
pub fn run(arguments: &PcrArguments) -> Result<(), Failure> {
    match (&arguments.input, &arguments.signing_certificate) {
        (Some(input), _) => {
            // Refuses directories and the like with a message of its own.
            image::open_file(input)?;
            let pcr = measure_file(input)
                .map_err(|error| Failure::new(ErrorCode::HASHER, format!("Cannot measure {}", input.display())).because(error))?;
            output::json(&json!({ "PCR": pcr.to_string() }))
        }
        (None, Some(certificate)) => output::json(&json!({ "PCR8": read_certificate(certificate)?.pcr8().to_string() })),
        (None, None) => Err(Failure::new(ErrorCode::MISSING_ARGUMENT, "Give --input FILE or --signing-certificate PEM")),
    }
}

fn read_certificate(path: &Path) -> Result<Certificate, Failure> {
    let pem = image::read_small(path, MAX_PEM_BYTES as u64)?;
    Certificate::from_pem(&pem).map_err(|error| {
        Failure::new(ErrorCode::INVALID_ARGUMENT, format!("{} is not a certificate that can be used", path.display())).because(error)
    })
}
