//! `nitroxide attestation`: genuine and local documents verified, shown, refused; the local root and imported ones.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod common;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use common::{nitroxide, run, text};
use nitroxide_attestation::{Claims, Pki};
use serde_json::Value;

const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";

fn genuine(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../attestation/tests/data").join(name)
}

fn document() -> PathBuf {
    genuine("aws-ap-south-1-2024-12-13.cbor")
}

/// A user without a PKI.
struct User(tempfile::TempDir);

impl User {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn attestation(&self, words: &[&str]) -> Command {
        let mut command = nitroxide();
        command.arg("attestation").args(words).env("XDG_DATA_HOME", self.0.path());
        command
    }

    fn pki(&self) -> Pki {
        Pki::at(self.0.path().join("nitroxide/pki"))
    }

    /// A document of this moment, in a file.
    fn local_document(&self, claims: &Claims<'_>) -> PathBuf {
        let now_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
        let document = self.pki().signer(MODULE_ID, now_ms).unwrap().document(now_ms, claims).unwrap();
        let path = self.0.path().join("document.cbor");
        fs::write(&path, document).unwrap();
        path
    }
}

fn json(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn fails(output: &Output, code: i32, words: &[&str]) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert_eq!(text(&output.stdout), "");
    assert!(message.contains(&format!("[E{code:02}]")), "{message}");
    for word in words {
        assert!(message.contains(word), "{word} in {message}");
    }
}

#[test]
fn genuine_document_is_verified_at_its_own_time_and_has_expired_now() {
    let user = User::new();
    let output = run(user.attestation(&["verify", "--at", "document"]).arg(document()));
    let verified = json(&output);
    assert_eq!((&verified["Verified"], &verified["Root"]), (&true.into(), &"aws".into()));
    assert_eq!(verified["Document"]["ModuleID"], "i-0f1cd77d37fd8bcc9-enc018e7aa61e2040ff");
    assert_eq!(verified["Chain"].as_array().unwrap().len(), 5);
    assert_eq!(text(&output.stderr), "The document is genuine. Its root: AWS's root for Nitro Enclaves\n");
    let output = run(user.attestation(&["verify"]).arg(document()));
    fails(&output, 61, &["cabundle[1]", "expired", "2025-01-01T05:25:54Z", "--at document"]);
    json(&run(user.attestation(&["verify", "--at", "2024-12-13T08:00:00Z"]).arg(document())));
    assert!(!user.pki().folder().exists(), "verifying makes no PKI");
}

#[test]
fn local_document_is_verified_and_said_not_to_be_awss() {
    let user = User::new();
    let path = user.local_document(&Claims { pcrs: &[(0, [0xab; 48])], nonce: Some(b"\x01\x02"), ..Claims::default() });
    let pcr = format!("0={}", "ab".repeat(48));
    let output = run(user.attestation(&["verify", "--nonce", "0102", "--pcr", &pcr]).arg(&path));
    let verified = json(&output);
    assert_eq!(verified["Root"], "local");
    assert_eq!(verified["RootMeaning"], "local Nitroxide root \u{2013} not AWS");
    assert!(text(&output.stderr).contains("not AWS"), "{}", text(&output.stderr));

    fails(&run(user.attestation(&["verify", "--nonce", "0103"]).arg(&path)), 61, &["nonce", "another value"]);
    fails(&run(user.attestation(&["verify", "--user-data", "00"]).arg(&path)), 61, &["user_data", "absent"]);
    fails(&run(user.attestation(&["verify", "--pcr", &pcr.replace("0=", "1=")]).arg(&path)), 61, &["PCR1", "absent"]);
    // Somebody else does not know the root, and knows it once it is given.
    let other = User::new();
    fails(&run(other.attestation(&["verify"]).arg(&path)), 61, &["not trusted", "AWS's root alone", "--root"]);
    for form in [&["root"][..], &["root", "--der"]] {
        let root = user.0.path().join("root");
        fs::write(&root, run(&mut user.attestation(form)).stdout).unwrap();
        assert_eq!(json(&run(other.attestation(&["verify", "--root"]).arg(&root).arg(&path)))["Root"], "given");
    }
    fails(&run(user.attestation(&["verify", "--root"]).arg(genuine("aws-nitro-enclaves-root.der")).arg(&path)), 61, &["not trusted"]);
}

#[test]
fn document_of_debug_mode_is_only_taken_on_demand() {
    let user = User::new();
    let path = user.local_document(&Claims { pcrs: &[(0, [0; 48]), (1, [0; 48]), (2, [0; 48]), (4, [1; 48])], ..Claims::default() });
    fails(&run(user.attestation(&["verify"]).arg(&path)), 61, &["debug mode", "--allow-debug"]);
    let output = run(user.attestation(&["verify", "--allow-debug"]).arg(&path));
    assert_eq!(json(&output)["Debug"], true);
    assert!(text(&output.stderr).contains("debug mode"));
}

