//! A stock kernel's own NSM driver against our device: boots QEMU and looks at what `nsm-check` printed in the guest.
//!
//! One boot, since a boot costs seconds. Guest memory comes in ten regions, more than a backend without CONFIGURE_MEM_SLOTS
//! could take. Needs `cargo xtask setup` and `cargo xtask guest`. The guest's program: `guest/probe/src/bin/nsm-check.rs`.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use ciborium::Value;
use nitroxide_eif::cpio::{Device, Tree};
use nitroxide_nsm::{InitialPcrs, NsmConfig};
use nitroxide_testkit::{Setup, guest_program};
use p384::ecdsa::signature::Verifier as _;
use p384::ecdsa::{Signature, VerifyingKey};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use x509_cert::Certificate;
use x509_cert::der::Decode as _;

const MODULE_ID: &str = "i-0000000000000000-enc0123456789abcdef";
const REGIONS: u32 = 10; // more than the 8 that one SET_MEM_TABLE message holds
const REGION_MIB: u32 = 26; // arbitrary; Debian's kernel needs 96 MiB altogether

/// Only ends a run that hangs; a boot takes about ten seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(300);

const READ_ONLY: &str = "{Error: ReadOnlyIndex}";
const INVALID_INDEX: &str = "{Error: InvalidIndex}";

#[test]
fn a_stock_guest_gets_every_answer_it_should() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = folder.path().join("initrd");
    write_initrd(&initrd);
    let (measured, measurements) = mpsc::channel();
    let nsm =
        nitroxide_nsm::spawn(NsmConfig { module_id: MODULE_ID.into(), pcrs: Box::new(move || measurements.recv().unwrap()), debug: false })
            .unwrap();
    let frontend = nsm.take_frontend().unwrap();
    assert!(nsm.take_frontend().is_none());
    let mut qemu = start(&initrd, &frontend);
    drop(frontend);

    let pcrs = InitialPcrs::of_image([0x11; 48], [0x22; 48], [0x33; 48], Some([0x88; 48])).with_instance_id("i-0000000000000000");
    let lines = Lines::read_from(&mut qemu, |line| {
        // Describing itself and random numbers do not wait for the measurements: they are not there before this line is.
        if line.starts_with("random ") {
            measured.send(pcrs).unwrap();
        }
    });
    qemu.wait().unwrap();

    let description = |locked: &str| {
        format!(
            "{{DescribeNSM: {{version_major: 1, version_minor: 0, version_patch: 0, module_id: {MODULE_ID}, max_pcrs: 32, \
             locked_pcrs: [{locked}], digest: SHA384}}}}"
        )
    };
    let numbers = |count: u16| (0..count).map(|index| index.to_string()).collect::<Vec<_>>().join(", ");
    lines.answers("describe-nsm", &description(&numbers(16)));
    lines.says("random", &format!("{} 278 differ", hex::encode(b"\xa1\x69GetRandom\xa1\x66random\x59\x01\x00")));

    for (index, value) in [(0, [0x11; 48]), (1, [0x22; 48]), (2, [0x33; 48]), (4, pcrs.pcr4), (8, [0x88; 48]), (3, [0; 48]), (15, [0; 48])]
    {
        lines.answers(&format!("describe-pcr {index}"), &format!("{{DescribePCR: {{lock: true, data: {}}}}}", hex::encode(value)));
    }
    lines.answers("describe-pcr 16", &format!("{{DescribePCR: {{lock: false, data: {}}}}}", "00".repeat(48)));
    lines.answers("describe-pcr 32", INVALID_INDEX);
    for index in [0, 15] {
        lines.answers(&format!("lock {index}"), READ_ONLY);
        lines.answers(&format!("extend {index}"), READ_ONLY);
    }
    lines.answers("lock 32", INVALID_INDEX);
    lines.answers("extend 32", INVALID_INDEX);
    // sha384(48 zeroes || "abc"), and sha384 of that; made with coreutils' sha384sum.
    let once = "b1c16eb7634112b7c9d5ebd27e62a2d4528bbfcfd68b62d3afd9ecf98e0f413a84314acce78317fb69fd895155343e09";
    lines.answers("extend 16", &format!("{{ExtendPCR: {{data: {once}}}}}"));
    let twice = "917afee04fee376dd7bd919468817bde18c38a268113c772b22524195118fb1638577df52676c721d768e2e525a83957";
    lines.answers("extend-again 16", &format!("{{ExtendPCR: {{data: {twice}}}}}"));
    assert!(lines.word("extend-much 17").starts_with(&hex::encode(b"\xa1\x69ExtendPCR\xa1\x64data\x58\x30")));
    lines.answers("lock 16", "LockPCR");
    lines.answers("lock-again 16", READ_ONLY);
    lines.answers("extend-locked 16", READ_ONLY);
    lines.answers("lock-range 33", INVALID_INDEX);
    lines.answers("lock-range 20", "LockPCRs");
    lines.answers("describe-nsm-locked", &description(&numbers(20)));

    let document = document(&lines.word("document"));
    assert!(document.ends_with(", public_key: null, user_data: null, nonce: null}"), "{document}");
    assert!(document.starts_with(&format!("{{module_id: {MODULE_ID}, digest: SHA384, timestamp: ")), "{document}");
    for attested in [format!("pcrs: {{0: {}, 1: ", "11".repeat(48)), format!("15: {}, 16: ", "00".repeat(48)), "17: ".into()] {
        assert!(document.contains(&attested), "{document}");
    }
    assert!(!document.contains("18: "), "a register that was not extended is not attested: {document}");
    let full = self::document(&lines.word("document-full"));
    let fields = format!(", public_key: {}, user_data: {}, nonce: {}}}", "03".repeat(1024), "01".repeat(1024), "02".repeat(1024));
    assert!(full.ends_with(&fields), "{full}");
    lines.answers("document-too-large", "{Error: InputTooLarge}");

    for number in 0..14 {
        lines.answers(&format!("broken {number}"), "{Error: InvalidOperation}");
    }
    lines.says("too-long", "90"); // EMSGSIZE, by the driver
    lines.says("threads", "100 of 100");
    lines.says("hwrng", "nsm-hwrng random");
    // The locks are the device's: a driver that is loaded anew finds them closed.
    lines.answers("extend-after-reload 16", READ_ONLY);
    lines.answers("lock-range 32", "LockPCRs");
    lines.answers("extend-locked 31", READ_ONLY);
    lines.answers("describe-nsm-last", &description(&numbers(32)));
}

