//! One X.509 certificate as documents carry them: P-384, ecdsa-with-SHA384, version 3.
//!
//! [`Certificate::from_der`] reads one and refuses what cannot be judged; [`crate::chain`] judges several together. Profile: RFC 5280
//! sections 4.1, 4.2 and 6.1.

use p384::ecdsa::signature::Verifier as _;
use p384::ecdsa::{DerSignature, VerifyingKey};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_cert::certificate::Version;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::oid::AssociatedOid as _;
use x509_cert::der::{DateTime, Decode as _, Encode as _};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, SubjectKeyIdentifier};
use x509_cert::name::Name;

const ECDSA_WITH_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const SECP384R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// What is wrong with a certificate, by itself or in its place of a chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub enum CertificateFault {
    /// It is not an X.509 certificate in DER: {0}.
    Malformed(String),
    /// It is not encoded in the one way that DER allows.
    NotDer,
    /// It is not of version 3.
    Version,
    /// It is signed with {0}, not with ecdsa-with-SHA384.
    Algorithm(String),
    /// Its key is not on the curve P-384.
    Curve,
    /// Its extension {0} stands there twice.
    RepeatedExtension(String),
    /// Its extension {0} is marked critical, and it is not known here what it means.
    UnknownCriticalExtension(String),
    /// Its extension {oid} cannot be read: {reason}.
    Extension {
        /// Which.
        oid: String,
        /// What the decoder says.
        reason: String,
    },
    /// It is not yet valid: it begins on {begins}, and the time of the check is {at}.
    NotYetValid {
        /// Its first moment.
        begins: Timestamp,
        /// The time of the check.
        at: Timestamp,
    },
    /// It has expired: it ended on {ended}, and the time of the check is {at}.
    Expired {
        /// Its last moment.
        ended: Timestamp,
        /// The time of the check.
        at: Timestamp,
    },
    /// Its issuer is `{named}`, but the certificate above it is that of `{above}`.
    Issuer {
        /// Whom it names.
        named: String,
        /// Who is there.
        above: String,
    },
    /// Its authority key identifier is not the subject key identifier of the certificate above it.
    KeyIdentifier,
    /// Its signature was not made with the key of the certificate above it.
    Signature,
    /// It is no certificate of an authority (basic constraints: CA), but others hang below it.
    NotAuthority,
    /// It is a certificate of an authority, which must not sign documents.
    IsAuthority,
    /// It allows {allowed} authorities below it, and {found} are there or needed.
    PathLength {
        /// Its path length.
        allowed: u8,
        /// Authorities below it.
        found: usize,
    },
    /// Its key usage does not allow to sign {0}.
    KeyUsage(&'static str),
}

/// A moment, in milliseconds since 1970-01-01 UTC; shown as `2024-12-13T07:37:58Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(
    /// The milliseconds.
    pub u64,
);

impl Timestamp {
    /// Now, by this machine's clock; 0 on one that is before 1970.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

impl FromStr for Timestamp {
    type Err = NoTimestamp;

    /// Reads a time in UTC as RFC 3339 has it, in whole seconds: `2024-12-13T07:37:58Z`.
    fn from_str(text: &str) -> Result<Self, NoTimestamp> {
        let date = text.parse::<DateTime>().map_err(|_| NoTimestamp)?;
        Ok(Self(date.unix_duration().as_secs().saturating_mul(1000)))
    }
}

/// The text is not a time in UTC like `2024-12-13T07:37:58Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub struct NoTimestamp;

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DateTime::from_unix_duration(Duration::from_secs(self.0 / 1000)) {
            Ok(date) => date.fmt(f),
            Err(_) => write!(f, "{} ms after 1970", self.0), // beyond the year 9999
        }
    }
}

/// A certificate that was read. Having one says that it is well formed, its key is a point of P-384 and nothing critical in it is
/// unknown; not that anybody signed it.
#[derive(Debug, Clone)]
pub struct Certificate {
    der: Vec<u8>,
    parsed: x509_cert::Certificate,
    key: VerifyingKey,
    constraints: BasicConstraints,
    usage: Option<KeyUsage>,
    subject_key: Option<Vec<u8>>,
    authority_key: Option<Vec<u8>>,
}

