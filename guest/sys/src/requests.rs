//! What can be asked of the NSM, and its answers: the CBOR of docs/nsm.md, "Messages".
//!
//! [`Request`] writes the bytes of one request; the methods of [`Nsm`] in this file send it and read the answer. Whatever has a length in an answer may have
//! an indefinite one (RFC 8949 section 3.2), as maps have in the documents that AWS's devices write by now. An answer of another form than the request's
//! is an error that shows it, never a panic.

use std::fmt;
use std::io;

use minicbor::data::Type;
use minicbor::{Decoder, Encoder};

use crate::nsm::Nsm;

/// How long a register's value is, in bytes.
pub const PCR_BYTES: usize = 48;

/// What a document repeats; each at most 1024 bytes, and together with some 50 bytes around them at most 4096.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fields<'a> {
    /// For the reader.
    pub user_data: Option<&'a [u8]>,
    /// What the reader has chosen, so that an old document is no answer.
    pub nonce: Option<&'a [u8]>,
    /// With which the reader may encrypt its answer.
    pub public_key: Option<&'a [u8]>,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// Value and lock of a register.
    DescribePcr(u16),
    /// Hash data into a register.
    ExtendPcr(u16, &'a [u8]),
    /// Lock a register.
    LockPcr(u16),
    /// Lock all registers below this one.
    LockPcrs(u16),
    /// What the module is.
    DescribeNsm,
    /// A signed document.
    Attestation(Fields<'a>),
    /// Random bytes.
    GetRandom,
}

impl Request<'_> {
    /// The name on the wire, which the answer has too.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::DescribePcr(_) => "DescribePCR",
            Self::ExtendPcr(..) => "ExtendPCR",
            Self::LockPcr(_) => "LockPCR",
            Self::LockPcrs(_) => "LockPCRs",
            Self::DescribeNsm => "DescribeNSM",
            Self::Attestation(_) => "Attestation",
            Self::GetRandom => "GetRandom",
        }
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Writing to a Vec cannot fail.
        let _ = self.write(&mut Encoder::new(&mut bytes));
        bytes
    }

    fn write(&self, cbor: &mut Encoder<&mut Vec<u8>>) -> Result<(), minicbor::encode::Error<std::convert::Infallible>> {
        if matches!(self, Self::DescribeNsm | Self::GetRandom) {
            cbor.str(self.name())?;
            return Ok(());
        }
        cbor.map(1)?.str(self.name())?;
        match self {
            Self::DescribePcr(index) | Self::LockPcr(index) => cbor.map(1)?.str("index")?.u16(*index)?,
            Self::LockPcrs(range) => cbor.map(1)?.str("range")?.u16(*range)?,
            Self::ExtendPcr(index, data) => cbor.map(2)?.str("index")?.u16(*index)?.str("data")?.bytes(data)?,
            Self::Attestation(Fields { user_data, nonce, public_key }) => {
                cbor.map(3)?;
                for (name, value) in [("user_data", user_data), ("nonce", nonce), ("public_key", public_key)] {
                    cbor.str(name)?;
                    match value {
                        Some(value) => cbor.bytes(value)?,
                        None => cbor.null()?,
                    };
                }
                cbor
            }
            Self::DescribeNsm | Self::GetRandom => cbor,
        };
        Ok(())
    }
}

/// Why a request was not fulfilled.
#[derive(Debug)]
pub enum AskError {
    /// The driver: EMSGSIZE for a request over 4096 bytes, ETIMEDOUT after two minutes without an answer.
    Driver(io::Error),
    /// The module, with the name of its error code.
    Refused(String),
    /// The answer is none to the request.
    Unexpected(Vec<u8>),
}

impl fmt::Display for AskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(error) => error.fmt(f),
            Self::Refused(code) => write!(f, "the NSM answered {code}"),
            Self::Unexpected(answer) => write!(f, "the NSM gave an unexpected answer: {}", hex::encode(answer)),
        }
    }
}

impl std::error::Error for AskError {}

/// What the module says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Major, minor, patch.
    pub version: [u16; 3],
    /// Its name.
    pub module_id: String,
    /// How many registers it has.
    pub max_pcrs: u16,
    /// Which of them are locked.
    pub locked_pcrs: Vec<u16>,
    /// The hash of the registers.
    pub digest: String,
}

impl Nsm {
    /// Whether register `index` is locked, and its value.
    ///
    /// # Errors
    ///
    /// [`AskError`]; `InvalidIndex` from 32 on.
    pub fn describe_pcr(&self, index: u16) -> Result<(bool, Vec<u8>), AskError> {
        self.ask(&Request::DescribePcr(index), register)
    }

