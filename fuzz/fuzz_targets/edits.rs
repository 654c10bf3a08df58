//! Two ways to read a fuzzer's input: as it is, or as changes to something good, which reaches places that random bytes never do.

use std::borrow::Cow;

/// First byte even: the rest is the input. Odd: the rest is a list of (place: u16, value: u8) changes to `good`, and two bytes more say where it is cut off.
pub fn apply<'a>(input: &'a [u8], good: &[u8]) -> Cow<'a, [u8]> {
    let Some((mode, rest)) = input.split_first() else { return Cow::Borrowed(input) };
    if mode % 2 == 0 {
        return Cow::Borrowed(rest);
    }
    let mut bytes = good.to_vec();
    for edit in rest.chunks(3) {
        match *edit {
            [high, low, value] => {
                let place = usize::from(u16::from_be_bytes([high, low])) % good.len();
                bytes[place] = value;
            }
            [high, low] => bytes.truncate(usize::from(u16::from_be_bytes([high, low]))),
            _ => {}
        }
    }
    Cow::Owned(bytes)
}
