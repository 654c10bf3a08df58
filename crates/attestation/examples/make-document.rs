//! Writes an attestation document below the user's local root to standard output: the library without an NSM around it.
//!
//! `cargo run -p nitroxide-attestation --example make-document > document.cbor`, then `nitroxide attestation verify document.cbor`.

use nitroxide_attestation::{Claims, Pki};
use std::error::Error;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

fn main() -> Result<(), Box<dyn Error>> {
    let now_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let mut signer = Pki::of_user()?.signer("i-0000000000000000-enc0123456789abcdef", now_ms)?;
    let pcrs = [(0, [0x11; 48]), (1, [0x22; 48]), (2, [0x33; 48])];
    let claims = Claims { pcrs: &pcrs, nonce: Some(b"what the asker sent"), ..Claims::default() };
    std::io::stdout().write_all(&signer.document(now_ms, &claims)?)?;
    Ok(())
}
