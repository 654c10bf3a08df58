//! What QEMU tells over QMP: that it runs, and why its guest ended.
//!
//! Lines of JSON, one object each. QEMU is trusted to be a program we chose, but a guest that broke into it may send anything: lines are bounded, whatever is
//! not understood is skipped. Source: docs/interop/qmp-spec.rst and qapi/run-state.json of QEMU.

/// The longest line kept; a longer one is skipped.
const MAX_LINE_BYTES: usize = 64 << 10;

/// What to send first: it leaves capabilities negotiation, and its answer says that the machine was built and runs.
pub(crate) const HELLO: &[u8] = b"{\"execute\":\"qmp_capabilities\"}\n";

/// Something QEMU said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// The machine was built and its guest runs (the answer to [`HELLO`]).
    Running,
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself (a reboot, a triple fault, a panic of most kernels).
    Reset,
    /// The guest's kernel reported a panic through a panic device.
    Panicked,
}

/// Splits the stream into lines and reads them.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    line: Vec<u8>,
    overlong: bool,
}

impl Reader {
    /// Takes the next bytes; calls `found` for each message in them.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut found: impl FnMut(Message)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            if self.line.len() + piece.len() > MAX_LINE_BYTES {
                self.overlong = true;
                self.line.clear();
            }
            if !self.overlong {
                self.line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                if let Some(message) = parse(&self.line) {
                    found(message);
                }
                self.line.clear();
                self.overlong = false;
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<Message> {
    let value: serde_json::Value = serde_json::from_slice(line).ok()?;
    if value.get("return").is_some() {
        return Some(Message::Running);
    }
    match value.get("event")?.as_str()? {
        "GUEST_PANICKED" | "GUEST_CRASHLOADED" => Some(Message::Panicked),
        "SHUTDOWN" => match value.get("data")?.get("reason")?.as_str()? {
            "guest-shutdown" => Some(Message::PoweredOff),
            "guest-reset" | "subsystem-reset" => Some(Message::Reset),
            "guest-panic" => Some(Message::Panicked),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": ["oob"]}}"#;

    fn event(reason: &str) -> String {
        format!(
            r#"{{"timestamp": {{"seconds": 1, "microseconds": 2}}, "event": "SHUTDOWN", "data": {{"guest": true, "reason": "{reason}"}}}}"#
        )
    }

    fn read(bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        Reader::default().feed(bytes, |message| messages.push(message));
        messages
    }

    #[test]
    fn a_whole_life_is_read() {
        let life = format!("{GREETING}\r\n{{\"return\": {{}}}}\r\n{}\r\n", event("guest-shutdown"));
        assert_eq!(read(life.as_bytes()), [Message::Running, Message::PoweredOff]);
    }

    #[test]
    fn reasons_are_told_apart() {
        for (reason, message) in [
            ("guest-reset", Some(Message::Reset)),
            ("guest-panic", Some(Message::Panicked)),
            ("host-signal", None),
            ("host-qmp-quit", None),
        ] {
            assert_eq!(parse(event(reason).as_bytes()), message, "{reason}");
        }
    }

    #[test]
    fn an_overlong_line_is_skipped_and_the_next_one_read() {
        let mut bytes = vec![b'x'; MAX_LINE_BYTES * 3];
        bytes.extend_from_slice(b"\n{\"return\": {}}\n");
        assert_eq!(read(&bytes), [Message::Running]);
        let mut reader = Reader::default();
        let mut messages = Vec::new();
        for piece in bytes.chunks(1000) {
            reader.feed(piece, |message| messages.push(message));
            assert!(reader.line.len() <= MAX_LINE_BYTES);
        }
        assert_eq!(messages, [Message::Running]);
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1_usize..50) {
            let mut reader = Reader::default();
            for piece in bytes.chunks(piece) {
                reader.feed(piece, |_| {});
            }
        }
    }
}
