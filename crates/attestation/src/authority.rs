//! An authority and what hangs below it: who signs leaf certificates now.
//!
//! [`Authority`] is the top: a root of our own, or certificates that were imported, with the key of the last. [`complete`] takes the levels
//! kept from earlier and makes those anew that are missing, due or not of this authority. Where they are kept is the matter of
//! [`crate::pki`] (files) and [`crate::signer`] (memory).

use crate::certificate::{Certificate, CertificateFault, Timestamp};
use crate::issue::{self, CertificateError, Link};
use crate::level::{Level, Period};

/// The certificates from the root down to one whose key we have.
#[derive(Clone)]
pub(crate) struct Authority {
    /// The certificates above the last; empty for a root.
    pub(crate) above: Vec<Certificate>,
    /// The one that signs.
    pub(crate) link: Link,
}

impl Authority {
    /// A new root.
    pub(crate) fn new_root(now: Timestamp) -> Result<Self, CertificateError> {
        Ok(Self { above: Vec::new(), link: issue::root(now)? })
    }

    /// The root.
    pub(crate) fn root(&self) -> &Certificate {
        self.above.first().unwrap_or(&self.link.certificate)
    }

    /// Root first.
    pub(crate) fn certificates(&self) -> impl Iterator<Item = &Certificate> {
        self.above.iter().chain([&self.link.certificate])
    }

    /// The levels that hang below it.
    pub(crate) fn levels(&self) -> &'static [Level] {
        Level::below(self.above.len() + 1)
    }

    /// Its certificate that does not count at this time, if there is one, and why not.
    pub(crate) fn lapsed(&self, now: Timestamp) -> Option<(&Certificate, CertificateFault)> {
        self.certificates().find_map(|certificate| Some((certificate, certificate.check_period(now).err()?)))
    }
}

/// The levels below an authority, in its order, and how many of them were kept.
pub(crate) struct Completed {
    pub(crate) links: Vec<Link>,
    pub(crate) kept: usize,
}

/// Keeps what holds and makes the rest. `kept` has one entry for each of [`Authority::levels`].
pub(crate) fn complete(
    authority: &Authority,
    kept: Vec<Option<Link>>,
    instance: &str,
    now: Timestamp,
) -> Result<Completed, CertificateError> {
    let mut completed = Completed { links: Vec::new(), kept: 0 };
    let mut kept = kept.into_iter();
    for (number, level) in authority.levels().iter().enumerate() {
        let issuer = completed.links.last().unwrap_or(&authority.link);
        // What hangs below something new is new.
        let old = kept.next().flatten().filter(|_| completed.kept == number);
        let link = match old.filter(|link| holds(*level, link, issuer, now, due)) {
            Some(link) => {
                completed.kept += 1;
                link
            }
            None => make(*level, instance, issuer, now)?,
        };
        completed.links.push(link);
    }
    Ok(completed)
}

/// Which certificates are of no use any more at a time, by level, period and the end of their issuer.
pub(crate) type Stale = fn(Period, Level, Timestamp, Timestamp) -> bool;

/// Those that have to be renewed, so that what is made below them lasts.
pub(crate) fn due(period: Period, level: Level, now: Timestamp, issuer_ends: Timestamp) -> bool {
    period.is_due(level, now, issuer_ends)
}

/// Those that do not count.
pub(crate) fn lapsed(period: Period, _: Level, now: Timestamp, _: Timestamp) -> bool {
    !period.covers(now)
}

/// All of the levels below an authority, if each is there, below the one before and not stale. Makes nothing.
pub(crate) fn all_hold(authority: &Authority, links: Vec<Option<Link>>, now: Timestamp, stale: Stale) -> Option<Vec<Link>> {
    let mut holding: Vec<Link> = Vec::new();
    for (level, link) in authority.levels().iter().zip(links) {
        let issuer = holding.last().unwrap_or(&authority.link);
        holding.push(link.filter(|link| holds(*level, link, issuer, now, stale))?);
    }
    Some(holding)
}

fn holds(level: Level, link: &Link, issuer: &Link, now: Timestamp, stale: Stale) -> bool {
    let Link { certificate, key } = link;
    let period = Period { begins: certificate.begins(), ends: certificate.ends() };
    !stale(period, level, now, issuer.certificate.ends())
        && certificate.key() == key.verifying_key()
        && certificate.check_names(&issuer.certificate).is_ok()
        && certificate.check_signature(&issuer.certificate).is_ok()
}

fn make(level: Level, instance: &str, issuer: &Link, now: Timestamp) -> Result<Link, CertificateError> {
    let random = issue::random_name()?;
    issue::authority(level, if level == Level::Instance { instance } else { &random }, issuer, now)
}