    /// Hashes data into a register and returns its new value.
    ///
    /// # Errors
    ///
    /// [`AskError`]; `ReadOnlyIndex` for a locked register, `InvalidIndex` from 32 on.
    pub fn extend_pcr(&self, index: u16, data: &[u8]) -> Result<Vec<u8>, AskError> {
        self.ask(&Request::ExtendPcr(index, data), |cbor| bytes_of(cbor, "data"))
    }

    /// Locks a register for ever.
    ///
    /// # Errors
    ///
    /// As [`Self::extend_pcr`].
    pub fn lock_pcr(&self, index: u16) -> Result<(), AskError> {
        self.ask(&Request::LockPcr(index), |_| Some(()))
    }

    /// Locks all registers below `range`, those that are locked already included.
    ///
    /// # Errors
    ///
    /// [`AskError`]; `InvalidIndex` from 33 on.
    pub fn lock_pcrs(&self, range: u16) -> Result<(), AskError> {
        self.ask(&Request::LockPcrs(range), |_| Some(()))
    }

    /// What the module is.
    ///
    /// # Errors
    ///
    /// [`AskError`].
    pub fn describe(&self) -> Result<Description, AskError> {
        self.ask(&Request::DescribeNsm, description)
    }

    /// A signed attestation document (COSE_Sign1).
    ///
    /// # Errors
    ///
    /// [`AskError`]; `InputTooLarge` for a field of more than 1024 bytes.
    pub fn attest(&self, wanted: Fields<'_>) -> Result<Vec<u8>, AskError> {
        self.ask(&Request::Attestation(wanted), |cbor| bytes_of(cbor, "document"))
    }

    /// Random bytes, as many as the module gives at a time.
    ///
    /// # Errors
    ///
    /// [`AskError`].
    pub fn random(&self) -> Result<Vec<u8>, AskError> {
        self.ask(&Request::GetRandom, |cbor| bytes_of(cbor, "random"))
    }

    /// Sends a request; `read` stands behind the name in the answer, or at the end of one that is a name only.
    fn ask<T>(&self, request: &Request<'_>, read: impl FnOnce(&mut Decoder<'_>) -> Option<T>) -> Result<T, AskError> {
        let answer = self.request(&request.encode()).map_err(AskError::Driver)?;
        understand(request, &answer, read)
    }
}

fn understand<T>(request: &Request<'_>, answer: &[u8], read: impl FnOnce(&mut Decoder<'_>) -> Option<T>) -> Result<T, AskError> {
    if let Some(code) = refusal(answer) {
        return Err(AskError::Refused(code));
    }
    let mut cbor = Decoder::new(answer);
    let found = match request {
        Request::LockPcr(_) | Request::LockPcrs(_) => text(&mut cbor).filter(|name| name == request.name()).and_then(|_| read(&mut cbor)),
        _ => only_entry(&mut cbor, request.name(), read),
    };
    found.filter(|_| cbor.position() == answer.len()).ok_or_else(|| AskError::Unexpected(answer.to_vec()))
}

/// The code of `{"Error": code}`.
fn refusal(answer: &[u8]) -> Option<String> {
    only_entry(&mut Decoder::new(answer), "Error", text)
}

/// What `read` makes of the value in a map that has one entry, of that name.
fn only_entry<'b, T>(cbor: &mut Decoder<'b>, name: &str, read: impl FnOnce(&mut Decoder<'b>) -> Option<T>) -> Option<T> {
    let mut entries = Entries(cbor.map().ok()?);
    if !entries.has_next(cbor)? || text(cbor)? != name {
        return None;
    }
    let value = read(cbor)?;
    (!entries.has_next(cbor)?).then_some(value)
}

/// Goes through a map: how many entries are left, or `None` for up to a break (RFC 8949 section 3.2.2).
struct Entries(Option<u64>);

impl Entries {
    /// Whether another entry follows; the break is read.
    fn has_next(&mut self, cbor: &mut Decoder<'_>) -> Option<bool> {
        match &mut self.0 {
            Some(0) => Some(false),
            Some(left) => {
                *left -= 1;
                Some(true)
            }
            None if cbor.datatype().ok()? == Type::Break => {
                cbor.set_position(cbor.position().saturating_add(1));
                Some(false)
            }
            None => Some(true),
        }
    }
}

/// A text, in one piece or in several.
fn text(cbor: &mut Decoder<'_>) -> Option<String> {
    cbor.str_iter().ok()?.collect::<Result<_, _>>().ok()
}

