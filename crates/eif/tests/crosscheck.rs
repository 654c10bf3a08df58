//! Our reader, builder and signer beside AWS's own library (tools/eif-crosscheck), and a genuine image that AWS's tools built.
//!
//! The tool is built on first use into target/eif-crosscheck, which takes some minutes and the network (250 packages) or cargo's cache; after that it is only
//! run. `NITROXIDE_SKIP_CROSSCHECK=1` leaves these tests out. The genuine image comes out of a published package, through cargo.
#![expect(clippy::unwrap_used, reason = "test helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::{CMDLINE, noise};
use nitroxide_eif::{Architecture, BuildMetadata, Builder, Image, Metadata, SectionKind, Warning, cpio, sign_file};
use serde_json::Value;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().into()
}

/// Is this part of the tests left out on request?
fn skipped() -> bool {
    let skipped = std::env::var_os("NITROXIDE_SKIP_CROSSCHECK").is_some();
    if skipped {
        eprintln!("skipped: NITROXIDE_SKIP_CROSSCHECK is set");
    }
    skipped
}

/// The tool, built if it is not there or older than its source.
fn tool() -> &'static Path {
    static TOOL: OnceLock<PathBuf> = OnceLock::new();
    TOOL.get_or_init(|| {
        let source = workspace().join("tools/eif-crosscheck");
        let target = workspace().join("target/eif-crosscheck");
        let tool = target.join("debug/eif-crosscheck");
        let changed = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
        let newest = ["src/main.rs", "Cargo.toml", "Cargo.lock"].map(|file| changed(&source.join(file)).unwrap()).into_iter().max();
        if changed(&tool).ok() < newest {
            eprintln!("building tools/eif-crosscheck (once; some minutes)");
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--locked", "--quiet", "--manifest-path"]).arg(source.join("Cargo.toml")).arg("--target-dir").arg(&target);
            // Without the system's OpenSSL headers it is compiled too.
            let system_openssl = Command::new("pkg-config").args(["--exists", "openssl"]).status().is_ok_and(|status| status.success());
            if !system_openssl {
                cargo.args(["--features", "vendored"]);
            }
            let status = cargo.status().unwrap();
            assert!(status.success(), "tools/eif-crosscheck did not build; set NITROXIDE_SKIP_CROSSCHECK=1 to go without it");
            // An unchanged program keeps its old time; note that it is up to date.
            File::options().append(true).open(&tool).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
        }
        tool
    })
}

fn run(arguments: &[&str]) -> Result<Value, String> {
    let output = Command::new(tool()).args(arguments).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

/// Our own measurements in the form of AWS's, the name of the algorithm apart.
fn measure(path: &Path) -> Value {
    let measured = Image::open(File::open(path).unwrap()).unwrap().check_and_measure().unwrap();
    let mut json = serde_json::json!({
        "PCR0": measured.pcr0.to_string(), "PCR1": measured.pcr1.to_string(), "PCR2": measured.pcr2.to_string(),
    });
    if let Some(pcr8) = measured.pcr8 {
        json["PCR8"] = pcr8.to_string().into();
    }
    json
}

fn measure_by_aws(path: &Path) -> Value {
    let mut answer = run(&["measure", path.to_str().unwrap()]).unwrap();
    assert_eq!(answer["CheckCRC"], true);
    answer["Measurements"].as_object_mut().unwrap().remove("HashAlgorithm");
    answer["Measurements"].take()
}

/// The genuine image of the published package nitro-enclaves 0.7.0.
fn genuine_image() -> PathBuf {
    let manifest = workspace().join("tools/eif-crosscheck/Cargo.toml");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--format-version", "1", "--locked", "--features", "fixture", "--manifest-path"]).arg(manifest);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = metadata["packages"].as_array().unwrap().iter().find(|package| package["name"] == "nitro-enclaves").unwrap();
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("tests/test_data/hello.eif")
}

#[test]
fn genuine_image_reads_and_measures_as_documented() {
    if skipped() {
        return;
    }
    let path = genuine_image();
    let image = Image::open(File::open(&path).unwrap()).unwrap();
    assert_eq!(image.warnings(), []);
    assert_eq!(image.architecture(), Architecture::Aarch64);
    assert_eq!((image.header().version, image.header().default_cpus, image.header().default_memory_bytes), (4, 2, 1 << 30));
    let kinds: Vec<_> = image.sections().iter().map(|section| section.kind).collect();
    assert_eq!(kinds, [SectionKind::Kernel, SectionKind::Cmdline, SectionKind::Metadata, SectionKind::Ramdisk, SectionKind::Ramdisk]);
    assert_eq!(image.cmdline(), b"reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on root=/dev/ram0");
    let metadata = image.metadata().unwrap().unwrap();
    assert_eq!((metadata.image_name.as_str(), metadata.build_metadata.kernel_version.as_str()), ("hello", "4.14.256"));
    let measured = measure(&path);
    assert!(measured["PCR0"].as_str().unwrap().starts_with("bb284bdb"));
    assert!(measured["PCR1"].as_str().unwrap().starts_with("3b4a7e1b"));
    assert!(measured["PCR2"].as_str().unwrap().starts_with("fcb50b1c"));
    assert_eq!(measured, measure_by_aws(&path));
}

#[test]
fn ramdisks_of_the_genuine_image_list_completely() {
    if skipped() {
        return;
    }
    let image = Image::open(File::open(genuine_image()).unwrap()).unwrap();
    let ramdisks: Vec<_> = image.ramdisks().collect();
    let entries = |index: usize| {
        let mut reader = cpio::Reader::new(std::io::BufReader::new(image.reader(ramdisks[index])));
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            entries.push((String::from_utf8(entry.name.clone()).unwrap(), entry.mode, entry.size));
        }
        entries
    };
    let bootstrap = [("dev".to_owned(), 0o040_755, 0), ("init".to_owned(), 0o100_755, 737_336), ("nsm.ko".to_owned(), 0o100_755, 22_904)];
    assert_eq!(entries(0), bootstrap);
    let application = entries(1);
    assert!(application.iter().filter(|(name, ..)| name.starts_with("rootfs")).count() > 400);
    assert!(application.iter().any(|(name, mode, _)| name == "cmd" && *mode == 0o100_644));
}

