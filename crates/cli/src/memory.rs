//! Memory sizes as users write them: MiB, with or without a suffix.

/// Reads `512`, `512M`, `2G`, `1T` (also `MiB`, `GiB`, `TiB`, any case) as MiB.
///
/// # Errors
///
/// A text that says what is allowed.
pub fn parse_mib(text: &str) -> Result<u64, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(digits_end);
    let factor = match suffix.to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => 1,
        "g" | "gib" => 1 << 10,
        "t" | "tib" => 1 << 20,
        _ => return Err(format!("`{text}` is not a memory size: write MiB as a number, or use a suffix as in 512M, 2G, 1T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is not a memory size: it must begin with a number"))?;
    let mib = number.checked_mul(factor).filter(|mib| mib.checked_mul(1 << 20).is_some());
    match mib {
        Some(0) => Err("an enclave without memory is not possible".to_owned()),
        Some(mib) => Ok(mib),
        None => Err(format!("`{text}` is more memory than can be counted")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_mib_with_the_usual_suffixes() {
        for (text, mib) in [("512", 512), ("512M", 512), ("2G", 2048), ("1T", 1 << 20), ("3gib", 3072), ("64m", 64)] {
            assert_eq!(parse_mib(text), Ok(mib), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_what_is_allowed() {
        for text in
            ["", "M", "-1", "1.5G", "12X", "99999999999999999999", "18446744073709551615", "17592186044416", "20000000T", "0", "0G", "5 G"]
        {
            assert!(parse_mib(text).is_err(), "{text}");
        }
    }
}