impl Certificate {
    /// Reads a certificate.
    ///
    /// # Errors
    ///
    /// [`CertificateFault`] says what cannot be read or judged.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateFault> {
        let malformed = |error: x509_cert::der::Error| CertificateFault::Malformed(error.to_string());
        let parsed = x509_cert::Certificate::from_der(der).map_err(malformed)?;
        // So the bytes that are hashed below are those that were signed.
        if parsed.to_der().map_err(malformed)? != der {
            return Err(CertificateFault::NotDer);
        }
        let tbs = parsed.tbs_certificate();
        if tbs.version() != Version::V3 {
            return Err(CertificateFault::Version);
        }
        for algorithm in [parsed.signature_algorithm(), tbs.signature()] {
            if algorithm.oid != ECDSA_WITH_SHA384 || algorithm.parameters.is_some() {
                return Err(CertificateFault::Algorithm(algorithm.oid.to_string()));
            }
        }
        let extensions = Extensions::read(tbs.extensions().map_or(&[], Vec::as_slice))?;
        let key = key_of(&parsed)?;
        let Extensions { constraints, usage, subject_key, authority_key } = extensions;
        Ok(Self {
            der: der.to_vec(),
            key,
            constraints: constraints.unwrap_or(BasicConstraints { ca: false, path_len_constraint: None }),
            usage,
            subject_key,
            authority_key,
            parsed,
        })
    }

    /// Its bytes.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// SHA-256 of its bytes.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.der)
    }

    /// Whose it is, as RFC 4514 writes names, without control characters.
    #[must_use]
    pub fn subject(&self) -> String {
        shown(self.parsed.tbs_certificate().subject())
    }

    /// Who signed it, as it says; written as [`Self::subject`].
    #[must_use]
    pub fn issuer(&self) -> String {
        shown(self.parsed.tbs_certificate().issuer())
    }

    /// Whether it names itself as its issuer, as roots do.
    #[must_use]
    pub fn is_self_issued(&self) -> bool {
        self.parsed.tbs_certificate().issuer() == self.name()
    }

    /// The common name of its subject; empty if it has none.
    #[must_use]
    pub fn common_name(&self) -> String {
        let name = self.parsed.tbs_certificate().subject();
        let attribute = name.iter().find(|attribute| attribute.oid == COMMON_NAME);
        attribute.map(|attribute| printable(&String::from_utf8_lossy(attribute.value.value()))).unwrap_or_default()
    }

    /// Its serial number, big-endian, without leading zeros.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        let bytes = self.parsed.tbs_certificate().serial_number().as_bytes();
        bytes.strip_prefix(&[0]).unwrap_or(bytes)
    }

    /// Its first moment.
    #[must_use]
    pub fn begins(&self) -> Timestamp {
        moment(self.parsed.tbs_certificate().validity().not_before)
    }

    /// Its last moment: the whole second counts (RFC 5280 section 4.1.2.5).
    #[must_use]
    pub fn ends(&self) -> Timestamp {
        moment(self.parsed.tbs_certificate().validity().not_after)
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> &VerifyingKey {
        &self.key
    }

    /// Whether it is an authority's.
    #[must_use]
    pub fn is_authority(&self) -> bool {
        self.constraints.ca
    }

    /// How many authorities may stand below it; `None` for any number.
    #[must_use]
    pub fn path_length(&self) -> Option<u8> {
        self.constraints.path_len_constraint
    }

    /// The parts, for whoever issues certificates below it.
    pub(crate) fn name(&self) -> &Name {
        self.parsed.tbs_certificate().subject()
    }

    pub(crate) fn subject_key(&self) -> Option<&[u8]> {
        self.subject_key.as_deref()
    }

    pub(crate) fn check_period(&self, at: Timestamp) -> Result<(), CertificateFault> {
        if at < self.begins() {
            return Err(CertificateFault::NotYetValid { begins: self.begins(), at });
        }
        if at.0 / 1000 > self.ends().0 / 1000 {
            return Err(CertificateFault::Expired { ended: self.ends(), at });
        }
        Ok(())
    }

    /// Whether it may stand above `authorities_below` others and the one that signs documents.
    pub(crate) fn check_as_authority(&self, authorities_below: usize) -> Result<(), CertificateFault> {
        if !self.constraints.ca {
            return Err(CertificateFault::NotAuthority);
        }
        if self.usage.as_ref().is_some_and(|usage| !usage.key_cert_sign()) {
            return Err(CertificateFault::KeyUsage("certificates"));
        }
        match self.constraints.path_len_constraint {
            Some(allowed) if authorities_below > usize::from(allowed) => {
                Err(CertificateFault::PathLength { allowed, found: authorities_below })
            }
            _ => Ok(()),
        }
    }

    /// Whether its key may sign documents.
    pub(crate) fn check_as_leaf(&self) -> Result<(), CertificateFault> {
        if self.constraints.ca {
            return Err(CertificateFault::IsAuthority);
        }
        if self.usage.as_ref().is_some_and(|usage| !usage.digital_signature()) {
            return Err(CertificateFault::KeyUsage("documents"));
        }
        Ok(())
    }

    /// Whether names and key identifiers say that `issuer` signed it.
    pub(crate) fn check_names(&self, issuer: &Self) -> Result<(), CertificateFault> {
        let named = self.parsed.tbs_certificate().issuer();
        if named != issuer.name() {
            return Err(CertificateFault::Issuer { named: shown(named), above: issuer.subject() });
        }
        match (&self.authority_key, &issuer.subject_key) {
            (Some(named), Some(above)) if named != above => Err(CertificateFault::KeyIdentifier),
            _ => Ok(()),
        }
    }

    /// Whether the key of `issuer` signed it.
    pub(crate) fn check_signature(&self, issuer: &Self) -> Result<(), CertificateFault> {
        let failed = |_| CertificateFault::Signature;
        let signature = self.parsed.signature().as_bytes().ok_or(CertificateFault::Signature)?;
        let signature = DerSignature::from_bytes(signature).map_err(failed)?;
        let signed = self.parsed.tbs_certificate().to_der().map_err(|_| CertificateFault::Signature)?;
        issuer.key.verify(&signed, &signature).map_err(failed)
    }
}

impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}

impl Eq for Certificate {}

/// SHA-256 of a certificate's bytes.
pub(crate) fn fingerprint(der: &[u8]) -> [u8; 32] {
    Sha256::digest(der).into()
}

/// What the extensions say that are understood here.
#[derive(Default)]
struct Extensions {
    constraints: Option<BasicConstraints>,
    usage: Option<KeyUsage>,
    subject_key: Option<Vec<u8>>,
    authority_key: Option<Vec<u8>>,
}

impl Extensions {
    fn read(extensions: &[x509_cert::ext::Extension]) -> Result<Self, CertificateFault> {
        let mut read = Self::default();
        for (number, extension) in extensions.iter().enumerate() {
            let oid = extension.extn_id;
            if extensions.iter().take(number).any(|earlier| earlier.extn_id == oid) {
                return Err(CertificateFault::RepeatedExtension(oid.to_string()));
            }
            let value = extension.extn_value.as_bytes();
            let failed = |error: x509_cert::der::Error| CertificateFault::Extension { oid: oid.to_string(), reason: error.to_string() };
            match oid {
                BasicConstraints::OID => read.constraints = Some(BasicConstraints::from_der(value).map_err(failed)?),
                KeyUsage::OID => read.usage = Some(KeyUsage::from_der(value).map_err(failed)?),
                SubjectKeyIdentifier::OID => {
                    read.subject_key = Some(SubjectKeyIdentifier::from_der(value).map_err(failed)?.0.into_bytes().into());
                }
                AuthorityKeyIdentifier::OID => {
                    let identifier = AuthorityKeyIdentifier::from_der(value).map_err(failed)?.key_identifier;
                    read.authority_key = identifier.map(|identifier| identifier.into_bytes().into());
                }
                _ if extension.critical => return Err(CertificateFault::UnknownCriticalExtension(oid.to_string())),
                _ => {} // e.g. CRL distribution points: nothing is fetched
            }
        }
        Ok(read)
    }
}

fn key_of(certificate: &x509_cert::Certificate) -> Result<VerifyingKey, CertificateFault> {
    let info = certificate.tbs_certificate().subject_public_key_info();
    let curve = info.algorithm.parameters.as_ref().and_then(|parameters| parameters.decode_as::<ObjectIdentifier>().ok());
    if info.algorithm.oid != EC_PUBLIC_KEY || curve != Some(SECP384R1) {
        return Err(CertificateFault::Curve);
    }
    let point = info.subject_public_key.as_bytes().ok_or(CertificateFault::Curve)?;
    VerifyingKey::from_sec1_bytes(point).map_err(|_| CertificateFault::Curve)
}

fn moment(time: x509_cert::time::Time) -> Timestamp {
    Timestamp(time.to_unix_duration().as_secs().saturating_mul(1000))
}

fn shown(name: &Name) -> String {
    printable(&name.to_string())
}

