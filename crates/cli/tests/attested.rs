//! What an enclave attests, end to end: its image and signer, its parent, what a script in it gave; with and without debug mode.
//!
//! A signed image whose application is a list of `nitroxide-guest` commands. Needs `cargo xtask setup` and `cargo xtask guest`.
#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use ciborium::Value as Cbor;
use common::{nitroxide, run, text};
use nitroxide_testkit::{guest_program, images::ImageSpec};
use serde_json::Value;

const INSTANCE: &str = "i-0123456789abcdef0";
const ROLE: &str = "arn:aws:iam::123456789012:role/Webserver";
/// sha384(48 zeroes || the text above), made with coreutils' sha384sum.
const PCR3: &str = "78fce75db17cd4e0a3fb8dad3ad128ca5e77edbb2b2c7f75329dccd99aa5f6ef4fc1f1a452e315b9e98f9e312e6921e6";
const PCR4: &str = "d6432900ac1c343cb40286898792c55e962aef0cc35c4910c0c286145b51af19e782cb21cc31a042671d7dfbd398251c";

/// The command whose document is looked at.
const ATTEST: &str = "attest --nonce 00ff --user-data @/data --format hex";

/// What the application runs; the last one keeps the enclave alive.
const COMMANDS: [&str; 16] = [
    "/bin/nitroxide-guest describe",
    "/bin/nitroxide-guest extend 16 616263",
    "/bin/nitroxide-guest lock 16",
    "/bin/nitroxide-guest extend 16 00",
    "/bin/nitroxide-guest extend 0 00",
    "/bin/nitroxide-guest pcr",
    "/bin/nitroxide-guest pcr 32",
    "/bin/nitroxide-guest lock --below 18",
    "/bin/nitroxide-guest attest --nonce 00ff --user-data @/data --format hex",
    "/bin/nitroxide-guest attest --public-key @/long",
    "/bin/nitroxide-guest attest --public-key @/dev/zero",
    "/bin/nitroxide-guest attest",
    "/bin/nitroxide-guest random 600",
    "/bin/nitroxide-guest random 4 --format base64",
    "/bin/nitroxide-guest attest --nonce 0",
    "/bin/nitroxide-probe hang",
];

#[test]
fn an_enclave_attests_image_signer_parent_and_what_it_was_given() {
    let directory = tempfile::tempdir().unwrap();
    let image = signed_image(directory.path());
    let described: Value = serde_json::from_slice(&run(nitroxide().arg("describe-eif").arg(&image)).stdout).unwrap();
    let of_image = |name: &str| described["Measurements"][name].as_str().unwrap().to_owned();

    let enclave = Enclave::start(directory.path(), &image, &[]);

    let description = enclave.said("describe", 0);
    assert_eq!(description[0], format!("module_id {}", enclave.module_id()));
    assert_eq!(description[1..4], ["version 1.0.0", "digest SHA384", "max_pcrs 32"]);
    let extended = enclave.said("extend 16 616263", 0);
    assert_eq!(enclave.said("lock 16", 0), Vec::<String>::new());
    assert!(enclave.said("extend 16 00", 1)[0].contains("register 16 is locked"));
    assert!(enclave.said("extend 0 00", 1)[0].contains("yours are 16 to 31"));
    assert!(enclave.said("pcr 32", 1)[0].contains("no register 32"));
    let registers = enclave.said("pcr", 0);
    assert_eq!(registers[16], format!("PCR16 {} locked", extended[0]));
    assert_eq!(registers[17], format!("PCR17 {} open", "0".repeat(96)));

    let signed = &enclave.said(ATTEST, 0)[0];
    let document = payload(signed);
    assert_eq!(field(&document, "module_id").as_text().unwrap(), enclave.module_id());
    assert_eq!(field(&document, "nonce").as_bytes().unwrap(), &[0, 0xff]);
    assert_eq!(field(&document, "user_data").as_bytes().unwrap(), b"what the script\nwants to say");
    assert!(field(&document, "public_key").is_null());
    let expected =
        [(0, of_image("PCR0")), (1, of_image("PCR1")), (2, of_image("PCR2")), (3, PCR3.into()), (4, PCR4.into()), (8, of_image("PCR8"))];
    for (index, value) in expected {
        assert_eq!(pcr(&document, index), value, "PCR{index}");
        assert_eq!(registers[usize::try_from(index).unwrap()], format!("PCR{index} {value} locked"));
    }
    assert_eq!(pcr(&document, 16), extended[0]);

    // The same by the product's own verifier, against this user's root; and a copy with one changed digit.
    let expectations = [0, 1, 2, 8].map(|index| format!("--pcr={index}={}", of_image(&format!("PCR{index}"))));
    let data = format!("--user-data={}", hex::encode(field(&document, "user_data").as_bytes().unwrap()));
    let words: Vec<&str> = expectations.iter().map(String::as_str).chain(["--nonce=00ff", &data]).collect();
    let verified: Value = serde_json::from_slice(&verify(signed, &words, 0).stdout).unwrap();
    assert_eq!((&verified["Verified"], &verified["Root"]), (&Value::Bool(true), &Value::from("local")));
    let mut changed = signed.clone().into_bytes();
    let middle = changed.len() / 2;
    changed[middle] = if changed[middle] == b'0' { b'1' } else { b'0' };
    verify(&text(&changed), &words, 61);
    verify(signed, &["--nonce=00fe"], 61);

    // Fields and requests that are too long, and output in other forms.
    assert!(enclave.said("attest --public-key @/long", 1)[0].contains("1024 bytes each"));
    assert!(enclave.said("attest --public-key @/dev/zero", 1)[0].contains("4096 bytes at most"));
    assert!(enclave.said("attest", 0)[0].starts_with("hEShATgio")); // 84 44 a1013822 a0
    assert_eq!(hex::decode(&enclave.said("random 600", 0)[0]).unwrap().len(), 600);
    assert_eq!(enclave.said("random 4 --format base64", 0)[0].len(), 8);
    assert!(enclave.said("attest --nonce 0", 2)[0].contains("not hex"));
}

