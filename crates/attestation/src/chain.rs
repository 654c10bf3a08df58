//! Judging a chain of certificates, from a trusted root down to the one that signed a document.
//!
//! [`check`] is RFC 5280 section 6.1 for what documents need: names, key identifiers, periods, basic constraints with path lengths, key
//! usages, signatures. There are no policies, no name constraints (critical ones are refused as unknown) and no revocation: the
//! certificates below the root live for days. What is cheap is looked at first.

use crate::certificate::{Certificate, CertificateFault, Timestamp};
use std::fmt;

/// Where a certificate stands in a document; shown as `cabundle[1]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the bundle, from 0 (the root).
    Bundle(usize),
    /// The certificate of the key that signed.
    Leaf,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bundle(index) => write!(f, "cabundle[{index}]"),
            Self::Leaf => f.write_str("certificate"),
        }
    }
}

/// Which certificate of a chain fails, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChainFault {
    pub(crate) place: Place,
    pub(crate) fault: CertificateFault,
}

/// Everything but signatures: costs microseconds.
pub(crate) fn check(bundle: &[Certificate], leaf: &Certificate, at: Timestamp) -> Result<(), ChainFault> {
    for (index, certificate) in bundle.iter().enumerate() {
        let issuer = index.checked_sub(1).and_then(|above| bundle.get(above)).unwrap_or(certificate);
        let below = bundle.len() - index - 1;
        let fail = |fault| ChainFault { place: Place::Bundle(index), fault };
        certificate.check_names(issuer).map_err(fail)?;
        certificate.check_as_authority(below).map_err(fail)?;
        certificate.check_period(at).map_err(fail)?;
    }
    let fail = |fault| ChainFault { place: Place::Leaf, fault };
    if let Some(issuer) = bundle.last() {
        leaf.check_names(issuer).map_err(fail)?;
    }
    leaf.check_as_leaf().map_err(fail)?;
    leaf.check_period(at).map_err(fail)
}

/// The signatures below the root, which is trusted for what it is.
pub(crate) fn check_signatures(bundle: &[Certificate], leaf: &Certificate) -> Result<(), ChainFault> {
    let leaf_place = std::iter::once((Place::Leaf, leaf));
    let below_root = bundle.iter().enumerate().skip(1).map(|(index, certificate)| (Place::Bundle(index), certificate));
    for ((place, certificate), issuer) in below_root.chain(leaf_place).zip(bundle) {
        certificate.check_signature(issuer).map_err(|fault| ChainFault { place, fault })?;
    }
    Ok(())
}
