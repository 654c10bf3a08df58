//! The kernel's syntax for lists of CPUs, all of it: [`for_each_range`].
//!
//! Elements are separated by commas and blanks: a number, `a-b`, `all`, and behind the latter two a stride `:used/group`; `N`
//! stands for the last CPU that can exist. A newline right after a number or a range ends the list. Facts from
//! bitmap_parselist() of Linux' lib/bitmap-str.c; the corners that look odd are those of that function, kept on purpose
//! (docs/driver.md, "cpulist").

use crate::error::PoolError;

/// Calls `found(first, last)` for every run of CPUs in `text`, which may overlap and come in any order.
///
/// `count` is one more than the highest CPU number. A NUL ends the text.
///
/// # Errors
///
/// [`PoolError::Syntax`], [`PoolError::Overflow`] or [`PoolError::NoSuchCpu`], at the first element that is wrong; `found` was
/// called for those before it.
pub fn for_each_range(text: &[u8], count: u32, mut found: impl FnMut(u32, u32)) -> Result<(), PoolError> {
    let mut cursor = Cursor { rest: text, last: count.wrapping_sub(1) };
    while cursor.skip_to_element() {
        let (element, ended) = cursor.element()?;
        element.check(count)?;
        element.emit(&mut found);
        if ended {
            break;
        }
    }
    Ok(())
}

/// One element: of every `group` CPUs from `start` to `end`, the first `used`.
#[derive(Clone, Copy)]
struct Element {
    start: u32,
    end: u32,
    used: u32,
    group: u32,
}

impl Element {
    fn check(self, count: u32) -> Result<(), PoolError> {
        if self.start > self.end || self.group == 0 || self.used > self.group {
            return Err(PoolError::Syntax);
        }
        if self.end >= count {
            return Err(PoolError::NoSuchCpu);
        }
        Ok(())
    }

    fn emit(self, found: &mut impl FnMut(u32, u32)) {
        let mut start = Some(self.start);
        while let Some(first) = start.filter(|first| *first <= self.end) {
            if let Some(last) = self.used.checked_sub(1).map(|more| first.saturating_add(more)) {
                found(first, last.min(self.end));
            }
            start = first.checked_add(self.group);
        }
    }
}

struct Cursor<'a> {
    rest: &'a [u8],
    last: u32,
}

impl Cursor<'_> {
    /// The next byte; NUL at the end.
    fn peek(&self) -> u8 {
        self.rest.first().copied().unwrap_or(0)
    }

    fn skip(&mut self, bytes: usize) {
        self.rest = self.rest.get(bytes..).unwrap_or(&[]);
    }

    fn skip_to_element(&mut self) -> bool {
        while is_separator(self.peek()) {
            self.skip(1);
        }
        self.peek() != 0
    }

    fn at_end_of_element(&self) -> bool {
        is_separator(self.peek()) || self.peek() == 0
    }

    /// Reads one element; also whether the text ends behind it.
    fn element(&mut self) -> Result<(Element, bool), PoolError> {
        let (start, end) = if self.rest.get(..3).is_some_and(|word| word.eq_ignore_ascii_case(b"all")) {
            self.skip(3);
            (0, self.last)
        } else {
            let start = self.number()?;
            if self.at_end_of_element() {
                return Ok((whole(start, start), self.at_end_of_text()));
            }
            self.expect(b'-')?;
            (start, self.number()?)
        };
        if self.at_end_of_element() {
            return Ok((whole(start, end), self.at_end_of_text()));
        }
        self.expect(b':')?;
        let used = self.number()?;
        self.expect(b'/')?;
        let group = self.number()?;
        // Behind a stride the kernel looks for the next element at once: no separator is needed, and a newline does not end the text.
        Ok((Element { start, end, used, group }, false))
    }

    fn at_end_of_text(&self) -> bool {
        matches!(self.peek(), 0 | b'\n')
    }

    fn expect(&mut self, byte: u8) -> Result<(), PoolError> {
        if self.peek() != byte {
            return Err(PoolError::Syntax);
        }
        self.skip(1);
        Ok(())
    }

    fn number(&mut self) -> Result<u32, PoolError> {
        if self.peek() == b'N' {
            self.skip(1);
            return Ok(self.last);
        }
        if !self.peek().is_ascii_digit() {
            return Err(PoolError::Syntax);
        }
        let mut value = Some(0_u32);
        while self.peek().is_ascii_digit() {
            let digit = u32::from(self.peek() - b'0');
            value = value.and_then(|value| value.checked_mul(10)).and_then(|value| value.checked_add(digit));
            self.skip(1);
        }
        value.ok_or(PoolError::Overflow)
    }
}

