//! A listening socket at a path of the user's choice: taken, and given back with [`SocketFile`].
//!
//! Both faces of a parent VM's device have one, [`PciServer`](crate::PciServer) and [`ParentVsock`](crate::ParentVsock). Sockets of a world are
//! `nitroxide_world`'s instead.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use displaydoc::Display;
use rustix::net::SocketAddrUnix;
use thiserror::Error;

/// Why the socket cannot be had.
#[derive(Debug, Display, Error)]
#[non_exhaustive]
pub enum BindError {
    /// `{0}` is in use by a running program; give another path, or end that program.
    InUse(PathBuf),
    /// `{0}` is there and is not a socket; give another path, or remove it.
    NotSocket(PathBuf),
    /// The path `{0}` is too long for a socket: at most 107 bytes.
    TooLong(PathBuf),
    /// The socket `{0}` cannot be made.
    Io(PathBuf, #[source] io::Error),
}

/// A socket's file; removed on drop, unless somebody else's has taken its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what lies at a path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|data: Metadata| (data.dev(), data.ino()))
}

/// Listens at `path`. A socket file that nobody listens at any more is replaced.
///
/// # Errors
///
/// Each says what is in the way.
pub(crate) fn listen_at(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |error| BindError::Io(path.to_owned(), error);
    if SocketAddrUnix::new(path).is_err() {
        return Err(BindError::TooLong(path.to_owned()));
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket()) {
                return Err(BindError::NotSocket(path.to_owned()));
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(BindError::InUse(path.to_owned())),
            }
            std::fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        other => other,
    };
    let listener = listener.map_err(failed)?;
    Ok((listener, SocketFile { path: path.to_owned(), identity: identity(path) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_has_taken_the_place_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, file) = listen_at(&path).unwrap();
        std::fs::rename(&path, folder.path().join("away")).unwrap();
        let (_other, other) = listen_at(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(other);
        assert!(!path.exists());
    }
}
