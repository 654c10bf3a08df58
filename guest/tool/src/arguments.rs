//! The command line: words become a [`Command`], or a failure that says what was expected.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::failure::Failure;
use crate::format::Format;

/// More than any request can hold (4096 bytes), so that a file of gigabytes is not read to its end.
const MAX_DATA_BYTES: u64 = 4097;

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// A document.
    Attest { nonce: Option<Data>, user_data: Option<Data>, public_key: Option<Data>, format: Format },
    /// What the module is.
    Describe,
    /// A register, or all.
    Pcr(Option<u16>),
    /// Hash data into a register.
    Extend(u16, Data),
    /// Lock a register.
    Lock(u16),
    /// Lock all registers below one.
    LockBelow(u16),
    /// Random bytes.
    Random(u64, Format),
    /// The help text.
    Help,
    /// The version.
    Version,
}

/// Where bytes come from.
#[derive(Debug, PartialEq, Eq)]
pub enum Data {
    /// They stood on the command line.
    Bytes(Vec<u8>),
    /// The content of a file.
    File(PathBuf),
    /// Standard input to its end.
    Input,
}

impl Data {
    fn parse(word: &OsString, name: &str) -> Result<Self, Failure> {
        let bytes = word.as_encoded_bytes();
        if bytes == b"-" {
            return Ok(Self::Input);
        }
        if bytes.starts_with(b"@") {
            return Ok(Self::File(OsStr::from_bytes(bytes.get(1..).unwrap_or_default()).into()));
        }
        hex::decode(bytes).map(Self::Bytes).map_err(|_| {
            Failure::Usage(format!("{name} `{}` is not hex; write pairs of hex digits, @FILE, or - for standard input", shown(word)))
        })
    }

    /// The bytes; at most one more than any request can hold.
    pub fn read(self) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        let (result, what) = match self {
            Self::Bytes(bytes) => return Ok(bytes),
            Self::File(path) => {
                (File::open(&path).and_then(|file| file.take(MAX_DATA_BYTES).read_to_end(&mut bytes)), path.display().to_string())
            }
            Self::Input => (std::io::stdin().take(MAX_DATA_BYTES).read_to_end(&mut bytes), "standard input".to_owned()),
        };
        result.map(|_| bytes).map_err(|error| Failure::Data(what, error))
    }
}

/// Reads the command line.
pub fn parse(words: &[OsString]) -> Result<Command, Failure> {
    // Wherever it stands: it can be neither data nor a number, and who asks for help may not know what else is needed.
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(Command::Help);
    }
    let mut words = Words(words.iter());
    let Some(command) = words.0.next() else { return Err(Failure::Usage("what is to be done?".to_owned())) };
    let command = match command.as_encoded_bytes() {
        b"attest" => attest(&mut words)?,
        b"describe" => Command::Describe,
        b"pcr" => Command::Pcr(words.0.next().map(index).transpose()?),
        b"extend" => Command::Extend(index(words.next("the number of a register")?)?, Data::parse(words.next("the data")?, "the data")?),
        b"lock" => match words.next("the number of a register")? {
            word if word == "--below" => Command::LockBelow(index(words.next("a number behind --below")?)?),
            word => Command::Lock(index(word)?),
        },
        b"random" => random(&mut words)?,
        b"help" => Command::Help,
        b"version" | b"--version" | b"-V" => Command::Version,
        _ => return Err(Failure::Usage(format!("there is no command `{}`", shown(command)))),
    };
    match words.0.next() {
        None => Ok(command),
        Some(word) => Err(Failure::Usage(format!("`{}` is one word too many", shown(word)))),
    }
}

fn attest(words: &mut Words<'_>) -> Result<Command, Failure> {
    let (mut nonce, mut user_data, mut public_key, mut format) = (None, None, None, None);
    while let Some((name, value)) = words.option()? {
        let place = match name.as_str() {
            "--nonce" => &mut nonce,
            "--user-data" => &mut user_data,
            "--public-key" => &mut public_key,
            "--format" => {
                once(&mut format, Format::parse(&value)?, &name)?;
                continue;
            }
            _ => return Err(Failure::Usage(format!("attest has no option {name}"))),
        };
        once(place, Data::parse(&value, &name)?, &name)?;
    }
    if [&nonce, &user_data, &public_key].into_iter().filter(|data| **data == Some(Data::Input)).count() > 1 {
        return Err(Failure::Usage("standard input (-) can be read for one field only".to_owned()));
    }
    Ok(Command::Attest { nonce, user_data, public_key, format: format.unwrap_or(Format::Base64) })
}

