//! Verifying a document: whose it is, whether it is whole, and whether it says what is expected.
//!
//! [`Verifier`] holds the trusted roots and the expectations; [`Verifier::verify`] gives a [`Verified`] or the first check that fails. The
//! order: form, root, chain without signatures, the document's signature, the chain's signatures, debug mode, expectations. So what a
//! document says is only compared once it is known to be genuine. Rules: docs/attestation.md, "What is checked".

use crate::certificate::{Certificate, CertificateFault, Timestamp};
use crate::chain::{self, ChainFault, Place};
use crate::cose::{Envelope, EnvelopeError};
use crate::document::{Document, DocumentError};
use crate::keyfile::{KeyFile, KeyFileError};
use std::fmt;
use subtle::ConstantTimeEq as _;

/// SHA-256 of AWS's root certificate for Nitro Enclaves (DER), `CN=aws.nitro-enclaves`, which AWS publishes; it ends in 2049.
pub const AWS_ROOT_FINGERPRINT: [u8; 32] = [
    0x64, 0x1a, 0x03, 0x21, 0xa3, 0xe2, 0x44, 0xef, 0xe4, 0x56, 0x46, 0x31, 0x95, 0xd6, 0x06, 0x31, 0x7e, 0xd7, 0xcd, 0xcc, 0x3c, 0x17,
    0x56, 0xe0, 0x98, 0x93, 0xf3, 0xc6, 0x8f, 0x79, 0xbb, 0x5b,
];

/// Whose root a document hangs from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootKind {
    /// AWS's: the document comes from a real Nitro Enclave.
    Aws,
    /// The one of a Nitroxide on some machine: good for tests, worth as much as that machine.
    Local,
    /// One that the caller named.
    Given,
}

impl fmt::Display for RootKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aws => "AWS's root for Nitro Enclaves",
            Self::Local => "local Nitroxide root \u{2013} not AWS",
            Self::Given => "the root that was given \u{2013} not AWS",
        })
    }
}

/// A root certificate that is trusted, known by the SHA-256 of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustedRoot {
    kind: RootKind,
    fingerprint: [u8; 32],
}

impl TrustedRoot {
    /// AWS's root.
    pub const AWS: Self = Self { kind: RootKind::Aws, fingerprint: AWS_ROOT_FINGERPRINT };

    /// The root (DER) of a local Nitroxide, e.g. [`crate::Signer::root`].
    #[must_use]
    pub fn local(der: &[u8]) -> Self {
        Self::of(RootKind::Local, der)
    }

    /// Another root (DER).
    #[must_use]
    pub fn given(der: &[u8]) -> Self {
        Self::of(RootKind::Given, der)
    }

    /// The roots in a file of the caller's: one in DER, or any number in PEM.
    ///
    /// # Errors
    ///
    /// [`KeyFileError`] if there is none, or one that cannot be judged.
    pub fn read(content: &[u8]) -> Result<Vec<Self>, KeyFileError> {
        const SEQUENCE: u8 = 0x30; // how DER begins; as text it is a zero, which PEM does not begin with
        if content.first() == Some(&SEQUENCE) {
            let root = Certificate::from_der(content).map_err(|fault| KeyFileError::Certificate { number: 1, fault })?;
            return Ok(vec![Self::given(root.der())]);
        }
        let roots: Vec<Self> = KeyFile::parse(content)?.certificates.iter().map(|root| Self::given(root.der())).collect();
        if roots.is_empty() { Err(KeyFileError::NoCertificate) } else { Ok(roots) }
    }

    /// A root is AWS's whoever names it.
    fn of(kind: RootKind, der: &[u8]) -> Self {
        let fingerprint = crate::certificate::fingerprint(der);
        if fingerprint == AWS_ROOT_FINGERPRINT { Self::AWS } else { Self { kind, fingerprint } }
    }
}

/// At which time certificates have to be valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// When the document says that it was made: whether it *was* good. Its freshness then rests on the nonce alone.
    Document,
    /// At this time.
    Time(Timestamp),
}

