//! Authorities of the user's own: roots and intermediates that are taken, and what is said of those that are not.

#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use std::error::Error;
use std::fs;

use nitroxide_attestation::{At, CertificateFault, Claims, ImportError, KeyFileError, Pki, PkiError, Timestamp, TrustedRoot, Verifier};

/// 2026-11-24 06:00:00 UTC.
const NOW_MS: u64 = 1_795_500_000_000;
const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";
const YEAR_MS: u64 = 365 * 86_400_000;

/// Somebody's authorities with their keys, as text: a PKI in a folder of its own. Certificates from `lowest` up to the root.
struct Company {
    _folder: tempfile::TempDir,
    pki: Pki,
}

impl Company {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pki = Pki::at(folder.path().join("pki"));
        pki.signer(MODULE_ID, NOW_MS).unwrap();
        Self { _folder: folder, pki }
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.pki.folder().join(format!("{name}.pem"))).unwrap()
    }

    fn certificate(&self, name: &str) -> String {
        let text = self.file(name);
        text[..text.find("-----BEGIN PRIVATE").unwrap()].to_owned()
    }

    fn key(&self, name: &str) -> String {
        let text = self.file(name);
        text[text.find("-----BEGIN PRIVATE").unwrap()..].to_owned()
    }

    fn certificates(&self, names: &[&str]) -> String {
        names.iter().map(|name| self.certificate(name)).collect()
    }
}

struct Home {
    _folder: tempfile::TempDir,
    pki: Pki,
}

fn home() -> Home {
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::at(folder.path().join("pki"));
    Home { _folder: folder, pki }
}

fn refusal(certificates: &str, key: &str) -> ImportError {
    let home = home();
    let error = home.pki.import(certificates.as_bytes(), key.as_bytes(), false, NOW_MS).unwrap_err();
    assert_eq!(home.pki.existing_root().unwrap(), None, "a refused import leaves nothing");
    match error {
        PkiError::Import(error) => error,
        other => panic!("{other}"),
    }
}

/// The causes below a message.
fn cause(error: &ImportError) -> String {
    error.source().unwrap().to_string()
}

#[test]
fn an_imported_root_stands_above_documents_of_five_levels() {
    let (company, home) = (Company::new(), home());
    let root = home.pki.import(company.certificate("authority").as_bytes(), company.key("authority").as_bytes(), false, NOW_MS).unwrap();
    assert_eq!(Some(root.clone()), company.pki.existing_root().unwrap());
    let document = home.pki.signer(MODULE_ID, NOW_MS).unwrap().document(NOW_MS, &Claims { pcrs: &[(0, [1; 48])], ..Claims::default() });
    let verified = Verifier::new([TrustedRoot::given(root.der())]).verify(&document.unwrap(), At::Time(Timestamp(NOW_MS))).unwrap();
    assert_eq!(verified.chain.len(), 5);
    assert_eq!(verified.chain[0], root);
}

#[test]
fn imported_intermediates_take_the_place_of_levels_in_any_order_of_the_file() {
    let company = Company::new();
    for (names, lowest) in
        [(&["region", "authority"][..], "region"), (&["authority", "region"], "region"), (&["zonal", "authority", "region"], "zonal")]
    {
        let home = home();
        let root = home.pki.import(company.certificates(names).as_bytes(), company.key(lowest).as_bytes(), false, NOW_MS).unwrap();
        let mut signer = home.pki.signer(MODULE_ID, NOW_MS).unwrap();
        let document = signer.document(NOW_MS, &Claims { pcrs: &[(0, [1; 48])], ..Claims::default() }).unwrap();
        let verified = Verifier::new([TrustedRoot::given(root.der())]).verify(&document, At::Time(Timestamp(NOW_MS))).unwrap();
        assert_eq!(verified.chain.len(), 5, "{names:?}");
        assert_eq!(home.pki.root(NOW_MS).unwrap(), root);
    }
}

#[test]
fn an_authority_that_is_there_is_only_replaced_on_demand_and_its_levels_with_it() {
    let (company, home) = (Company::new(), home());
    let mut signer = home.pki.signer(MODULE_ID, NOW_MS).unwrap();
    let old = home.pki.root(NOW_MS).unwrap();
    let (certificate, key) = (company.certificate("authority"), company.key("authority"));
    let error = home.pki.import(certificate.as_bytes(), key.as_bytes(), false, NOW_MS).unwrap_err();
    assert!(matches!(error, PkiError::Exists), "{error}");
    assert_eq!(home.pki.root(NOW_MS).unwrap(), old);
    let new = home.pki.import(certificate.as_bytes(), key.as_bytes(), true, NOW_MS).unwrap();
    assert_ne!(new, old);
    let later = NOW_MS + 10_800_000; // the running enclave's leaf ends
    let document = signer.document(later, &Claims { pcrs: &[(0, [1; 48])], ..Claims::default() }).unwrap();
    Verifier::new([TrustedRoot::local(new.der())]).verify(&document, At::Time(Timestamp(later))).unwrap();
}