/// A byte string, in one piece or in several.
fn bytes(cbor: &mut Decoder<'_>) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    for piece in cbor.bytes_iter().ok()? {
        whole.extend_from_slice(piece.ok()?);
    }
    Some(whole)
}

/// Lock and value.
fn register(cbor: &mut Decoder<'_>) -> Option<(bool, Vec<u8>)> {
    let (mut lock, mut data) = (None, None);
    fields(cbor, |name, cbor| {
        match name {
            "lock" => lock = Some(cbor.bool().ok()?),
            "data" => data = Some(bytes(cbor)?),
            _ => cbor.skip().ok()?,
        }
        Some(())
    })?;
    Some((lock?, data?))
}

fn description(cbor: &mut Decoder<'_>) -> Option<Description> {
    let (mut major, mut minor, mut patch) = (None, None, None);
    let (mut module_id, mut max_pcrs, mut locked_pcrs, mut digest) = (None, None, None, None);
    fields(cbor, |name, cbor| {
        match name {
            "version_major" => major = Some(cbor.u16().ok()?),
            "version_minor" => minor = Some(cbor.u16().ok()?),
            "version_patch" => patch = Some(cbor.u16().ok()?),
            "module_id" => module_id = Some(text(cbor)?),
            "max_pcrs" => max_pcrs = Some(cbor.u16().ok()?),
            "locked_pcrs" => locked_pcrs = Some(cbor.array_iter::<u16>().ok()?.collect::<Result<_, _>>().ok()?),
            "digest" => digest = Some(text(cbor)?),
            _ => cbor.skip().ok()?,
        }
        Some(())
    })?;
    let version = [major?, minor?, patch?];
    Some(Description { version, module_id: module_id?, max_pcrs: max_pcrs?, locked_pcrs: locked_pcrs?, digest: digest? })
}

/// Calls `entry` with the name of each field, standing at its value.
fn fields<'b>(cbor: &mut Decoder<'b>, mut entry: impl FnMut(&str, &mut Decoder<'b>) -> Option<()>) -> Option<()> {
    let mut entries = Entries(cbor.map().ok()?);
    while entries.has_next(cbor)? {
        entry(&text(cbor)?, cbor)?;
    }
    Some(())
}