impl At {
    /// Now, by this machine's clock.
    #[must_use]
    pub fn now() -> Self {
        Self::Time(Timestamp::now())
    }
}

/// Why a document is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub enum VerifyError {
    /// The bytes are no attestation document.
    Document(#[from] DocumentError),
    /// The certificate {place} (`{subject}`) does not hold.
    Certificate {
        /// Where it stands.
        place: Place,
        /// Whose it is, `unreadable` if that cannot be said.
        subject: String,
        /// What is wrong with it.
        #[source]
        fault: CertificateFault,
    },
    /// The document hangs from the root `{subject}` with SHA-256 {fingerprint}, which is not trusted here.
    UnknownRoot {
        /// Whose it says to be.
        subject: String,
        /// In hex.
        fingerprint: String,
    },
    /// The signature of the document was not made over its content with the key of its certificate.
    Signature,
    /// The document is of an enclave in debug mode (PCR0, PCR1 and PCR2 are zero), so it says nothing about what runs there.
    Debug,
    /// PCR{index} is {found} instead of {expected}.
    Pcr {
        /// Which register.
        index: u8,
        /// In hex; `absent` if the document does not have it.
        found: String,
        /// In hex.
        expected: String,
    },
    /// The field `{field}` is {found}, not what is expected.
    Field {
        /// `nonce`, `user_data` or `public_key`.
        field: &'static str,
        /// `absent` or `another value`.
        found: &'static str,
    },
}

impl From<EnvelopeError> for VerifyError {
    fn from(error: EnvelopeError) -> Self {
        Self::Document(error.into())
    }
}

/// A document that is genuine below one of the trusted roots, at a time, and says what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// What it says.
    pub document: Document,
    /// Whose root it hangs from. Decide by this: a local root proves something about a test machine only.
    pub root: RootKind,
    /// The certificates, root first, the signing one last.
    pub chain: Vec<Certificate>,
    /// The time for which the certificates were checked.
    pub at: Timestamp,
}

/// Trusted roots and expectations.
///
/// ```
/// use nitroxide_attestation::{At, Claims, Signer, TrustedRoot, Verifier};
///
/// // A document as an enclave gets it; this one from a key that lives in this program only.
/// let now_ms = 1_795_500_000_000;
/// let mut signer = Signer::local("i-0000000000000000-enc0123456789abcdef", now_ms)?;
/// let pcrs = [(0, [0x11; 48]), (1, [0x22; 48]), (2, [0x33; 48])];
/// let document = signer.document(now_ms, &Claims { pcrs: &pcrs, nonce: Some(b"4711"), ..Claims::default() })?;
///
/// // AWS's root and this signer's are trusted; PCR0 and the nonce must be what we know.
/// let verifier = Verifier::new([TrustedRoot::AWS, TrustedRoot::local(signer.root())]).pcr(0, [0x11; 48]).nonce(b"4711");
/// let verified = verifier.verify(&document, At::Document)?;
/// assert_eq!(verified.root.to_string(), "local Nitroxide root – not AWS");
///
/// // Whoever trusts AWS only does not believe it.
/// assert!(Verifier::new([TrustedRoot::AWS]).verify(&document, At::Document).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Verifier {
    roots: Vec<TrustedRoot>,
    pcrs: Vec<(u8, Vec<u8>)>,
    nonce: Option<Vec<u8>>,
    user_data: Option<Vec<u8>>,
    public_key: Option<Vec<u8>>,
    allow_debug: bool,
}

impl Verifier {
    /// A verifier that trusts `roots` and expects nothing yet. It refuses documents of debug mode.
    #[must_use]
    pub fn new(roots: impl IntoIterator<Item = TrustedRoot>) -> Self {
        Self { roots: roots.into_iter().collect(), ..Self::default() }
    }

