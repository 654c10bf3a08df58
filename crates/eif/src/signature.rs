//! The signature section: who vouches for an image's PCR0.
//!
//! CBOR: an array of maps, each with a certificate (PEM text) and a COSE_Sign1 (RFC 9052, section 4.2) over a register's number and value; byte strings are
//! written as arrays of integers. Only the first entry counts. docs/eif.md, section 7. Neighbours: [`certificate`](crate::certificate) and
//! [`Signer`](crate::Signer), which makes what is verified here.

use minicbor::data::Type;
use minicbor::decode::Error as CborError;
use minicbor::{Decoder, Encoder};

use crate::certificate::{Certificate, CertificateError};
use crate::error::ReadError;
use crate::measure::{PCR_SIZE, Pcr};

/// COSE algorithm numbers (RFC 9053, section 2.1).
pub(crate) const ES256: i64 = -7;
pub(crate) const ES384: i64 = -35;
pub(crate) const ES512: i64 = -36;
/// The tag a COSE_Sign1 may carry (RFC 9052, section 2); AWS's tools write none.
const COSE_SIGN1_TAG: u64 = 18;
const HEADER_ALGORITHM: i64 = 1;
const HEADER_CRITICAL: i64 = 2;

/// Why a signature section is not believed.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
#[non_exhaustive]
pub enum SignatureError {
    /// The signature section could not be read.
    Read {
        /// Why.
        #[source]
        source: ReadError,
    },
    /// The signature section's {what} is not the CBOR it should be; the image is damaged: sign it again.
    Malformed {
        /// Which part.
        what: &'static str,
        /// What the CBOR decoder said.
        #[source]
        source: CborError,
    },
    /// The signature section has no entry; sign the image again.
    Empty,
    /// The signing certificate cannot be used.
    Certificate {
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// The signature uses the COSE algorithm {algorithm}, but only -7 (ES256), -35 (ES384) and -36 (ES512) are known; sign the image with such a key.
    UnsupportedAlgorithm {
        /// Its number.
        algorithm: i64,
    },
    /// The signature names no algorithm or a header that must be understood and is not; sign the image again.
    UnsupportedHeader,
    /// The signing certificate's key does not fit the signature's algorithm {algorithm}; sign the image again with a matching pair.
    WrongKey {
        /// The algorithm's number.
        algorithm: i64,
    },
    /// The signature is for PCR{register}, not for PCR0; sign the image again.
    WrongRegister {
        /// The register's number.
        register: i64,
    },
    /// The signature is for another image: it vouches for PCR0 {signed}, but this image measures to {measured}; sign it again after every change.
    WrongMeasurement {
        /// What was signed (hexadecimal).
        signed: String,
        /// What the image is.
        measured: Pcr,
    },
    /// The signature was not made with the key of the signing certificate, or was changed since; sign the image again.
    Invalid,
}

/// A signature section, decoded but not verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    entries: Vec<SignatureEntry>,
}

/// One entry of a signature section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureEntry {
    /// The signing certificate as PEM text.
    pub certificate: Vec<u8>,
    /// A COSE_Sign1.
    pub cose_sign1: Vec<u8>,
}

impl Signature {
    /// Decodes a signature section's payload. Memory is bounded by the input's size.
    ///
    /// # Errors
    ///
    /// `Malformed`, `Empty`.
    pub fn parse(bytes: &[u8]) -> Result<Signature, SignatureError> {
        let entries = parse_entries(bytes).map_err(malformed("list of signatures"))?;
        if entries.is_empty() { Err(SignatureError::Empty) } else { Ok(Signature { entries }) }
    }

    /// All entries; only the first counts.
    pub fn entries(&self) -> &[SignatureEntry] {
        &self.entries
    }

    /// The first entry's certificate.
    ///
    /// # Errors
    ///
    /// `Certificate`.
    pub fn certificate(&self) -> Result<Certificate, SignatureError> {
        Certificate::from_pem(&self.first().certificate).map_err(|source| SignatureError::Certificate { source })
    }

