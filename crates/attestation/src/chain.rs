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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issue::{self, Link};
    use crate::level::Level;

    const NOW: Timestamp = Timestamp(1_795_500_000_000);
    const MODULE_ID: &str = "i-0123456789abcdef0-enc00000000000012ab";

    /// Root, region, zone, instance.
    fn links() -> Vec<Link> {
        let mut links = vec![issue::root(NOW).unwrap()];
        for level in [Level::Region, Level::Zonal, Level::Instance] {
            let link = issue::authority(level, "0123456789abcdef", links.last().unwrap(), NOW).unwrap();
            links.push(link);
        }
        links
    }

    fn leaf_below(issuer: &Link) -> Link {
        let key = issue::new_key().unwrap();
        Link { certificate: issue::leaf(MODULE_ID, key.verifying_key(), issuer, NOW).unwrap(), key }
    }

    fn judge(links: &[Link], leaf: &Link) -> Result<(), ChainFault> {
        let bundle: Vec<Certificate> = links.iter().map(|link| link.certificate.clone()).collect();
        check(&bundle, &leaf.certificate, NOW)?;
        check_signatures(&bundle, &leaf.certificate)
    }

    fn fault_of(links: &[Link], leaf: &Link) -> (Place, CertificateFault) {
        let ChainFault { place, fault } = judge(links, leaf).unwrap_err();
        (place, fault)
    }

    #[test]
    fn a_chain_as_it_should_be_holds() {
        let links = links();
        judge(&links, &leaf_below(&links[3])).unwrap();
    }

    #[test]
    fn a_leaf_cannot_issue() {
        let root = issue::root(NOW).unwrap();
        let leaf = leaf_below(&root);
        let below = leaf_below(&leaf);
        assert_eq!(fault_of(&[root, leaf], &below), (Place::Bundle(1), CertificateFault::NotAuthority));
    }

    #[test]
    fn an_authority_cannot_sign_documents() {
        let links = links();
        assert_eq!(fault_of(&links[..3], &links[3]), (Place::Leaf, CertificateFault::IsAuthority));
    }

    #[test]
    fn more_authorities_than_a_path_length_allows_are_refused() {
        let mut links = links();
        links.push(issue::authority(Level::Instance, "another", &links[3], NOW).unwrap());
        let leaf = leaf_below(&links[4]);
        assert_eq!(fault_of(&links, &leaf), (Place::Bundle(1), CertificateFault::PathLength { allowed: 2, found: 3 }));
    }

    #[test]
    fn a_certificate_left_out_or_in_another_place_is_noticed() {
        let links = links();
        let leaf = leaf_below(&links[3]);
        for missing in 1..4 {
            let rest: Vec<Link> = links.iter().enumerate().filter(|(index, _)| *index != missing).map(|(_, link)| link.clone()).collect();
            assert!(matches!(fault_of(&rest, &leaf).1, CertificateFault::Issuer { .. }), "{missing}");
        }
        let swapped = [links[0].clone(), links[2].clone(), links[1].clone(), links[3].clone()];
        assert!(matches!(fault_of(&swapped, &leaf), (Place::Bundle(1), CertificateFault::Issuer { .. })));
    }

    #[test]
    fn another_authority_of_the_same_name_is_noticed_by_its_key_identifier() {
        let (links, other) = (links(), issue::root(NOW).unwrap());
        let mixed = [other, links[1].clone(), links[2].clone(), links[3].clone()];
        assert_eq!(fault_of(&mixed, &leaf_below(&links[3])), (Place::Bundle(1), CertificateFault::KeyIdentifier));
    }

    #[test]
    fn a_signature_with_another_key_is_noticed_at_each_place() {
        let links = links();
        for place in 1..4_usize {
            // The certificate names its issuer and was signed by somebody else.
            let mut forged = links.clone();
            let forger = Link { certificate: links[place - 1].certificate.clone(), key: issue::new_key().unwrap() };
            let level = [Level::Region, Level::Zonal, Level::Instance][place - 1];
            forged[place] = issue::authority(level, "0123456789abcdef", &forger, NOW).unwrap();
            for below in place + 1..4 {
                let level = [Level::Region, Level::Zonal, Level::Instance][below - 1];
                forged[below] = issue::authority(level, "0123456789abcdef", &forged[below - 1].clone(), NOW).unwrap();
            }
            assert_eq!(fault_of(&forged, &leaf_below(&forged[3])), (Place::Bundle(place), CertificateFault::Signature));
        }
        let forger = Link { certificate: links[3].certificate.clone(), key: issue::new_key().unwrap() };
        assert_eq!(fault_of(&links, &leaf_below(&forger)), (Place::Leaf, CertificateFault::Signature));
    }

    #[test]
    fn each_certificates_period_counts() {
        let links = links();
        let leaf = leaf_below(&links[3]);
        let bundle: Vec<Certificate> = links.iter().map(|link| link.certificate.clone()).collect();
        for (at, place) in [
            (bundle[0].ends().0 + 1000, Place::Bundle(0)),
            (bundle[1].ends().0 + 1000, Place::Bundle(1)),
            (bundle[2].ends().0 + 1000, Place::Bundle(2)),
            (bundle[3].ends().0 + 1000, Place::Bundle(3)),
            (leaf.certificate.ends().0 + 1000, Place::Leaf),
        ] {
            let fault = check(&bundle, &leaf.certificate, Timestamp(at)).unwrap_err();
            assert_eq!(fault.place, place);
            assert!(matches!(fault.fault, CertificateFault::Expired { .. }), "{fault:?}");
        }
        let early = check(&bundle, &leaf.certificate, Timestamp(leaf.certificate.begins().0 - 1)).unwrap_err();
        assert!(matches!(early.fault, CertificateFault::NotYetValid { .. }), "{early:?}");
        check(&bundle, &leaf.certificate, Timestamp(leaf.certificate.ends().0 + 999)).unwrap();
    }
}
