//! The guest kernel's command line: what the VM needs is put in front of ` -- `.
//!
//! Linux gives everything behind a lone `--` to init (`parse_args`, kernel/params.c), so an appended parameter would reach the application instead of
//! the kernel. Double quotes hide blanks and dashes (`next_arg`, lib/cmdline.c), so a `--` inside them is none.

/// Puts `extra` (parameters without quotes or blanks inside) into `line`: at the end, or before the first lone `--`.
pub(crate) fn insert(line: &[u8], extra: &[String]) -> Vec<u8> {
    let mut new = Vec::with_capacity(line.len() + extra.iter().map(|parameter| parameter.len() + 1).sum::<usize>());
    let (kernel, rest) = line.split_at(end_of_kernel_part(line));
    new.extend_from_slice(kernel.trim_ascii_end());
    for parameter in extra {
        if !new.is_empty() {
            new.push(b' ');
        }
        new.extend_from_slice(parameter.as_bytes());
    }
    if !rest.is_empty() {
        if !new.is_empty() {
            new.push(b' ');
        }
        new.extend_from_slice(rest);
    }
    new
}

/// Where the kernel's part ends: the position of the first lone `--`, or the line's length.
fn end_of_kernel_part(line: &[u8]) -> usize {
    words(line).find(|(_, word)| *word == b"--").map_or(line.len(), |(start, _)| start)
}

/// The line's words with their positions, as the kernel splits them: at white space outside double quotes.
fn words(line: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut position = 0;
    std::iter::from_fn(move || {
        let rest = line.get(position..)?;
        let start = position + rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
        let mut quoted = false;
        let length = line[start..]
            .iter()
            .position(|&byte| {
                quoted ^= byte == b'"';
                byte.is_ascii_whitespace() && !quoted
            })
            .unwrap_or(line.len() - start);
        position = start + length;
        Some((start, &line[start..position]))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inserted(line: &str, extra: &[&str]) -> String {
        let extra: Vec<String> = extra.iter().map(ToString::to_string).collect();
        String::from_utf8(insert(line.as_bytes(), &extra)).unwrap()
    }

    #[test]
    fn parameters_go_to_the_end() {
        assert_eq!(inserted("console=ttyS0 quiet", &["tsc_early_khz=1", "lpj=2"]), "console=ttyS0 quiet tsc_early_khz=1 lpj=2");
    }

    #[test]
    fn parameters_go_before_the_lone_dashes() {
        assert_eq!(inserted("quiet -- --listen 5", &["a=1"]), "quiet a=1 -- --listen 5");
        assert_eq!(inserted("-- x", &["a=1"]), "a=1 -- x");
        assert_eq!(inserted("quiet --", &["a=1"]), "quiet a=1 --");
    }

    #[test]
    fn only_a_lone_unquoted_pair_of_dashes_ends_the_kernels_part() {
        assert_eq!(inserted("--x y-- a=-- q=\" -- \"", &["a=1"]), "--x y-- a=-- q=\" -- \" a=1");
    }

    #[test]
    fn empty_line_and_trailing_blanks_leave_no_double_blanks() {
        assert_eq!(inserted("", &["a=1"]), "a=1");
        assert_eq!(inserted("quiet  ", &["a=1"]), "quiet a=1");
        assert_eq!(inserted("quiet", &[]), "quiet");
    }

    proptest! {
        #[test]
        fn words_keep_their_order_and_the_new_one_stands_before_the_dashes(line in "[a-z=\" -]{0,40}") {
            let before: Vec<Vec<u8>> = words(line.as_bytes()).map(|(_, word)| word.to_vec()).collect();
            let new = insert(line.as_bytes(), &["n=1".to_owned()]);
            // An open quote swallows what follows, in the kernel too: nothing can be put behind it.
            prop_assume!(line.matches('"').count() % 2 == 0);
            let after: Vec<Vec<u8>> = words(&new).map(|(_, word)| word.to_vec()).collect();
            let position = before.iter().position(|word| word == b"--").unwrap_or(before.len());
            let mut expected = before;
            expected.insert(position, b"n=1".to_vec());
            prop_assert_eq!(after, expected);
        }

        #[test]
        fn any_bytes_are_taken(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let new = insert(&line, &["n=1".to_owned()]);
            prop_assert!(new.len() >= 3 && new.len() <= line.len() + 5);
        }
    }
}
