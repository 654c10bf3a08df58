//! Socket options of level AF_VSOCK (linux/vm_sockets.h; net/vmw_vsock/af_vsock.c): kept, and but for the time limit of connect() without effect. Pure.

use std::time::Duration;

/// `SO_VM_SOCKETS_BUFFER_SIZE`, `..._MIN_SIZE` and `..._MAX_SIZE`: 64 bits each.
const BUFFER_SIZE: u32 = 0;
const BUFFER_MIN_SIZE: u32 = 1;
const BUFFER_MAX_SIZE: u32 = 2;
/// `SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD` and `..._NEW`: a `struct timeval`, the same on 64-bit machines.
const CONNECT_TIMEOUT_OLD: u32 = 6;
const CONNECT_TIMEOUT_NEW: u32 = 8;

/// `VSOCK_DEFAULT_CONNECT_TIMEOUT`.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest time that is taken: what fits the kernel's own with a clock of 1000 ticks.
const LONGEST_SECONDS: i64 = i64::MAX / 1000 - 1;

/// The options of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    size: u64,
    least: u64,
    most: u64,
    pub(crate) connect_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { size: 256 << 10, least: 128, most: 256 << 10, connect_timeout: DEFAULT_CONNECT_TIMEOUT }
    }
}

impl Options {
    /// What getsockopt gives into a room of so many bytes.
    ///
    /// # Errors
    ///
    /// ENOPROTOOPT for an option that there is not, EINVAL for too little room.
    pub(crate) fn get(&self, option: u32, room: usize) -> Result<Vec<u8>, i32> {
        let value = match option {
            BUFFER_SIZE => self.size.to_le_bytes().to_vec(),
            BUFFER_MIN_SIZE => self.least.to_le_bytes().to_vec(),
            BUFFER_MAX_SIZE => self.most.to_le_bytes().to_vec(),
            CONNECT_TIMEOUT_OLD | CONNECT_TIMEOUT_NEW => {
                let microseconds = u64::from(self.connect_timeout.subsec_micros());
                [self.connect_timeout.as_secs().to_le_bytes(), microseconds.to_le_bytes()].concat()
            }
            _ => return Err(libc::ENOPROTOOPT),
        };
        if room < value.len() { Err(libc::EINVAL) } else { Ok(value) }
    }

    /// How many bytes setsockopt takes for an option.
    ///
    /// # Errors
    ///
    /// As [`Options::get`], with the bytes that the program gives.
    pub(crate) fn bytes_of(option: u32, given: usize) -> Result<usize, i32> {
        let bytes = match option {
            BUFFER_SIZE | BUFFER_MIN_SIZE | BUFFER_MAX_SIZE => 8,
            CONNECT_TIMEOUT_OLD | CONNECT_TIMEOUT_NEW => 16,
            _ => return Err(libc::ENOPROTOOPT),
        };
        if given < bytes { Err(libc::EINVAL) } else { Ok(bytes) }
    }

    /// setsockopt with the bytes that [`Options::bytes_of`] wants.
    ///
    /// # Errors
    ///
    /// ERANGE for a time that is none.
    pub(crate) fn set(&mut self, option: u32, value: &[u8]) -> Result<(), i32> {
        let word = |at: usize| value.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        match option {
            BUFFER_SIZE => self.size = word(0),
            BUFFER_MIN_SIZE => self.least = word(0),
            BUFFER_MAX_SIZE => self.most = word(0),
            _ => {
                let (seconds, microseconds) = (word(0).cast_signed(), word(8).cast_signed());
                if !(0..LONGEST_SECONDS).contains(&seconds) || microseconds >= 1_000_000 {
                    return Err(libc::ERANGE);
                }
                // Less than none is added as none, and no time at all means the usual one.
                let time = Duration::from_secs(seconds.unsigned_abs()) + Duration::from_micros(microseconds.max(0).unsigned_abs());
                self.connect_timeout = if time.is_zero() { DEFAULT_CONNECT_TIMEOUT } else { time };
            }
        }
        self.size = self.size.min(self.most).max(self.least);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64, microseconds: i64) -> Vec<u8> {
        [seconds.to_le_bytes(), microseconds.to_le_bytes()].concat()
    }

    #[test]
    fn sizes_stay_within_their_bounds() {
        let mut options = Options::default();
        for (option, value) in [(0, 1000), (1, 500), (2, 4096), (0, 1 << 20)] {
            options.set(option, &u64::to_le_bytes(value)).unwrap();
        }
        assert_eq!(
            [0, 1, 2].map(|option| options.get(option, 8).unwrap()),
            [4096, 500, 4096].map(|value: u64| value.to_le_bytes().to_vec())
        );
        options.set(0, &[0; 8]).unwrap();
        assert_eq!(options.get(0, 8).unwrap(), 500_u64.to_le_bytes());
    }

    #[test]
    fn times_are_checked_as_by_the_kernel() {
        let mut options = Options::default();
        for option in [6, 8] {
            assert_eq!(options.get(option, 16).unwrap(), time(2, 0));
            options.set(option, &time(5, 250_000)).unwrap();
            assert_eq!(options.get(option, 16).unwrap(), time(5, 250_000));
            for (seconds, microseconds) in [(-1, 0), (1, 1_000_000), (i64::MAX, 0)] {
                assert_eq!(options.set(option, &time(seconds, microseconds)), Err(libc::ERANGE));
            }
            options.set(option, &time(0, 0)).unwrap();
        }
    }

    #[test]
    fn rooms_and_unknown_options_are_refused() {
        let options = Options::default();
        assert_eq!(options.get(0, 7), Err(libc::EINVAL));
        assert_eq!(options.get(6, 15), Err(libc::EINVAL));
        for option in [3, 4, 5, 7, 9, u32::MAX] {
            assert_eq!(options.get(option, 64), Err(libc::ENOPROTOOPT));
            assert_eq!(Options::bytes_of(option, 64), Err(libc::ENOPROTOOPT));
        }
        assert_eq!(Options::bytes_of(8, 15), Err(libc::EINVAL));
    }
}
