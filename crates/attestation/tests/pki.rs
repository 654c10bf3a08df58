//! The local PKI in files: first use, many at once, renewal at every level, clocks that jump, damage, crashes.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use std::error::Error as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use nitroxide_attestation::{At, Certificate, Claims, Pki, PkiError, Signer, SignerError, Timestamp, TrustedRoot, Verified, Verifier};

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;
const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";
const INSTANCE_FILE: &str = "instance-i-0123456789abcdef0.pem";
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const PCRS: [(u16, [u8; 48]); 1] = [(0, [1; 48])];

fn pki(folder: &tempfile::TempDir) -> Pki {
    Pki::at(folder.path().join("data/nitroxide/pki"))
}

/// A document of this moment, verified at this moment below this root.
fn verified(signer: &mut Signer, root: &[u8], now_ms: u64) -> Verified {
    let document = signer.document(now_ms, &Claims { pcrs: &PCRS, ..Claims::default() }).unwrap();
    Verifier::new([TrustedRoot::local(root)]).verify(&document, At::Time(Timestamp(now_ms))).unwrap()
}

fn refusal(pki: &Pki, now_ms: u64) -> PkiError {
    match pki.signer(MODULE_ID, now_ms).unwrap_err() {
        SignerError::Pki(error) => error,
        other => panic!("{other}"),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn first_use_makes_a_folder_and_keys_that_only_the_user_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    assert_eq!(pki.existing_root().unwrap(), None);
    assert!(!pki.folder().exists(), "looking makes nothing");
    let root = pki.root(NOW_MS).unwrap();
    assert_eq!(pki.existing_root().unwrap(), Some(root.clone()));
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    assert_eq!(signer.root(), root.der());
    assert_eq!(verified(&mut signer, root.der(), NOW_MS).chain.len(), 5);
    let mut files: Vec<String> = fs::read_dir(pki.folder()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["authority.pem", INSTANCE_FILE, "lock", "region.pem", "zonal.pem"]);
    assert_eq!(mode(pki.folder()), 0o700);
    assert!(files.iter().all(|file| mode(&pki.folder().join(file)) == 0o600));
    assert!(root.subject().contains("not AWS") && root.subject().contains("Nitroxide"), "{}", root.subject());
}

#[test]
fn later_signers_share_everything_but_the_leaf() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let [one, two] = [(); 2].map(|()| {
        let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
        let root = signer.root().to_vec();
        verified(&mut signer, &root, NOW_MS).chain
    });
    assert_eq!(one[..4], two[..4]);
    assert_ne!(one[4].key(), two[4].key());
}

#[test]
fn many_threads_at_a_fresh_pki_end_with_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let bundles: Vec<Vec<Certificate>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|_| {
                scope.spawn(|| {
                    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
                    let root = signer.root().to_vec();
                    let mut chain = verified(&mut signer, &root, NOW_MS).chain;
                    chain.pop();
                    chain
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(bundles.iter().all(|bundle| *bundle == bundles[0]));
}

/// This very program, as a process that only makes a signer: see below.
#[test]
fn many_processes_at_a_fresh_pki_end_with_one_root() {
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::at(folder.path().join("nitroxide/pki"));
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).expect("tests lie in target/debug/deps").join("examples/make-document");
    assert!(program.exists(), "`cargo build -p nitroxide-attestation --examples` makes {}", program.display());
    let start = || Command::new(&program).env("XDG_DATA_HOME", folder.path()).stdout(Stdio::piped()).spawn().unwrap();
    let children: Vec<_> = (0..12).map(|_| start()).collect();
    let documents: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap().stdout).collect();
    let root = pki.existing_root().unwrap().unwrap();
    let verifier = Verifier::new([TrustedRoot::local(root.der())]);
    for document in documents {
        verifier.verify(&document, At::now()).unwrap();
    }
}

/// Which levels of two chains are the same, root first.
fn same(one: &[Certificate], other: &[Certificate]) -> Vec<bool> {
    one.iter().zip(other).map(|(one, other)| one == other).collect()
}

