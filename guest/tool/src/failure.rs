//! What went wrong, and what to do about it.

use std::fmt;
use std::io::{self, ErrorKind};

use nitroxide_guest_sys::requests::AskError;

/// Why the command was not done. The display text is the whole message.
#[derive(Debug)]
pub enum Failure {
    /// The command line is not understood.
    Usage(String),
    /// Data cannot be read from there.
    Data(String, io::Error),
    /// `/dev/nsm` cannot be opened.
    Device(io::Error),
    /// The request about that register, if it was about one, was not fulfilled.
    Ask(Option<u16>, AskError),
    /// The result cannot be written.
    Output(io::Error),
}

impl Failure {
    /// The exit status that it leads to.
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            _ => 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) => write!(f, "{what}; `nitroxide-guest help` shows the commands"),
            Self::Data(from, error) => write!(f, "{from} cannot be read: {error}"),
            Self::Device(error) if error.kind() == ErrorKind::NotFound => f.write_str(
                "there is no /dev/nsm. Outside of an enclave there is none. In one, the kernel's module `nsm` has to be loaded (nitroxide-init loads \
                 /modules/nsm.ko or /nsm.ko of the first ramdisk; by hand: insmod nsm.ko, from Linux 6.8 on) and /dev has to be a devtmpfs. On the host \
                 nitroxide needs QEMU 11 or newer for the device: `nitroxide describe-enclaves` has a note where it is missing",
            ),
            Self::Device(error) if error.kind() == ErrorKind::PermissionDenied => {
                write!(f, "/dev/nsm cannot be opened: {error}. The kernel makes it for everybody (mode 0666); look what changed that")
            }
            Self::Device(error) => write!(f, "/dev/nsm cannot be opened: {error}"),
            Self::Ask(index, AskError::Refused(code)) => refused(f, *index, code),
            Self::Ask(_, AskError::Driver(error)) => driver_refused(f, error),
            Self::Ask(_, error @ AskError::Unexpected(_)) => error.fmt(f),
            Self::Output(error) => write!(f, "the result cannot be written: {error}"),
        }
    }
}

fn refused(f: &mut fmt::Formatter<'_>, index: Option<u16>, code: &str) -> fmt::Result {
    match (code, index) {
        ("InvalidIndex", Some(index)) => write!(f, "there is no register {index}; they are 0 to 31 (NSM: {code})"),
        ("ReadOnlyIndex", Some(index @ 0..16)) => {
            write!(f, "register {index} was written at boot and is locked; yours are 16 to 31 (NSM: {code})")
        }
        ("ReadOnlyIndex", Some(index)) => write!(f, "register {index} is locked; a lock stays as long as the enclave lives (NSM: {code})"),
        ("InputTooLarge", _) => write!(f, "nonce, user data and public key may have 1024 bytes each (NSM: {code})"),
        ("InternalError", _) => write!(f, "the module failed; the log of the enclave's process on the host says why (NSM: {code})"),
        _ => write!(f, "the module answered {code}"),
    }
}

fn driver_refused(f: &mut fmt::Formatter<'_>, error: &io::Error) -> fmt::Result {
    // EMSGSIZE of drivers/misc/nsm.c.
    if error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error()) {
        return f.write_str("the data is too long: a request has 4096 bytes at most, all fields together");
    }
    if error.kind() == ErrorKind::TimedOut {
        return write!(f, "the module did not answer in two minutes: {error}. Is the enclave's process on the host still there?");
    }
    write!(f, "the driver of /dev/nsm refused the request: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_comes_with_what_to_do() {
        let text = Failure::Device(ErrorKind::NotFound.into()).to_string();
        for words in ["no /dev/nsm", "insmod", "QEMU 11"] {
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn codes_of_the_module_are_explained() {
        let refused = |index, code: &str| Failure::Ask(index, AskError::Refused(code.to_owned())).to_string();
        assert!(refused(Some(32), "InvalidIndex").contains("no register 32"));
        assert!(refused(Some(15), "ReadOnlyIndex").contains("yours are 16 to 31"));
        assert!(refused(Some(16), "ReadOnlyIndex").contains("a lock stays"));
        assert!(refused(None, "InputTooLarge").contains("1024"));
        assert_eq!(refused(None, "Unheard"), "the module answered Unheard");
        let long = io::Error::from_raw_os_error(rustix::io::Errno::MSGSIZE.raw_os_error());
        assert!(Failure::Ask(None, AskError::Driver(long)).to_string().contains("4096"));
    }
}
