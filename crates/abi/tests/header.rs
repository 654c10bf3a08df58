//! The checked-in C header is the generated one, and a C compiler reads the same interface out of it as out of Linux' own.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nitroxide_abi::code::NE_CODES;
use nitroxide_abi::extension::{self, EnclaveInfo, List, PoolInfo, Query, Stop};
use nitroxide_abi::ioctl::{self, EnclaveStartInfo, ImageLoadInfo, UserMemoryRegion};
use nitroxide_abi::wire::Field;
use nitroxide_abi::{flags, table};

#[path = "../examples/header.rs"]
mod header;

/// Linux' header as distributions install it.
const DISTRIBUTION_HEADER: &str = "/usr/include/linux/nitro_enclaves.h";

fn include_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include/uapi")
}

#[test]
fn checked_in_header_is_the_generated_one() {
    let file = include_directory().join("linux/nitro_enclaves.h");
    let checked_in = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        checked_in == header::render(),
        "{} is not what the Rust definitions say; run `cargo run -p nitroxide-abi --example header > include/uapi/linux/nitro_enclaves.h`",
        file.display()
    );
}

/// One C program, compiled once against each header: the interface of 2020 must come out the same, to the last number.
#[test]
fn c_compiler_reads_the_same_interface_from_both_headers() {
    if !Path::new(DISTRIBUTION_HEADER).exists() {
        println!("SKIPPED: {DISTRIBUTION_HEADER} is not installed (package linux-libc-dev)");
        return;
    }
    let rows = mainline_rows();
    let Some(theirs) = run_c("theirs", &rows, None) else {
        println!("SKIPPED: there is no gcc");
        return;
    };
    let ours = run_c("ours", &rows, Some(&include_directory())).expect("gcc was there a moment ago");
    assert_eq!(ours, theirs);
    assert_eq!(ours, expected(&rows));
}

/// The extension as a C compiler sees it is the one that Rust has.
#[test]
fn c_compiler_reads_the_extension_as_rust_defines_it() {
    let rows = extension_rows();
    let Some(ours) = run_c("extension", &rows, Some(&include_directory())) else {
        println!("SKIPPED: there is no gcc");
        return;
    };
    assert_eq!(ours, expected(&rows));
}

/// A C expression and the value that Rust has for it.
type Row = (String, u64);

fn mainline_rows() -> Vec<Row> {
    let mut rows = command_rows(ioctl::COMMANDS);
    rows.extend(constant_rows(flags::ALL));
    // 276 is not in Linux' header.
    let codes = NE_CODES.iter().filter(|entry| entry.code.number() <= 275);
    rows.extend(codes.map(|entry| (entry.name.to_owned(), entry.code.number().unsigned_abs().into())));
    rows.extend(struct_rows(ImageLoadInfo::C_NAME, ImageLoadInfo::SIZE, ImageLoadInfo::FIELDS));
    rows.extend(struct_rows(UserMemoryRegion::C_NAME, UserMemoryRegion::SIZE, UserMemoryRegion::FIELDS));
    rows.extend(struct_rows(EnclaveStartInfo::C_NAME, EnclaveStartInfo::SIZE, EnclaveStartInfo::FIELDS));
    rows
}

fn extension_rows() -> Vec<Row> {
    let mut rows = command_rows(extension::COMMANDS);
    rows.push(("NE_ERR_NOT_IN_RUNNING_STATE".to_owned(), 276));
    rows.extend(constant_rows(extension::group::ALL));
    rows.extend(constant_rows(extension::state::ALL));
    rows.extend(constant_rows(extension::trouble::ALL));
    rows.extend(struct_rows(Query::C_NAME, Query::SIZE, Query::FIELDS));
    rows.extend(struct_rows(EnclaveInfo::C_NAME, EnclaveInfo::SIZE, EnclaveInfo::FIELDS));
    rows.extend(struct_rows(List::C_NAME, List::SIZE, List::FIELDS));
    rows.extend(struct_rows(Stop::C_NAME, Stop::SIZE, Stop::FIELDS));
    rows.extend(struct_rows(PoolInfo::C_NAME, PoolInfo::SIZE, PoolInfo::FIELDS));
    rows
}

fn command_rows(commands: &[table::Command]) -> Vec<Row> {
    commands.iter().map(|command| (command.name.to_owned(), command.word.into())).collect()
}

fn constant_rows(constants: &[table::Constant]) -> Vec<Row> {
    constants.iter().map(|constant| (constant.name.to_owned(), constant.value)).collect()
}

fn struct_rows(name: &str, size: usize, fields: &[Field]) -> Vec<Row> {
    let mut rows = vec![(format!("sizeof(struct {name})"), size as u64)];
    for field in fields {
        rows.push((format!("offsetof(struct {name}, {})", field.name), field.offset as u64));
        rows.push((format!("sizeof(((struct {name} *)0)->{})", field.name), field.size as u64));
    }
    rows
}

fn expected(rows: &[Row]) -> String {
    rows.iter().fold(String::new(), |mut text, (expression, value)| {
        let _ = writeln!(text, "{expression} = {value}");
        text
    })
}

/// Compiles and runs a program that prints every row; `None` if there is no compiler.
fn run_c(name: &str, rows: &[Row], include: Option<&Path>) -> Option<String> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = directory.join(format!("header-{name}.c"));
    let program = directory.join(format!("header-{name}"));
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/nitro_enclaves.h>\nint main(void)\n{\n",
    );
    for (expression, _) in rows {
        let _ = writeln!(text, "\tprintf(\"{expression} = %llu\\n\", (unsigned long long)({expression}));");
    }
    text.push_str("\treturn 0;\n}\n");
    std::fs::write(&source, text).expect("the target directory can be written");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]);
    if let Some(include) = include {
        gcc.arg("-I").arg(include);
    }
    let output = match gcc.arg("-o").arg(&program).arg(&source).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        output => output.expect("gcc can be run"),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).output().expect("what was just compiled can be run");
    Some(String::from_utf8(output.stdout).expect("the program prints ASCII"))
}