/// Text of others as it may stand on a terminal: control characters are replaced, and so are those that are not seen themselves but
/// change the order or the lines of what is (Unicode's direction and format marks, line and paragraph separators).
#[must_use]
pub fn printable(text: &str) -> String {
    let unseen = |character| matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    text.chars().map(|character| if character.is_control() || unseen(character) { '\u{fffd}' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENUINE: &[u8] = include_bytes!("../tests/data/aws-nitro-enclaves-root.der");

    /// The root with some bytes replaced by as many others.
    fn with(from: &[u8], to: &[u8]) -> Result<Certificate, CertificateFault> {
        assert_eq!(from.len(), to.len());
        let at = GENUINE.windows(from.len()).position(|part| part == from).unwrap();
        let mut der = GENUINE.to_vec();
        der[at..at + to.len()].copy_from_slice(to);
        Certificate::from_der(&der)
    }

    #[test]
    fn awss_root_is_read() {
        let root = Certificate::from_der(GENUINE).unwrap();
        assert_eq!(root.common_name(), "aws.nitro-enclaves");
        assert_eq!((root.begins().to_string(), root.ends().to_string()), ("2019-10-28T13:28:05Z".into(), "2049-10-28T14:28:05Z".into()));
        assert!(root.is_authority() && root.is_self_issued() && root.path_length().is_none());
        assert_eq!(hex::encode(root.serial()), "f93175681b90afe11d46ccb4e4e7f856");
        root.check_signature(&root).unwrap();
    }

    #[test]
    fn what_cannot_be_judged_is_refused_with_its_reason() {
        // Key usage (2.5.29.15) becomes 2.5.29.60, which nobody knows and which is still critical.
        let unknown = with(&[0x55, 0x1d, 0x0f, 0x01, 0x01, 0xff], &[0x55, 0x1d, 0x3c, 0x01, 0x01, 0xff]).unwrap_err();
        assert_eq!(unknown, CertificateFault::UnknownCriticalExtension("2.5.29.60".into()));
        // The subject key identifier becomes a second key usage.
        let twice = with(&[0x55, 0x1d, 0x0e, 0x04, 0x16], &[0x55, 0x1d, 0x0f, 0x04, 0x16]).unwrap_err();
        assert!(matches!(twice, CertificateFault::RepeatedExtension(_) | CertificateFault::Extension { .. }), "{twice}");
        // secp384r1 becomes secp521r1; ecdsa-with-SHA384 becomes -SHA512; version 3 becomes 2.
        assert_eq!(with(&[0x2b, 0x81, 0x04, 0x00, 0x22], &[0x2b, 0x81, 0x04, 0x00, 0x23]).unwrap_err(), CertificateFault::Curve);
        let algorithm = with(&[0x3d, 0x04, 0x03, 0x03, 0x30, 0x49], &[0x3d, 0x04, 0x03, 0x04, 0x30, 0x49]).unwrap_err();
        assert!(matches!(algorithm, CertificateFault::Algorithm(_)), "{algorithm}");
        assert_eq!(with(&[0xa0, 0x03, 0x02, 0x01, 0x02], &[0xa0, 0x03, 0x02, 0x01, 0x01]).unwrap_err(), CertificateFault::Version);
        // A point that is not on the curve.
        assert_eq!(with(&[0x04, 0xfc, 0x02, 0x54], &[0x04, 0xfc, 0x02, 0x55]).unwrap_err(), CertificateFault::Curve);
        let mut longer = GENUINE.to_vec();
        longer.push(0);
        assert!(matches!(Certificate::from_der(&longer), Err(CertificateFault::Malformed(_))));
        assert!(matches!(Certificate::from_der(&[]), Err(CertificateFault::Malformed(_))));
    }

    #[test]
    fn names_do_not_steer_a_terminal() {
        let name = with(b"aws.nitro-enclaves", b"aws\x1b[31m\x07-enclaves").unwrap();
        assert!(!name.subject().contains(|character: char| character.is_control()), "{}", name.subject());
        assert!(!name.common_name().contains('\u{1b}'));
        let marks = ['\u{200b}', '\u{200f}', '\u{2028}', '\u{202e}', '\u{2060}', '\u{2066}', '\u{2069}', '\u{feff}', '\n'];
        assert!(marks.iter().all(|mark| printable(&format!("a{mark}b")) == "a\u{fffd}b"));
        assert_eq!(printable("Zürich – 東京"), "Zürich – 東京");
    }
}
