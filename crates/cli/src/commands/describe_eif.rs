//! `describe-eif`: what an image is, without running it.
//!
//! Checksum, measurements and signature are computed in one pass; a wrong one is a field of the result (`CheckCRC`, `SignatureCheck`)
//! and a remark, not a failure: whoever asks wants to know.

use std::{fs::File, ops::ControlFlow, path::Path};

use nitroxide_eif::{Image, Measurer};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    arguments::DescribeEifArguments,
    codes::ErrorCode,
    failure::Failure,
    image, output,
    remarks::Remarks,
    shapes::{self, CertificateJson, MeasurementsJson},
};

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Description {
    eif_version: u16,
    measurements: MeasurementsJson,
    is_signed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    signing_certificate: Option<CertificateJson>,
    #[serde(rename = "CheckCRC")]
    check_crc: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    signature_check: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Value>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    sections: Option<Value>,
}

/// Prints the description as JSON.
pub fn run(arguments: DescribeEifArguments, remarks: Remarks) -> Result<(), Failure> {
    let path = arguments
        .eif_path
        .or(arguments.image)
        .ok_or_else(|| Failure::new(ErrorCode::MISSING_ARGUMENT, "Which image? Give --eif-path FILE"))?;
    let image = image::open(&path)?;
    for warning in image.warnings() {
        remarks.note(format!("Note: {warning}"));
    }
    output::json(&describe(&path, &image, arguments.sections, remarks)?)
}

fn describe(path: &Path, image: &Image<File>, with_sections: bool, remarks: Remarks) -> Result<Description, Failure> {
    let bar = remarks.bytes("Measuring", image.end());
    let progress = |bytes| {
        bar.at(bytes);
        ControlFlow::Continue(())
    };
    let pass = Measurer::new(image).progress(progress).run().map_err(|error| image::read_failure(path, error))?;
    drop(bar);
    if !pass.checksum.matches() {
        remarks.note(format!(
            "Note: the checksum in the header is {:#010x}, the content has {:#010x}: the image is damaged",
            pass.checksum.stored, pass.checksum.computed
        ));
    }
    let (certificate, signature_check) = signature(image, &pass.measurements.pcr0, remarks);
    // As AWS's reader: what cannot be read of the metadata is left out, with a remark.
    let metadata = image.metadata().unwrap_or_else(|error| {
        remarks.note(format!("Note: {error}"));
        None
    });
    Ok(Description {
        eif_version: image.header().version,
        measurements: (&pass.measurements).into(),
        is_signed: signature_check.is_some(),
        signing_certificate: certificate,
        check_crc: pass.checksum.matches(),
        signature_check,
        image_name: metadata.as_ref().map(|metadata| metadata.image_name.clone()),
        image_version: metadata.as_ref().map(|metadata| metadata.image_version.clone()),
        metadata: metadata.as_ref().map(shapes::metadata),
        sections: with_sections.then(|| sections(image)),
    })
}

/// The certificate if it can be read, and the verdict if there is a signature at all.
fn signature(image: &Image<File>, pcr0: &nitroxide_eif::Pcr, remarks: Remarks) -> (Option<CertificateJson>, Option<bool>) {
    let signature = match image.signature() {
        Ok(None) => return (None, None),
        Ok(Some(signature)) => signature,
        Err(error) => {
            remarks.note(format!("Note: {error}"));
            return (None, Some(false));
        }
    };
    let certificate = signature.certificate().ok();
    let verdict = signature.verify(pcr0);
    if let Err(error) = &verdict {
        remarks.note(format!("Note: {error}"));
    }
    if let Some(error) = certificate.as_ref().and_then(|certificate| certificate.check_validity(std::time::SystemTime::now()).err()) {
        remarks.note(format!("Note: {error}"));
    }
    (certificate.as_ref().map(CertificateJson::from), Some(verdict.is_ok()))
}

fn sections(image: &Image<File>) -> Value {
    let sections: Vec<Value> = image
        .sections()
        .iter()
        .map(|section| json!({ "Kind": section.kind.to_string(), "Offset": section.payload_offset, "Size": section.size }))
        .collect();
    json!({
        "Architecture": image.architecture().to_string(),
        "Cmdline": String::from_utf8_lossy(image.cmdline()),
        "Sections": sections,
    })
}
