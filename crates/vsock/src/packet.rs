//! The packet header of virtio-vsock: 44 bytes, little endian, before every payload.
//!
//! [`Header`] is the parsed copy that all decisions are made on; the guest's memory is read once. What a parsed header proves:
//! nothing but its length. Every field is the guest's word. Source: virtio 1.3, section 5.10.6; Linux `include/uapi/linux/virtio_vsock.h`.

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 44;

/// A stream socket, the only type this device speaks (`VIRTIO_VSOCK_TYPE_STREAM`).
pub const TYPE_STREAM: u16 = 1;

/// Bit of [`Header::flags`] in a [`Operation::Shutdown`]: the sender will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Bit of [`Header::flags`] in a [`Operation::Shutdown`]: the sender will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet asks for (`VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Open a connection.
    Request = 1,
    /// The connection is accepted.
    Response = 2,
    /// The connection is refused or over.
    Reset = 3,
    /// One or both directions end; the flags say which.
    Shutdown = 4,
    /// Data.
    ReadWrite = 5,
    /// News about the sender's receive buffer.
    CreditUpdate = 6,
    /// Asks for a [`Operation::CreditUpdate`].
    CreditRequest = 7,
}

impl Operation {
    /// The operation of a number on the wire, if there is one.
    #[must_use]
    pub fn from_wire(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// One packet header, fields as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// CID of the sender.
    pub source_cid: u64,
    /// CID of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Length of the payload in bytes.
    pub length: u32,
    /// Socket type; 1 is a stream.
    pub socket_type: u16,
    /// Number of the operation; see [`Operation::from_wire`].
    pub operation: u16,
    /// Meaning depends on the operation.
    pub flags: u32,
    /// How many bytes the sender's receive buffer has in all.
    pub buffer_bytes: u32,
    /// How many bytes the sender has taken out of its receive buffer so far, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads a header from its bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        // The destructuring into parts of fixed length replaces slicing, which could panic.
        let (source_cid, rest) = split::<8>(bytes);
        let (destination_cid, rest) = split::<8>(rest);
        let (source_port, rest) = split::<4>(rest);
        let (destination_port, rest) = split::<4>(rest);
        let (length, rest) = split::<4>(rest);
        let (socket_type, rest) = split::<2>(rest);
        let (operation, rest) = split::<2>(rest);
        let (flags, rest) = split::<4>(rest);
        let (buffer_bytes, rest) = split::<4>(rest);
        let (forwarded, _) = split::<4>(rest);
        Self {
            source_cid: u64::from_le_bytes(source_cid),
            destination_cid: u64::from_le_bytes(destination_cid),
            source_port: u32::from_le_bytes(source_port),
            destination_port: u32::from_le_bytes(destination_port),
            length: u32::from_le_bytes(length),
            socket_type: u16::from_le_bytes(socket_type),
            operation: u16::from_le_bytes(operation),
            flags: u32::from_le_bytes(flags),
            buffer_bytes: u32::from_le_bytes(buffer_bytes),
            forwarded: u32::from_le_bytes(forwarded),
        }
    }

    /// The header's bytes on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = bytes.as_mut_slice();
        let mut put = |part: &[u8]| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(part.len());
            head.copy_from_slice(part);
            rest = tail;
        };
        put(&self.source_cid.to_le_bytes());
        put(&self.destination_cid.to_le_bytes());
        put(&self.source_port.to_le_bytes());
        put(&self.destination_port.to_le_bytes());
        put(&self.length.to_le_bytes());
        put(&self.socket_type.to_le_bytes());
        put(&self.operation.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buffer_bytes.to_le_bytes());
        put(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet: the same socket type, source and destination exchanged (virtio 1.3, 5.10.6.3).
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            socket_type: self.socket_type,
            operation: Operation::Reset as u16,
            ..Self::default()
        }
    }
}

/// The first `N` bytes and the rest; zeros and nothing if there are fewer, which the caller's fixed length excludes.
fn split<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    match bytes.split_first_chunk::<N>() {
        Some((head, rest)) => (*head, rest),
        None => ([0; N], &[]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|i| u8::try_from(i).unwrap());

        let header = Header::from_bytes(&bytes);

        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.destination_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(header.source_port, 0x1312_1110);
        assert_eq!(header.destination_port, 0x1716_1514);
        assert_eq!(header.length, 0x1b1a_1918);
        assert_eq!(header.socket_type, 0x1d1c);
        assert_eq!(header.operation, 0x1f1e);
        assert_eq!(header.flags, 0x2322_2120);
        assert_eq!(header.buffer_bytes, 0x2726_2524);
        assert_eq!(header.forwarded, 0x2b2a_2928);
    }

    proptest! {
        #[test]
        fn every_header_survives_the_wire(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }
    }
}
