//! The JSON that nitro-cli's users know: names, order and forms of its fields.

use std::collections::BTreeMap;

use nitroxide_eif::{Certificate, Measurements, Metadata};
use serde::Serialize;
use serde_json::{Map, Value};

/// What nitro-cli prints for the hash algorithm: a Rust debug text that became part of its output.
pub const HASH_ALGORITHM: &str = "Sha384 { ... }";

/// `Measurements`: PCRs as lower-case hexadecimal text.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct MeasurementsJson {
    hash_algorithm: &'static str,
    #[serde(rename = "PCR0")]
    pcr0: String,
    #[serde(rename = "PCR1")]
    pcr1: String,
    #[serde(rename = "PCR2")]
    pcr2: String,
    #[serde(rename = "PCR8", skip_serializing_if = "Option::is_none")]
    pcr8: Option<String>,
}

impl From<&Measurements> for MeasurementsJson {
    fn from(measurements: &Measurements) -> Self {
        Self {
            hash_algorithm: HASH_ALGORITHM,
            pcr0: measurements.pcr0.to_string(),
            pcr1: measurements.pcr1.to_string(),
            pcr2: measurements.pcr2.to_string(),
            pcr8: measurements.pcr8.map(|pcr| pcr.to_string()),
        }
    }
}

/// `SigningCertificate` of describe-eif.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct CertificateJson {
    issuer_name: BTreeMap<String, String>,
    algorithm: String,
    not_before: String,
    not_after: String,
    signature: String,
}

impl From<&Certificate> for CertificateJson {
    fn from(certificate: &Certificate) -> Self {
        Self {
            issuer_name: certificate.issuer().into_iter().collect(),
            algorithm: certificate.algorithm(),
            not_before: certificate.not_before(),
            not_after: certificate.not_after(),
            signature: hex(certificate.signature()),
        }
    }
}

/// `Metadata`: how the image was built, with the user's own keys beside it.
pub fn metadata(metadata: &Metadata) -> Value {
    let mut object = match serde_json::to_value(&metadata.build_metadata) {
        Ok(Value::Object(object)) => object,
        _ => Map::new(),
    };
    object.insert("DockerInfo".to_owned(), metadata.docker_info.clone());
    if let Value::Object(custom) = &metadata.custom_metadata {
        object.extend(custom.clone());
    }
    Value::Object(object)
}

/// Bytes as lower-case hexadecimal text.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