/// A range without a stride. The kernel's group is then one more than `end` and wraps: 4294967295 is a syntax error, not a
/// number that is too large.
fn whole(start: u32, end: u32) -> Element {
    Element { start, end, used: end.wrapping_add(1), group: end.wrapping_add(1) }
}

/// The kernel's isspace(), the Latin-1 no-break space included, and the comma.
fn is_separator(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ' | 0xA0 | b',')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn cpus(text: &str) -> Result<Vec<u32>, PoolError> {
        let mut set = std::collections::BTreeSet::new();
        for_each_range(text.as_bytes(), 6, |first, last| set.extend(first..=last))?;
        Ok(set.into_iter().collect())
    }

    #[test]
    fn everything_that_the_kernel_takes_is_taken() {
        for (text, expected) in [
            ("2-3,4-5", &[2, 3, 4, 5][..]),
            ("2,3\n", &[2, 3]),
            ("2-3,2-3\n", &[2, 3]),
            (" 2-3 \n", &[2, 3]),
            ("2-5:2/2\n", &[2, 3, 4, 5]),
            ("0-5:1/2", &[0, 2, 4]),
            ("all:1/3", &[0, 3]),
            ("ALL", &[0, 1, 2, 3, 4, 5]),
            ("4-N\n", &[4, 5]),
            ("N", &[5]),
            ("", &[]),
            ("\n", &[]),
            (",,2,,\t3,", &[2, 3]),
            ("1-5:0/2", &[]),
            ("\n2", &[2]),
            ("2\n3", &[2]),
            ("2 \n3", &[2, 3]),
            ("2-5:1/2\n3", &[2, 3, 4]),
            ("2-3:1/1N", &[2, 3, 5]),
            ("2\0x", &[2]),
            ("0000000000000000003", &[3]),
        ] {
            assert_eq!(cpus(text).as_deref(), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn errors_are_those_of_the_kernel() {
        for (text, expected) in [
            ("99", PoolError::NoSuchCpu),
            ("6", PoolError::NoSuchCpu),
            ("2-6", PoolError::NoSuchCpu),
            ("4294967296", PoolError::Overflow),
            ("4294967295", PoolError::Syntax),
            ("3-2", PoolError::Syntax),
            ("2-", PoolError::Syntax),
            ("-2", PoolError::Syntax),
            ("2-3:", PoolError::Syntax),
            ("2-3:1", PoolError::Syntax),
            ("2-3:1/0", PoolError::Syntax),
            ("2-3:3/2", PoolError::Syntax),
            ("2:1/2", PoolError::Syntax),
            ("x", PoolError::Syntax),
            ("n", PoolError::Syntax),
            ("0x2", PoolError::Syntax),
            ("2;3", PoolError::Syntax),
            ("2,99,x", PoolError::NoSuchCpu),
            ("allx", PoolError::Syntax),
        ] {
            assert_eq!(cpus(text), Err(expected), "{text:?}");
        }
    }

    #[test]
    fn huge_strides_end() {
        let mut calls = 0;
        for_each_range(b"0-4294967293:1/4294967290", u32::MAX, |_, _| calls += 1).unwrap();
        assert_eq!(calls, 2);
    }
}
