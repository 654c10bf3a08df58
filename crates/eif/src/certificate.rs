//! The certificate that signs an image: its DER bytes (PCR8), its key, and the facts describe-eif shows.
//!
//! A certificate here is an identity by its bytes, not a link of a chain: nobody checks who issued it (the enclave's peers compare PCR8). docs/eif.md, section 7.
//! Neighbour: [`signature`](crate::signature).

use std::time::{SystemTime, UNIX_EPOCH};

use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Encode, Tag, Tagged};
use x509_cert::time::Time;

use crate::measure::Pcr;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
/// Limit of a certificate file in bytes: the one of the signature section it has to fit into.
pub const MAX_PEM_BYTES: usize = 32_768;

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum CertificateError {
    /// There is no block from "-----BEGIN CERTIFICATE-----" to "-----END CERTIFICATE-----"; give the certificate in PEM form (openssl x509 -outform PEM).
    NotPem,
    /// The certificate has {size} bytes, more than the limit of 32768; give one certificate, not a bundle.
    TooBig {
        /// Its size in bytes.
        size: usize,
    },
    /// The PEM block has the character {found:?}, which is not base64; the certificate is damaged.
    Base64 {
        /// What stands there.
        found: char,
    },
    /// The PEM block does not hold an X.509 certificate; it is damaged or something else.
    Der {
        /// What the parser said.
        #[source]
        source: x509_cert::der::Error,
    },
    /// The certificate is valid from {not_before} on; set the clock right, or sign with one that is valid now.
    NotYetValid {
        /// Begin of its validity.
        not_before: String,
    },
    /// The certificate was valid until {not_after}; sign the image with one that is valid now.
    Expired {
        /// End of its validity.
        not_after: String,
    },
}

/// A parsed certificate. Having one proves that its structure is sound; nothing about who made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    parsed: CertificateInner<Raw>,
}

impl Certificate {
    /// Reads the first certificate of a PEM text; what stands around the block is ignored, as OpenSSL does.
    ///
    /// # Errors
    ///
    /// `NotPem`, `TooBig`, `Base64`, `Der`.
    pub fn from_pem(pem: &[u8]) -> Result<Certificate, CertificateError> {
        if pem.len() > MAX_PEM_BYTES {
            return Err(CertificateError::TooBig { size: pem.len() });
        }
        let text = String::from_utf8_lossy(pem);
        let (_, rest) = text.split_once(BEGIN).ok_or(CertificateError::NotPem)?;
        let (block, _) = rest.split_once(END).ok_or(CertificateError::NotPem)?;
        Certificate::from_der(decode_base64(block)?)
    }

    /// Reads a certificate in DER form.
    ///
    /// # Errors
    ///
    /// `Der`.
    pub fn from_der(der: impl Into<Vec<u8>>) -> Result<Certificate, CertificateError> {
        let der = der.into();
        let parsed = CertificateInner::<Raw>::from_der(&der).map_err(|source| CertificateError::Der { source })?;
        Ok(Certificate { der, parsed })
    }

    /// The certificate's bytes.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The PCR8 of an image signed with this certificate.
    pub fn pcr8(&self) -> Pcr {
        Pcr::of(&self.der)
    }

    /// Who issued it: pairs of attribute and value in the certificate's order, attributes by their long names as OpenSSL prints them ("commonName").
    pub fn issuer(&self) -> Vec<(String, String)> {
        let attributes = self.parsed.tbs_certificate().issuer().iter();
        attributes.map(|attribute| (attribute_name(attribute.oid), text_of(attribute.value.tag(), attribute.value.value()))).collect()
    }

    /// How it is signed, as OpenSSL prints it ("ecdsa-with-SHA384"); a dotted number if we do not know the name.
    pub fn algorithm(&self) -> String {
        let oid = self.parsed.signature_algorithm().oid;
        let name = match oid.to_string().as_str() {
            "1.2.840.10045.4.1" => "ecdsa-with-SHA1",
            "1.2.840.10045.4.3.2" => "ecdsa-with-SHA256",
            "1.2.840.10045.4.3.3" => "ecdsa-with-SHA384",
            "1.2.840.10045.4.3.4" => "ecdsa-with-SHA512",
            "1.2.840.113549.1.1.5" => "sha1WithRSAEncryption",
            "1.2.840.113549.1.1.10" => "rsassaPss",
            "1.2.840.113549.1.1.11" => "sha256WithRSAEncryption",
            "1.2.840.113549.1.1.12" => "sha384WithRSAEncryption",
            "1.2.840.113549.1.1.13" => "sha512WithRSAEncryption",
            "1.3.101.112" => "ED25519",
            other => return other.into(),
        };
        name.into()
    }

