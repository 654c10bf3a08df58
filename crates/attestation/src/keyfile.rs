//! Certificates and a private key in one PEM text: what the files of a PKI hold, and what is imported.
//!
//! [`KeyFile::parse`] reads both; [`KeyFile::write`] makes the text of a file. Keys are PKCS#8 or SEC1 (RFC 7468, RFC 5958, RFC 5915).

use crate::certificate::{Certificate, CertificateFault};
use p384::SecretKey;
use p384::ecdsa::SigningKey;
use p384::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, LineEnding};
use x509_cert::der::pem;

/// The longest text (bytes) that is read: certificates and a key need less than a tenth of it.
pub const MAX_PEM_BYTES: usize = 64 * 1024;

/// The most certificates in one text.
const MAX_CERTIFICATES: usize = 8;

/// Why a PEM text is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub enum KeyFileError {
    /// It is longer than 65536 bytes.
    TooLong,
    /// It is not PEM text: {0}.
    Pem(String),
    /// It holds no certificate (a block that begins with `-----BEGIN CERTIFICATE-----`).
    NoCertificate,
    /// It holds more than 8 certificates.
    TooManyCertificates,
    /// Its certificate number {number}, counted from 1, cannot be used.
    Certificate {
        /// Which.
        number: usize,
        /// Why not.
        #[source]
        fault: CertificateFault,
    },
    /// It holds no private key (`-----BEGIN PRIVATE KEY-----` or `-----BEGIN EC PRIVATE KEY-----`).
    NoKey,
    /// It holds more than one private key.
    SeveralKeys,
    /// Its private key is encrypted; decrypt it first, e.g. with `openssl pkey`.
    EncryptedKey,
    /// Its private key is no P-384 key.
    Key,
}

/// What a PEM text holds.
#[derive(Default)]
pub(crate) struct KeyFile {
    /// In the order of the text.
    pub(crate) certificates: Vec<Certificate>,
    pub(crate) key: Option<SigningKey>,
}

impl KeyFile {
    /// Reads a text. Blocks of other kinds are passed over, as is what stands between blocks.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, KeyFileError> {
        let mut file = Self::default();
        for block in blocks(text)? {
            let (label, der) = pem::decode_vec(block.as_bytes()).map_err(|error| KeyFileError::Pem(error.to_string()))?;
            match label {
                "CERTIFICATE" => file.add_certificate(&der)?,
                "PRIVATE KEY" => file.add_key(SecretKey::from_pkcs8_der(&der).ok())?,
                "EC PRIVATE KEY" => file.add_key(SecretKey::from_sec1_der(&der).ok())?,
                "ENCRYPTED PRIVATE KEY" => return Err(KeyFileError::EncryptedKey),
                other if other.ends_with("PRIVATE KEY") => return Err(KeyFileError::Key),
                _ => {} // e.g. EC PARAMETERS, which openssl writes before a key
            }
        }
        Ok(file)
    }

    fn add_certificate(&mut self, der: &[u8]) -> Result<(), KeyFileError> {
        let number = self.certificates.len() + 1;
        if number > MAX_CERTIFICATES {
            return Err(KeyFileError::TooManyCertificates);
        }
        self.certificates.push(Certificate::from_der(der).map_err(|fault| KeyFileError::Certificate { number, fault })?);
        Ok(())
    }

    fn add_key(&mut self, key: Option<SecretKey>) -> Result<(), KeyFileError> {
        let key = key.ok_or(KeyFileError::Key)?;
        if self.key.replace(key.into()).is_some() { Err(KeyFileError::SeveralKeys) } else { Ok(()) }
    }

    /// The text of certificates and a key.
    pub(crate) fn write<'a>(certificates: impl IntoIterator<Item = &'a Certificate>, key: &SigningKey) -> String {
        let mut text: String = certificates.into_iter().map(to_pem).collect();
        text += &SecretKey::from(key.as_nonzero_scalar()).to_pkcs8_pem(LineEnding::LF).expect("a key that exists can be written");
        text
    }
}

/// A certificate as PEM.
#[must_use]
pub fn to_pem(certificate: &Certificate) -> String {
    pem::encode_string("CERTIFICATE", LineEnding::LF, certificate.der()).expect("a certificate that was read can be written")
}

/// The blocks of a PEM text, each from its first line to its last.
fn blocks(text: &[u8]) -> Result<Vec<String>, KeyFileError> {
    if text.len() > MAX_PEM_BYTES {
        return Err(KeyFileError::TooLong);
    }
    let text = std::str::from_utf8(text).map_err(|_| KeyFileError::Pem("it is not text".into()))?;
    let mut blocks = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines().map(str::trim_end) {
        if line.starts_with("-----BEGIN ") && open.replace(String::new()).is_some() {
            return Err(KeyFileError::Pem("a block begins inside another".into()));
        }
        let Some(block) = &mut open else { continue };
        block.push_str(line);
        block.push('\n');
        if line.starts_with("-----END ") {
            blocks.extend(open.take());
        }
    }
    if open.is_some() {
        return Err(KeyFileError::Pem("its last block has no end".into()));
    }
    Ok(blocks)
}
