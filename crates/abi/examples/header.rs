//! Prints the C header of the interface, made from the Rust definitions.
//!
//! `cargo run -p nitroxide-abi --example header > include/uapi/linux/nitro_enclaves.h`; `tests/header.rs` says when it is due.

use std::fmt::Write as _;

use nitroxide_abi::code::NE_CODES;
use nitroxide_abi::extension::{self, EnclaveInfo, List, PoolInfo, Query, Stop};
use nitroxide_abi::ioctl::{self, EnclaveStartInfo, ImageLoadInfo, UserMemoryRegion};
use nitroxide_abi::table::{Command, Constant};
use nitroxide_abi::wire::Field;
use nitroxide_abi::{flags, limits};

const HEAD: &str = "\
/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT */
/*
 * The Nitro Enclaves interface: what a program and /dev/nitro_enclaves agree on.
 *
 * Generated from crates/abi of Nitroxide by `cargo run -p nitroxide-abi --example header`; do not edit.
 * The first part has the same words, sizes, offsets and codes as Linux' own header of this name. The second
 * part is an extension: a driver without it answers ENOTTY.
 */

#ifndef _LINUX_NITRO_ENCLAVES_H_
#define _LINUX_NITRO_ENCLAVES_H_

#include <linux/types.h>
";

/// The width that comments are wrapped to, in characters.
const COMMENT_WIDTH: usize = 90;

#[allow(dead_code, clippy::print_stdout, reason = "the test includes this file for `render` alone")]
fn main() {
    print!("{}", render());
}

/// The whole header.
pub fn render() -> String {
    let mut header = String::from(HEAD);
    section(&mut header, "Commands.");
    commands(&mut header, ioctl::COMMANDS);
    section(&mut header, "Codes: errno after a command that failed, beside those of Linux.");
    let codes: Vec<_> = NE_CODES
        .iter()
        .map(|entry| Constant { name: entry.name, value: entry.code.number().unsigned_abs().into(), text: entry.text })
        .collect();
    constants(&mut header, &codes, decimal);
    section(&mut header, "Flags.");
    constants(&mut header, flags::ALL, hexadecimal);
    section(&mut header, "Structs of the commands.");
    structure(&mut header, ImageLoadInfo::C_NAME, ImageLoadInfo::DOC, ImageLoadInfo::FIELDS);
    structure(&mut header, UserMemoryRegion::C_NAME, UserMemoryRegion::DOC, UserMemoryRegion::FIELDS);
    structure(&mut header, EnclaveStartInfo::C_NAME, EnclaveStartInfo::DOC, EnclaveStartInfo::FIELDS);
    section(
        &mut header,
        "Extension: commands. Each takes a pointer to a struct whose first field the caller sets to the struct's size; what is \
         shorter than the driver's is extended with zeroes, and what is longer must be zero there (E2BIG).",
    );
    commands(&mut header, extension::COMMANDS);
    section(&mut header, "Extension: values.");
    for table in [
        extension::group::ALL,
        extension::home::ALL,
        extension::backend::ALL,
        extension::isolation::ALL,
        extension::feature::ALL,
        extension::cid_flag::ALL,
        extension::state::ALL,
        extension::exit_reason::ALL,
        extension::trouble::ALL,
    ] {
        constants(&mut header, table, hexadecimal);
        header.push('\n');
    }
    section(&mut header, "Extension: structs.");
    structure(&mut header, Query::C_NAME, Query::DOC, Query::FIELDS);
    structure(&mut header, EnclaveInfo::C_NAME, EnclaveInfo::DOC, EnclaveInfo::FIELDS);
    structure(&mut header, List::C_NAME, List::DOC, List::FIELDS);
    structure(&mut header, Stop::C_NAME, Stop::DOC, Stop::FIELDS);
    structure(&mut header, PoolInfo::C_NAME, PoolInfo::DOC, PoolInfo::FIELDS);
    section(&mut header, "Numbers behind the interface.");
    constants(
        &mut header,
        &[
            Constant { name: "NE_EIF_OFFSET", value: limits::EIF_OFFSET, text: "Bytes before the image in the enclave's memory." },
            Constant { name: "NE_MIN_ENCLAVE_BYTES", value: limits::MIN_ENCLAVE_BYTES, text: "Bytes of the smallest enclave." },
            Constant { name: "NE_GRANULE", value: limits::GRANULE, text: "Sizes and addresses of regions are multiples of it." },
            Constant { name: "NE_PARENT_CID", value: limits::PARENT_CID.0.into(), text: "The parent, as enclaves address it." },
        ],
        hexadecimal,
    );
    header.push_str("\n#endif /* _LINUX_NITRO_ENCLAVES_H_ */\n");
    header
}

fn section(header: &mut String, title: &str) {
    header.push('\n');
    comment(header, "", title);
    header.push('\n');
}

/// A C comment, wrapped.
fn comment(header: &mut String, indent: &str, text: &str) {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        if lines.last().is_some_and(|line| !line.is_empty() && line.len() + 1 + word.len() > COMMENT_WIDTH) {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    let text = lines.join(&format!("\n{indent} * "));
    let end = if lines.len() > 1 { format!("\n{indent} */") } else { " */".to_owned() };
    let start = if lines.len() > 1 { format!("/*\n{indent} * ") } else { "/* ".to_owned() };
    header.push_str(&format!("{indent}{start}{text}{end}\n"));
}

fn commands(header: &mut String, table: &[Command]) {
    for command in table {
        let number = command.word & 0xFF;
        let definition = match (command.word >> 30, command.c_type) {
            (0, _) => format!("_IO(0xAE, {number:#04x})"),
            (1, c_type) => format!("_IOW(0xAE, {number:#04x}, {c_type})"),
            (2, c_type) => format!("_IOR(0xAE, {number:#04x}, {c_type})"),
            (_, c_type) => format!("_IOWR(0xAE, {number:#04x}, {c_type})"),
        };
        comment(header, "", command.text);
        let _ = writeln!(header, "#define {:<32}{definition}", command.name);
    }
}

fn decimal(value: u64) -> String {
    value.to_string()
}

fn hexadecimal(value: u64) -> String {
    format!("{value:#x}")
}

fn constants(header: &mut String, table: &[Constant], format: fn(u64) -> String) {
    for constant in table {
        comment(header, "", constant.text);
        let _ = writeln!(header, "#define {:<40}({})", constant.name, format(constant.value));
    }
}

fn structure(header: &mut String, name: &str, doc: &[&str], fields: &[Field]) {
    comment(header, "", &doc.concat());
    let _ = writeln!(header, "struct {name} {{");
    for field in fields {
        comment(header, "\t", &field.doc.concat());
        let array = if field.elements == 0 { String::new() } else { format!("[{}]", field.elements) };
        let _ = writeln!(header, "\t{} {}{array};", field.c_type, field.name);
    }
    header.push_str("};\n\n");
}