/// The byte string in the field of that name.
fn bytes_of(cbor: &mut Decoder<'_>, wanted: &str) -> Option<Vec<u8>> {
    let mut found = None;
    fields(cbor, |name, cbor| {
        if name == wanted {
            found = Some(bytes(cbor)?);
            Some(())
        } else {
            cbor.skip().ok()
        }
    })?;
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_modules_tables_say() {
        let cases: [(Request<'_>, &[u8]); 7] = [
            (Request::DescribePcr(31), b"\xa1\x6bDescribePCR\xa1\x65index\x18\x1f"),
            (Request::ExtendPcr(16, b"abc"), b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x43abc"),
            (Request::LockPcr(16), b"\xa1\x67LockPCR\xa1\x65index\x10"),
            (Request::LockPcrs(20), b"\xa1\x68LockPCRs\xa1\x65range\x14"),
            (Request::DescribeNsm, b"\x6bDescribeNSM"),
            (
                Request::Attestation(Fields { nonce: Some(b""), ..Fields::default() }),
                b"\xa1\x6bAttestation\xa3\x69user_data\xf6\x65nonce\x40\x6apublic_key\xf6",
            ),
            (Request::GetRandom, b"\x69GetRandom"),
        ];
        for (request, bytes) in cases {
            assert_eq!(hex::encode(request.encode()), hex::encode(bytes), "{request:?}");
        }
    }

    #[test]
    fn a_field_is_found_among_others() {
        let answer = b"\xa1\x69ExtendPCR\xa2\x64more\x81\x01\x64data\x43\x01\x02\x03";
        let data = understand(&Request::ExtendPcr(16, b""), answer, |cbor| bytes_of(cbor, "data"));
        assert_eq!(data.unwrap(), [1, 2, 3]);
        assert!(understand(&Request::LockPcr(16), b"\x67LockPCR", |_| Some(())).is_ok());
    }

    #[test]
    fn a_refusal_has_its_code_and_anything_else_is_shown() {
        let ask = |answer: &[u8]| understand(&Request::GetRandom, answer, |cbor| bytes_of(cbor, "random")).unwrap_err().to_string();
        assert_eq!(ask(b"\xa1\x65Error\x6dInternalError"), "the NSM answered InternalError");
        for answer in [
            b"".as_slice(),
            b"\x69GetRandom",
            b"\xa1\x69GetRandom\xbf\xff",
            b"\xbf\xff",
            b"\xa2\x69GetRandom\xa1\x66random\x41a\x60\xf6",
            b"\xbf\x69GetRandom\xa1\x66random\x41a\x60\xf6\xff",
            b"\xa1\x69GetRandom\xa1\x66random\x61a",
            b"\xa1\x69GetRandom\xa1\x66random\x5f\x61a\xff",
            b"\xa1\x69GetRandom\xa1\x66random\x41a\0",
        ] {
            assert_eq!(ask(answer), format!("the NSM gave an unexpected answer: {}", hex::encode(answer)));
        }
    }

    /// Of the fields of DescribeNSM those whose number is not `without`.
    fn described(without: usize) -> Vec<u8> {
        let fields: [&[u8]; 7] = [
            b"\x6dversion_major\x01",
            b"\x6dversion_minor\x02",
            b"\x6dversion_patch\x03",
            b"\x69module_id\x61m",
            b"\x68max_pcrs\x18\x20",
            b"\x6blocked_pcrs\x82\x00\x01",
            b"\x66digest\x66SHA384",
        ];
        let left = fields.iter().enumerate().filter(|(number, _)| *number != without).map(|(_, field)| *field);
        let (count, content) = left.fold((0xa0, Vec::new()), |(count, content), field| (count + 1, [&content, field].concat()));
        [b"\xa1\x6bDescribeNSM", [count].as_slice(), &content].concat()
    }

    #[test]
    fn a_description_that_lacks_a_field_is_unexpected() {
        let read = |answer: &[u8]| understand(&Request::DescribeNsm, answer, description);
        let digest = "SHA384".to_owned();
        let whole = Description { version: [1, 2, 3], module_id: "m".to_owned(), max_pcrs: 32, locked_pcrs: vec![0, 1], digest };
        assert_eq!(read(&described(usize::MAX)).unwrap(), whole);
        for without in 0..7 {
            let answer = described(without);
            assert!(matches!(read(&answer), Err(AskError::Unexpected(shown)) if shown == answer), "without field {without}");
        }
    }

    #[test]
    fn lengths_may_be_indefinite_and_must_end() {
        fn ask<T>(request: &Request<'_>, answer: &[u8], read: fn(&mut Decoder<'_>) -> Option<T>) -> T {
            for length in 0..answer.len() {
                assert!(
                    matches!(understand(request, &answer[..length], read), Err(AskError::Unexpected(_))),
                    "{length} of {}",
                    hex::encode(answer)
                );
            }
            understand(request, answer, read).unwrap()
        }
        let random = |cbor: &mut Decoder<'_>| bytes_of(cbor, "random");
        assert_eq!(ask(&Request::GetRandom, b"\xbf\x69GetRandom\xbf\x66random\x5f\x41a\x40\x42bc\xff\xff\xff", random), b"abc");
        assert_eq!(ask(&Request::GetRandom, b"\xa1\x7f\x63Get\x66Random\xff\xa1\x7f\x66random\xff\x5f\xff", random), b"");
        let answer = b"\xbf\x6bDescribePCR\xbf\x64more\x9f\xbf\xff\xff\x64data\x5f\x41a\xff\x64lock\xf5\xff\xff";
        assert_eq!(ask(&Request::DescribePcr(0), answer, register), (true, b"a".to_vec()));
        ask(&Request::LockPcr(16), b"\x7f\x64Lock\x63PCR\xff", |_| Some(()));
    }

    #[test]
    fn a_description_of_indefinite_length_says_the_same() {
        let definite = described(usize::MAX);
        let (name, fields) = definite[1..].split_at(12);
        let mut answer = [&[0xbf], name, &[0xbf], &fields[1..], &[0xff, 0xff]].concat();
        let array = answer.windows(4).position(|window| window == [b's', 0x82, 0, 1]).unwrap() + 1;
        answer.splice(array..array + 3, [0x9f, 0, 1, 0xff]);
        let read = |answer: &[u8]| understand(&Request::DescribeNsm, answer, description).unwrap();
        assert_eq!(read(&answer), read(&definite));
    }

    #[test]
    fn a_refusal_of_indefinite_length_has_its_code() {
        let refused = understand(&Request::GetRandom, b"\xbf\x65Error\x7f\x6dInternalError\xff\xff", |cbor| bytes_of(cbor, "random"));
        assert!(matches!(refused, Err(AskError::Refused(code)) if code == "InternalError"));
    }
}
