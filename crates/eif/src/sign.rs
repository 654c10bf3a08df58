//! Signing: [`Signer`] makes signature sections, [`sign_image`] writes an image anew with one.
//!
//! The image is copied, never changed in place: sizes, offsets and the checksum all come out right, an image that was signed before loses its old signature,
//! and a crash leaves the old file. Byte for byte what AWS's tools write (docs/eif.md, section 7), up to the randomness of ECDSA.
//! Neighbour: [`signature`](crate::signature), which verifies.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;

use minicbor::Encoder;
use minicbor::encode::Error as EncodeError;

use crate::builder::{BuildError, Built, copy_reader, replace_file};
use crate::certificate::{Certificate, CertificateError};
use crate::error::ReadError;
use crate::format::{MAX_SECTIONS, MAX_SIGNATURE_BYTES, SectionKind};
use crate::image::Image;
use crate::measure::{Measurements, Pcr};
use crate::read_at::ReadAt;
use crate::signature::{ES256, ES384, ES512, Signature, SignatureError, to_be_signed};
use crate::writer::ImageWriter;

/// The first version of the format that knows signatures.
const FIRST_SIGNED_VERSION: u16 = 3;

/// Why an image cannot be signed.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum SignError {
    /// Could not read `{path}`; check that it exists and is readable.
    Open {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The signing certificate cannot be used.
    Certificate {
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// The signing key is no unencrypted PEM key on P-256, P-384 or P-521; make one with "openssl ecparam -name secp384r1 -genkey".
    Key,
    /// The signing key does not belong to the certificate; give a matching pair.
    Mismatch,
    /// The certificate is too long: the signature section would have {size} bytes, more than the limit of 32768; sign with a smaller one.
    TooBig {
        /// The section's size in bytes.
        size: usize,
    },
    /// The image has 32 sections already; build it again with fewer ramdisks.
    TooManySections,
    /// The image to sign cannot be read.
    Read {
        /// Why.
        #[source]
        source: ReadError,
    },
    /// The signed image cannot be written.
    Write {
        /// Why.
        #[source]
        source: BuildError,
    },
}

impl From<ReadError> for SignError {
    fn from(source: ReadError) -> SignError {
        SignError::Read { source }
    }
}

impl From<BuildError> for SignError {
    fn from(source: BuildError) -> SignError {
        SignError::Write { source }
    }
}

enum Key {
    P256(p256::ecdsa::SigningKey),
    P384(p384::ecdsa::SigningKey),
    P521(p521::ecdsa::SigningKey),
}

/// A private key and its certificate.
pub struct Signer {
    key: Key,
    certificate: Certificate,
    certificate_pem: Vec<u8>,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("pcr8", &self.certificate.pcr8()).finish_non_exhaustive()
    }
}

impl Signer {
    /// Takes a key (PKCS #8 or SEC 1 in PEM form, not encrypted) and its certificate (PEM form). They must belong together.
    ///
    /// # Errors
    ///
    /// `Key`, `Certificate`, `Mismatch`, `TooBig`.
    pub fn from_pem(key: &str, certificate: &[u8]) -> Result<Signer, SignError> {
        let key = parse_key(key).ok_or(SignError::Key)?;
        let parsed = Certificate::from_pem(certificate).map_err(|source| SignError::Certificate { source })?;
        let signer = Signer { key, certificate: parsed, certificate_pem: certificate.into() };
        // The surest test of a pair is a signature, made and verified; it also shows whether the section has room for the certificate.
        let section = signer.signature_section(&Pcr::ZERO);
        if section.len() as u64 > MAX_SIGNATURE_BYTES {
            return Err(SignError::TooBig { size: section.len() });
        }
        match Signature::parse(&section).and_then(|signature| signature.verify(&Pcr::ZERO)) {
            Ok(_) => Ok(signer),
            Err(SignatureError::Certificate { source }) => Err(SignError::Certificate { source }),
            Err(_) => Err(SignError::Mismatch),
        }
    }

    /// The certificate.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The payload of a signature section that vouches for `pcr0`.
    pub fn signature_section(&self, pcr0: &Pcr) -> Vec<u8> {
        let cose = self.cose_sign1(&encode(|e| register(e, pcr0)));
        encode(|encoder| {
            encoder.array(1)?.map(2)?;
            byte_array(encoder.str("signing_certificate")?, &self.certificate_pem)?;
            byte_array(encoder.str("signature")?, &cose)
        })
    }