#[test]
fn each_level_is_renewed_in_time_and_takes_those_below_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    let root = signer.root().to_vec();
    let first = verified(&mut signer, &root, NOW_MS).chain;
    for (after_ms, kept) in [
        (HOUR_MS, [true, true, true, true, true]),
        (2 * HOUR_MS - 3_000, [true, true, true, true, true]),
        (2 * HOUR_MS + 1_000, [true, true, true, true, false]),
        (18 * HOUR_MS, [true, true, true, true, false]),
        (21 * HOUR_MS, [true, true, true, false, false]),
        (4 * DAY_MS + 12 * HOUR_MS, [true, true, true, false, false]),
        (4 * DAY_MS + 17 * HOUR_MS, [true, true, false, false, false]),
        (14 * DAY_MS + 7 * HOUR_MS, [true, true, false, false, false]),
        (14 * DAY_MS + 11 * HOUR_MS, [true, false, false, false, false]),
        (3650 * DAY_MS, [true, false, false, false, false]),
    ] {
        let chain = verified(&mut signer, &root, NOW_MS + after_ms).chain;
        assert_eq!(same(&chain, &first), kept, "{} hours later", after_ms / HOUR_MS);
        assert_eq!(chain[4].key(), first[4].key());
        // All that is above the leaf outlasts it.
        assert!(chain[..4].iter().all(|certificate| certificate.ends() >= chain[4].ends()));
    }
}

#[test]
fn an_enclave_that_lives_for_a_year_gives_documents_that_verify_when_they_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    let root = signer.root().to_vec();
    for step in 0..100_u64 {
        verified(&mut signer, &root, NOW_MS + step * 88 * HOUR_MS);
    }
}

#[test]
fn a_clock_that_jumps_back_or_forward_gets_certificates_of_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let root = pki.root(NOW_MS - 3000 * DAY_MS).unwrap();
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    for now_ms in [NOW_MS, NOW_MS + 1000 * DAY_MS, NOW_MS - 2000 * DAY_MS, NOW_MS - 1000, NOW_MS + 30 * DAY_MS, NOW_MS] {
        verified(&mut signer, root.der(), now_ms);
        verified(&mut pki.signer(MODULE_ID, now_ms).unwrap(), root.der(), now_ms);
    }
}

#[test]
fn a_root_that_does_not_count_is_an_error_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let root = pki.root(NOW_MS).unwrap();
    for (now_ms, reason) in [(NOW_MS + 31 * 366 * DAY_MS, "expired"), (NOW_MS - 2 * HOUR_MS, "not yet valid")] {
        let error = refusal(&pki, now_ms);
        assert!(matches!(error, PkiError::Lapsed { .. }) && error.to_string().contains("set the clock right"), "{error}");
        assert!(error.source().unwrap().to_string().contains(reason));
    }
    assert_eq!(pki.existing_root().unwrap(), Some(root));
}

#[test]
fn the_last_certificates_end_with_the_root_and_are_used_to_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let root = pki.root(NOW_MS).unwrap();
    let ends_ms = root.ends().0;
    let mut signer = pki.signer(MODULE_ID, ends_ms - 10 * 60_000).unwrap();
    let first = verified(&mut signer, root.der(), ends_ms - 10 * 60_000).chain;
    let last = verified(&mut signer, root.der(), ends_ms - 1000).chain;
    assert_eq!(first, last, "nothing better can be made, so nothing is");
    assert!(signer.document(ends_ms + 1000, &Claims::default()).is_err());
}

/// What becomes of a file's text.
type Damage = fn(&str) -> String;

