//! The X.509 certificates behind a document's key: a local root and the leaf below it.
//!
//! [`root`] and [`leaf`] issue them with P-384 and ecdsa-with-SHA384; [`Signer`](crate::Signer) decides when. Names say plainly
//! that they are not AWS's. Profile: RFC 5280 sections 4.1 and 4.2.

use p384::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use p384::elliptic_curve::Generate as _;
use std::str::FromStr as _;
use std::time::Duration;
use x509_cert::builder::profile::BuilderProfile;
use x509_cert::builder::{Builder as _, CertificateBuilder};
use x509_cert::certificate::TbsCertificate;
use x509_cert::der::{DateTime, Encode as _};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, KeyUsages, SubjectKeyIdentifier};
use x509_cert::ext::{Extension, ToExtension as _};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{SubjectPublicKeyInfoOwned, SubjectPublicKeyInfoRef};
use x509_cert::time::{Time, Validity};

/// The longest common name (bytes) a certificate may carry: ub-common-name of RFC 5280 appendix A.1.
pub(crate) const MAX_COMMON_NAME_BYTES: usize = 64;

/// Who every certificate of ours says it comes from.
const ORGANISATION: &str = "OU=Local test identity - not AWS,O=Nitroxide";

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum CertificateError {
    /// Module id `{0}` cannot be the name in a certificate; use 1 to 64 ASCII letters, digits, `-`, `.` or `_`.
    Name(String),
    /// Milliseconds {0} since 1970 are not a date a certificate can carry; set the clock.
    Date(u64),
    /// The certificate could not be encoded or signed: {0}.
    Build(String),
    /// The kernel gave no random numbers for a key or serial number: {0}.
    Random(String),
}

/// From when until when a certificate counts, in milliseconds since 1970-01-01 UTC; written with whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Period {
    /// The first moment.
    pub(crate) from_ms: u64,
    /// The last moment.
    pub(crate) until_ms: u64,
}

/// The two places in the chain.
enum Place {
    Root { subject: Name },
    Leaf { subject: Name, issuer: Name },
}

impl BuilderProfile for Place {
    fn get_issuer(&self, subject: &Name) -> Name {
        match self {
            Self::Root { .. } => subject.clone(),
            Self::Leaf { issuer, .. } => issuer.clone(),
        }
    }

    fn get_subject(&self) -> Name {
        match self {
            Self::Root { subject } | Self::Leaf { subject, .. } => subject.clone(),
        }
    }

    fn build_extensions(
        &self,
        key: SubjectPublicKeyInfoRef<'_>,
        issuer_key: SubjectPublicKeyInfoRef<'_>,
        certificate: &TbsCertificate,
    ) -> x509_cert::builder::Result<Vec<Extension>> {
        let (constraints, usage) = match self {
            Self::Root { .. } => (
                BasicConstraints { ca: true, path_len_constraint: None },
                KeyUsages::KeyCertSign | KeyUsages::CRLSign | KeyUsages::DigitalSignature,
            ),
            Self::Leaf { .. } => (BasicConstraints { ca: false, path_len_constraint: None }, KeyUsages::DigitalSignature.into()),
        };
        let subject = certificate.subject();
        let mut extensions: Vec<Extension> = Vec::new();
        extensions.push(constraints.to_extension(subject, &extensions)?);
        extensions.push(KeyUsage(usage).to_extension(subject, &extensions)?);
        extensions.push(SubjectKeyIdentifier::try_from(key)?.to_extension(subject, &extensions)?);
        if matches!(self, Self::Leaf { .. }) {
            extensions.push(AuthorityKeyIdentifier::try_from(issuer_key)?.to_extension(subject, &extensions)?);
        }
        Ok(extensions)
    }
}

/// Makes a P-384 key from the kernel's random numbers.
pub(crate) fn new_key() -> Result<SigningKey, CertificateError> {
    SigningKey::try_generate().map_err(|error| CertificateError::Random(error.to_string()))
}

/// Issues the self-signed certificate (DER) of `key`.
pub(crate) fn root(key: &SigningKey, period: Period) -> Result<Vec<u8>, CertificateError> {
    issue(Place::Root { subject: root_name()? }, key.verifying_key(), key, period)
}

/// Issues the certificate (DER) of `key` in the name of `module_id`, signed by the root's key.
pub(crate) fn leaf(module_id: &str, key: &VerifyingKey, root_key: &SigningKey, period: Period) -> Result<Vec<u8>, CertificateError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if module_id.is_empty() || module_id.len() > MAX_COMMON_NAME_BYTES || !module_id.bytes().all(allowed) {
        return Err(CertificateError::Name(module_id.to_owned()));
    }
    issue(Place::Leaf { subject: name(module_id)?, issuer: root_name()? }, key, root_key, period)
}

fn issue(place: Place, key: &VerifyingKey, issuer_key: &SigningKey, period: Period) -> Result<Vec<u8>, CertificateError> {
    let serial: [u8; 16] = <[u8; 16]>::try_generate().map_err(|error| CertificateError::Random(error.to_string()))?;
    let serial = SerialNumber::new(&serial).map_err(build)?;
    let validity = Validity::new(time(period.from_ms)?, time(period.until_ms)?);
    let key = SubjectPublicKeyInfoOwned::from_key(key).map_err(build)?;
    let builder = CertificateBuilder::new(place, serial, validity, key).map_err(build)?;
    let certificate = builder.build::<_, DerSignature>(issuer_key).map_err(build)?;
    certificate.to_der().map_err(build)
}

fn root_name() -> Result<Name, CertificateError> {
    name("Nitroxide local root")
}

/// `common_name` holds no character that RFC 4514 gives a meaning.
fn name(common_name: &str) -> Result<Name, CertificateError> {
    // The string form is written most specific first (RFC 4514 section 2.1), the encoded form the other way round.
    Name::from_str(&format!("CN={common_name},{ORGANISATION}")).map_err(build)
}

fn time(ms: u64) -> Result<Time, CertificateError> {
    DateTime::from_unix_duration(Duration::from_secs(ms / 1000)).map(Time::from).map_err(|_| CertificateError::Date(ms))
}

fn build(error: impl std::fmt::Display) -> CertificateError {
    CertificateError::Build(error.to_string())
}
