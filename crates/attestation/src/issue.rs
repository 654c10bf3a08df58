//! Making certificates: [`issue`] signs one of a [`Level`] with the extensions, order and string types of genuine ones.
//!
//! Two differ from AWS's in content alone: names (ours say that they are local) and the address of the revocation list, which is at
//! `.invalid`, a domain that never exists (RFC 2606), because there is no list. Profile: RFC 5280 sections 4.1 and 4.2.

use crate::certificate::{Certificate, CertificateFault, Timestamp};
use crate::level::{Level, NameShape, Period};
use p384::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use p384::elliptic_curve::Generate as _;
use std::time::Duration;
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::builder::profile::BuilderProfile;
use x509_cert::builder::{Builder as _, CertificateBuilder};
use x509_cert::certificate::TbsCertificate;
use x509_cert::der::asn1::{Any, Ia5String, ObjectIdentifier, OctetString};
use x509_cert::der::flagset::FlagSet;
use x509_cert::der::oid::AssociatedOid;
use x509_cert::der::{DateTime, Decode as _, Encode, Tag};
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::crl::dp::DistributionPoint;
use x509_cert::ext::pkix::name::{DistributionPointName, GeneralName};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, CrlDistributionPoints, KeyUsage, KeyUsages, SubjectKeyIdentifier};
use x509_cert::name::{Name, RdnSequence, RelativeDistinguishedName};
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{SubjectPublicKeyInfoOwned, SubjectPublicKeyInfoRef};
use x509_cert::time::{Time, Validity};

const ORGANISATION: &str = "Nitroxide";
const UNIT: &str = "Local root - not AWS";
/// A code that ISO 3166 leaves to its users.
const COUNTRY: &str = "XX";
const STATE: &str = "Local";
const LOCALITY: &str = "This machine";

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum CertificateError {
    /// Module id `{0}` cannot be the name in a certificate; use up to 50 ASCII letters, digits, `-`, `.` or `_`, and up to 40 before `-enc`.
    Name(String),
    /// The clock says {0}, and no certificate can be made for that time; set it right.
    Date(Timestamp),
    /// The certificate could not be encoded or signed: {0}.
    Build(String),
    /// The certificate that was made does not hold.
    Fault(#[from] CertificateFault),
    /// The kernel gave no random numbers for a key or serial number: {0}.
    Random(String),
}

/// A certificate with its key.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) certificate: Certificate,
    pub(crate) key: SigningKey,
}

/// Makes a P-384 key from the kernel's random numbers.
pub(crate) fn new_key() -> Result<SigningKey, CertificateError> {
    SigningKey::try_generate().map_err(|error| CertificateError::Random(error.to_string()))
}

/// Random bytes in hex, for names.
pub(crate) fn random_name() -> Result<String, CertificateError> {
    Ok(hex::encode(random::<8>()?))
}

/// Makes a self-signed root with a new key.
pub(crate) fn root(now: Timestamp) -> Result<Link, CertificateError> {
    let key = new_key()?;
    let order = Order { level: Level::Root, own: "", serial: &random::<16>()?, period: Level::Root.period(now) };
    let certificate = issue(&order, key.verifying_key(), None, &key)?;
    Ok(Link { certificate, key })
}

/// Makes an authority with a new key below `issuer`.
pub(crate) fn authority(level: Level, own: &str, issuer: &Link, now: Timestamp) -> Result<Link, CertificateError> {
    let key = new_key()?;
    // As in genuine chains: 20 bytes for the instance, 16 for the others.
    let (short, long) = (random::<16>()?, random::<20>()?);
    let serial: &[u8] = if level == Level::Instance { &long } else { &short };
    let order = Order { level, own, serial, period: level.period(now).cut(issuer.certificate.ends()) };
    let certificate = issue(&order, key.verifying_key(), Some(&issuer.certificate), &issuer.key)?;
    Ok(Link { certificate, key })
}