#[test]
fn damaged_files_are_named_and_never_replaced() {
    let damages: [(&str, Damage); 7] = [
        ("emptied", |_| String::new()),
        ("not text", |_| "\u{0}\u{1}".into()),
        ("cut", |text| text[..text.len() / 3].into()),
        ("without a key", |text| text.split("-----BEGIN PRIVATE").next().unwrap().into()),
        ("without a certificate", |text| text[text.find("-----BEGIN PRIVATE").unwrap()..].into()),
        ("twice", |text| format!("{text}{text}")),
        ("a letter changed", |text| text.replacen("MI", "XX", 1)),
    ];
    for file in ["authority.pem", "region.pem", "zonal.pem", INSTANCE_FILE] {
        for (what, damage) in damages {
            let folder = tempfile::tempdir().unwrap();
            let pki = pki(&folder);
            pki.signer(MODULE_ID, NOW_MS).unwrap();
            let path = pki.folder().join(file);
            let damaged = damage(&fs::read_to_string(&path).unwrap());
            fs::write(&path, &damaged).unwrap();
            let error = refusal(&pki, NOW_MS);
            assert!(matches!(error, PkiError::Content { .. } | PkiError::Pieces { .. }), "{file} {what}: {error}");
            assert!(error.to_string().contains(file) && error.to_string().contains("put back a copy"), "{file} {what}: {error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), damaged, "{file} {what}");
            if file == "authority.pem" {
                assert!(pki.root(NOW_MS).is_err() && pki.existing_root().is_err());
            }
        }
    }
}

#[test]
fn a_key_of_another_certificate_is_an_error() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [one, other] = [pki(&folders[0]), pki(&folders[1])];
    for pki in [&one, &other] {
        pki.root(NOW_MS).unwrap();
    }
    let text = |pki: &Pki| fs::read_to_string(pki.folder().join("authority.pem")).unwrap();
    let split = text(&one).find("-----BEGIN PRIVATE").unwrap();
    let (theirs, at) = (text(&other), text(&other).find("-----BEGIN PRIVATE").unwrap());
    fs::write(one.folder().join("authority.pem"), text(&one)[..split].to_owned() + &theirs[at..]).unwrap();
    assert!(matches!(refusal(&one, NOW_MS), PkiError::Pieces { .. }));
}

#[test]
fn files_and_folders_that_others_can_read_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    pki.signer(MODULE_ID, NOW_MS).unwrap();
    for (path, open, right) in [("authority.pem", 0o644, 0o600), ("zonal.pem", 0o620, 0o600), ("", 0o755, 0o700)] {
        let path = pki.folder().join(path);
        fs::set_permissions(&path, Permissions::from_mode(open)).unwrap();
        let error = refusal(&pki, NOW_MS);
        assert!(matches!(error, PkiError::Mode { mode, wanted, .. } if mode == open && wanted == right), "{error}");
        assert!(error.to_string().contains(&format!("chmod {right:04o}")), "{error}");
        fs::set_permissions(&path, Permissions::from_mode(right)).unwrap();
    }
    pki.signer(MODULE_ID, NOW_MS).unwrap();
}

#[test]
fn a_missing_root_above_other_certificates_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    pki.signer(MODULE_ID, NOW_MS).unwrap();
    fs::remove_file(pki.folder().join("authority.pem")).unwrap();
    // Also if but one of those below is left.
    for gone in ["", "region.pem", "zonal.pem"] {
        let _ = fs::remove_file(pki.folder().join(gone));
        assert!(matches!(refusal(&pki, NOW_MS), PkiError::NoAuthority { .. }), "{gone}");
        assert!(pki.root(NOW_MS).is_err());
    }
}

#[test]
fn a_crash_at_any_step_leaves_a_pki_that_goes_on() {
    let steps = ["authority.pem", "region.pem", "zonal.pem", INSTANCE_FILE];
    for crashed in 0..steps.len() {
        let folder = tempfile::tempdir().unwrap();
        let pki = pki(&folder);
        pki.signer(MODULE_ID, NOW_MS).unwrap();
        // As if the process had died while it wrote this file: half of it stands beside its place, and no later one is there.
        for (number, file) in steps.iter().enumerate().skip(crashed) {
            let path = pki.folder().join(file);
            if number == crashed {
                fs::write(path.with_extension("pem.new"), &fs::read(&path).unwrap()[..100]).unwrap();
            }
            fs::remove_file(path).unwrap();
        }
        let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
        let root = signer.root().to_vec();
        verified(&mut signer, &root, NOW_MS);
        assert!(fs::read_dir(pki.folder()).unwrap().all(|file| !file.unwrap().file_name().to_string_lossy().ends_with(".new")));
    }
}