#[test]
fn in_debug_mode_image_and_signer_are_zero_in_documents_and_the_parent_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let image = signed_image(directory.path());

    let enclave = Enclave::start(directory.path(), &image, &["--debug-mode"]);

    let signed = &enclave.said(ATTEST, 0)[0];
    verify(signed, &[], 61);
    verify(signed, &["--allow-debug"], 0);
    let document = payload(signed);
    let registers = enclave.said("pcr", 0);
    for index in [0, 1, 2, 8] {
        assert_eq!(pcr(&document, index), "0".repeat(96), "PCR{index}");
        assert_eq!(registers[usize::try_from(index).unwrap()], format!("PCR{index} {} locked", "0".repeat(96)));
    }
    assert_eq!((pcr(&document, 3), pcr(&document, 4)), (PCR3.to_owned(), PCR4.to_owned()));
    let extended = enclave.said("extend 16 616263", 0);
    assert_eq!(pcr(&document, 16), extended[0]);
}

#[test]
fn without_options_the_parent_has_the_constant_id_and_no_role() {
    let runtime = tempfile::tempdir().unwrap();
    let image = common::small_image(runtime.path());
    let mut command = nitroxide();
    command.env("NITROXIDE_RUNTIME_DIR", runtime.path().join("runtime")).args(["run-enclave", "--device", "local", "--engine", "none"]);
    let output = run(command.args(["--no-wait", "--eif-path"]).arg(&image));
    let started: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(started["EnclaveID"].as_str().unwrap().starts_with("i-0000000000000000-enc"), "{started}");
    run(nitroxide().env("NITROXIDE_RUNTIME_DIR", runtime.path().join("runtime")).args(["terminate-enclave", "--all"]));
}

#[test]
fn ids_and_roles_of_another_form_are_refused() {
    for (option, value, why) in
        [("--instance-id", "i-123", "8 or 17 digits"), ("--iam-role", "Webserver", "arn:aws:iam::123456789012:role/Webserver")]
    {
        let output = run(nitroxide().args(["run", "x.eif", option, value]));
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains(why), "{}", text(&output.stderr));
    }
}

#[test]
fn the_guest_tool_is_smaller_than_one_and_a_half_mebibytes() {
    // It has about one: the rest is room for what a newer toolchain brings along.
    assert!(guest_program("nitroxide-guest").metadata().unwrap().len() < 3 << 19);
}

fn signed_image(directory: &Path) -> std::path::PathBuf {
    let mut spec = ImageSpec::probe(&["script", "/commands"]);
    spec.programs.push(("/bin/nitroxide-guest".to_owned(), "nitroxide-guest".to_owned()));
    spec.files = vec![
        ("/commands".to_owned(), COMMANDS.join("\n").into_bytes()),
        ("/data".to_owned(), b"what the script\nwants to say".to_vec()),
        ("/long".to_owned(), vec![7; 1025]),
    ];
    let image = directory.join("signed.eif");
    spec.build(&image);
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eif/tests/data");
    let mut command = nitroxide();
    command.args(["sign-eif", "--eif-path"]).arg(&image).arg("--signing-certificate").arg(data.join("p384.cert.pem"));
    let output = run(command.arg("--private-key").arg(data.join("p384.key.pem")));
    assert!(output.status.success(), "{}", text(&output.stderr));
    image
}

