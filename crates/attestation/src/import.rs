//! Taking an authority of the user's own: which certificates and keys fit, and what is said of those that do not.
//!
//! [`authority`] puts the certificates in order and checks them as [`crate::Verifier`] will, with the levels in mind that
//! [`crate::pki`] hangs below.

use crate::authority::Authority;
use crate::certificate::{Certificate, CertificateFault, Timestamp};
use crate::document::MAX_FIELD_BYTES;
use crate::issue::Link;
use crate::keyfile::{KeyFile, KeyFileError};
use crate::level::Level;

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
}

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