#[test]
fn a_key_of_something_else_is_refused() {
    let company = Company::new();
    assert_eq!(refusal(&company.certificate("authority"), &company.key("region")), ImportError::Mismatch);
}

#[test]
fn an_intermediate_without_its_root_is_refused() {
    let company = Company::new();
    let error = refusal(&company.certificate("region"), &company.key("region"));
    assert!(matches!(&error, ImportError::NoRoot { .. }) && error.to_string().contains("add the certificates above it"), "{error}");
}

#[test]
fn certificates_that_do_not_belong_are_refused() {
    let company = Company::new();
    let error = refusal(&company.certificates(&["authority", "region"]), &company.key("authority"));
    assert!(matches!(&error, ImportError::Stray(_)), "{error}");
}

#[test]
fn a_path_length_that_leaves_no_room_is_refused() {
    let company = Company::new();
    let names = ["authority", "region", "zonal", "instance-i-0123456789abcdef0"];
    let error = refusal(&company.certificates(&names), &company.key(names[3]));
    assert!(matches!(&error, ImportError::Certificate { fault: CertificateFault::PathLength { .. }, .. }), "{error}");
}

#[test]
fn an_authority_that_does_not_count_today_is_refused() {
    let (company, home) = (Company::new(), home());
    let error = home
        .pki
        .import(company.certificates(&["authority", "region"]).as_bytes(), company.key("region").as_bytes(), false, NOW_MS + YEAR_MS)
        .unwrap_err();
    let PkiError::Import(error) = error else { panic!("{error}") };
    assert!(cause(&error).contains("expired"), "{error}");
}

#[test]
fn other_curves_and_algorithms_are_refused() {
    let data = |name: &str| fs::read_to_string(format!("{}/../eif/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let error = refusal(&data("p256.cert.pem"), &data("p256.key.pem"));
    assert!(matches!(&error, ImportError::Certificates(KeyFileError::Certificate { number: 1, .. })), "{error}");
    let error = refusal(&data("rsa.cert.pem"), &data("p384.key.pem"));
    assert!(matches!(&error, ImportError::Certificates(KeyFileError::Certificate { .. })), "{error}");
    let error = refusal(&Company::new().certificate("authority"), &data("p256.key.pem"));
    assert_eq!(error, ImportError::Key(KeyFileError::Key));
}

#[test]
fn texts_without_what_is_needed_are_refused() {
    let company = Company::new();
    let (certificate, key) = (company.certificate("authority"), company.key("authority"));
    assert_eq!(refusal("", &key), ImportError::Certificates(KeyFileError::NoCertificate));
    assert_eq!(refusal(&certificate, ""), ImportError::Key(KeyFileError::NoKey));
    assert_eq!(refusal(&certificate, &(key.clone() + &key)), ImportError::Key(KeyFileError::SeveralKeys));
    assert_eq!(refusal(&certificate, &key.replace(" PRIVATE", " ENCRYPTED PRIVATE")), ImportError::Key(KeyFileError::EncryptedKey));
    assert_eq!(refusal(&certificate, &"x".repeat(70_000)), ImportError::Key(KeyFileError::TooLong));
    assert_eq!(refusal(&certificate.repeat(9), &key), ImportError::Certificates(KeyFileError::TooManyCertificates));
    assert!(matches!(refusal(&certificate[..certificate.len() - 5], &key), ImportError::Certificates(KeyFileError::Pem(_))));
}

#[test]
fn a_key_in_openssls_older_form_is_taken() {
    use p384::pkcs8::DecodePrivateKey as _;
    let (company, home) = (Company::new(), home());
    let key = p384::SecretKey::from_pkcs8_pem(&company.key("authority")).unwrap();
    let sec1 = key.to_sec1_pem(p384::pkcs8::LineEnding::LF).unwrap();
    assert!(sec1.contains("BEGIN EC PRIVATE KEY"));
    home.pki.import(company.certificate("authority").as_bytes(), sec1.as_bytes(), false, NOW_MS).unwrap();
}

/// Made with OpenSSL: a root with intermediates, and the key of the last; none of the certificates has more than 1024 bytes.
fn refused_file(name: &str) -> ImportError {
    let text = fs::read_to_string(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let home = home();
    let now_ms = NOW_MS + YEAR_MS;
    let error = home.pki.import(text.as_bytes(), text.as_bytes(), false, now_ms).unwrap_err();
    assert_eq!(home.pki.existing_root().unwrap(), None, "a refused import leaves nothing");
    let PkiError::Import(error) = error else { panic!("{error}") };
    error
}

#[test]
fn an_authority_with_a_name_too_long_for_certificates_below_it_is_refused() {
    let error = refused_file("long-name.pem");
    assert!(matches!(&error, ImportError::TooLongBelow { above, length: 1025.., .. } if above.contains("Long name")), "{error}");
}

#[test]
fn an_authority_below_so_much_that_documents_would_not_fit_a_response_is_refused() {
    let error = refused_file("long-chain.pem");
    assert!(matches!(&error, ImportError::DocumentTooLong { length: 12_289.., .. }), "{error}");
}