/// Makes the certificate of the key that signs documents. Its serial number is the enclave's number and the second of its making.
pub(crate) fn leaf(module_id: &str, key: &VerifyingKey, issuer: &Link, now: Timestamp) -> Result<Certificate, CertificateError> {
    let number = module_id.rsplit_once("-enc").and_then(|(_, hex)| u64::from_str_radix(hex, 16).ok());
    let mut serial = match number {
        Some(number) => number.to_be_bytes(),
        None => random::<8>()?,
    }
    .to_vec();
    serial.extend((now.0 / 1000).to_be_bytes());
    let period = Level::Leaf.period(now).cut(issuer.certificate.ends());
    let order = Order { level: Level::Leaf, own: module_id, serial: &serial, period };
    issue(&order, key, Some(&issuer.certificate), &issuer.key)
}

/// Checks that an instance's id and a module id can be names.
pub(crate) fn check_names(module_id: &str) -> Result<(), CertificateError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let fits = Level::Leaf.common_name(module_id).is_some() && Level::Instance.common_name(instance_of(module_id)).is_some();
    if instance_of(module_id).is_empty() || !module_id.bytes().all(allowed) || !fits {
        return Err(CertificateError::Name(module_id.to_owned()));
    }
    Ok(())
}

/// The instance's id in a module id: what stands before `-enc`, all of it if that is not there.
pub(crate) fn instance_of(module_id: &str) -> &str {
    module_id.rsplit_once("-enc").map_or(module_id, |(instance, _)| instance)
}

/// What is wanted.
struct Order<'a> {
    level: Level,
    own: &'a str,
    serial: &'a [u8],
    period: Period,
}

fn issue(
    order: &Order<'_>,
    key: &VerifyingKey,
    issuer: Option<&Certificate>,
    signing: &SigningKey,
) -> Result<Certificate, CertificateError> {
    let common_name = order.level.common_name(order.own).ok_or_else(|| CertificateError::Name(order.own.to_owned()))?;
    let subject = name(order.level.name_shape(), &common_name)?;
    let profile = Profile { level: order.level, subject, issuer: issuer.map(|issuer| (issuer.name().clone(), issuer.subject_key())) };
    // A first bit of 1 would need a byte more than RFC 5280 allows for 20 bytes; leading zeros are no number.
    let mut serial = order.serial.to_vec();
    if let (20, Some(first)) = (serial.len(), serial.first_mut()) {
        *first &= 0x7f;
    }
    if let Some(first) = serial.first_mut().filter(|first| **first == 0 && order.level != Level::Leaf) {
        *first = 1;
    }
    let serial = SerialNumber::new(&serial).map_err(build)?;
    let validity = Validity::new(time(order.period.begins)?, time(order.period.ends)?);
    let key = SubjectPublicKeyInfoOwned::from_key(key).map_err(build)?;
    let builder = CertificateBuilder::new(profile, serial, validity, key).map_err(build)?;
    let certificate = builder.build::<_, DerSignature>(signing).map_err(build)?;
    Ok(Certificate::from_der(&certificate.to_der().map_err(build)?)?)
}

/// Names and extensions of one certificate.
struct Profile<'a> {
    level: Level,
    subject: Name,
    issuer: Option<(Name, Option<&'a [u8]>)>,
}

impl BuilderProfile for Profile<'_> {
    fn get_issuer(&self, subject: &Name) -> Name {
        self.issuer.as_ref().map_or_else(|| subject.clone(), |(name, _)| name.clone())
    }

    fn get_subject(&self) -> Name {
        self.subject.clone()
    }

    fn build_extensions(
        &self,
        key: SubjectPublicKeyInfoRef<'_>,
        issuer_key: SubjectPublicKeyInfoRef<'_>,
        _: &TbsCertificate,
    ) -> x509_cert::builder::Result<Vec<Extension>> {
        let own = SubjectKeyIdentifier::try_from(key)?;
        let above = match self.issuer.as_ref().and_then(|(_, identifier)| *identifier) {
            Some(identifier) => OctetString::new(identifier)?,
            None => SubjectKeyIdentifier::try_from(issuer_key)?.0,
        };
        let authority = AuthorityKeyIdentifier { key_identifier: Some(above.clone()), ..AuthorityKeyIdentifier::default() };
        let constraints = BasicConstraints { ca: self.level != Level::Leaf, path_len_constraint: self.level.path_length() };
        let constraints = extension(true, &constraints)?;
        Ok(match self.level {
            Level::Root => vec![constraints, extension(false, &own)?, extension(true, &usage(ALL))?],
            Level::Region | Level::Zonal => vec![
                constraints,
                extension(false, &authority)?,
                extension(false, &own)?,
                extension(true, &usage(ALL))?,
                extension(false, &revocation(above.as_bytes())?)?,
            ],
            Level::Instance => vec![
                constraints,
                extension(true, &usage(&[KeyUsages::KeyCertSign]))?,
                extension(false, &own)?,
                extension(false, &authority)?,
            ],
            Level::Leaf => vec![constraints, extension(false, &usage(&[KeyUsages::DigitalSignature, KeyUsages::NonRepudiation]))?],
        })
    }
}