/// The lines that `nsm-check` printed, without its mark.
struct Lines(Vec<String>);

impl Lines {
    /// Reads to the end of QEMU's output, telling `seen` every line when it comes. A QEMU that does not end is ended.
    fn read_from(qemu: &mut Child, mut seen: impl FnMut(&str)) -> Self {
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (line, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for text in output.split(b'\n').map_while(Result::ok) {
                let _ = line.send(String::from_utf8_lossy(&text).trim_end().to_owned());
            }
        });
        let mut all = Vec::new();
        let mut ours = Vec::new();
        loop {
            match lines.recv_timeout(PATIENCE) {
                Ok(text) => {
                    if let Some(text) = text.strip_prefix("nsm-check: ") {
                        seen(text);
                        ours.push(text.to_owned());
                    }
                    all.push(text);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    qemu.kill().unwrap();
                    panic!("the guest hangs; it said:\n{}", all.join("\n"));
                }
            }
        }
        reader.join().unwrap();
        assert!(ours.iter().any(|line| line.starts_with("done")), "the guest did not come to its end; it said:\n{}", all.join("\n"));
        Self(ours)
    }

    fn word(&self, name: &str) -> String {
        let found = self.0.iter().find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(' ')));
        found.unwrap_or_else(|| panic!("no line {name} in:\n{}", self.0.join("\n"))).trim().to_owned()
    }

    fn says(&self, name: &str, words: &str) {
        assert_eq!(self.word(name), words, "{name}");
    }

    /// The answer of that name, as text of its CBOR.
    fn answers(&self, name: &str, expected: &str) {
        assert_eq!(text(&decode(&hex::decode(self.word(name)).unwrap())), expected, "{name}");
    }
}

fn decode(bytes: &[u8]) -> Value {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).unwrap();
    assert!(rest.is_empty(), "bytes behind an answer");
    value
}

