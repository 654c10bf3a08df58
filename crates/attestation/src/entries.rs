//! Going through CBOR maps and arrays, whose length may be indefinite (RFC 8949 section 3.2.2).

use minicbor::Decoder;
use minicbor::data::Type;
use minicbor::decode::Error;

/// The rest of a map or an array that was begun: how many entries are left, or up to a break.
#[derive(Debug)]
pub struct Entries(Option<u64>);

impl Entries {
    /// Reads the head of a map.
    ///
    /// # Errors
    ///
    /// The decoder's for anything else.
    pub fn of_map(cbor: &mut Decoder<'_>) -> Result<Self, Error> {
        cbor.map().map(Self)
    }

    /// Reads the head of an array.
    ///
    /// # Errors
    ///
    /// The decoder's for anything else.
    pub fn of_array(cbor: &mut Decoder<'_>) -> Result<Self, Error> {
        cbor.array().map(Self)
    }

    /// How many entries are left, as far as the head has said.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        self.0
    }

    /// Whether another entry follows, which the caller has to read; the break at an indefinite end is read. A wrong count runs into the end of the input.
    ///
    /// # Errors
    ///
    /// The decoder's at the end of the input.
    pub fn has_next(&mut self, cbor: &mut Decoder<'_>) -> Result<bool, Error> {
        match &mut self.0 {
            Some(0) => Ok(false),
            Some(left) => {
                *left -= 1;
                Ok(true)
            }
            None if cbor.datatype()? == Type::Break => {
                cbor.set_position(cbor.position().saturating_add(1));
                Ok(false)
            }
            None => Ok(true),
        }
    }
}
