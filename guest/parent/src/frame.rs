//! Messages between the host and a parent VM's init.
//!
//! A frame is a kind (1 byte), a number (4 bytes, little endian) that names a command, a length (the same) and that many bytes. The host picks the
//! numbers; several commands may run at once, and their output comes mixed. Both sides read with [`read()`] and write with [`write()`].

use std::io::{self, Read, Write};

/// The longest content of a frame, in bytes: bounds what a reader sets aside for its peer.
pub const MAX_CONTENT_BYTES: usize = 1 << 20;

const HEADER_BYTES: usize = 9;

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the guest: run the content with `sh -c`; standard output and error come back mixed, standard input is a pipe.
    Run,
    /// To the guest: as [`Kind::Run`], but on a terminal. The first four bytes are its rows and columns (2 bytes each, little endian).
    Terminal,
    /// To the guest: bytes for the command's standard input; an empty one closes it (on a terminal it does nothing).
    Input,
    /// To the guest: the one byte is a signal for the command's process group.
    Signal,
    /// To the guest: the terminal has another size now; content as in [`Kind::Terminal`].
    Resize,
    /// To the host: the VM is set up and takes commands. Its content is text: milliseconds since the kernel started.
    Ready,
    /// To the host: output of the command.
    Output,
    /// To the host: the command has ended; the four bytes (little endian) are its exit status, 128 + N where signal N ended it.
    Exited,
    /// To the host: the command could not be started; the content says why.
    Failed,
}

const KINDS: [(u8, Kind); 9] = [
    (1, Kind::Run),
    (2, Kind::Terminal),
    (3, Kind::Input),
    (4, Kind::Signal),
    (5, Kind::Resize),
    (16, Kind::Ready),
    (17, Kind::Output),
    (18, Kind::Exited),
    (19, Kind::Failed),
];

impl Kind {
    fn to_byte(self) -> u8 {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or(0, |(byte, _)| *byte)
    }

    fn from_byte(byte: u8) -> Option<Self> {
        KINDS.iter().find(|(known, _)| *known == byte).map(|(_, kind)| *kind)
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is about.
    pub kind: Kind,
    /// Which command it belongs to; 0 for none.
    pub command: u32,
    /// At most [`MAX_CONTENT_BYTES`].
    pub content: Vec<u8>,
}

/// Writes one frame.
///
/// # Errors
///
/// `InvalidInput` for a longer content than [`MAX_CONTENT_BYTES`]; what writing gives.
pub fn write(out: &mut impl Write, kind: Kind, command: u32, content: &[u8]) -> io::Result<()> {
    let length = u32::try_from(content.len()).ok().filter(|_| content.len() <= MAX_CONTENT_BYTES);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the content of a frame is too long"))?;
    let mut frame = Vec::with_capacity(HEADER_BYTES + content.len());
    frame.push(kind.to_byte());
    frame.extend(command.to_le_bytes());
    frame.extend(length.to_le_bytes());
    frame.extend(content);
    out.write_all(&frame)?;
    out.flush()
}

/// Reads one frame; none at the end of the stream.
///
/// # Errors
///
/// `InvalidData` for an unknown kind or too long a content, `UnexpectedEof` within a frame; what reading gives.
pub fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER_BYTES];
    let (first, rest) = header.split_at_mut(1);
    loop {
        match from.read(first) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    from.read_exact(rest)?;
    let [kind, a, b, c, d, e, f, g, h] = header;
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let kind = Kind::from_byte(kind).ok_or_else(|| invalid("a frame of an unknown kind"))?;
    let length = usize::try_from(u32::from_le_bytes([e, f, g, h])).unwrap_or(usize::MAX);
    if length > MAX_CONTENT_BYTES {
        return Err(invalid("the content of a frame is too long"));
    }
    let mut content = vec![0; length];
    from.read_exact(&mut content)?;
    Ok(Some(Frame { kind, command: u32::from_le_bytes([a, b, c, d]), content }))
}

/// Rows and columns as [`Kind::Resize`] carries them.
pub fn size_to_bytes(rows: u16, columns: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (rows.to_le_bytes(), columns.to_le_bytes());
    [a, b, c, d]
}

/// Rows and columns at the beginning of a content, and what comes after them.
pub fn size_from_bytes(content: &[u8]) -> Option<(u16, u16, &[u8])> {
    let (&[a, b, c, d], rest) = content.split_first_chunk()?;
    Some((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]), rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Vec<(usize, u32, Vec<u8>)>> {
        proptest::collection::vec((0..KINDS.len(), any::<u32>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..8)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(frames in frames()) {
            let mut stream = Vec::new();
            for (kind, command, content) in &frames {
                write(&mut stream, KINDS[*kind].1, *command, content).unwrap();
            }
            let mut stream = stream.as_slice();
            for (kind, command, content) in frames {
                prop_assert_eq!(read(&mut stream).unwrap(), Some(Frame { kind: KINDS[kind].1, command, content }));
            }
            prop_assert_eq!(read(&mut stream).unwrap(), None);
        }

        #[test]
        fn any_bytes_end_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut stream = bytes.as_slice();
            while let Ok(Some(frame)) = read(&mut stream) {
                prop_assert!(frame.content.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn too_long_a_content_is_refused_on_both_sides() {
        let long = vec![0; MAX_CONTENT_BYTES + 1];
        assert_eq!(write(&mut Vec::new(), Kind::Run, 1, &long).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let header = [1, 0, 0, 0, 0, 1, 0, 16, 0];
        assert_eq!(read(&mut header.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_size_is_read_with_what_follows_it() {
        let content = [size_to_bytes(25, 80).as_slice(), b"ls"].concat();
        assert_eq!(size_from_bytes(&content), Some((25, 80, b"ls".as_slice())));
        assert_eq!(size_from_bytes(b"abc"), None);
    }
}