/// A started enclave, and what it printed until it had nothing more to do. Terminated when dropped.
struct Enclave {
    runtime: std::path::PathBuf,
    id: String,
    lines: Vec<String>,
}

impl Enclave {
    fn start(directory: &Path, image: &Path, options: &[&str]) -> Self {
        let runtime = directory.join("runtime");
        let mut command = nitroxide();
        command.env("NITROXIDE_RUNTIME_DIR", &runtime).args(["run-enclave", "--device", "local", "--eif-path"]).arg(image);
        let output = run(command.args(["--instance-id", INSTANCE, "--iam-role", ROLE]).args(options));
        assert!(output.status.success(), "{}", text(&output.stderr));
        let started: Value = serde_json::from_slice(&output.stdout).unwrap();
        let id = started["EnclaveID"].as_str().unwrap().to_owned();
        let mut enclave = Self { runtime, id, lines: Vec::new() };
        let described: Vec<Value> = serde_json::from_slice(&run(enclave.nitroxide().arg("describe-enclaves")).stdout).unwrap();
        assert_eq!(described[0]["EnclaveID"], started["EnclaveID"]);
        let mut logs = enclave.nitroxide().args(["logs", "--follow", &enclave.id]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(logs.stdout.take().unwrap()).lines().map(|line| line.unwrap().trim_end().to_owned());
        enclave.lines = lines.take_while(|line| !line.ends_with("probe hang")).collect();
        logs.kill().unwrap();
        logs.wait().unwrap();
        enclave
    }

    fn nitroxide(&self) -> Command {
        let mut command = nitroxide();
        command.env("NITROXIDE_RUNTIME_DIR", &self.runtime);
        command
    }

    /// What a command of the guest tool printed; it has to end with that status.
    fn said(&self, command: &str, status: i32) -> Vec<String> {
        let shown = format!("probe: $ /bin/nitroxide-guest {command}");
        let from = self.lines.iter().position(|line| *line == shown).unwrap_or_else(|| panic!("no {shown}:\n{}", self.lines.join("\n")));
        let until = self.lines[from..].iter().position(|line| line.starts_with("probe: status")).unwrap();
        let output = &self.lines[from + 1..from + until];
        assert_eq!(self.lines[from + until], format!("probe: status {status}"), "{shown}: {output:?}");
        output.to_vec()
    }

    /// The NSM's name for it: the enclave's id with its number padded to 16 digits.
    fn module_id(&self) -> String {
        let (instance, number) = self.id.split_once("-enc").unwrap();
        assert_eq!(instance, INSTANCE);
        format!("{instance}-enc{number:0>16}")
    }
}

impl Drop for Enclave {
    fn drop(&mut self) {
        let output = run(self.nitroxide().args(["terminate-enclave", &self.id]));
        if !std::thread::panicking() {
            let ended: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(ended["EnclaveID"], *self.id);
        }
    }
}

/// Has a document judged; it has to end with that status.
fn verify(document: &str, options: &[&str], status: i32) -> Output {
    let mut command = nitroxide();
    let mut verifier = command
        .args(["attestation", "verify", "-"])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    verifier.stdin.take().unwrap().write_all(document.as_bytes()).unwrap();
    let output = verifier.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(status), "{}{}", text(&output.stdout), text(&output.stderr));
    output
}

/// The fields of a document in hex.
fn payload(document: &str) -> Cbor {
    let document: Cbor = ciborium::from_reader(hex::decode(document).unwrap().as_slice()).unwrap();
    ciborium::from_reader(document.as_array().unwrap()[2].as_bytes().unwrap().as_slice()).unwrap()
}

fn field<'a>(document: &'a Cbor, name: &str) -> &'a Cbor {
    &document.as_map().unwrap().iter().find(|(key, _)| key.as_text() == Some(name)).unwrap().1
}

fn pcr(document: &Cbor, index: i64) -> String {
    let pcrs = field(document, "pcrs").as_map().unwrap();
    hex::encode(pcrs.iter().find(|(key, _)| *key == Cbor::from(index)).unwrap().1.as_bytes().unwrap())
}
