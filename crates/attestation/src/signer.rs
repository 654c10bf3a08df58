//! The signing identity of one NSM: a key made at launch, its certificates, and documents signed with it.
//!
//! [`Signer::local`] makes key, root and leaf; [`Signer::document`] signs a payload of [`crate::Payload`] in the envelope of
//! [`crate::cose`]. Nothing is written to disk: the keys end with the value.

use crate::certificate::{self, CertificateError, Period};
use crate::cose;
use crate::payload::{Payload, Pcr};
use p384::ecdsa::SigningKey;
use std::fmt;

/// How long a leaf certificate counts, in milliseconds: 3 hours and 3 seconds, as in genuine documents.
pub const LEAF_VALIDITY_MS: u64 = (3 * 60 * 60 + 3) * 1000;

/// A leaf is issued anew when less than this is left of it, so that whoever gets a document has time to look at it.
const LEAF_RENEWAL_MS: u64 = 60 * 60 * 1000;

/// Certificates begin this much before they are made, because the verifier's clock may be behind.
const CLOCK_SKEW_MS: u64 = 3_000;

/// How long the root counts: 30 years, as AWS's does.
const ROOT_VALIDITY_MS: u64 = 30 * 365 * 24 * 60 * 60 * 1000;

/// Why a signer could not be made or a document not be signed.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum SignerError {
    /// The certificate of the attestation key could not be made.
    Certificate(#[from] CertificateError),
    /// The document could not be signed.
    Signature(#[source] p384::ecdsa::Error),
}

/// What the caller wants a document to say, besides the signer's own identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct Claims<'a> {
    /// PCR index and value, ascending.
    pub pcrs: &'a [(u16, Pcr)],
    /// A key of the application, or none.
    pub public_key: Option<&'a [u8]>,
    /// Data of the application, or none.
    pub user_data: Option<&'a [u8]>,
    /// What the asker sent, or none.
    pub nonce: Option<&'a [u8]>,
}

/// A P-384 key with a certificate chain: root (in the bundle) and leaf.
///
/// The root is made with it and known to nobody else; its documents prove that they come from one and the same signer, no more.
#[derive(Clone)]
pub struct Signer {
    module_id: String,
    key: SigningKey,
    root_key: SigningKey,
    cabundle: Vec<Vec<u8>>,
    leaf: Vec<u8>,
    leaf_period: Period,
}

impl Signer {
    /// Makes keys and certificates for `module_id`. `now_ms`: milliseconds since 1970-01-01 UTC.
    ///
    /// # Errors
    ///
    /// [`SignerError::Certificate`] if the name or the date cannot stand in a certificate, or there is no randomness.
    pub fn local(module_id: impl Into<String>, now_ms: u64) -> Result<Self, SignerError> {
        let module_id = module_id.into();
        let (key, root_key) = (certificate::new_key()?, certificate::new_key()?);
        let from_ms = now_ms.saturating_sub(CLOCK_SKEW_MS);
        let root = certificate::root(&root_key, Period { from_ms, until_ms: now_ms.saturating_add(ROOT_VALIDITY_MS) })?;
        let (leaf, leaf_period) = issue_leaf(&module_id, &key, &root_key, now_ms)?;
        Ok(Self { module_id, key, root_key, cabundle: vec![root], leaf, leaf_period })
    }

    /// The name that stands in every document and in the leaf certificate.
    #[must_use]
    pub fn module_id(&self) -> &str {
        &self.module_id
    }

    /// The certificate (DER) that a verifier has to trust.
    #[must_use]
    pub fn root(&self) -> &[u8] {
        self.cabundle.first().map_or(&[], Vec::as_slice)
    }

    /// Signs a document. `now_ms`: milliseconds since 1970-01-01 UTC; the leaf is issued anew when it does not cover it.
    ///
    /// # Errors
    ///
    /// [`SignerError`] if a new leaf or the signature cannot be made.
    pub fn document(&mut self, now_ms: u64, claims: &Claims<'_>) -> Result<Vec<u8>, SignerError> {
        let Period { from_ms, until_ms } = self.leaf_period;
        if now_ms < from_ms || now_ms.saturating_add(LEAF_RENEWAL_MS) > until_ms {
            (self.leaf, self.leaf_period) = issue_leaf(&self.module_id, &self.key, &self.root_key, now_ms)?;
        }
        let payload = Payload {
            module_id: &self.module_id,
            timestamp_ms: now_ms,
            pcrs: claims.pcrs,
            certificate: &self.leaf,
            cabundle: &self.cabundle,
            public_key: claims.public_key,
            user_data: claims.user_data,
            nonce: claims.nonce,
        };
        cose::sign1(&self.key, &payload.encode()).map_err(SignerError::Signature)
    }
}

impl fmt::Debug for Signer {
    /// The keys stay out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("module_id", &self.module_id).finish_non_exhaustive()
    }
}

fn issue_leaf(module_id: &str, key: &SigningKey, root_key: &SigningKey, now_ms: u64) -> Result<(Vec<u8>, Period), CertificateError> {
    let from_ms = now_ms.saturating_sub(CLOCK_SKEW_MS);
    let period = Period { from_ms, until_ms: from_ms.saturating_add(LEAF_VALIDITY_MS) };
    Ok((certificate::leaf(module_id, key.verifying_key(), root_key, period)?, period))
}
