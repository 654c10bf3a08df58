//! One request to the Nitro Security Module through `/dev/nsm` (Linux `include/uapi/linux/nsm.h`).
#![expect(unsafe_code, reason = "the NSM ioctl has no safe wrapper")]

use std::{fs::File, io, os::fd::AsRawFd};

/// The largest answer of the device, in bytes (`NSM_RESPONSE_MAX_SIZE` of `drivers/misc/nsm.c`).
pub const RESPONSE_MAX_BYTES: usize = 0x3000;

/// `NSM_IOCTL_RAW`: `_IOWR(0x0A, 0, struct nsm_raw)` with two 16-byte `nsm_iovec`.
const IOCTL_RAW: libc::c_ulong = 0xC020_0A00;

/// `struct nsm_raw`: request and response, each an address and a length in bytes.
#[repr(C)]
struct Raw {
    request_address: u64,
    request_bytes: u64,
    response_address: u64,
    response_bytes: u64,
}

/// The open NSM device.
#[derive(Debug)]
pub struct Nsm {
    device: File,
}

impl Nsm {
    /// Opens `/dev/nsm`.
    ///
    /// # Errors
    ///
    /// ENOENT where the enclave has no NSM or its driver is not loaded.
    pub fn open() -> io::Result<Self> {
        Ok(Self { device: File::options().read(true).write(true).open("/dev/nsm")? })
    }

    /// Sends one CBOR request and returns the CBOR answer (at most [`RESPONSE_MAX_BYTES`]).
    ///
    /// # Errors
    ///
    /// EMSGSIZE for a request over 4096 bytes; ETIMEDOUT or EIO when the device does not answer.
    pub fn request(&self, request: &[u8]) -> io::Result<Vec<u8>> {
        let mut response = vec![0_u8; RESPONSE_MAX_BYTES];
        let used = self.request_into(request, &mut response)?;
        response.truncate(used);
        Ok(response)
    }

    /// As [`Self::request`], with a buffer of the caller's; returns how much of it the answer fills. The driver cuts off what has no room, silently.
    ///
    /// # Errors
    ///
    /// As [`Self::request`].
    pub fn request_into(&self, request: &[u8], response: &mut [u8]) -> io::Result<usize> {
        let mut raw = Raw {
            request_address: request.as_ptr() as u64,
            request_bytes: request.len() as u64,
            response_address: response.as_mut_ptr() as u64,
            response_bytes: response.len() as u64,
        };
        // SAFETY: both ranges are live for the call, the request is only read, the response buffer is exclusively ours, and
        // the kernel writes at most `response_bytes` into it and the used length into `raw`.
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), IOCTL_RAW, &raw mut raw) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(usize::try_from(raw.response_bytes).unwrap_or(usize::MAX).min(response.len()))
    }
}