    /// Does the first entry vouch for `pcr0`? Returns the certificate whose key does. Neither its validity in time
    /// ([`Certificate::check_validity`]) nor its issuer is judged.
    ///
    /// # Errors
    ///
    /// Every [`SignatureError`] but `Read` and `Empty`.
    pub fn verify(&self, pcr0: &Pcr) -> Result<Certificate, SignatureError> {
        let certificate = self.certificate()?;
        let cose = CoseSign1::parse(&self.first().cose_sign1).map_err(malformed("COSE_Sign1"))?;
        let algorithm = cose.algorithm()?;
        verify_ecdsa(algorithm, &certificate, &to_be_signed(cose.protected, cose.payload), cose.signature)?;
        let (register, value) = parse_register(cose.payload).map_err(malformed("signed register"))?;
        if register != 0 {
            return Err(SignatureError::WrongRegister { register });
        }
        if value != pcr0.0 {
            let signed = value.iter().take(PCR_SIZE).map(|byte| format!("{byte:02x}")).collect();
            return Err(SignatureError::WrongMeasurement { signed, measured: *pcr0 });
        }
        Ok(certificate)
    }

    fn first(&self) -> &SignatureEntry {
        self.entries.first().expect("parse() refuses an empty list")
    }
}

fn malformed(what: &'static str) -> impl FnOnce(CborError) -> SignatureError {
    move |source| SignatureError::Malformed { what, source }
}

/// The bytes a COSE_Sign1's signature is made over: Sig_structure with empty external data (RFC 9052, section 4.4).
pub(crate) fn to_be_signed(protected: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new());
    let encoded = encoder.array(4).and_then(|e| e.str("Signature1")?.bytes(protected)?.bytes(&[])?.bytes(payload));
    encoded.expect("a Vec takes all that is written");
    encoder.into_writer()
}

struct CoseSign1<'a> {
    protected: &'a [u8],
    payload: &'a [u8],
    signature: &'a [u8],
}

