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
    use std::io::Read;
    let file = image::open_file(path)?;
    let mut pem = Vec::new();
    // One more than the limit, so that a longer file is seen to be too long.
    file.take(MAX_PEM_BYTES as u64 + 1)
        .read_to_end(&mut pem)
        .map_err(|error| Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot read {}", path.display())).because(error))?;
    Certificate::from_pem(&pem).map_err(|error| {
        Failure::new(ErrorCode::INVALID_ARGUMENT, format!("{} is not a certificate that can be used", path.display())).because(error)
    })
}
