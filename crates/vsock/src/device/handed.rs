//! The host's end of a connection that a program has prepared (`PREPARE`): it comes as a descriptor over the stream that asked.
//!
//! The program keeps whatever copies of it it likes, so nothing that copies share is changed here (`O_NONBLOCK` is such a thing). Rules for
//! programs: `docs/vsock.md`, "Beginning of a connection".

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketType, recvmsg, sockopt};

use super::Device;
use super::host::Sent;
use crate::table::{Entry, Token};

impl Device {
    /// Takes the host's end of a connection that waits for it, if it is there by now.
    pub(super) fn take_stream(&mut self, token: Token) {
        let Some(asking) = self.table.entry(token).and_then(Entry::stream) else { return };
        match receive_stream(asking) {
            Sent::NotYet => {}
            Sent::Whole(stream) => {
                self.stop_watching(asking);
                self.table.set_deadline(token, None);
                if let Some(connection) = self.table.connection_mut(token) {
                    connection.hand(stream);
                }
                if let Err(error) = self.begin_watching(token) {
                    tracing::warn!(%error, "A stream that was handed over cannot be watched; its connection is reset.");
                    return self.reset(token);
                }
                self.settle(token);
            }
            Sent::Junk => {
                tracing::debug!("A program of the host did not hand over one UNIX stream for a connection it prepared; it is reset.");
                self.reset(token);
            }
        }
    }
}

/// Takes one byte with one descriptor, a UNIX stream socket, off the stream of a program. Other descriptors are closed.
fn receive_stream(asking: &UnixStream) -> Sent<UnixStream> {
    let mut bytes = [0; 2]; // room for one too many, so that it is seen
    let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = match recvmsg(asking, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
        Ok(message) => message,
        Err(Errno::AGAIN | Errno::INTR) => return Sent::NotYet,
        Err(_) => return Sent::Junk,
    };
    let mut files = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            files.extend(descriptors);
        }
    }
    // CTRUNC: there were more, or this process may open no more files.
    if message.bytes != 1 || message.flags.contains(ReturnFlags::CTRUNC) {
        return Sent::Junk;
    }
    match <[OwnedFd; 1]>::try_from(files) {
        Ok([file]) if is_unix_stream(&file) => Sent::Whole(file.into()),
        _ => Sent::Junk,
    }
}

fn is_unix_stream(file: &OwnedFd) -> bool {
    sockopt::socket_domain(file) == Ok(AddressFamily::UNIX) && sockopt::socket_type(file) == Ok(SocketType::STREAM)
}
