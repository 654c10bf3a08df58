//! Taking an authority of the user's own: which certificates and keys fit, and what is said of those that do not.
//!
//! [`authority`] puts the certificates in order and checks them as [`crate::Verifier`] will, with the levels in mind that
//! [`crate::pki`] hangs below.

use crate::authority::Authority;
use crate::certificate::{Certificate, CertificateFault, Timestamp};
use crate::cose;
use crate::document::MAX_FIELD_BYTES;
use crate::issue::{self, Link};
use crate::keyfile::{KeyFile, KeyFileError};
use crate::level::Level;
use crate::payload::{PCR_BYTES, Payload, Pcr};
use crate::pki::PkiError;

/// What does not fit about an imported authority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, displaydoc::Display)]
pub enum ImportError {
    /// The file with the certificates cannot be used.
    Certificates(#[source] KeyFileError),
    /// The file with the key cannot be used.
    Key(#[source] KeyFileError),
    /// The private key is not that of any of the certificates; give the key of the certificate that is to sign.
    Mismatch,
    /// The chain ends at `{subject}`, which `{issuer}` signed; add the certificates above it, up to the self-signed root.
    NoRoot {
        /// The last that was found.
        subject: String,
        /// Whom it names.
        issuer: String,
    },
    /// The certificate `{0}` is not above the one that the key belongs to; leave it out.
    Stray(String),
    /// The certificate `{subject}` cannot stand in documents.
    Certificate {
        /// Whose.
        subject: String,
        /// What is wrong with it.
        #[source]
        fault: CertificateFault,
    },
    /// The certificate `{subject}` has {length} bytes; documents take certificates of up to 1024.
    TooLong {
        /// Whose.
        subject: String,
        /// Its length in DER.
        length: usize,
    },
    /// A certificate below `{above}`, that of `{subject}`, could have {length} bytes, and documents take certificates of up to 1024; import an authority with a shorter name.
    TooLongBelow {
        /// The last of the import.
        above: String,
        /// Whose.
        subject: String,
        /// Its length in DER at the most.
        length: usize,
    },
    /// Documents could make responses of {length} bytes, and an NSM's have up to 12288; import fewer certificates or shorter ones: the longest is that of `{longest}`.
    DocumentTooLong {
        /// At the most.
        length: usize,
        /// Whose certificate takes most of it.
        longest: String,
    },
}

/// The longest response of an NSM (bytes), as in Linux `drivers/misc/nsm.c` (NSM_RESPONSE_MAX_SIZE).
pub const MAX_RESPONSE_BYTES: usize = 0x3000;

/// What a response has around its document: `{"Attestation": {"document": …}}` with the head of a string of that length.
const AROUND_DOCUMENT_BYTES: usize = 26;

/// By how much another certificate of the same names can be longer: leading bits of two numbers of the signature and of the serial number.
const VARYING_BYTES: usize = 8;

/// Checks certificates (PEM, in any order) and a key (PEM) and makes an authority of them.
pub(crate) fn authority(certificates: &[u8], key: &[u8], now: Timestamp) -> Result<Authority, ImportError> {
    let mut pool = KeyFile::parse(certificates).map_err(ImportError::Certificates)?.certificates;
    if pool.is_empty() {
        return Err(ImportError::Certificates(KeyFileError::NoCertificate));
    }
    let key = KeyFile::parse(key).map_err(ImportError::Key)?.key.ok_or(ImportError::Key(KeyFileError::NoKey))?;
    let own = pool.iter().position(|certificate| certificate.key() == key.verifying_key()).ok_or(ImportError::Mismatch)?;
    let mut chain = vec![pool.swap_remove(own)];
    while let Some(lowest) = chain.first().filter(|certificate| !certificate.is_self_issued()) {
        let issuer = pool.iter().position(|certificate| lowest.check_names(certificate).is_ok());
        let missing = || ImportError::NoRoot { subject: lowest.subject(), issuer: lowest.issuer() };
        chain.insert(0, pool.swap_remove(issuer.ok_or_else(missing)?));
    }
    if let Some(stray) = pool.first() {
        return Err(ImportError::Stray(stray.subject()));
    }
    check(&chain, now)?;
    let certificate = chain.pop().ok_or(ImportError::Mismatch)?;
    Ok(Authority { above: chain, link: Link { certificate, key } })
}

/// Makes the levels below an authority with the longest names, and says which certificate or document would be too long.
pub(crate) fn try_out(authority: &Authority, now: Timestamp) -> Result<(), PkiError> {
    let instance = "i".repeat(40);
    let module_id = format!("{instance}-enc123456");
    let links = crate::authority::complete(authority, authority.levels().iter().map(|_| None).collect(), &instance, now)?.links;
    let key = issue::new_key()?;
    let leaf = issue::leaf(&module_id, key.verifying_key(), links.last().unwrap_or(&authority.link), now)?;
    let above = authority.link.certificate.subject();
    for certificate in links.iter().map(|link| &link.certificate).chain([&leaf]) {
        let length = certificate.der().len() + VARYING_BYTES;
        if length > MAX_FIELD_BYTES {
            return Err(ImportError::TooLongBelow { above, subject: certificate.subject(), length }.into());
        }
    }
    let bundle: Vec<&Certificate> = authority.certificates().chain(links.iter().map(|link| &link.certificate)).collect();
    let cabundle: Vec<Vec<u8>> = bundle.iter().map(|certificate| certificate.der().to_vec()).collect();
    let pcrs: Vec<(u16, Pcr)> = (0..32).map(|index| (index, [0; PCR_BYTES])).collect();
    let field = [0; MAX_FIELD_BYTES];
    let payload = Payload {
        module_id: &module_id,
        timestamp_ms: now.0,
        pcrs: &pcrs,
        certificate: leaf.der(),
        cabundle: &cabundle,
        public_key: Some(&field),
        user_data: Some(&field),
        nonce: Some(&field),
    };
    let document = cose::envelope_bytes(payload.encode().len());
    let length = document + AROUND_DOCUMENT_BYTES + (links.len() + 1) * VARYING_BYTES;
    if length > MAX_RESPONSE_BYTES {
        let longest = bundle.iter().max_by_key(|certificate| certificate.der().len()).map(|longest| longest.subject());
        return Err(ImportError::DocumentTooLong { length, longest: longest.unwrap_or(above) }.into());
    }
    Ok(())
}

fn check(chain: &[Certificate], now: Timestamp) -> Result<(), ImportError> {
    let levels = Level::below(chain.len()).len();
    for (index, certificate) in chain.iter().enumerate() {
        let issuer = index.checked_sub(1).and_then(|above| chain.get(above)).unwrap_or(certificate);
        let below = chain.len() - index - 1 + levels;
        let checked = certificate
            .check_as_authority(below)
            .and_then(|()| certificate.check_period(now))
            .and_then(|()| certificate.check_names(issuer))
            .and_then(|()| certificate.check_signature(issuer));
        checked.map_err(|fault| ImportError::Certificate { subject: certificate.subject(), fault })?;
        let length = certificate.der().len();
        if length > MAX_FIELD_BYTES {
            return Err(ImportError::TooLong { subject: certificate.subject(), length });
        }
    }
    Ok(())
}
