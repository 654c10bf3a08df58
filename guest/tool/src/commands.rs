//! What each command asks, and how its answer is printed.

use std::io::{self, Write};

use nitroxide_guest_sys::nsm::Nsm;
use nitroxide_guest_sys::requests::{AskError, Description, Fields};

use crate::HELP;
use crate::arguments::{Command, Data};
use crate::failure::Failure;
use crate::format::Format;

/// Does it.
pub fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Help => print(HELP.as_bytes()),
        Command::Version => print(concat!("nitroxide-guest ", env!("CARGO_PKG_VERSION"), "\n").as_bytes()),
        Command::Attest { nonce, user_data, public_key, format } => {
            let read = |data: Option<Data>| data.map(Data::read).transpose();
            let (nonce, user_data, public_key) = (read(nonce)?, read(user_data)?, read(public_key)?);
            let fields = Fields { user_data: user_data.as_deref(), nonce: nonce.as_deref(), public_key: public_key.as_deref() };
            let document = open()?.attest(fields).map_err(|error| Failure::Ask(None, error))?;
            print(&[&format.piece(&document), format.end()].concat())
        }
        Command::Describe => print(description(&open()?.describe().map_err(|error| Failure::Ask(None, error))?).as_bytes()),
        Command::Pcr(Some(index)) => {
            let (_, value) = open()?.describe_pcr(index).map_err(about(index))?;
            print_value(&value)
        }
        Command::Pcr(None) => {
            let nsm = open()?;
            let count = nsm.describe().map_err(|error| Failure::Ask(None, error))?.max_pcrs;
            (0..count).try_for_each(|index| {
                let (locked, value) = nsm.describe_pcr(index).map_err(about(index))?;
                print(format!("PCR{index} {} {}\n", hex::encode(&value), if locked { "locked" } else { "open" }).as_bytes())
            })
        }
        Command::Extend(index, data) => {
            let data = data.read()?;
            print_value(&open()?.extend_pcr(index, &data).map_err(about(index))?)
        }
        Command::Lock(index) => open()?.lock_pcr(index).map_err(about(index)),
        Command::LockBelow(range) => open()?.lock_pcrs(range).map_err(about(range)),
        Command::Random(count, format) => random(count, format),
    }
}

fn open() -> Result<Nsm, Failure> {
    Nsm::open().map_err(Failure::Device)
}

fn about(index: u16) -> impl Fn(AskError) -> Failure {
    move |error| Failure::Ask(Some(index), error)
}

fn print_value(value: &[u8]) -> Result<(), Failure> {
    print(format!("{}\n", hex::encode(value)).as_bytes())
}

fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    output.write_all(bytes).and_then(|()| output.flush()).map_err(Failure::Output)
}

/// A name and its value per line.
fn description(found: &Description) -> String {
    let Description { version: [major, minor, patch], module_id, max_pcrs, locked_pcrs, digest } = found;
    let locked: Vec<String> = locked_pcrs.iter().map(u16::to_string).collect();
    // Text from the other side: what could end a line stays on it.
    let (module_id, digest) = (module_id.escape_debug(), digest.escape_debug());
    format!(
        "module_id {module_id}\nversion {major}.{minor}.{patch}\ndigest {digest}\nmax_pcrs {max_pcrs}\nlocked_pcrs {}\n",
        locked.join(" ")
    )
}

/// Asks as often as it takes.
fn random(count: u64, format: Format) -> Result<(), Failure> {
    let nsm = open()?;
    // Pieces for base64 are multiples of 3 bytes, so the rest of one answer is kept for the next.
    let (mut kept, mut left) = (Vec::new(), count);
    while left > 0 {
        let mut bytes = nsm.random().map_err(|error| Failure::Ask(None, error))?;
        if bytes.is_empty() {
            return Err(Failure::Ask(None, AskError::Unexpected(bytes)));
        }
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left = left.saturating_sub(bytes.len() as u64);
        kept.append(&mut bytes);
        let whole = if left == 0 { kept.len() } else { kept.len() / 3 * 3 };
        let rest = kept.split_off(whole);
        print(&format.piece(&kept))?;
        kept = rest;
    }
    print(format.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_a_name_and_a_value_per_line() {
        let found = Description {
            version: [1, 0, 0],
            module_id: "i-1-enc\n1".to_owned(),
            max_pcrs: 32,
            locked_pcrs: vec![0, 1],
            digest: "SHA384".to_owned(),
        };
        assert_eq!(description(&found), "module_id i-1-enc\\n1\nversion 1.0.0\ndigest SHA384\nmax_pcrs 32\nlocked_pcrs 0 1\n");
    }
}
