//! `explain`: what an error code means and what to do; E-codes, and the driver's own codes by name or number.

use std::fmt::Write;

use nitroxide_abi::Code;

use crate::{arguments::ExplainArguments, codes::ErrorCode, failure::Failure, output};

/// Prints a paragraph per code.
pub fn run(arguments: &ExplainArguments) -> Result<(), Failure> {
    let mut text = String::new();
    for code in arguments.codes.iter().chain(&arguments.error_code) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", explain(code)?);
    }
    output::bytes(text.as_bytes())
}

fn explain(text: &str) -> Result<String, Failure> {
    if let Ok(code) = text.parse::<ErrorCode>() {
        let meaning = code.meaning();
        return Ok(format!("{code}: {}\n{}", meaning.title, wrap(meaning.text)));
    }
    let by_number = text.parse().ok().and_then(Code::new);
    let code = by_number.or_else(|| (1..512).filter_map(Code::new).find(|code| code.name().eq_ignore_ascii_case(text)));
    match code.filter(|code| code.name() != "unknown") {
        Some(code) => Ok(format!("{} ({}): the Nitro Enclaves driver's code\n{}", code.name(), code.number(), wrap(code.text()))),
        None => Err(Failure::new(ErrorCode::INVALID_ARGUMENT, format!("`{text}` is no error code"))
            .help("Codes are E00 to E62, and those of the driver by name or number, e.g. NE_ERR_MEM_NOT_HUGE_PAGE or 263.")),
    }
}

/// Indents a text by two columns in lines of at most 100.
fn wrap(text: &str) -> String {
    let mut wrapped = String::from(" ");
    let mut column = 1;
    for word in text.split(' ') {
        if column + 1 + word.len() > 100 {
            wrapped.push_str("\n ");
            column = 1;
        }
        wrapped.push(' ');
        wrapped.push_str(word);
        column += 1 + word.len();
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e_codes_and_driver_codes_are_explained() {
        assert!(explain("E29").unwrap().contains("driver"));
        assert!(explain("263").unwrap().contains("NE_ERR_MEM_NOT_HUGE_PAGE"));
        assert!(explain("ne_err_mem_not_huge_page").unwrap().contains("(263)"));
    }

    #[test]
    fn unknown_codes_are_invalid_arguments() {
        for text in ["E63", "511", "NE_ERR_NONE", "", "-1"] {
            assert_eq!(explain(text).unwrap_err().code(), ErrorCode::INVALID_ARGUMENT, "{text}");
        }
    }

    #[test]
    fn long_texts_are_wrapped() {
        assert!(explain("E03").unwrap().lines().all(|line| line.len() <= 100));
    }
}