/// Something like diagnostic notation: byte strings in hex, text without quotes.
fn text(value: &Value) -> String {
    let join = |parts: Vec<String>| parts.join(", ");
    match value {
        Value::Text(text) => text.clone(),
        Value::Bytes(bytes) => hex::encode(bytes),
        Value::Bool(value) => value.to_string(),
        Value::Null => "null".into(),
        Value::Integer(number) => i128::from(*number).to_string(),
        Value::Array(values) => format!("[{}]", join(values.iter().map(text).collect())),
        Value::Map(entries) => {
            format!("{{{}}}", join(entries.iter().map(|(key, value)| format!("{}: {}", text(key), text(value))).collect()))
        }
        other => panic!("an answer holds {other:?}"),
    }
}

/// Verifies the document of an Attestation answer with the key of its certificate and gives its payload as text.
fn document(answer: &str) -> String {
    let answer = decode(&hex::decode(answer).unwrap()).into_map().unwrap().remove(0).1.into_map().unwrap().remove(0).1;
    let [protected, _, payload, signature]: [Value; 4] = decode(&answer.into_bytes().unwrap()).into_array().unwrap().try_into().unwrap();
    let mut covered = Vec::new();
    let structure = Value::Array(vec![Value::Text("Signature1".into()), protected, Value::Bytes(vec![]), payload.clone()]);
    ciborium::into_writer(&structure, &mut covered).unwrap();
    let payload = decode(payload.as_bytes().unwrap());
    let fields = payload.as_map().unwrap();
    let certificate = fields.iter().find(|(key, _)| key.as_text() == Some("certificate")).unwrap().1.as_bytes().unwrap();
    let certificate = Certificate::from_der(certificate).unwrap();
    let key = certificate.tbs_certificate().subject_public_key_info().subject_public_key.raw_bytes();
    let signature = Signature::from_slice(signature.as_bytes().unwrap()).unwrap();
    VerifyingKey::from_sec1_bytes(key).unwrap().verify(&covered, &signature).unwrap();
    text(&payload)
}

fn write_initrd(path: &Path) {
    let setup = Setup::locate();
    let mut tree = Tree::new();
    tree.file_from("init", 0o755, guest_program("nsm-check")).unwrap();
    tree.device("dev/console", 0o600, Device::Character, (5, 1)).unwrap();
    for module in ["virtio_mmio", "nsm"] {
        tree.file(format!("modules/{module}.ko"), 0o644, setup.module_bytes(module)).unwrap();
    }
    tree.write_to(File::create(path).unwrap()).unwrap();
}

fn start(initrd: &Path, nsm: &impl std::os::fd::AsFd) -> Child {
    let setup = Setup::locate();
    let mut qemu = setup.qemu();
    qemu.args(["-M", "microvm,acpi=on", "-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none"]);
    qemu.args(["-serial", "stdio", "-no-reboot", "-smp", "2", "-m", &format!("{}M", REGIONS * REGION_MIB)]);
    for region in 0..REGIONS {
        qemu.args(["-object", &format!("memory-backend-memfd,id=m{region},size={REGION_MIB}M,share=on")]);
        qemu.args(["-numa", &format!("node,memdev=m{region}{}", if region == 0 { ",cpus=0-1" } else { "" })]);
    }
    // Without its clock's speed a guest under TCG hangs on a busy host.
    let khz = tsc_khz();
    let cmdline = format!("console=ttyS0 quiet panic=-1 tsc_early_khz={khz} lpj={}", 2 * khz);
    qemu.arg("-kernel").arg(setup.kernel()).arg("-initrd").arg(initrd).args(["-append", &cmdline]);
    let fd = nsm.as_fd();
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap(); // QEMU inherits it
    qemu.args(["-chardev", &format!("socket,id=nsm,fd={}", fd.as_raw_fd())]);
    qemu.args(["-device", "vhost-user-test-device,chardev=nsm,virtio-id=33,num_vqs=1"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

fn tsc_khz() -> u64 {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpus.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a clock speed")]
    mhz.map_or(2_500_000, |mhz| (mhz * 1000.0) as u64)
}
