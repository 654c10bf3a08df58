//! The signing identity of one NSM: a key made at launch, its certificates, and documents signed with it.
//!
//! [`crate::Pki::signer`] makes one below the user's own PKI, [`Signer::local`] one below a root that ends with it. [`Signer::document`]
//! signs a payload of [`crate::Payload`] in the envelope of [`crate::cose`]. The leaf's key is never written to disk.

use crate::authority::{self, Authority};
use crate::certificate::{Certificate, Timestamp};
use crate::cose;
use crate::issue::{self, CertificateError, Link};
use crate::level::{Level, Period};
use crate::payload::{Payload, Pcr};
use crate::pki::{Pki, PkiError, in_one_line};
use p384::ecdsa::SigningKey;
use std::fmt;

/// Why a signer could not be made or a document not be signed.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum SignerError {
    /// The certificate of the attestation key could not be made.
    Certificate(#[from] CertificateError),
    /// The local PKI cannot be used.
    Pki(#[from] PkiError),
    /// The document could not be signed.
    Signature(#[source] p384::ecdsa::Error),
    /// Certificates could not be renewed less than a second ago, and it is not yet tried again: {0}
    Rests(String),
}

/// How long certificates are not tried again that could not be made: an enclave asks for documents as often as it likes.
const REST_MS: u64 = 1000;

/// The last failure to renew, until it works.
#[derive(Clone)]
struct Broken {
    at: Timestamp,
    error: String,
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

/// A P-384 key with a certificate chain of five levels: root, region, zone and instance (in the bundle), and leaf.
///
/// Every document is good at the moment of its signing, however long the signer lives and whatever the clock does: the leaf is issued
/// anew when less than an hour of it is left, and what is above it before a leaf would outlast it.
#[derive(Clone)]
pub struct Signer {
    module_id: String,
    key: SigningKey,
    source: Source,
    cabundle: Vec<Vec<u8>>,
    leaf: Vec<u8>,
    leaf_period: Period,
    /// When the last certificate above the leaf ends.
    issuer_ends: Timestamp,
    broken: Option<Broken>,
}

/// Where the certificates above the leaf come from.
#[derive(Clone)]
enum Source {
    /// Made with the signer and known to nobody else.
    Memory(Box<Memory>),
    /// The files of a PKI.
    Files(Pki),
}

#[derive(Clone)]
struct Memory {
    authority: Authority,
    links: Vec<Link>,
}

/// Who signs leaf certificates now.
pub(crate) struct Issuing {
    /// Root first; the last is the issuer's.
    pub(crate) bundle: Vec<Certificate>,
    pub(crate) issuer: Link,
}

impl Signer {
    /// A signer below a root that is made with it and ends with it: for tests and programs without a home.
    ///
    /// `module_id`: up to 50 ASCII letters, digits, `-`, `.` or `_`. `now_ms`: milliseconds since 1970-01-01 UTC.
    ///
    /// # Errors
    ///
    /// [`SignerError::Certificate`] if the name or the date cannot stand in a certificate, or there is no randomness.
    pub fn local(module_id: impl Into<String>, now_ms: u64) -> Result<Self, SignerError> {
        let memory = Memory { authority: Authority::new_root(Timestamp(now_ms))?, links: Vec::new() };
        Self::new(module_id.into(), Source::Memory(Box::new(memory)), Timestamp(now_ms))
    }

    pub(crate) fn of_pki(module_id: String, pki: Pki, now: Timestamp) -> Result<Self, SignerError> {
        Self::new(module_id, Source::Files(pki), now)
    }

    pub(crate) fn of_pki_later(module_id: String, pki: Pki) -> Result<Self, SignerError> {
        Self::without_leaf(module_id, Source::Files(pki))
    }

    fn new(module_id: String, source: Source, now: Timestamp) -> Result<Self, SignerError> {
        let mut signer = Self::without_leaf(module_id, source)?;
        signer.renew(now)?;
        Ok(signer)
    }

    fn without_leaf(module_id: String, source: Source) -> Result<Self, SignerError> {
        issue::check_names(&module_id)?;
        // Covers no moment, so that the first document makes the leaf.
        let never = Period { begins: Timestamp(u64::MAX), ends: Timestamp(0) };
        let key = issue::new_key()?;
        Ok(Self {
            module_id,
            key,
            source,
            cabundle: Vec::new(),
            leaf: Vec::new(),
            leaf_period: never,
            issuer_ends: Timestamp(0),
            broken: None,
        })
    }

    /// The name that stands in every document and in the leaf certificate.
    #[must_use]
    pub fn module_id(&self) -> &str {
        &self.module_id
    }

    /// The certificate (DER) that a verifier has to trust; empty as long as a signer made for later has none.
    #[must_use]
    pub fn root(&self) -> &[u8] {
        self.cabundle.first().map_or(&[], Vec::as_slice)
    }

    /// Signs a document. `now_ms`: milliseconds since 1970-01-01 UTC; certificates that do not cover it are issued anew.
    ///
    /// # Errors
    ///
    /// [`SignerError`] if a new leaf or the signature cannot be made. A PKI that cannot be used is an error only once the leaf has ended.
    pub fn document(&mut self, now_ms: u64, claims: &Claims<'_>) -> Result<Vec<u8>, SignerError> {
        let now = Timestamp(now_ms);
        if self.leaf_period.is_due(Level::Leaf, now, self.issuer_ends)
            && let Err((error, is_new)) = self.try_to_renew(now)
        {
            if !self.leaf_period.covers(now) {
                return Err(error);
            }
            if is_new {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "The attestation certificate could not be renewed; the old one still counts"
                );
            }
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

    /// Renews unless that has just failed; says of a failure whether it is another one than before.
    fn try_to_renew(&mut self, now: Timestamp) -> Result<(), (SignerError, bool)> {
        let is_recent = |broken: &&Broken| now.0.checked_sub(broken.at.0).is_some_and(|since_ms| since_ms < REST_MS);
        if let Some(broken) = self.broken.as_ref().filter(is_recent) {
            return Err((SignerError::Rests(broken.error.clone()), false));
        }
        let before = self.broken.take();
        self.renew(now).map_err(|error| {
            let text = in_one_line(&error);
            let is_new = before.is_none_or(|before| before.error != text);
            self.broken = Some(Broken { at: now, error: text });
            (error, is_new)
        })
    }

    fn renew(&mut self, now: Timestamp) -> Result<(), SignerError> {
        // Documents say when they were made, and 0 is no time in them; a clock from before 1970 reads so. No certificate covers it.
        if now.0 == 0 {
            return Err(CertificateError::Date(now).into());
        }
        let instance = issue::instance_of(&self.module_id);
        let Issuing { bundle, issuer } = match &mut self.source {
            Source::Memory(memory) => memory.issuing(instance, now)?,
            Source::Files(pki) => pki.issuing(instance, now)?,
        };
        let leaf = issue::leaf(&self.module_id, self.key.verifying_key(), &issuer, now)?;
        self.leaf_period = Period { begins: leaf.begins(), ends: leaf.ends() };
        self.leaf = leaf.der().to_vec();
        self.issuer_ends = issuer.certificate.ends();
        self.cabundle = bundle.iter().map(|certificate| certificate.der().to_vec()).collect();
        Ok(())
    }
}

impl Memory {
    fn issuing(&mut self, instance: &str, now: Timestamp) -> Result<Issuing, CertificateError> {
        if self.authority.lapsed(now).is_some() {
            // Nobody holds it, so nobody misses it.
            self.authority = Authority::new_root(now)?;
        }
        let mut kept: Vec<_> = self.links.drain(..).map(Some).collect();
        kept.resize_with(self.authority.levels().len(), || None);
        self.links = authority::complete(&self.authority, kept, instance, now)?.links;
        Ok(Issuing::new(&self.authority, &self.links))
    }
}

impl Issuing {
    pub(crate) fn new(authority: &Authority, links: &[Link]) -> Self {
        let bundle = authority.certificates().chain(links.iter().map(|link| &link.certificate)).cloned().collect();
        Self { bundle, issuer: links.last().unwrap_or(&authority.link).clone() }
    }
}

impl fmt::Debug for Signer {
    /// The keys stay out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("module_id", &self.module_id).finish_non_exhaustive()
    }
}