#[test]
fn documents_are_read_as_text_and_from_standard_input() {
    let user = User::new();
    let hex = hex::encode(fs::read(document()).unwrap());
    let mut child = user.attestation(&["verify", "--at", "document", "-"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(hex.as_bytes()).unwrap();
    assert_eq!(json(&child.wait_with_output().unwrap())["Root"], "aws");
}

#[test]
fn show_prints_text_or_json_without_judging() {
    let user = User::new();
    let shown = run(user.attestation(&["show"]).arg(document()));
    let lines = text(&shown.stdout);
    assert!(lines.starts_with("Not verified"), "{lines}");
    for part in
        ["i-0f1cd77d37fd8bcc9-enc018e7aa61e2040ff", "2024-12-13T07:37:58Z", "PCR0        189038ec", "cabundle[3]", "user data   none"]
    {
        assert!(lines.contains(part), "{part} in {lines}");
    }
    let shown = json(&run(user.attestation(&["show", "--json"]).arg(document())));
    assert_eq!(shown["Document"]["Timestamp"], 1_734_075_478_960_u64);
    assert_eq!(shown["Document"]["Nonce"], Value::Null);
    assert_eq!(shown["Chain"][0]["Fingerprint"], "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b");
}

#[test]
fn what_is_no_document_or_no_usage_has_other_codes_than_what_is_not_believed() {
    let user = User::new();
    let broken = user.0.path().join("broken");
    fs::write(&broken, "{}").unwrap();
    fails(&run(user.attestation(&["show"]).arg(&broken)), 17, &["no attestation document"]);
    fails(&run(user.attestation(&["verify"]).arg(&broken)), 17, &[]);
    fails(&run(user.attestation(&["verify"]).arg(user.0.path().join("missing"))), 19, &[]);
    fails(&run(user.attestation(&["verify", "--root"]).arg(&broken).arg(document())), 3, &["no certificate"]);
    for words in [&["verify", "--pcr", "0=00", "x"][..], &["verify", "--nonce", "xx", "x"], &["verify", "--at", "then", "x"]] {
        assert_eq!(run(&mut user.attestation(words)).status.code(), Some(3), "{words:?}");
    }
    // Its first bytes are those of a document; the rest is not there.
    fs::write(&broken, &fs::read(document()).unwrap()[..100]).unwrap();
    fails(&run(user.attestation(&["show"]).arg(&broken)), 17, &["no attestation document"]);
    fails(&run(user.attestation(&["verify"]).arg(&broken)), 17, &["no attestation document"]);
    let (one, other) = (format!("0={}", "aa".repeat(48)), format!("0={}", "bb".repeat(48)));
    fails(&run(user.attestation(&["verify", "--pcr", &one, "--pcr", &other]).arg(document())), 3, &["register 0 twice"]);
    let mut bytes = fs::read(document()).unwrap();
    let inside_the_public_key = bytes.len() - 150;
    bytes[inside_the_public_key] ^= 1;
    fs::write(&broken, bytes).unwrap();
    fails(&run(user.attestation(&["verify", "--at", "document"]).arg(&broken)), 61, &["signature"]);
}

#[test]
fn root_is_made_once_and_an_own_one_is_imported_on_demand_only() {
    let (user, company) = (User::new(), User::new());
    let first = run(&mut user.attestation(&["root"]));
    assert!(text(&first.stdout).starts_with("-----BEGIN CERTIFICATE-----"));
    assert!(text(&first.stderr).contains("new root"), "{}", text(&first.stderr));
    let second = run(&mut user.attestation(&["root"]));
    assert_eq!((second.stdout, second.stderr), (first.stdout.clone(), vec![]));

    run(&mut company.attestation(&["root"]));
    let authority = company.pki().folder().join("authority.pem");
    let words = ["import", "--certificate", authority.to_str().unwrap(), "--private-key", authority.to_str().unwrap()];
    fails(&run(&mut user.attestation(&words)), 62, &["root already", "--replace"]);
    let imported = json(&run(user.attestation(&words).arg("--replace")));
    assert_eq!(imported["Root"]["Fingerprint"], hex::encode(company.pki().existing_root().unwrap().unwrap().fingerprint()));
    let third = run(&mut user.attestation(&["root"]));
    assert_ne!(third.stdout, first.stdout);
    assert_eq!(third.stdout, run(&mut company.attestation(&["root"])).stdout);
}

#[test]
fn a_broken_pki_is_named_and_verifying_goes_on_with_awss_root() {
    let user = User::new();
    run(&mut user.attestation(&["root"]));
    fs::write(user.pki().folder().join("authority.pem"), "").unwrap();
    fails(&run(&mut user.attestation(&["root"])), 62, &["authority.pem", "put back a copy"]);
    let output = run(user.attestation(&["verify", "--at", "document"]).arg(document()));
    assert_eq!(json(&output)["Root"], "aws");
    assert!(text(&output.stderr).contains("only AWS's root"), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("It holds no certificate"), "the cause: {}", text(&output.stderr));
}
