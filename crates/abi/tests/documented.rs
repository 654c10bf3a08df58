//! docs/abi.md and docs/ioctl-number.md say what the code says: every layout, word, code and reserved number.

use std::path::Path;

use nitroxide_abi::code::NE_CODES;
use nitroxide_abi::extension::{self, EnclaveInfo, List, PoolInfo, Query, Stop};
use nitroxide_abi::ioctl::{self, EnclaveStartInfo, ImageLoadInfo, UserMemoryRegion};
use nitroxide_abi::pci::{self, Command, Reply};
use nitroxide_abi::reserved;
use nitroxide_abi::wire::Field;

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The rows that a struct's table must have.
fn rows(fields: &[Field]) -> String {
    fields
        .iter()
        .map(|field| {
            let array = if field.elements == 0 { String::new() } else { format!("[{}]", field.elements) };
            let doc = field.doc.concat();
            format!("| {} | {}{array} | `{}` | {} |\n", field.offset, field.c_type, field.name, doc.trim())
        })
        .collect()
}

#[test]
fn every_layout_of_the_document_is_that_of_the_code() {
    let text = document("abi.md");
    for (name, size, fields) in [
        (ImageLoadInfo::C_NAME, ImageLoadInfo::SIZE, ImageLoadInfo::FIELDS),
        (UserMemoryRegion::C_NAME, UserMemoryRegion::SIZE, UserMemoryRegion::FIELDS),
        (EnclaveStartInfo::C_NAME, EnclaveStartInfo::SIZE, EnclaveStartInfo::FIELDS),
        (Query::C_NAME, Query::SIZE, Query::FIELDS),
        (EnclaveInfo::C_NAME, EnclaveInfo::SIZE, EnclaveInfo::FIELDS),
        (List::C_NAME, List::SIZE, List::FIELDS),
        (Stop::C_NAME, Stop::SIZE, Stop::FIELDS),
        (PoolInfo::C_NAME, PoolInfo::SIZE, PoolInfo::FIELDS),
        (Reply::C_NAME, Reply::SIZE, Reply::FIELDS),
    ] {
        let table = format!("`struct {name}`, {size} bytes\n\n| at | type | field | meaning |\n|---|---|---|---|\n{}", rows(fields));
        assert!(text.contains(&table), "docs/abi.md lacks or contradicts:\n\n{table}");
    }
}

#[test]
fn every_word_and_code_is_documented() {
    let text = document("abi.md");
    for command in ioctl::COMMANDS.iter().chain(extension::COMMANDS) {
        let row = format!("| {} | 0x{:08X} |", command.name, command.word);
        assert!(text.contains(&row), "docs/abi.md lacks {row}");
    }
    for entry in NE_CODES {
        let row = format!("| {} | {} | {} |", entry.code.number(), entry.name, entry.text);
        assert!(text.contains(&row), "docs/abi.md lacks {row}");
    }
    for command in Command::ALL {
        let row = format!("| {} | {} | {} |", command.number(), command.name(), command.request_bytes());
        assert!(text.contains(&row), "docs/abi.md lacks {row}");
    }
    for (offset, name) in [(pci::ENABLE, "enable"), (pci::VERSION, "version"), (pci::COMMAND, "command"), (pci::EVENT_COUNTER, "counters")]
    {
        assert!(text.contains(&format!("| 0x{offset:03x} | ")), "docs/abi.md lacks register {name}");
    }
}

#[test]
fn every_number_of_the_range_is_recorded() {
    let text = document("ioctl-number.md");
    for command in ioctl::COMMANDS.iter().chain(extension::COMMANDS) {
        assert!(text.contains(&format!("| 0x{:08X} | {} |", command.word, command.name)), "docs/ioctl-number.md lacks {}", command.name);
    }
    for word in reserved::SECOND_GENERATION_WORDS.iter().chain(&reserved::DRAFT_WORDS) {
        assert!(text.contains(&format!("| 0x{:08X} | {} |", word.word, word.name)), "docs/ioctl-number.md lacks {}", word.name);
    }
}
