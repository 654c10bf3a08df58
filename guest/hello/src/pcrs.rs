//! PCR0 to PCR2 from `/dev/nsm`: the request `DescribePCR` and its answer in CBOR (the NSM API's own encoding).

use std::{fmt::Write, io};

use minicbor::{Decoder, Encoder, data::Type};
use nitroxide_guest_sys::nsm::Nsm;

/// `PCR0 <hex>` to `PCR2 <hex>`, or one line that says why not.
pub fn lines() -> Vec<String> {
    let nsm = match Nsm::open() {
        Ok(nsm) => nsm,
        Err(error) => return vec![format!("no NSM: /dev/nsm: {error}")],
    };
    let value = |index: u16| match read(&nsm, index) {
        Ok(value) => format!("PCR{index} {}", hex(&value)),
        Err(error) => format!("PCR{index} cannot be read: {error}"),
    };
    (0..3).map(value).collect()
}

fn read(nsm: &Nsm, index: u16) -> io::Result<Vec<u8>> {
    let mut request = Encoder::new(Vec::new());
    let encoded =
        request.map(1).and_then(|e| e.str("DescribePCR")).and_then(|e| e.map(1)).and_then(|e| e.str("index")).and_then(|e| e.u16(index));
    if let Err(error) = encoded {
        return Err(io::Error::other(error.to_string()));
    }
    let answer = nsm.request(&request.into_writer())?;
    data(&answer).ok_or_else(|| io::Error::other(format!("unexpected answer {}", hex(&answer))))
}

/// The `data` of `{"DescribePCR": {"lock": bool, "data": bytes}}`.
fn data(answer: &[u8]) -> Option<Vec<u8>> {
    let mut decoder = Decoder::new(answer);
    if decoder.map().ok()? != Some(1) || decoder.str().ok()? != "DescribePCR" {
        return None;
    }
    for _ in 0..decoder.map().ok()?? {
        let name = decoder.str().ok()?;
        if name == "data" && decoder.datatype().ok()? == Type::Bytes {
            return decoder.bytes().ok().map(<[u8]>::to_vec);
        }
        decoder.skip().ok()?;
    }
    None
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_found_among_the_answers_fields() {
        let answer = [b"\xa1\x6bDescribePCR\xa2\x64lock\xf5\x64data\x43\x01\x02\x03".as_slice()].concat();
        assert_eq!(data(&answer), Some(vec![1, 2, 3]));
    }

    #[test]
    fn errors_and_rubbish_have_no_data() {
        assert_eq!(data(b"\xa1\x65Error\x6cInvalidIndex"), None);
        assert_eq!(data(b""), None);
        assert_eq!(data(b"\xa1\x6bDescribePCR\xbf\xff"), None);
    }
}