fn random(words: &mut Words<'_>) -> Result<Command, Failure> {
    let word = words.next("how many bytes")?;
    let count = word.to_str().and_then(|text| text.parse().ok());
    let count = count.ok_or_else(|| Failure::Usage(format!("`{}` is no number of bytes", shown(word))))?;
    let mut format = None;
    while let Some((name, value)) = words.option()? {
        if name != "--format" {
            return Err(Failure::Usage(format!("random has no option {name}")));
        }
        once(&mut format, Format::parse(&value)?, &name)?;
    }
    Ok(Command::Random(count, format.unwrap_or(Format::Hex)))
}

/// The words that are left.
struct Words<'a>(std::slice::Iter<'a, OsString>);

impl<'a> Words<'a> {
    fn next(&mut self, what: &str) -> Result<&'a OsString, Failure> {
        self.0.next().ok_or_else(|| Failure::Usage(format!("{what} is missing")))
    }

    /// The next option and its value, which may be the next word or stand behind `=`.
    fn option(&mut self) -> Result<Option<(String, OsString)>, Failure> {
        let Some(word) = self.0.next() else { return Ok(None) };
        let text = word.to_str().filter(|text| text.starts_with("--"));
        let text = text.ok_or_else(|| Failure::Usage(format!("`{}` is not an option", shown(word))))?;
        if let Some((name, value)) = text.split_once('=') {
            return Ok(Some((name.to_owned(), value.into())));
        }
        Ok(Some((text.to_owned(), self.next(&format!("the value of {text}"))?.clone())))
    }
}

fn once<T>(place: &mut Option<T>, value: T, name: &str) -> Result<(), Failure> {
    if place.replace(value).is_some() { Err(Failure::Usage(format!("{name} stands twice"))) } else { Ok(()) }
}

fn index(word: &OsString) -> Result<u16, Failure> {
    let number = word.to_str().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Failure::Usage(format!("`{}` is no number of a register", shown(word))))
}

fn shown(word: &OsString) -> String {
    word.to_string_lossy().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, Failure> {
        parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn commands_are_understood() {
        let attest = |nonce, user_data, public_key, format| Command::Attest { nonce, user_data, public_key, format };
        let cases = [
            ("attest", attest(None, None, None, Format::Base64)),
            ("attest --nonce 0aFF --format hex", attest(Some(Data::Bytes(vec![10, 255])), None, None, Format::Hex)),
            (
                "attest --user-data=@/etc/x --format=raw --public-key - --nonce=",
                attest(Some(Data::Bytes(vec![])), Some(Data::File("/etc/x".into())), Some(Data::Input), Format::Raw),
            ),
            ("describe", Command::Describe),
            ("pcr", Command::Pcr(None)),
            ("pcr 4", Command::Pcr(Some(4))),
            ("extend 16 00", Command::Extend(16, Data::Bytes(vec![0]))),
            ("lock 16", Command::Lock(16)),
            ("lock --below 32", Command::LockBelow(32)),
            ("random 32", Command::Random(32, Format::Hex)),
            ("random 32 --format base64", Command::Random(32, Format::Base64)),
            ("--help", Command::Help),
            ("attest --help", Command::Help),
            ("attest --nonce --help", Command::Help),
            ("extend 16 00 -h", Command::Help),
            ("describe -h all", Command::Help),
            ("version --help", Command::Help),
            ("version", Command::Version),
        ];
        for (line, command) in cases {
            assert_eq!(parsed(line).unwrap(), command, "{line}");
        }
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let cases = [
            ("", "what is to be done"),
            ("atest", "no command `atest`"),
            ("attest 00", "`00` is not an option"),
            ("attest --nonce=--help", "not hex"),
            ("attest --nonce", "the value of --nonce is missing"),
            ("attest --nonce 0", "not hex"),
            ("attest --nonce 00 --nonce 00", "twice"),
            ("attest --nonce - --user-data -", "one field only"),
            ("attest --nonces 00", "no option --nonces"),
            ("attest --format pem", "raw, base64 or hex"),
            ("describe all", "`all` is one word too many"),
            ("pcr x", "`x` is no number"),
            ("pcr 65536", "`65536` is no number"),
            ("extend 16", "the data is missing"),
            ("extend 16 xyz", "not hex"),
            ("lock", "is missing"),
            ("lock --below", "is missing"),
            ("random", "how many bytes is missing"),
            ("random -1", "`-1` is no number of bytes"),
        ];
        for (line, words) in cases {
            let failure = parsed(line).unwrap_err();
            assert!(failure.to_string().contains(words), "{line}: {failure}");
            assert_eq!(failure.exit_status(), 2, "{line}");
        }
    }

    #[test]
    fn a_file_is_read_no_further_than_a_request_is_long() {
        let bytes = Data::File("/dev/zero".into()).read().unwrap();
        assert_eq!(bytes.len(), 4097);
        let failure = Data::File("/nonexistent".into()).read().unwrap_err();
        assert!(failure.to_string().contains("/nonexistent"), "{failure}");
    }
}
