//! What a guest is told: each answer as the CBOR bytes of docs/nsm.md, "Messages".
//!
//! [`Response`] borrows what it says; [`Response::encode`] writes it, never longer than [`MAX_BYTES`] for anything that
//! [`Module`](crate::Module) answers. The hwrng of Linux `drivers/misc/nsm.c` compares GetRandom's prefix byte by byte.

use minicbor::Encoder;
use nitroxide_attestation::{DIGEST_NAME, Pcr};

/// The longest response in bytes, as in Linux `drivers/misc/nsm.c` (NSM_RESPONSE_MAX_SIZE).
pub const MAX_BYTES: usize = nitroxide_attestation::MAX_RESPONSE_BYTES;

/// Why a request was not fulfilled; the name on the wire is the variant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// An argument has a value that the request does not allow.
    InvalidArgument,
    /// There is no register of that index.
    InvalidIndex,
    /// The answer does not belong to the request. Only client libraries use it.
    InvalidResponse,
    /// The register is locked.
    ReadOnlyIndex,
    /// The bytes are not a request this module knows.
    InvalidOperation,
    /// The answer has no room in the caller's buffer.
    BufferTooSmall,
    /// The request or one of its fields is too long.
    InputTooLarge,
    /// The module failed.
    InternalError,
}

impl ErrorCode {
    /// The name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "InvalidArgument",
            Self::InvalidIndex => "InvalidIndex",
            Self::InvalidResponse => "InvalidResponse",
            Self::ReadOnlyIndex => "ReadOnlyIndex",
            Self::InvalidOperation => "InvalidOperation",
            Self::BufferTooSmall => "BufferTooSmall",
            Self::InputTooLarge => "InputTooLarge",
            Self::InternalError => "InternalError",
        }
    }
}

/// One answer.
#[derive(Debug, Clone, Copy)]
pub enum Response<'a> {
    /// Lock and value of a register.
    DescribePcr {
        /// Is it locked?
        lock: bool,
        /// Its value.
        data: &'a Pcr,
    },
    /// The register's new value.
    ExtendPcr {
        /// Its value.
        data: &'a Pcr,
    },
    /// It is locked now.
    LockPcr,
    /// They are locked now.
    LockPcrs,
    /// What this module is.
    DescribeNsm {
        /// Major, minor, patch.
        version: [u16; 3],
        /// Its name.
        module_id: &'a str,
        /// How many registers it has.
        max_pcrs: u16,
        /// Which of them are locked, ascending.
        locked_pcrs: &'a [u16],
    },
    /// A signed document.
    Attestation {
        /// COSE_Sign1.
        document: &'a [u8],
    },
    /// Random bytes.
    GetRandom {
        /// At least 24: the kernel's decoder leaves its length uninitialised for shorter ones.
        random: &'a [u8],
    },
    /// It was not done.
    Error(ErrorCode),
}

impl Response<'_> {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(512);
        self.write(&mut Encoder::new(&mut bytes)).expect("a Vec takes every write");
        bytes
    }

    fn write(&self, cbor: &mut Encoder<&mut Vec<u8>>) -> Result<(), minicbor::encode::Error<std::convert::Infallible>> {
        match self {
            Self::LockPcr => cbor.str("LockPCR")?,
            Self::LockPcrs => cbor.str("LockPCRs")?,
            Self::Error(code) => cbor.map(1)?.str("Error")?.str(code.name())?,
            Self::DescribePcr { lock, data } => {
                cbor.map(1)?.str("DescribePCR")?.map(2)?.str("lock")?.bool(*lock)?.str("data")?.bytes(*data)?
            }
            Self::ExtendPcr { data } => cbor.map(1)?.str("ExtendPCR")?.map(1)?.str("data")?.bytes(*data)?,
            Self::Attestation { document } => cbor.map(1)?.str("Attestation")?.map(1)?.str("document")?.bytes(document)?,
            Self::GetRandom { random } => cbor.map(1)?.str("GetRandom")?.map(1)?.str("random")?.bytes(random)?,
            Self::DescribeNsm { version: [major, minor, patch], module_id, max_pcrs, locked_pcrs } => {
                cbor.map(1)?.str("DescribeNSM")?.map(7)?;
                cbor.str("version_major")?.u16(*major)?.str("version_minor")?.u16(*minor)?.str("version_patch")?.u16(*patch)?;
                cbor.str("module_id")?.str(module_id)?.str("max_pcrs")?.u16(*max_pcrs)?;
                cbor.str("locked_pcrs")?.array(locked_pcrs.len() as u64)?;
                for index in *locked_pcrs {
                    cbor.u16(*index)?;
                }
                cbor.str("digest")?.str(DIGEST_NAME)?
            }
        };
        Ok(())
    }
}