#[test]
fn a_pki_that_breaks_later_stops_documents_only_when_the_leaf_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    let root = signer.root().to_vec();
    fs::write(pki.folder().join("authority.pem"), "").unwrap();
    verified(&mut signer, &root, NOW_MS + 3 * HOUR_MS - 60_000);
    assert!(matches!(signer.document(NOW_MS + 3 * HOUR_MS + 60_000, &Claims::default()), Err(SignerError::Pki(_))));
}

#[test]
fn a_signer_for_later_works_as_soon_as_its_pki_does() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let root = pki.root(NOW_MS).unwrap();
    let authority = pki.folder().join("authority.pem");
    let text = fs::read(&authority).unwrap();
    fs::write(&authority, "").unwrap();
    let mut signer = pki.signer_later(MODULE_ID).unwrap();
    assert!(signer.root().is_empty());
    assert!(matches!(signer.document(NOW_MS, &Claims::default()), Err(SignerError::Pki(_))));
    fs::write(&authority, text).unwrap();
    // Who asks all the time does not make it try all the time.
    assert!(matches!(signer.document(NOW_MS + 999, &Claims::default()), Err(SignerError::Rests(_))));
    verified(&mut signer, root.der(), NOW_MS + 1000);
    assert!(pki.signer_later("a b").is_err());
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("data"), "").unwrap();
    let error = refusal(&pki(&folder), NOW_MS);
    assert!(error.to_string().contains("data/nitroxide/pki"), "{error}");
    assert!(pki(&folder).look(NOW_MS).is_err());
}

#[test]
fn a_look_makes_nothing_and_says_what_a_signer_would_meet() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    pki.look(NOW_MS).unwrap();
    assert!(!folder.path().join("data").exists());
    pki.root(NOW_MS).unwrap();
    pki.look(NOW_MS).unwrap();
    assert!(matches!(pki.look(NOW_MS + 31 * 366 * DAY_MS), Err(PkiError::Lapsed { .. })));
    fs::set_permissions(pki.folder(), Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(pki.look(NOW_MS), Err(PkiError::Mode { .. })));
}

#[test]
fn names_that_are_paths_are_refused_before_a_file_is_named_after_them() {
    let folder = tempfile::tempdir().unwrap();
    for module_id in ["../x-enc1", "a/b-enc1", "-enc1", ""] {
        assert!(matches!(pki(&folder).signer(module_id, NOW_MS), Err(SignerError::Certificate(_))), "{module_id}");
    }
    assert!(!pki(&folder).folder().exists());
}

/// Holds a PKI's lock as another process would: a description of its own.
fn hold(pki: &Pki) -> fs::File {
    let lock = fs::File::create(pki.folder().join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    lock
}

/// The lock's holder never lets go, so a wait without end would never come back.
#[test]
fn a_lock_that_is_held_does_not_stop_what_only_reads() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let mut signer = pki.signer(MODULE_ID, NOW_MS).unwrap();
    let root = signer.root().to_vec();
    let _held = hold(&pki);
    pki.look(NOW_MS).unwrap();
    assert_eq!(pki.existing_root().unwrap().unwrap().der(), root);
    assert_eq!(pki.root(NOW_MS).unwrap().der(), root);
    verified(&mut pki.signer(MODULE_ID, NOW_MS).unwrap(), &root, NOW_MS);
    verified(&mut signer, &root, NOW_MS + 3 * HOUR_MS);
}