impl<'a> CoseSign1<'a> {
    fn parse(bytes: &'a [u8]) -> Result<CoseSign1<'a>, CborError> {
        let mut decoder = Decoder::new(bytes);
        if decoder.datatype()? == Type::Tag && decoder.tag()?.as_u64() != COSE_SIGN1_TAG {
            return Err(CborError::message("tagged as something else than COSE_Sign1"));
        }
        if decoder.array()? != Some(4) {
            return Err(CborError::message("not an array of four"));
        }
        let protected = decoder.bytes()?;
        if !matches!(decoder.datatype()?, Type::Map | Type::MapIndef) {
            return Err(CborError::message("unprotected headers are not a map"));
        }
        decoder.skip()?;
        let (payload, signature) = (decoder.bytes()?, decoder.bytes()?);
        at_end(&decoder)?;
        Ok(CoseSign1 { protected, payload, signature })
    }

    /// The algorithm of the protected headers, which must not demand anything we do not know.
    fn algorithm(&self) -> Result<i64, SignatureError> {
        let headers = parse_headers(self.protected).map_err(malformed("protected headers"))?;
        match headers {
            (Some(algorithm), false) => Ok(algorithm),
            _ => Err(SignatureError::UnsupportedHeader),
        }
    }
}

/// The algorithm, if it is a number, and whether there are critical headers.
fn parse_headers(bytes: &[u8]) -> Result<(Option<i64>, bool), CborError> {
    let mut decoder = Decoder::new(bytes);
    let (mut algorithm, mut critical) = (None, false);
    let mut entries = decoder.map()?;
    while more(&mut decoder, &mut entries)? {
        match decoder.datatype()? {
            Type::U8 | Type::U16 | Type::U32 | Type::U64 | Type::I8 | Type::I16 | Type::I32 | Type::I64 => match decoder.i64()? {
                HEADER_ALGORITHM if algorithm.is_none() && decoder.datatype()? != Type::String => algorithm = Some(decoder.i64()?),
                HEADER_ALGORITHM => return Err(CborError::message("the algorithm is given twice or as a text")),
                HEADER_CRITICAL => {
                    critical = true;
                    decoder.skip()?;
                }
                _ => decoder.skip()?,
            },
            _ => {
                decoder.skip()?;
                decoder.skip()?;
            }
        }
    }
    at_end(&decoder)?;
    Ok((algorithm, critical))
}

fn parse_entries(bytes: &[u8]) -> Result<Vec<SignatureEntry>, CborError> {
    let mut decoder = Decoder::new(bytes);
    let mut entries = Vec::new();
    let mut left = decoder.array()?;
    while more(&mut decoder, &mut left)? {
        let (mut certificate, mut cose_sign1) = (None, None);
        let mut pairs = decoder.map()?;
        while more(&mut decoder, &mut pairs)? {
            match decoder.str()? {
                "signing_certificate" => once(&mut certificate, byte_array(&mut decoder)?)?,
                "signature" => once(&mut cose_sign1, byte_array(&mut decoder)?)?,
                _ => decoder.skip()?,
            }
        }
        let missing = || CborError::message("an entry lacks its certificate or its signature");
        entries.push(SignatureEntry { certificate: certificate.ok_or_else(missing)?, cose_sign1: cose_sign1.ok_or_else(missing)? });
    }
    at_end(&decoder)?;
    Ok(entries)
}

fn parse_register(bytes: &[u8]) -> Result<(i64, Vec<u8>), CborError> {
    let mut decoder = Decoder::new(bytes);
    let (mut index, mut value) = (None, None);
    let mut pairs = decoder.map()?;
    while more(&mut decoder, &mut pairs)? {
        match decoder.str()? {
            "register_index" => once(&mut index, decoder.i64()?)?,
            "register_value" => once(&mut value, byte_array(&mut decoder)?)?,
            _ => decoder.skip()?,
        }
    }
    at_end(&decoder)?;
    index.zip(value).ok_or_else(|| CborError::message("the register's number or value is missing"))
}

/// Is there another element? Counts down a definite length, takes the break of an indefinite one.
fn more(decoder: &mut Decoder<'_>, left: &mut Option<u64>) -> Result<bool, CborError> {
    match left {
        Some(0) => Ok(false),
        Some(left) => {
            *left -= 1;
            Ok(true)
        }
        None if decoder.datatype()? == Type::Break => {
            decoder.skip()?;
            Ok(false)
        }
        None => Ok(true),
    }
}

/// Bytes written as an array of integers, or as the byte string they should have been.
fn byte_array(decoder: &mut Decoder<'_>) -> Result<Vec<u8>, CborError> {
    if decoder.datatype()? == Type::Bytes {
        return Ok(decoder.bytes()?.to_vec());
    }
    let mut bytes = Vec::new(); // grows with what is there; the announced length is not believed
    let mut left = decoder.array()?;
    while more(decoder, &mut left)? {
        bytes.push(decoder.u8()?);
    }
    Ok(bytes)
}

fn once<T>(place: &mut Option<T>, value: T) -> Result<(), CborError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(CborError::message("a key stands there twice")),
    }
}

fn at_end(decoder: &Decoder<'_>) -> Result<(), CborError> {
    if decoder.position() == decoder.input().len() { Ok(()) } else { Err(CborError::message("bytes follow the value")) }
}

/// Verifies with the curve that belongs to the algorithm; the certificate's key must be on it.
fn verify_ecdsa(algorithm: i64, certificate: &Certificate, message: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
    macro_rules! verify {
        ($curve:ident, $oid:literal) => {{
            use $curve::ecdsa::{Signature, VerifyingKey, signature::Verifier};
            let key = certificate.ec_key().filter(|(curve, _)| curve.to_string() == $oid);
            let key = key.and_then(|(_, point)| VerifyingKey::from_sec1_bytes(point).ok());
            let key = key.ok_or(SignatureError::WrongKey { algorithm })?;
            let signature = Signature::from_slice(signature).map_err(|_| SignatureError::Invalid)?;
            key.verify(message, &signature).map_err(|_| SignatureError::Invalid)
        }};
    }
    // Curves by their names in RFC 5480, section 2.1.1.1.
    match algorithm {
        ES256 => verify!(p256, "1.2.840.10045.3.1.7"),
        ES384 => verify!(p384, "1.3.132.0.34"),
        ES512 => verify!(p521, "1.3.132.0.35"),
        algorithm => Err(SignatureError::UnsupportedAlgorithm { algorithm }),
    }
}
