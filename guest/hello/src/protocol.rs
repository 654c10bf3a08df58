//! The line protocol: one request per line, answers end with a line end.

use crate::nsm;

/// The requests, for people.
pub const HELP: &str = "`echo TEXT`, `pcrs`, `attest NONCEHEX`, `cid`, `exit N`, `help`";

/// What a request leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// Lines to send back.
    Text(Vec<u8>),
    /// End the application with this status.
    Exit(u8),
}

/// Answers one line (with or without its line end).
pub fn answer(line: &[u8]) -> Reply {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let (word, rest) = line.iter().position(|byte| *byte == b' ').map_or((line, &[][..]), |at| {
        let (word, rest) = line.split_at(at);
        (word, rest.get(1..).unwrap_or_default())
    });
    match word {
        b"echo" => Reply::Text([rest, b"\n"].concat()),
        b"pcrs" => Reply::Text(nsm::pcrs().into_iter().map(|line| line + "\n").collect::<String>().into_bytes()),
        b"attest" => Reply::Text((nsm::document(rest) + "\n").into_bytes()),
        b"cid" => Reply::Text(
            nitroxide_guest_sys::vsock::local_cid().map_or_else(|error| format!("error: {error}\n"), |cid| format!("{cid}\n")).into_bytes(),
        ),
        b"exit" => match std::str::from_utf8(rest).ok().map(str::trim).unwrap_or_default() {
            "" => Reply::Exit(0),
            status => status.parse().map_or_else(|_| Reply::Text(b"error: the status is a number from 0 to 255\n".to_vec()), Reply::Exit),
        },
        b"help" => Reply::Text(format!("{HELP}\n").into_bytes()),
        _ => Reply::Text(format!("error: unknown request; try {HELP}\n").into_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echo_gives_the_text_back_as_it_is() {
        assert_eq!(answer(b"echo a  b\n"), Reply::Text(b"a  b\n".to_vec()));
        assert_eq!(answer(b"echo \xff\r\n"), Reply::Text(b"\xff\n".to_vec()));
        assert_eq!(answer(b"echo"), Reply::Text(b"\n".to_vec()));
    }

    #[test]
    fn exit_takes_a_status_or_means_zero() {
        assert_eq!(answer(b"exit 42\n"), Reply::Exit(42));
        assert_eq!(answer(b"exit\n"), Reply::Exit(0));
        assert!(matches!(answer(b"exit 256\n"), Reply::Text(text) if text.starts_with(b"error")));
    }

    #[test]
    fn unknown_request_is_answered_with_help() {
        assert!(matches!(answer(b"what\n"), Reply::Text(text) if text.starts_with(b"error")));
        assert!(matches!(answer(b""), Reply::Text(text) if text.starts_with(b"error")));
    }
}
