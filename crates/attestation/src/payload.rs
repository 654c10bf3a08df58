//! The signed content of a document: a CBOR map of nine fields in a fixed order.
//!
//! [`Payload`] borrows everything; [`Payload::encode`] writes it. [`crate::cose`] signs the result. The order is that of genuine
//! documents, not RFC 8949's canonical one (docs/nsm.md, "The document").

use minicbor::Encoder;

/// Bytes in one PCR: a SHA-384 digest.
pub const PCR_BYTES: usize = 48;

/// The name of the digest that PCRs are made with, as documents and DescribeNSM spell it.
pub const DIGEST_NAME: &str = "SHA384";

/// The value of one platform configuration register.
pub type Pcr = [u8; PCR_BYTES];

/// What a document says, before it is signed.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    /// Which NSM signed: parent instance, `-enc`, enclave as 16 hex digits.
    pub module_id: &'a str,
    /// When it was signed: milliseconds since 1970-01-01 UTC.
    pub timestamp_ms: u64,
    /// PCR index and value, in the order in which they are written (genuine documents: ascending).
    pub pcrs: &'a [(u16, Pcr)],
    /// The certificate (DER) of the key that signs.
    pub certificate: &'a [u8],
    /// The certificates (DER) above it, root first.
    pub cabundle: &'a [Vec<u8>],
    /// A key of the application that others may encrypt to. An empty string is not the same as none.
    pub public_key: Option<&'a [u8]>,
    /// Anything the application wants to have signed.
    pub user_data: Option<&'a [u8]>,
    /// What the asker sent so that the answer is fresh.
    pub nonce: Option<&'a [u8]>,
}

impl Payload<'_> {
    /// The CBOR of the map; absent fields are null, not left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4096);
        self.write(&mut Encoder::new(&mut bytes)).expect("a Vec takes every write");
        bytes
    }

    fn write(&self, cbor: &mut Encoder<&mut Vec<u8>>) -> Result<(), minicbor::encode::Error<std::convert::Infallible>> {
        cbor.map(9)?;
        cbor.str("module_id")?.str(self.module_id)?;
        cbor.str("digest")?.str(DIGEST_NAME)?;
        cbor.str("timestamp")?.u64(self.timestamp_ms)?;
        cbor.str("pcrs")?.map(self.pcrs.len() as u64)?;
        for (index, value) in self.pcrs {
            cbor.u16(*index)?.bytes(value)?;
        }
        cbor.str("certificate")?.bytes(self.certificate)?;
        cbor.str("cabundle")?.array(self.cabundle.len() as u64)?;
        for certificate in self.cabundle {
            cbor.bytes(certificate)?;
        }
        for (name, value) in [("public_key", self.public_key), ("user_data", self.user_data), ("nonce", self.nonce)] {
            cbor.str(name)?;
            match value {
                Some(bytes) => cbor.bytes(bytes)?,
                None => cbor.null()?,
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_in_the_order_of_genuine_documents() {
        let payload = Payload {
            module_id: "m",
            timestamp_ms: 1,
            pcrs: &[(0, [7; 48]), (16, [8; 48])],
            certificate: b"leaf",
            cabundle: &[b"root".to_vec()],
            public_key: None,
            user_data: Some(b""),
            nonce: Some(b"n"),
        };
        let mut expected = b"\xa9\x69module_id\x61m\x66digest\x66SHA384\x69timestamp\x01\x64pcrs\xa2\x00\x58\x30".to_vec();
        expected.extend([7; 48]);
        expected.extend(b"\x10\x58\x30");
        expected.extend([8; 48]);
        expected.extend(b"\x6bcertificate\x44leaf\x68cabundle\x81\x44root\x6apublic_key\xf6\x69user_data\x40\x65nonce\x41n");
        assert_eq!(hex::encode(payload.encode()), hex::encode(expected));
    }
}