    /// Expects a register to have a value; one that the document lacks is a failure. Every expectation counts, also several of one register.
    #[must_use]
    pub fn pcr(mut self, index: u8, value: impl Into<Vec<u8>>) -> Self {
        self.pcrs.push((index, value.into()));
        self
    }

    /// Expects the nonce that the asker sent: the only proof that a document is fresh.
    #[must_use]
    pub fn nonce(mut self, nonce: impl Into<Vec<u8>>) -> Self {
        self.nonce = Some(nonce.into());
        self
    }

    /// Expects user data.
    #[must_use]
    pub fn user_data(mut self, user_data: impl Into<Vec<u8>>) -> Self {
        self.user_data = Some(user_data.into());
        self
    }

    /// Expects a public key.
    #[must_use]
    pub fn public_key(mut self, public_key: impl Into<Vec<u8>>) -> Self {
        self.public_key = Some(public_key.into());
        self
    }

    /// Also takes documents of enclaves in debug mode, which say nothing about what runs there.
    #[must_use]
    pub fn allow_debug(mut self, allow: bool) -> Self {
        self.allow_debug = allow;
        self
    }

    /// Verifies a document (raw bytes, not base64).
    ///
    /// # Errors
    ///
    /// [`VerifyError`]: the first check that fails, and where.
    pub fn verify(&self, bytes: &[u8], at: At) -> Result<Verified, VerifyError> {
        let envelope = Envelope::open(bytes)?;
        let document = Document::of_payload(envelope.payload)?;
        let (bundle, leaf) = certificates(&document)?;
        let root = self.root(&bundle)?;
        let at = match at {
            At::Document => Timestamp(document.timestamp_ms),
            At::Time(time) => time,
        };
        let located = |fault| locate(&bundle, &leaf, fault);
        chain::check(&bundle, &leaf, at).map_err(located)?;
        envelope.check(leaf.key()).map_err(|_| VerifyError::Signature)?;
        chain::check_signatures(&bundle, &leaf).map_err(located)?;
        self.compare(&document)?;
        let chain = bundle.into_iter().chain([leaf]).collect();
        Ok(Verified { document, root, chain, at })
    }

    fn root(&self, bundle: &[Certificate]) -> Result<RootKind, VerifyError> {
        let root = bundle.first().ok_or(DocumentError::Missing("cabundle"))?;
        let fingerprint = root.fingerprint();
        let trusted = self.roots.iter().find(|trusted| trusted.fingerprint == fingerprint);
        let unknown = || VerifyError::UnknownRoot { subject: root.subject(), fingerprint: hex::encode(fingerprint) };
        trusted.map(|trusted| trusted.kind).ok_or_else(unknown)
    }

