//! What AWS's own image library says about an image: one JSON object on standard output.
//!
//! ```text
//! eif-crosscheck measure FILE
//! eif-crosscheck describe FILE
//! eif-crosscheck build OUTPUT KERNEL CMDLINE x86_64|aarch64 [RAMDISK...]
//! eif-crosscheck sign FILE CERTIFICATE.pem KEY.pem
//! ```
//!
//! Errors go to standard error, with exit status 1. The library panics on some input; that counts as an error too.

use std::error::Error;
use std::fs::File;
use std::path::Path;

use aws_nitro_enclaves_image_format::defs::{EIF_HDR_ARCH_ARM64, EifBuildInfo, EifIdentityInfo};
use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use aws_nitro_enclaves_image_format::utils::{EifBuilder, EifSigner, PcrSignatureChecker, SignKeyData};
use serde_json::{Value, json};
use sha2::{Digest, Sha384};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["measure", file] => measure(file),
        ["describe", file] => describe(file),
        ["build", output, kernel, cmdline, architecture, ramdisks @ ..] => build(output, kernel, cmdline, architecture, ramdisks),
        ["sign", file, certificate, key] => sign(file, certificate, key),
        _ => Err("usage: eif-crosscheck measure|describe FILE | build OUTPUT KERNEL CMDLINE ARCHITECTURE [RAMDISK...] | sign FILE CERTIFICATE KEY".into()),
    };
    match result {
        Ok(answer) => println!("{answer}"),
        Err(error) => {
            eprintln!("eif-crosscheck: {error}");
            std::process::exit(1);
        }
    }
}

/// PCRs and the verdict on the checksum.
fn measure(file: &str) -> Result<Value, Box<dyn Error>> {
    let mut reader = EifReader::from_eif(file.into())?;
    Ok(json!({ "Measurements": reader.get_measurements()?, "CheckCRC": reader.check_crc() }))
}

/// What its describe-eif is made of.
fn describe(file: &str) -> Result<Value, Box<dyn Error>> {
    let mut reader = EifReader::from_eif(file.into())?;
    let header = reader.get_header();
    let measurements = reader.get_measurements()?;
    let mut answer = json!({
        "EifVersion": header.version,
        "Flags": header.flags,
        "DefaultMemory": header.default_mem,
        "DefaultCpus": header.default_cpus,
        "Sections": header.num_sections,
        "Measurements": measurements,
        "CheckCRC": reader.check_crc(),
        "Metadata": reader.get_metadata(),
    });
    if reader.signature_section.is_some() {
        let certificate = reader.get_certificate_info(measurements)?;
        answer["SigningCertificate"] = serde_json::to_value(certificate)?;
        answer["PayloadMatches"] = json!(reader.sign_check);
        answer["SignatureCheck"] = json!(PcrSignatureChecker::from_eif(file)?.verify().is_ok());
    }
    Ok(answer)
}

fn build(output: &str, kernel: &str, cmdline: &str, architecture: &str, ramdisks: &[&str]) -> Result<Value, Box<dyn Error>> {
    let flags = match architecture {
        "x86_64" => 0,
        "aarch64" => EIF_HDR_ARCH_ARM64,
        other => return Err(format!("unknown architecture {other}").into()),
    };
    let identity = EifIdentityInfo {
        img_name: "crosscheck".into(),
        img_version: "1".into(),
        build_info: EifBuildInfo {
            build_time: "1970-01-01T00:00:00+00:00".into(),
            build_tool: "eif-crosscheck".into(),
            build_tool_version: "0".into(),
            img_os: "Linux".into(),
            img_kernel: "Unknown".into(),
        },
        docker_info: Value::Null,
        custom_info: Value::Null,
    };
    let mut builder = EifBuilder::new(Path::new(kernel), cmdline.into(), None, Sha384::new(), flags, identity);
    for ramdisk in ramdisks {
        builder.add_ramdisk(Path::new(ramdisk));
    }
    Ok(json!({ "Measurements": builder.write_to(&mut File::create(output)?) }))
}

/// Signs an image in place; a second time, the library's known mistake with the header's size shows.
fn sign(file: &str, certificate: &str, key: &str) -> Result<Value, Box<dyn Error>> {
    let signer = EifSigner::new(Some(SignKeyData::new(key, Path::new(certificate))?)).ok_or("no signer")?;
    signer.sign_image(file)?;
    measure(file)
}