    /// An untagged COSE_Sign1 over `payload`.
    fn cose_sign1(&self, payload: &[u8]) -> Vec<u8> {
        let algorithm = match self.key {
            Key::P256(_) => ES256,
            Key::P384(_) => ES384,
            Key::P521(_) => ES512,
        };
        let protected = encode(|e| e.map(1)?.u8(1)?.i64(algorithm).map(drop));
        let message = to_be_signed(&protected, payload);
        let signature = match &self.key {
            Key::P256(key) => p256::ecdsa::signature::Signer::<p256::ecdsa::Signature>::sign(key, &message).to_bytes().to_vec(),
            Key::P384(key) => p384::ecdsa::signature::Signer::<p384::ecdsa::Signature>::sign(key, &message).to_bytes().to_vec(),
            Key::P521(key) => p521::ecdsa::signature::Signer::<p521::ecdsa::Signature>::sign(key, &message).to_bytes().to_vec(),
        };
        encode(|e| e.array(4)?.bytes(&protected)?.map(0)?.bytes(payload)?.bytes(&signature).map(drop))
    }
}

/// Copies an image to `out` with a fresh signature as its last section; its checksum must match. Gaps and bytes after the last section are left out.
///
/// # Errors
///
/// See [`SignError`]; what was written until then is of no use.
pub fn sign_image<S: ReadAt + Sync>(
    image: &Image<S>,
    signer: &Signer,
    out: &mut (impl Write + Seek),
) -> Result<(Measurements, Built), SignError> {
    let kept = image.sections().iter().filter(|section| section.kind != SectionKind::Signature);
    if kept.clone().count() >= MAX_SECTIONS {
        return Err(SignError::TooManySections);
    }
    let measured = image.check_and_measure()?;
    let mut writer = ImageWriter::begin(out)?;
    for section in kept {
        writer.section(section.kind, section.flags, |sink| copy_reader(section.kind, &mut image.reader(section), "the image", sink))?;
    }
    let signature = signer.signature_section(&measured.pcr0);
    writer.section(SectionKind::Signature, 0, |sink| sink.put(&signature))?;
    let mut header = *image.header();
    header.version = header.version.max(FIRST_SIGNED_VERSION);
    let built = writer.finish(header)?;
    Ok((Measurements { pcr8: Some(signer.certificate.pcr8()), ..measured }, built))
}

/// Signs the image at `path`, or signs it again; the file is replaced as a whole once the new one is complete.
///
/// # Errors
///
/// See [`SignError`]; the file is as it was before.
pub fn sign_file(path: impl AsRef<Path>, signer: &Signer) -> Result<(Measurements, Built), SignError> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|source| SignError::Open { path: path.into(), source })?;
    let image = Image::open(&file)?;
    replace_file(path, |out| sign_image(&image, signer, out))
}

/// The first private key of a PEM text, whichever curve it is on; `openssl ecparam -genkey` writes a block of parameters before it.
fn parse_key(text: &str) -> Option<Key> {
    let label = ["EC PRIVATE KEY", "PRIVATE KEY"].into_iter().find(|label| text.contains(&format!("-----BEGIN {label}-----")))?;
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let start = text.find(&begin)?;
    let length = text.get(start..)?.find(&end)? + end.len();
    let pem = text.get(start..start + length)?;
    let p256 = || Some(Key::P256(p256::SecretKey::from_pem(pem).ok()?.into()));
    let p384 = || Some(Key::P384(p384::SecretKey::from_pem(pem).ok()?.into()));
    let p521 = || Some(Key::P521(p521::SecretKey::from_pem(pem).ok()?.into()));
    p384().or_else(p256).or_else(p521)
}

fn encode(write: impl FnOnce(&mut Encoder<Vec<u8>>) -> Result<(), EncodeError<std::convert::Infallible>>) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new());
    write(&mut encoder).expect("a Vec takes all that is written");
    encoder.into_writer()
}

/// `{"register_index": 0, "register_value": [...]}`: what is signed.
fn register(encoder: &mut Encoder<Vec<u8>>, pcr0: &Pcr) -> Result<(), EncodeError<std::convert::Infallible>> {
    encoder.map(2)?.str("register_index")?.u8(0)?;
    byte_array(encoder.str("register_value")?, &pcr0.0)
}

/// Bytes as AWS's tools write them: an array of integers.
fn byte_array(encoder: &mut Encoder<Vec<u8>>, bytes: &[u8]) -> Result<(), EncodeError<std::convert::Infallible>> {
    encoder.array(bytes.len() as u64)?;
    bytes.iter().try_for_each(|&byte| encoder.u8(byte).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_register_has_the_bytes_awss_tools_write() {
        // Expected by the format's description: a map of two, an array of 48 (98 30), numbers from 24 on in two bytes.
        let pcr0 = Pcr(std::array::from_fn(|i| u8::try_from(i).unwrap()));
        let bytes = encode(|e| register(e, &pcr0));
        let mut expected = b"\xa2\x6eregister_index\x00\x6eregister_value\x98\x30".to_vec();
        expected.extend((0..24).chain((24..48).flat_map(|value| [0x18, value])));
        assert_eq!(bytes, expected);
    }
}