/// The same input through both builders: the same file, byte for byte, and the same measurements by both readers.
#[test]
fn both_builders_write_the_same_bytes() {
    if skipped() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("kernel"), noise(200_000, 1)).unwrap();
    fs::write(path("disk0"), noise(300_001, 2)).unwrap();
    fs::write(path("disk1"), noise(400_003, 3)).unwrap();
    fs::write(path("disk2"), noise(1, 4)).unwrap();
    for (architecture, ramdisks) in [
        (Architecture::X86_64, vec!["disk0", "disk1"]),
        (Architecture::Aarch64, vec!["disk0", "disk1", "disk2"]),
        (Architecture::X86_64, vec!["disk2"]),
        (Architecture::X86_64, vec![]),
    ] {
        let metadata = Metadata {
            build_metadata: BuildMetadata {
                build_tool: "eif-crosscheck".into(),
                build_tool_version: "0".into(),
                ..Metadata::new("", "").build_metadata
            },
            ..Metadata::new("crosscheck", "1")
        };
        let builder = Builder::new(path("kernel"), CMDLINE).architecture(architecture).metadata(metadata);
        ramdisks.iter().fold(builder, |builder, name| builder.ramdisk(path(name))).write_file(path("ours.eif")).unwrap();
        let disks: Vec<String> = ramdisks.iter().map(|name| path(name).display().to_string()).collect();
        let theirs = path("theirs.eif").display().to_string();
        let kernel = path("kernel").display().to_string();
        let architecture = architecture.to_string();
        let mut arguments = vec!["build", &theirs, &kernel, CMDLINE, &architecture];
        arguments.extend(disks.iter().map(String::as_str));
        run(&arguments).unwrap();
        assert!(fs::read(path("ours.eif")).unwrap() == fs::read(path("theirs.eif")).unwrap(), "{ramdisks:?}");
        assert_eq!(measure(&path("ours.eif")), measure_by_aws(&path("ours.eif")));
    }
}

#[test]
fn each_signer_is_believed_by_the_other_and_shows_the_same_facts() {
    if skipped() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = (directory.path().join("ours.eif"), directory.path().join("theirs.eif"));
    for curve in ["p256", "p384", "p521"] {
        fs::write(&ours, common::small()).unwrap();
        fs::write(&theirs, common::small()).unwrap();
        sign_file(&ours, &common::signer(curve)).unwrap();
        let pem = |kind: &str| format!("{}/tests/data/{curve}.{kind}.pem", env!("CARGO_MANIFEST_DIR"));
        run(&["sign", theirs.to_str().unwrap(), &pem("cert"), &pem("key")]).unwrap();
        for path in [&ours, &theirs] {
            let described = run(&["describe", path.to_str().unwrap()]).unwrap();
            assert_eq!((&described["PayloadMatches"], &described["SignatureCheck"]), (&true.into(), &true.into()), "{curve}");
            assert_eq!(measure(path), measure_by_aws(path));
            let image = Image::open(File::open(path).unwrap()).unwrap();
            assert_eq!(image.warnings(), []);
            let certificate = image.signature().unwrap().unwrap().verify(&image.measure().unwrap().pcr0).unwrap();
            let issuer: serde_json::Map<String, Value> =
                certificate.issuer().into_iter().map(|(name, value)| (name, value.into())).collect();
            let signature = certificate.signature().iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":");
            let facts = serde_json::json!({
                "IssuerName": issuer, "Algorithm": certificate.algorithm(), "NotBefore": certificate.not_before(),
                "NotAfter": certificate.not_after(), "Signature": signature,
            });
            assert_eq!(described["SigningCertificate"], facts);
        }
    }
}

/// AWS's signer leaves a stale size in the image's header when it signs again; its reader and ours read the image all the same, and ours mends it.
#[test]
fn image_signed_again_by_aws_is_read_with_a_warning_and_mended_by_our_signer() {
    if skipped() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.eif");
    fs::write(&path, common::small()).unwrap();
    for curve in ["p521", "p256"] {
        let pem = |kind: &str| format!("{}/tests/data/{curve}.{kind}.pem", env!("CARGO_MANIFEST_DIR"));
        run(&["sign", path.to_str().unwrap(), &pem("cert"), &pem("key")]).unwrap();
    }
    let image = Image::open(fs::read(&path).unwrap()).unwrap();
    assert!(matches!(image.warnings(), [Warning::SignatureSizeDisagrees { in_table, in_section }] if in_table > in_section));
    assert_eq!(measure(&path), measure_by_aws(&path));
    image.signature().unwrap().unwrap().verify(&image.measure().unwrap().pcr0).unwrap();
    sign_file(&path, &common::signer("p384")).unwrap();
    assert_eq!(Image::open(fs::read(&path).unwrap()).unwrap().warnings(), []);
    assert_eq!(measure(&path), measure_by_aws(&path));
}