const ALL: &[KeyUsages] = &[KeyUsages::DigitalSignature, KeyUsages::KeyCertSign, KeyUsages::CRLSign];

fn usage(usages: &[KeyUsages]) -> KeyUsage {
    KeyUsage(usages.iter().copied().fold(FlagSet::default(), |all, usage| all | usage))
}

fn extension<T: AssociatedOid + Encode>(critical: bool, value: &T) -> x509_cert::der::Result<Extension> {
    Ok(Extension { extn_id: T::OID, critical, extn_value: OctetString::new(value.to_der()?)? })
}

/// Where the issuer's revocation list would be; the file is called like AWS's, in the form of a UUID.
fn revocation(issuer_key: &[u8]) -> x509_cert::der::Result<CrlDistributionPoints> {
    let id = hex::encode(issuer_key);
    let part = |from: usize, length: usize| id.get(from..from + length).unwrap_or_default();
    let address =
        format!("http://crl.{SERVICE_DOMAIN}/crl/{}-{}-{}-{}-{}.crl", part(0, 8), part(8, 4), part(12, 4), part(16, 4), part(20, 12));
    let name = GeneralName::UniformResourceIdentifier(Ia5String::new(&address)?);
    Ok(CrlDistributionPoints(vec![DistributionPoint {
        distribution_point: Some(DistributionPointName::FullName(vec![name])),
        reasons: None,
        crl_issuer: None,
    }]))
}

const SERVICE_DOMAIN: &str = "nitroxide.invalid";

/// Object identifiers of RFC 4519.
const COMMON_NAME: &str = "2.5.4.3";
const COUNTRY_NAME: &str = "2.5.4.6";
const LOCALITY_NAME: &str = "2.5.4.7";
const STATE_NAME: &str = "2.5.4.8";
const ORGANISATION_NAME: &str = "2.5.4.10";
const UNIT_NAME: &str = "2.5.4.11";

fn name(shape: NameShape, common_name: &str) -> Result<Name, CertificateError> {
    let (country, state, locality) = ((COUNTRY_NAME, COUNTRY), (STATE_NAME, STATE), (LOCALITY_NAME, LOCALITY));
    let (organisation, unit, own) = ((ORGANISATION_NAME, ORGANISATION), (UNIT_NAME, UNIT), (COMMON_NAME, common_name));
    let parts = match shape {
        NameShape::Short => vec![country, organisation, unit, own],
        NameShape::Zonal => vec![own, unit, organisation, country, state, locality],
        NameShape::Long => vec![country, state, locality, organisation, unit, own],
    };
    let parts = parts.into_iter().map(|(oid, value)| part(oid, value)).collect::<x509_cert::der::Result<Vec<_>>>().map_err(build)?;
    Name::from_der(&RdnSequence::from(parts).to_der().map_err(build)?).map_err(build)
}

fn part(oid: &str, value: &str) -> x509_cert::der::Result<RelativeDistinguishedName> {
    let tag = if oid == COUNTRY_NAME { Tag::PrintableString } else { Tag::Utf8String };
    let attribute = AttributeTypeAndValue { oid: ObjectIdentifier::new(oid)?, value: Any::new(tag, value.as_bytes())? };
    RelativeDistinguishedName::try_from(vec![attribute])
}

fn time(moment: Timestamp) -> Result<Time, CertificateError> {
    DateTime::from_unix_duration(Duration::from_secs(moment.0 / 1000)).map(Time::from).map_err(|_| CertificateError::Date(moment))
}

fn random<const N: usize>() -> Result<[u8; N], CertificateError> {
    <[u8; N]>::try_generate().map_err(|error| CertificateError::Random(error.to_string()))
}

fn build(error: impl std::fmt::Display) -> CertificateError {
    CertificateError::Build(error.to_string())
}
