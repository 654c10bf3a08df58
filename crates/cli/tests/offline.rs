//! The real program, in everything that needs no enclave: results on standard output, complaints with the right code, generated files.

mod common;

use std::{fs, process::Stdio};

use common::{finish, nitroxide, run, small_image, text};

#[test]
fn describe_eif_prints_measurements_and_metadata_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image(directory.path());
    let output = run(nitroxide().args(["describe-eif", "--eif-path"]).arg(&image));
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
    let description: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let opened = nitroxide_eif::Image::open(fs::File::open(&image).unwrap()).unwrap();
    assert_eq!(description["Measurements"]["PCR0"], opened.measure().unwrap().pcr0.to_string());
    assert_eq!(description["EifVersion"], 4);
    assert_eq!(description["CheckCRC"], true);
    assert_eq!(description["IsSigned"], false);
    assert_eq!(description["ImageName"], "small");
    assert_eq!(description["Metadata"]["BuildTool"], "nitroxide");
    assert!(description.get("SignatureCheck").is_none());
    assert!(description.get("Sections").is_none());
}

#[test]
fn describe_eif_of_a_damaged_image_says_so_in_the_result() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image(directory.path());
    let mut bytes = fs::read(&image).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&image, bytes).unwrap();
    let output = run(nitroxide().arg("describe-eif").arg(&image));
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).contains("\"CheckCRC\": false"));
    assert!(text(&output.stderr).contains("damaged"));
}

#[test]
fn describe_eif_of_something_else_fails_with_e35_and_of_nothing_with_e19() {
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("other.eif");
    fs::write(&other, vec![0_u8; 4096]).unwrap();
    for (path, code) in [(other, 35), (directory.path().join("missing.eif"), 19), (directory.path().to_owned(), 19)] {
        let output = run(nitroxide().args(["describe-eif", "--eif-path"]).arg(&path));
        assert_eq!(output.status.code(), Some(code), "{}", path.display());
        assert_eq!(text(&output.stdout), "");
        assert!(text(&output.stderr).contains(&format!("[E{code}]")), "{}", text(&output.stderr));
    }
}

#[test]
fn pcr_of_a_file_is_the_extended_hash_of_its_content() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "abc").unwrap();
    let output = run(nitroxide().args(["pcr", "--input"]).arg(&file));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["PCR"], nitroxide_eif::Pcr::of(b"abc").to_string());
}

#[test]
fn pcr_of_a_certificate_that_is_none_fails_with_e03() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cert.pem");
    fs::write(&file, "no certificate").unwrap();
    let output = run(nitroxide().args(["pcr", "--signing-certificate"]).arg(&file));
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("BEGIN CERTIFICATE"));
}

#[test]
fn a_signed_image_describes_its_signature_and_can_be_signed_again() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image(directory.path());
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../eif/tests/data");
    for curve in ["p384", "p256"] {
        let mut command = nitroxide();
        command.args(["sign-eif", "--eif-path"]).arg(&image);
        command
            .arg("--signing-certificate")
            .arg(data.join(format!("{curve}.cert.pem")))
            .arg("--private-key")
            .arg(data.join(format!("{curve}.key.pem")));
        let output = run(&mut command);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let signed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let described: serde_json::Value = serde_json::from_slice(&run(nitroxide().arg("describe-eif").arg(&image)).stdout).unwrap();
        assert_eq!(described["Measurements"], signed["Measurements"]);
        assert_eq!(
            (&described["IsSigned"], &described["SignatureCheck"], &described["CheckCRC"]),
            (&true.into(), &true.into(), &true.into())
        );
        assert!(described["SigningCertificate"]["Algorithm"].as_str().unwrap().contains("ecdsa"));
        let pcr = run(nitroxide().args(["pcr", "--signing-certificate"]).arg(data.join(format!("{curve}.cert.pem"))));
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&pcr.stdout).unwrap()["PCR8"], signed["Measurements"]["PCR8"]);
    }
}

#[test]
fn a_key_that_does_not_fit_leaves_the_image_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image(directory.path());
    let before = fs::read(&image).unwrap();
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../eif/tests/data");
    let mut command = nitroxide();
    command.args(["sign-eif", "--eif-path"]).arg(&image).arg("--signing-certificate").arg(data.join("p384.cert.pem"));
    let output = run(command.arg("--private-key").arg(data.join("other.key.pem")));
    assert_eq!(output.status.code(), Some(60), "{}", text(&output.stderr));
    assert_eq!(fs::read(&image).unwrap(), before);
}

