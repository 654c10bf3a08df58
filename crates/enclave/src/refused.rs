//! Why an enclave is not started: an errno for the driver and a sentence for people.

use std::error::Error;
use std::io;

use nitroxide_engine::{DiscoverError, LaunchError};
use nitroxide_world::{BindError, ClaimError};
use rustix::io::Errno;

use crate::control::ServeError;
use crate::image::ImageError;

/// Why an enclave is not started.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// What START answers.
    pub(crate) errno: i32,
    /// Why, for people.
    pub(crate) message: String,
}

impl Refused {
    pub(crate) fn new(errno: Errno, error: &(dyn Error + 'static)) -> Self {
        Self { errno: errno.raw_os_error(), message: chain(error) }
    }

    pub(crate) fn io(what: &str, error: &io::Error) -> Self {
        let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
        Self { errno: errno.raw_os_error(), message: format!("{what}: {error}") }
    }
}

impl From<ClaimError> for Refused {
    fn from(error: ClaimError) -> Self {
        Self { errno: error.errno(), message: chain(&error) }
    }
}

impl From<BindError> for Refused {
    fn from(error: BindError) -> Self {
        Self { errno: error.errno(), message: chain(&error) }
    }
}

impl From<ServeError> for Refused {
    fn from(error: ServeError) -> Self {
        let errno = match &error {
            ServeError::Bind(source) => source.errno(),
            ServeError::Thread(source) => Errno::from_io_error(source).unwrap_or(Errno::IO).raw_os_error(),
        };
        Self { errno, message: chain(&error) }
    }
}

impl From<ImageError> for Refused {
    fn from(error: ImageError) -> Self {
        let errno = match &error {
            ImageError::Copy(source) => Errno::from_io_error(source).unwrap_or(Errno::IO),
            _ => Errno::INVAL,
        };
        Self::new(errno, &error)
    }
}

impl From<DiscoverError> for Refused {
    fn from(error: DiscoverError) -> Self {
        Self::new(Errno::IO, &error)
    }
}

impl From<LaunchError> for Refused {
    fn from(error: LaunchError) -> Self {
        let errno = match &error {
            LaunchError::Spec(_) => Errno::INVAL,
            _ => Errno::IO,
        };
        Self::new(errno, &error)
    }
}

/// An error and what it came from, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_socket_without_space_is_enospc_as_any_other_of_the_world() {
        let full = || BindError::NoSpace("world/enclaves/x.sock".into());
        let refused = Refused::from(ServeError::Bind(full()));
        assert_eq!((refused.errno, Refused::from(full()).errno), (Errno::NOSPC.raw_os_error(), Errno::NOSPC.raw_os_error()));
        assert!(refused.message.contains("No space is left"), "{}", refused.message);
    }
}
