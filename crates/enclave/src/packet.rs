//! What owner and enclave process say to each other: JSON packets with file descriptors over one SOCK_SEQPACKET pair.
//!
//! The owner sends `Files` and `Ranges`, as many as it takes, then `Start`; the process answers with `Stage`s, then `Started` or `Refused`, and
//! later `Ended`. The end of the connection is the end of the other: for the process it means to stop the enclave. Both are one program of
//! one version, so there is no negotiation; sizes are bounded all the same.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nitroxide_engine::{Accelerator, VirtioDiscovery};
use nitroxide_world::ParentIdentity;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::options::{EngineChoice, MemoryMode, Parent};
use crate::report::EndReport;
use crate::stage::StageTime;

/// The largest packet in bytes; below the smallest default of a socket's send buffer.
const PACKET_BYTES: usize = 128 << 10;

/// How many descriptors one packet carries at most; the kernel takes 253 (SCM_MAX_FD in include/net/scm.h).
pub(crate) const FILES_PER_PACKET: usize = 200;

/// How many ranges one packet carries at most.
pub(crate) const RANGES_PER_PACKET: usize = 1000;

/// From the owner to the process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToProcess {
    /// The next files of the memory, as descriptors.
    Files,
    /// The next ranges of the memory.
    Ranges(Vec<RangeSpec>),
    /// All that remains; with the descriptors of the world and of the slot's claim.
    Start(Box<StartSpec>),
}

/// A piece of a file that was sent before.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct RangeSpec {
    /// Which file, from 0 in the order they were sent.
    pub(crate) file: usize,
    /// Where the piece begins.
    pub(crate) offset: u64,
    /// Its bytes.
    pub(crate) size: u64,
}

/// How to start the enclave.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StartSpec {
    pub(crate) slot_uid: u64,
    pub(crate) cid: Option<u32>,
    pub(crate) debug: bool,
    pub(crate) vcpus: u32,
    pub(crate) cpus: Vec<u32>,
    pub(crate) name: String,
    pub(crate) creator_pid: u32,
    pub(crate) memory: MemoryMode,
    pub(crate) parent: Parent,
    pub(crate) parent_identity: ParentIdentity,
    pub(crate) engine: EngineChoice,
    pub(crate) accelerator: WireAccelerator,
    pub(crate) virtio_by_command_line: bool,
    pub(crate) world_path: String,
    pub(crate) stages: Vec<StageTime>,
}

/// [`Accelerator`] in JSON.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WireAccelerator {
    Auto,
    Kvm,
    Tcg,
}

impl From<Accelerator> for WireAccelerator {
    fn from(accelerator: Accelerator) -> Self {
        match accelerator {
            Accelerator::Auto => Self::Auto,
            Accelerator::Kvm => Self::Kvm,
            Accelerator::Tcg => Self::Tcg,
        }
    }
}

impl From<WireAccelerator> for Accelerator {
    fn from(accelerator: WireAccelerator) -> Self {
        match accelerator {
            WireAccelerator::Auto => Self::Auto,
            WireAccelerator::Kvm => Self::Kvm,
            WireAccelerator::Tcg => Self::Tcg,
        }
    }
}

impl StartSpec {
    pub(crate) fn discovery(&self) -> VirtioDiscovery {
        if self.virtio_by_command_line { VirtioDiscovery::Cmdline } else { VirtioDiscovery::Acpi }
    }
}

/// From the process to the owner.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FromProcess {
    /// A stage was reached.
    Stage(StageTime),
    /// The enclave runs.
    Started {
        /// Its CID.
        cid: u32,
        /// Its name.
        name: String,
    },
    /// It does not, and the process ends.
    Refused {
        /// The errno to answer with.
        errno: i32,
        /// Why, for people.
        message: String,
    },
    /// It has run and ended by itself.
    Ended(EndReport),
}

/// Sends a packet with descriptors.
pub(crate) fn send(socket: impl AsFd, packet: &impl Serialize, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(packet)?;
    if bytes.len() > PACKET_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_PER_PACKET))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()), // A sequenced packet goes as a whole.
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives a packet with its descriptors; `None` when the other end is gone.
pub(crate) fn receive<P: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(P, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; PACKET_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_PER_PACKET))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut files = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            files.extend(descriptors);
        }
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        // CTRUNC also means that this process may open no more files.
        return Err(io::Error::other("A packet or its file descriptors did not fit; raise the limit of open files (`ulimit -n`)."));
    }
    let packet = serde_json::from_slice(bytes.get(..message.bytes).unwrap_or_default())?;
    Ok(Some((packet, files)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn packets_arrive_whole_with_their_descriptors() {
        let (a, b) = pair();
        let file = crate::memory::sealable_memory("test").unwrap();
        send(&a, &ToProcess::Files, &vec![file.as_fd(); FILES_PER_PACKET]).unwrap();
        send(&a, &ToProcess::Ranges(vec![RangeSpec { file: 199, offset: u64::MAX, size: u64::MAX }; RANGES_PER_PACKET]), &[]).unwrap();
        let (packet, files) = receive::<ToProcess>(&b).unwrap().unwrap();
        assert!(matches!(packet, ToProcess::Files));
        assert_eq!(files.len(), FILES_PER_PACKET);
        let (packet, files) = receive::<ToProcess>(&b).unwrap().unwrap();
        assert!(matches!(packet, ToProcess::Ranges(ranges) if ranges.len() == RANGES_PER_PACKET && ranges[999].size == u64::MAX));
        assert!(files.is_empty());
    }

    #[test]
    fn the_end_of_the_other_is_told() {
        let (a, b) = pair();
        drop(a);
        assert!(receive::<ToProcess>(&b).unwrap().is_none());
        assert!(send(&b, &ToProcess::Files, &[]).is_err());
    }

    #[test]
    fn nonsense_is_an_error() {
        let (a, b) = pair();
        rustix::net::send(&a, b"{", SendFlags::empty()).unwrap();
        assert!(receive::<ToProcess>(&b).is_err());
    }
}