    fn compare(&self, document: &Document) -> Result<(), VerifyError> {
        if !self.allow_debug && document.is_debug() {
            return Err(VerifyError::Debug);
        }
        for (index, expected) in &self.pcrs {
            let found = document.pcrs.get(index);
            if !found.is_some_and(|found| equal(found, expected)) {
                let found = found.map_or_else(|| "absent".into(), hex::encode);
                return Err(VerifyError::Pcr { index: *index, found, expected: hex::encode(expected) });
            }
        }
        for (field, expected, found) in [
            ("nonce", &self.nonce, &document.nonce),
            ("user_data", &self.user_data, &document.user_data),
            ("public_key", &self.public_key, &document.public_key),
        ] {
            match (expected, found) {
                (Some(_), None) => return Err(VerifyError::Field { field, found: "absent" }),
                (Some(expected), Some(found)) if !equal(expected, found) => {
                    return Err(VerifyError::Field { field, found: "another value" });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// In a time that depends on the lengths alone: whoever asks again and again must not learn a nonce byte by byte.
fn equal(one: &[u8], other: &[u8]) -> bool {
    bool::from(one.ct_eq(other))
}

fn certificates(document: &Document) -> Result<(Vec<Certificate>, Certificate), VerifyError> {
    let read = |place, der: &[u8]| {
        Certificate::from_der(der).map_err(|fault| VerifyError::Certificate { place, subject: "unreadable".into(), fault })
    };
    let bundle = document.cabundle.iter().enumerate().map(|(index, der)| read(Place::Bundle(index), der)).collect::<Result<_, _>>()?;
    Ok((bundle, read(Place::Leaf, &document.certificate)?))
}

fn locate(bundle: &[Certificate], leaf: &Certificate, fault: ChainFault) -> VerifyError {
    let ChainFault { place, fault } = fault;
    let certificate = match place {
        Place::Bundle(index) => bundle.get(index).unwrap_or(leaf),
        Place::Leaf => leaf,
    };
    VerifyError::Certificate { place, subject: certificate.subject(), fault }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cose;
    use crate::issue::{self, Link};
    use crate::level::Level;
    use crate::payload::Payload;

    const AWS_ROOT: &[u8] = include_bytes!("../tests/data/aws-nitro-enclaves-root.der");
    const NOW: Timestamp = Timestamp(1_795_500_000_000);
    const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";

    /// A document below this root with everything as it should be, made by whoever has this key.
    fn document_below(root: Link) -> Vec<u8> {
        let mut links = vec![root];
        for level in [Level::Region, Level::Zonal, Level::Instance] {
            let link = issue::authority(level, "0123456789abcdef", links.last().unwrap(), NOW).unwrap();
            links.push(link);
        }
        let key = issue::new_key().unwrap();
        let leaf = issue::leaf(MODULE_ID, key.verifying_key(), links.last().unwrap(), NOW).unwrap();
        let cabundle: Vec<Vec<u8>> = links.iter().map(|link| link.certificate.der().to_vec()).collect();
        let payload = Payload {
            module_id: MODULE_ID,
            timestamp_ms: NOW.0,
            pcrs: &[(0, [1; 48])],
            certificate: leaf.der(),
            cabundle: &cabundle,
            public_key: None,
            user_data: None,
            nonce: None,
        };
        cose::sign1(&key, &payload.encode()).unwrap()
    }

    #[test]
    fn whoever_only_copies_awss_root_is_not_believed() {
        let forger = Link { certificate: Certificate::from_der(AWS_ROOT).unwrap(), key: issue::new_key().unwrap() };
        let error = Verifier::new([TrustedRoot::AWS]).verify(&document_below(forger), At::Document).unwrap_err();
        assert!(
            matches!(&error, VerifyError::Certificate { place: Place::Bundle(1), fault: CertificateFault::Signature, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn the_same_document_below_the_forgers_own_root_is_good_where_that_is_trusted() {
        let root = issue::root(NOW).unwrap();
        let trusted = TrustedRoot::given(root.certificate.der());
        assert_eq!(Verifier::new([trusted]).verify(&document_below(root), At::Document).unwrap().root, RootKind::Given);
    }

    #[test]
    fn two_values_of_one_register_are_never_both_there() {
        let root = issue::root(NOW).unwrap();
        let verifier = Verifier::new([TrustedRoot::given(root.certificate.der())]).pcr(0, [2; 48]).pcr(0, [1; 48]);
        let error = verifier.verify(&document_below(root), At::Document).unwrap_err();
        assert!(matches!(&error, VerifyError::Pcr { index: 0, .. }), "{error:?}");
    }

    #[test]
    fn roots_are_read_from_der_and_pem_and_nothing_else() {
        let root = Certificate::from_der(AWS_ROOT).unwrap();
        assert_eq!(TrustedRoot::read(AWS_ROOT), Ok(vec![TrustedRoot::AWS]));
        assert_eq!(TrustedRoot::read(crate::to_pem(&root).repeat(2).as_bytes()), Ok(vec![TrustedRoot::AWS; 2]));
        assert_eq!(TrustedRoot::read(b""), Err(KeyFileError::NoCertificate));
        assert!(TrustedRoot::read(&AWS_ROOT[..100]).is_err());
    }
}