#[test]
fn a_lock_that_is_held_makes_what_would_write_busy() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    fs::create_dir_all(pki.folder()).unwrap();
    fs::set_permissions(pki.folder(), Permissions::from_mode(0o700)).unwrap();
    let held = hold(&pki);
    let error = refusal(&pki, NOW_MS);
    assert!(matches!(&error, PkiError::Busy { path } if path.ends_with("lock")) && error.to_string().contains("try again"), "{error}");
    assert!(matches!(pki.root(NOW_MS), Err(PkiError::Busy { .. })));
    drop(held);
    pki.signer(MODULE_ID, NOW_MS).unwrap();
}

#[test]
fn certificates_that_are_due_are_used_to_their_end_while_they_cannot_be_renewed() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let root = pki.signer(MODULE_ID, NOW_MS).unwrap().root().to_vec();
    let _held = hold(&pki);
    verified(&mut pki.signer(MODULE_ID, NOW_MS + 21 * HOUR_MS).unwrap(), &root, NOW_MS + 21 * HOUR_MS);
    assert!(matches!(refusal(&pki, NOW_MS + 24 * HOUR_MS), PkiError::Busy { .. }));
}

/// For root permissions are no obstacle: there the test shows that nothing is written.
#[test]
fn a_folder_that_can_only_be_read_is_enough_as_long_as_all_in_it_counts() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    let root = pki.signer(MODULE_ID, NOW_MS).unwrap().root().to_vec();
    fs::remove_file(pki.folder().join("lock")).unwrap();
    for file in fs::read_dir(pki.folder()).unwrap() {
        fs::set_permissions(file.unwrap().path(), Permissions::from_mode(0o400)).unwrap();
    }
    fs::set_permissions(pki.folder(), Permissions::from_mode(0o500)).unwrap();
    pki.look(NOW_MS).unwrap();
    assert_eq!(pki.root(NOW_MS).unwrap().der(), root);
    verified(&mut pki.signer(MODULE_ID, NOW_MS + HOUR_MS).unwrap(), &root, NOW_MS + HOUR_MS);
    assert!(!pki.folder().join("lock").exists());
    fs::set_permissions(pki.folder(), Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn what_is_made_belongs_to_whoever_has_the_folder_above() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    fs::create_dir(&home).unwrap();
    // As with `sudo -E`; only root can give a folder away, and for others everything is their own.
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&home, Some(65_534), Some(65_534)).unwrap();
    }
    let owner = fs::metadata(&home).unwrap().uid();
    let pki = Pki::at(home.join(".local/share/nitroxide/pki"));
    pki.look(NOW_MS).unwrap();
    verified(&mut pki.signer(MODULE_ID, NOW_MS).unwrap(), pki.root(NOW_MS).unwrap().der(), NOW_MS);
    let above = pki.folder().ancestors().take_while(|path| *path != home).map(Path::to_path_buf);
    let files = fs::read_dir(pki.folder()).unwrap().map(|entry| entry.unwrap().path());
    let made: Vec<_> = above.chain(files).collect();
    assert_eq!(made.len(), 4 + 5, "{made:?}");
    for path in made {
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o077), (owner, 0), "{}", path.display());
    }
}

#[test]
fn causes_stand_behind_their_error_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    pki.root(NOW_MS).unwrap();
    fs::write(pki.folder().join("authority.pem"), "").unwrap();
    let line = nitroxide_attestation::in_one_line(&pki.look(NOW_MS).unwrap_err());
    assert!(line.ends_with("made anew: It holds no certificate (a block that begins with `-----BEGIN CERTIFICATE-----`)."), "{line}");
}

#[test]
fn a_clock_before_1970_makes_no_documents() {
    let mut signer = Signer::local(MODULE_ID, NOW_MS).unwrap();
    for error in [signer.document(0, &Claims::default()).unwrap_err(), Signer::local(MODULE_ID, 0).unwrap_err()] {
        let SignerError::Certificate(error) = error else { panic!("{error}") };
        assert!(error.to_string().contains("1970-01-01T00:00:00Z"), "{error}");
    }
}