#[test]
fn command_lines_that_cannot_be_understood_have_their_codes() {
    let cases: &[(&[&str], i32)] = &[
        (&[], 1),
        (&["run-enclave"], 1),
        (&["terminate-enclave"], 1),
        (&["run-enclave", "--eif-path", "x", "--cpu-count", "2", "--cpu-ids", "1"], 2),
        (&["run-enclave", "--config", "c", "--memory", "64"], 2),
        (&["run-enclave", "--eif-path", "x", "--memory", "12X"], 3),
        (&["run-enclave", "--eif-path", "x", "--cpu-count", "0"], 3),
        (&["vsock", "connect", "4294967296", "1"], 3),
        (&["describe-enclaves", "--nonsense"], 3),
        (&["no-such-command"], 14),
    ];
    for (words, code) in cases {
        let output = run(nitroxide().args(*words));
        assert_eq!(output.status.code(), Some(*code), "{words:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{words:?}");
        assert!(text(&output.stderr).contains(&format!("[E{code:02}]")), "{words:?}: {}", text(&output.stderr));
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    for words in [["--help"].as_slice(), &["run-enclave", "--help"], &["help", "run"], &["--version"]] {
        let output = run(nitroxide().args(words));
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{words:?}");
    }
}

#[test]
fn called_as_nitro_cli_it_shows_that_version() {
    use std::os::unix::process::CommandExt;
    let output = run(nitroxide().arg0("/usr/bin/nitro-cli").arg("--version"));
    assert!(text(&output.stdout).starts_with("Nitro CLI 1.5.0"), "{}", text(&output.stdout));
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let mut child = nitroxide().arg("explain").args(["E00"; 5000]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn explain_knows_every_code_and_refuses_others() {
    let codes: Vec<String> = (0..=62).map(|number| format!("E{number:02}")).collect();
    let output = run(nitroxide().args(["explain", "--error-code"]).args(&codes));
    assert_eq!(output.status.code(), Some(0));
    assert!(codes.iter().all(|code| text(&output.stdout).contains(&format!("{code}: "))));
    assert_eq!(run(nitroxide().args(["explain", "E63"])).status.code(), Some(3));
}

#[test]
fn completions_and_man_pages_generate() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(nitroxide().args(["completions", shell]));
        assert!(text(&output.stdout).contains("describe-enclaves"), "{shell}");
    }
    let directory = tempfile::tempdir().unwrap();
    let output = run(nitroxide().arg("man").arg(directory.path().join("man1")));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for page in ["nitroxide.1", "nitroxide-run-enclave.1", "nitroxide-vsock-connect.1"] {
        let page = fs::read_to_string(directory.path().join("man1").join(page)).unwrap();
        assert!(page.contains(".TH"), "{page}");
    }
    assert!(!directory.path().join("man1/nitroxide-enclave-process.1").exists());
}

#[test]
fn doctor_reports_as_text_and_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = directory.path().join("runtime");
    let output = run(nitroxide().arg("doctor").env("NITROXIDE_RUNTIME_DIR", &runtime));
    assert!(text(&output.stdout).contains("runtime directory"), "{}", text(&output.stdout));
    let output = run(nitroxide().args(["doctor", "--json"]).env("NITROXIDE_RUNTIME_DIR", &runtime));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for name in ["QEMU", "kernel module"] {
        assert!(report["checks"].as_array().unwrap().iter().any(|check| check["name"] == name), "{report}");
    }
}

#[test]
fn doctor_says_what_is_wrong_with_the_runtime_directory() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let output = run(nitroxide().arg("doctor").env("NITROXIDE_RUNTIME_DIR", directory.path()));
    assert!(text(&output.stdout).contains("chmod 700"), "{}", text(&output.stdout));
}

#[test]
fn doctor_without_qemu_says_how_to_get_one_and_fails() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = nitroxide();
    command.arg("doctor").env("NITROXIDE_RUNTIME_DIR", directory.path().join("runtime")).env("NITROXIDE_QEMU", "/nonexistent/qemu");
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("NITROXIDE_QEMU"), "{}", text(&output.stdout));
}

#[test]
fn standard_output_that_cannot_be_written_is_a_failure_without_a_panic() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = finish(nitroxide().args(["explain", "E29"]).stdout(full));
    assert_eq!(output.status.code(), Some(19));
}
