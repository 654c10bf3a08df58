//! What the sample asks `/dev/nsm`: PCR0 to PCR2, and attestation documents.

use nitroxide_guest_sys::nsm::Nsm;
use nitroxide_guest_sys::requests::Fields;

/// `PCR0 <hex>` to `PCR2 <hex>`, or one line that says why not.
pub fn pcrs() -> Vec<String> {
    let nsm = match Nsm::open() {
        Ok(nsm) => nsm,
        Err(error) => return vec![format!("no NSM: /dev/nsm: {error}")],
    };
    let value = |index: u16| match nsm.describe_pcr(index) {
        Ok((_, value)) => format!("PCR{index} {}", hex::encode(value)),
        Err(error) => format!("PCR{index} cannot be read: {error}"),
    };
    (0..3).map(value).collect()
}

/// An attestation document with this nonce (hex; none if it is empty), in hex; or a line that begins with `error`.
pub fn document(nonce: &[u8]) -> String {
    let Ok(nonce) = hex::decode(nonce.trim_ascii()) else { return "error: the nonce is pairs of hex digits, e.g. attest 00ff".to_owned() };
    let nsm = match Nsm::open() {
        Ok(nsm) => nsm,
        Err(error) => return format!("error: no NSM: /dev/nsm: {error}"),
    };
    let fields = Fields { nonce: (!nonce.is_empty()).then_some(&nonce), ..Fields::default() };
    nsm.attest(fields).map_or_else(|error| format!("error: {error}"), hex::encode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_that_is_no_hex_is_an_error_that_says_so() {
        for wrong in [b"x".as_slice(), b"0", b"00 11"] {
            assert!(document(wrong).starts_with("error: the nonce is pairs of hex digits"));
        }
    }
}