    /// Begin of its validity, as OpenSSL prints it ("Nov 24 06:00:00 2026 GMT").
    pub fn not_before(&self) -> String {
        time_text(self.parsed.tbs_certificate().validity().not_before)
    }

    /// End of its validity, as OpenSSL prints it.
    pub fn not_after(&self) -> String {
        time_text(self.parsed.tbs_certificate().validity().not_after)
    }

    /// The issuer's signature over it.
    pub fn signature(&self) -> &[u8] {
        self.parsed.signature().raw_bytes()
    }

    /// Its public key: for a key on a curve, the point in SEC 1 form.
    pub fn public_key(&self) -> &[u8] {
        self.parsed.tbs_certificate().subject_public_key_info().subject_public_key.raw_bytes()
    }

    /// Is it valid at a point in time?
    ///
    /// # Errors
    ///
    /// `NotYetValid`, `Expired`.
    pub fn check_validity(&self, now: SystemTime) -> Result<(), CertificateError> {
        let validity = self.parsed.tbs_certificate().validity();
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        if now < validity.not_before.to_unix_duration() {
            return Err(CertificateError::NotYetValid { not_before: self.not_before() });
        }
        if now > validity.not_after.to_unix_duration() {
            return Err(CertificateError::Expired { not_after: self.not_after() });
        }
        Ok(())
    }

    /// The curve its key names, and the key's point in SEC 1 form; `None` if it is not a key on a named curve.
    pub(crate) fn ec_key(&self) -> Option<(ObjectIdentifier, &[u8])> {
        const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1"); // RFC 5480, section 2.1.1
        let key = self.parsed.tbs_certificate().subject_public_key_info();
        let curve = key.algorithm.parameters.as_ref().filter(|_| key.algorithm.oid == EC_PUBLIC_KEY)?;
        let curve = ObjectIdentifier::from_der(&curve.to_der().ok()?).ok()?;
        Some((curve, self.public_key()))
    }
}

/// RFC 4648 base64; white space is skipped, padding ends the text.
fn decode_base64(text: &str) -> Result<Vec<u8>, CertificateError> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for found in text.chars().filter(|found| !found.is_ascii_whitespace()) {
        let value = match found {
            'A'..='Z' => u32::from(found) - u32::from('A'),
            'a'..='z' => u32::from(found) - u32::from('a') + 26,
            '0'..='9' => u32::from(found) - u32::from('0') + 52,
            '+' => 62,
            '/' => 63,
            '=' => break,
            _ => return Err(CertificateError::Base64 { found }),
        };
        bits = (bits << 6 | value) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff).try_into().expect("eight bits were kept"));
        }
    }
    Ok(bytes)
}

/// X.520 and PKCS #9 attribute types by OpenSSL's long names.
fn attribute_name(oid: ObjectIdentifier) -> String {
    let name = match oid.to_string().as_str() {
        "2.5.4.3" => "commonName",
        "2.5.4.4" => "surname",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "countryName",
        "2.5.4.7" => "localityName",
        "2.5.4.8" => "stateOrProvinceName",
        "2.5.4.9" => "streetAddress",
        "2.5.4.10" => "organizationName",
        "2.5.4.11" => "organizationalUnitName",
        "2.5.4.12" => "title",
        "2.5.4.17" => "postalCode",
        "2.5.4.42" => "givenName",
        "1.2.840.113549.1.9.1" => "emailAddress",
        "0.9.2342.19200300.100.1.1" => "userId",
        "0.9.2342.19200300.100.1.25" => "domainComponent",
        other => return other.into(),
    };
    name.into()
}

/// A name's value as text, whichever string type it has.
fn text_of(tag: Tag, value: &[u8]) -> String {
    match tag {
        // In practice Latin 1.
        Tag::TeletexString => value.iter().map(|&byte| char::from(byte)).collect(),
        Tag::BmpString => {
            let units = value.chunks_exact(2).map(|unit| unit.iter().fold(0, |unit, &byte| unit << 8 | u16::from(byte)));
            char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
        }
        _ => String::from_utf8_lossy(value).into_owned(),
    }
}

fn time_text(time: Time) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let time = time.to_date_time();
    let month = MONTHS.get(usize::from(time.month()).wrapping_sub(1)).unwrap_or(&"???");
    format!("{month} {:2} {:02}:{:02}:{:02} {} GMT", time.day(), time.hour(), time.minutes(), time.seconds(), time.year())
}
