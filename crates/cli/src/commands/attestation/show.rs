//! `attestation show`: what a document says, as text or JSON, believed or not.

use std::fmt::Write as _;

use nitroxide_attestation::{Certificate, Document, Place, Timestamp, printable};
use serde_json::{Map, Value, json};

use super::{certificate, input};
use crate::{arguments::attestation::ShowArguments, failure::Failure, output};

/// Prints.
pub fn run(arguments: &ShowArguments) -> Result<(), Failure> {
    let bytes = input::read(&arguments.document)?;
    let document = Document::decode(&bytes).map_err(|error| input::no_document(&arguments.document).because(error))?;
    if arguments.json {
        let mut shown = Map::new();
        shown.insert("Debug".into(), document.is_debug().into());
        shown.insert("Document".into(), self::document(&document));
        let chain = chain(&document).map(|(place, read)| match read {
            Ok(read) => certificate(&read),
            Err(error) => json!({ "Place": place.to_string(), "Error": error }),
        });
        shown.insert("Chain".into(), chain.collect::<Vec<Value>>().into());
        return output::json(&shown);
    }
    output::bytes(text(&document).as_bytes())
}

/// The fields as JSON: bytes as hex, absent ones null.
pub fn document(document: &Document) -> Value {
    let bytes = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(hex::encode);
    let pcrs: Map<String, Value> = document.pcrs.iter().map(|(index, value)| (index.to_string(), hex::encode(value).into())).collect();
    json!({
        "ModuleID": printable(&document.module_id),
        "Digest": "SHA384",
        "Timestamp": document.timestamp_ms,
        "Time": Timestamp(document.timestamp_ms).to_string(),
        "PCRs": pcrs,
        "PublicKey": bytes(&document.public_key),
        "UserData": bytes(&document.user_data),
        "Nonce": bytes(&document.nonce),
    })
}

fn chain(document: &Document) -> impl Iterator<Item = (Place, Result<Certificate, String>)> {
    let bundle = document.cabundle.iter().enumerate().map(|(index, der)| (Place::Bundle(index), der));
    let all = bundle.chain([(Place::Leaf, &document.certificate)]);
    all.map(|(place, der)| (place, Certificate::from_der(der).map_err(|fault| fault.to_string())))
}

fn text(document: &Document) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "Not verified: this is what the document says (nitroxide attestation verify).\n");
    let _ = writeln!(text, "module id   {}", printable(&document.module_id));
    let _ = writeln!(text, "time        {} ({} ms)", Timestamp(document.timestamp_ms), document.timestamp_ms);
    for (name, value) in [("public key", &document.public_key), ("user data", &document.user_data), ("nonce", &document.nonce)] {
        let shown = match value {
            None => "none".to_owned(),
            Some(bytes) => format!("{} ({} bytes)", hex::encode(bytes), bytes.len()),
        };
        let _ = writeln!(text, "{name:<11} {shown}");
    }
    text.push('\n');
    for (index, value) in document.pcrs.iter().filter(|(_, value)| value.iter().any(|byte| *byte != 0)) {
        let _ = writeln!(text, "PCR{index:<8} {}", hex::encode(value));
    }
    let zero: Vec<String> =
        document.pcrs.iter().filter(|(_, value)| value.iter().all(|byte| *byte == 0)).map(|(index, _)| index.to_string()).collect();
    if !zero.is_empty() {
        let _ = writeln!(text, "zero PCRs   {}", zero.join(" "));
    }
    if document.is_debug() {
        text.push_str("debug mode  the document says nothing about what runs in its enclave\n");
    }
    text.push('\n');
    for (place, read) in chain(document) {
        let _ = match read {
            Ok(read) => writeln!(text, "{place:<11} {}\n            {} to {}", read.subject(), read.begins(), read.ends()),
            Err(error) => writeln!(text, "{place:<11} {error}"),
        };
    }
    text
}
