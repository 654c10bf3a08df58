//! `doctor`: the local PKI that attestation documents hang from.

use nitroxide_attestation::{Pki, Timestamp, in_one_line};

use super::Check;

const NAME: &str = "attestation";

/// Looks at folder and root, and makes nothing.
pub fn check() -> Check {
    let pki = match Pki::of_user() {
        Ok(pki) => pki,
        Err(error) => return Check::note(NAME, "documents hang from a root that ends with its enclave", error.to_string()),
    };
    match pki.look(Timestamp::now().0) {
        Ok(()) => Check::ok(NAME, format!("documents hang from the local root in {}", pki.folder().display())),
        Err(error) => Check::note(NAME, "enclaves get no documents", in_one_line(&error)),
    }
}
