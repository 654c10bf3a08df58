//! Our documents before a judge that shares nothing with us: Python's cbor2 and cryptography (`judge.py`), unpacked by `cargo xtask setup --tests`.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nitroxide_attestation::{Claims, Pki, Signer};
use nitroxide_testkit::Setup;

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;
const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";
const DAY_MS: u64 = 86_400_000;

/// Documents, each with a root and a time, in files.
struct Cases {
    folder: tempfile::TempDir,
    lines: String,
}

impl Cases {
    fn add(&mut self, document: &[u8], root: &[u8], now_ms: u64) {
        let number = self.lines.lines().count();
        let place = |name: &str| self.folder.path().join(format!("{number}.{name}"));
        fs::write(place("cbor"), document).unwrap();
        fs::write(place("der"), root).unwrap();
        self.lines += &format!("{} {} {now_ms}\n", place("cbor").display(), place("der").display());
    }

    /// The judge's verdicts, one for each case.
    fn judge(&self) -> Vec<String> {
        let tree = self.folder.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let unpacked =
            Command::new("tar").arg("--extract").arg("--file").arg(Setup::locate().programs()).arg("--directory").arg(&tree).status();
        assert!(unpacked.unwrap().success());
        let mut python = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
        python.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu")).arg(tree.join("usr/bin/python3"));
        python.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/judge.py")).env("PYTHONHOME", tree.join("usr"));
        python.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = python.spawn().unwrap();
        child.stdin.take().unwrap().write_all(self.lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let verdicts: Vec<String> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
        assert_eq!(verdicts.len(), self.lines.lines().count(), "{verdicts:?}");
        verdicts
    }
}

fn cases() -> Cases {
    Cases { folder: tempfile::tempdir().unwrap(), lines: String::new() }
}

fn claims() -> Claims<'static> {
    Claims { pcrs: &[(0, [1; 48]), (1, [2; 48]), (16, [3; 48])], nonce: Some(b"4711"), public_key: Some(&[7; 1024]), ..Claims::default() }
}

#[test]
fn documents_in_memory_of_a_pki_and_after_renewals_are_good_to_another_implementation() {
    let mut cases = cases();
    let mut signer = Signer::local(MODULE_ID, NOW_MS).unwrap();
    cases.add(&signer.document(NOW_MS, &claims()).unwrap(), signer.root(), NOW_MS);
    let pki = Pki::at(cases.folder.path().join("pki"));
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    for now_ms in [NOW_MS, NOW_MS + DAY_MS / 8, NOW_MS + DAY_MS, NOW_MS + 7 * DAY_MS, NOW_MS + 30 * DAY_MS, NOW_MS + 3650 * DAY_MS] {
        cases.add(&signer.document(now_ms, &claims()).unwrap(), signer.root(), now_ms);
    }
    // Somebody else's intermediate above.
    let other = Pki::at(cases.folder.path().join("other"));
    let text = |name: &str| fs::read_to_string(pki.folder().join(name)).unwrap();
    let (root, region) = (text("authority.pem"), text("region.pem"));
    let certificates = root.split("-----BEGIN PRIVATE").next().unwrap().to_owned() + &region;
    let now_ms = NOW_MS + 3650 * DAY_MS;
    other.import(certificates.as_bytes(), region.as_bytes(), false, now_ms).unwrap();
    let mut signer = other.signer(MODULE_ID, now_ms).unwrap();
    cases.add(&signer.document(now_ms, &claims()).unwrap(), signer.root(), now_ms);
    let verdicts = cases.judge();
    assert!(verdicts.iter().all(|verdict| *verdict == format!("good {MODULE_ID}")), "{verdicts:#?}");
    assert_eq!(verdicts.len(), 8);
}

/// Without this, a judge that says "good" to everything would do.
#[test]
fn the_judge_takes_a_genuine_document_and_no_bad_one() {
    let data = |name: &str| fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap();
    let (genuine, root) = (data("aws-ap-south-1-2024-12-13.cbor"), data("aws-nitro-enclaves-root.der"));
    let mut cases = cases();
    cases.add(&genuine, &root, 1_734_075_478_960);
    cases.add(&genuine, &root, NOW_MS);
    for position in [8, 100, 400, 1500, 3000, genuine.len() - 120, genuine.len() - 1] {
        let mut changed = genuine.clone();
        changed[position] ^= 1;
        cases.add(&changed, &root, 1_734_075_478_960);
    }
    let mut ours = Signer::local(MODULE_ID, NOW_MS).unwrap();
    cases.add(&ours.document(NOW_MS, &claims()).unwrap(), &root, NOW_MS);
    let verdicts = cases.judge();
    assert_eq!(verdicts[0], "good i-0f1cd77d37fd8bcc9-enc018e7aa61e2040ff");
    assert!(verdicts[1..].iter().all(|verdict| verdict.starts_with("bad ")), "{verdicts:#?}");
}
