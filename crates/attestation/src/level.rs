//! The five levels of a chain: what their certificates are called, how long they count, when they are renewed.
//!
//! Measured on genuine documents (docs/attestation.md, "The chain"): names, the order of their parts, periods and path lengths are AWS's,
//! with names of our own that say so. [`crate::issue`] makes the certificates.

use crate::certificate::Timestamp;

/// Hours, in milliseconds.
const HOUR_MS: u64 = 60 * 60 * 1000;
const DAY_MS: u64 = 24 * HOUR_MS;

/// How long a leaf certificate counts, in milliseconds: 3 hours and 3 seconds, as in genuine documents.
pub const LEAF_VALIDITY_MS: u64 = 3 * HOUR_MS + 3000;

/// What stands for AWS's partition `aws`, in every name.
const PARTITION: &str = "not-aws";
/// What stands for `nitro-enclaves`.
const SERVICE: &str = "nitroxide";
/// What stands for a region such as `ap-south-1`.
const REGION: &str = "local";

/// The longest common name (bytes) of a certificate: ub-common-name of RFC 5280 appendix A.1.
const MAX_COMMON_NAME_BYTES: usize = 64;

/// A place in the chain, from the top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Root,
    Region,
    Zonal,
    Instance,
    Leaf,
}

/// From when until when a certificate counts; written with whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Period {
    pub(crate) begins: Timestamp,
    pub(crate) ends: Timestamp,
}

/// The order in which a name's parts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameShape {
    /// Country, organisation, unit, common name.
    Short,
    /// Common name, unit, organisation, country, state, locality.
    Zonal,
    /// Country, state, locality, organisation, unit, common name.
    Long,
}

impl Level {
    /// The levels below an authority's chain of `certificates`, without the leaf. One that was imported takes the places from the top.
    pub(crate) fn below(certificates: usize) -> &'static [Self] {
        match certificates {
            0 | 1 => &[Self::Region, Self::Zonal, Self::Instance],
            2 => &[Self::Zonal, Self::Instance],
            _ => &[Self::Instance],
        }
    }

    pub(crate) fn path_length(self) -> Option<u8> {
        match self {
            Self::Root | Self::Leaf => None,
            Self::Region => Some(2),
            Self::Zonal => Some(1),
            Self::Instance => Some(0),
        }
    }

    /// The period of a certificate that is made now, before it is cut at its issuer's end. Certificates begin before they are made,
    /// because a verifier's clock may be behind.
    pub(crate) fn period(self, now: Timestamp) -> Period {
        let (before_ms, after_ms) = match self {
            // 30 years by the calendar, with 7 or 8 leap days: whoever looks wants a round number, not the millisecond.
            Self::Root => (HOUR_MS, 30 * 365 * DAY_MS + 8 * DAY_MS),
            Self::Region => (HOUR_MS, 20 * DAY_MS),
            Self::Zonal => (HOUR_MS, 5 * DAY_MS + 16 * HOUR_MS - 1000),
            // Where in its day a genuine one is made is not known.
            Self::Instance => (HOUR_MS, DAY_MS - HOUR_MS),
            Self::Leaf => (3000, LEAF_VALIDITY_MS - 3000),
        };
        Period { begins: Timestamp(now.0.saturating_sub(before_ms)), ends: Timestamp(now.0.saturating_add(after_ms)) }
    }

    /// A certificate with less than this left is renewed: enough for a whole period of the level below, and for a leaf an hour in
    /// which whoever gets a document can look at it.
    pub(crate) fn renewal_ms(self) -> u64 {
        match self {
            Self::Root => 0,
            Self::Region => 5 * DAY_MS + 16 * HOUR_MS,
            Self::Zonal => DAY_MS,
            Self::Instance => 4 * HOUR_MS,
            Self::Leaf => HOUR_MS,
        }
    }

    pub(crate) fn name_shape(self) -> NameShape {
        match self {
            Self::Root | Self::Region => NameShape::Short,
            Self::Zonal => NameShape::Zonal,
            Self::Instance | Self::Leaf => NameShape::Long,
        }
    }

    /// The common name. `own` is what distinguishes the certificate: random hex for region and zone, the instance's id, the module id.
    /// None if it does not fit.
    pub(crate) fn common_name(self, own: &str) -> Option<String> {
        let name = match self {
            Self::Root => format!("{PARTITION}.{SERVICE}"),
            Self::Region | Self::Instance => format!("{own}.{REGION}.{PARTITION}.{SERVICE}"),
            Self::Zonal => format!("{own}.zonal.{REGION}.{PARTITION}.{SERVICE}"),
            Self::Leaf => format!("{own}.{REGION}.{PARTITION}"),
        };
        (name.len() <= MAX_COMMON_NAME_BYTES).then_some(name)
    }
}

impl Period {
    pub(crate) fn covers(self, now: Timestamp) -> bool {
        self.begins <= now && now <= self.ends
    }

    /// Ends no later than `end`.
    pub(crate) fn cut(self, end: Timestamp) -> Self {
        Self { ends: self.ends.min(end), ..self }
    }

    /// Whether a certificate of this level and period has to be replaced. One that ends with its issuer is kept to its end: a new one
    /// would not last longer.
    pub(crate) fn is_due(self, level: Level, now: Timestamp, issuer_ends: Timestamp) -> bool {
        let soon = now.0.saturating_add(level.renewal_ms()) > self.ends.0;
        !self.covers(now) || (soon && self.ends < issuer_ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_795_500_000_000);

    #[test]
    fn a_level_that_is_not_due_outlasts_what_is_made_below_it() {
        let levels = [Level::Region, Level::Zonal, Level::Instance, Level::Leaf];
        for pair in levels.windows(2) {
            let below = pair[1].period(NOW).ends.0 - NOW.0;
            assert!(pair[0].renewal_ms() >= below, "{pair:?}");
        }
    }

    #[test]
    fn what_ends_with_its_issuer_is_not_due_until_then() {
        let period = Period { begins: NOW, ends: Timestamp(NOW.0 + 60_000) };
        assert!(period.is_due(Level::Leaf, NOW, Timestamp(NOW.0 + DAY_MS)));
        assert!(!period.is_due(Level::Leaf, NOW, period.ends));
        assert!(period.is_due(Level::Leaf, Timestamp(NOW.0 + 60_001), period.ends));
        assert!(period.is_due(Level::Leaf, Timestamp(NOW.0 - 1), period.ends));
    }

    #[test]
    fn names_fit_ids_of_the_usual_length_and_no_endless_ones() {
        assert!(Level::Leaf.common_name("i-0f1cd77d37fd8bcc9-enc018e7aa61e2040ff").is_some());
        assert!(Level::Instance.common_name("i-0f1cd77d37fd8bcc9").is_some());
        assert_eq!(Level::Leaf.common_name(&"x".repeat(51)), None);
    }
}
