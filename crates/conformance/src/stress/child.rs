//! A forked child that makes calls until it is killed in the middle of one: enclaves of its own, and those that it has inherited.
//!
//! It takes no lock and asks for no memory (its parent has many threads), so it counts in memory that it shares with its parent.

use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};

use nitroxide_abi::extension::{self, List, Stop};
use nitroxide_abi::limits::GRANULE;
use nitroxide_abi::{Code, ioctl};

use super::calls::{Argument, Asked, Gone, Kind, Tally};
use super::shared::PAGES;
use crate::random::Numbers;
use crate::sys;

/// Inherited descriptors that a child uses.
pub(super) const INHERITED: usize = 6;
/// Calls after which a child ends by itself.
const MOST_CALLS: usize = 100_000;

/// What a child needs; nothing in it is behind a lock.
pub(super) struct Child {
    pub(super) numbers: Numbers,
    pub(super) tally: Tally,
    pub(super) node: RawFd,
    pub(super) inherited: [Option<RawFd>; INHERITED],
    pub(super) extension: bool,
    pub(super) pages: u64,
    /// Pages that nobody but its thread uses much.
    pub(super) first_page: u64,
    pub(super) own_pages: u64,
    /// Shall it be another user?
    pub(super) nobody: bool,
}

impl Child {
    /// Makes calls until it is killed.
    pub(super) fn run(mut self) {
        if self.nobody {
            sys::become_nobody_after_fork();
        }
        let mut own: [Option<OwnedFd>; 2] = [None, None];
        for _ in 0..MOST_CALLS {
            if self.numbers.once_in(3) {
                let fd = self.inherited.get(self.numbers.index(INHERITED)).copied().flatten();
                fd.into_iter().for_each(|fd| self.call(fd, true));
                continue;
            }
            let place = self.numbers.index(own.len());
            let Some(slot) = own.get_mut(place) else { return };
            match slot {
                None => *slot = self.create(),
                Some(_) if self.numbers.once_in(12) => *slot = None,
                Some(fd) => self.call(fd.as_raw_fd(), false),
            }
        }
    }

    fn create(&mut self) -> Option<OwnedFd> {
        let result = sys::ioctl_with(self.node, ioctl::CREATE_VM, &mut [0; 8]);
        let answer = self.note(Kind::Create, Argument::Good, false, result);
        let Some(fd) = sys::own(answer) else {
            // Others need the processor more.
            sys::pause_us(500);
            return None;
        };
        // A whole set-up at once, or it is killed before it has anything.
        let start = PAGES + self.first_page * GRANULE;
        self.set_memory(fd.as_raw_fd(), false, start, self.own_pages);
        self.add_vcpu(fd.as_raw_fd(), false);
        Some(fd)
    }

    fn call(&mut self, fd: RawFd, stranger: bool) {
        match self.numbers.below(10) {
            0 | 1 => self.add_vcpu(fd, stranger),
            2 | 3 => {
                let page = self.numbers.below(self.pages);
                let count = 1 + self.numbers.below(4).min(self.pages - page - 1);
                self.set_memory(fd, stranger, PAGES + page * GRANULE, count);
            }
            4 | 5 => {
                let mut argument = ioctl::EnclaveStartInfo { flags: 0, enclave_cid: 0 }.to_bytes();
                let result = sys::ioctl_with(fd, ioctl::START_ENCLAVE, &mut argument);
                self.note(Kind::Start, Argument::Good, stranger, result);
            }
            6 => {
                let mut argument = ioctl::ImageLoadInfo { flags: 1, memory_offset: 0 }.to_bytes();
                let result = sys::ioctl_with(fd, ioctl::GET_IMAGE_LOAD_INFO, &mut argument);
                self.note(Kind::LoadInfo, Argument::Good, stranger, result);
            }
            7 => {
                let result = sys::poll(fd, 1);
                self.note(Kind::Poll, Argument::Good, stranger, result);
            }
            8 => {
                let mut argument = Stop { size: 8, flags: 0 }.to_bytes();
                let result = sys::ioctl_with(fd, extension::STOP, &mut argument);
                self.note(Kind::Stop, Argument::Good, stranger, result);
            }
            _ => self.list(),
        }
    }

    fn add_vcpu(&mut self, fd: RawFd, stranger: bool) {
        let result = sys::ioctl_with(fd, ioctl::ADD_VCPU, &mut [0; 4]);
        self.note(Kind::AddVcpu, Argument::Good, stranger, result);
    }

    fn set_memory(&mut self, fd: RawFd, stranger: bool, address: u64, pages: u64) {
        let region = ioctl::UserMemoryRegion { flags: 0, memory_size: pages * GRANULE, userspace_addr: address };
        let result = sys::ioctl_with(fd, ioctl::SET_USER_MEMORY_REGION, &mut region.to_bytes());
        self.note(Kind::SetMemory, Argument::Good, stranger, result);
    }

    /// Another user sees its own enclaves only.
    fn list(&mut self) {
        let mut bytes = List { size: u32::try_from(List::SIZE).unwrap_or(0), ..List::default() }.to_bytes();
        for _ in 0..128 {
            let result = sys::ioctl_with(self.node, extension::LIST, &mut bytes);
            if self.note(Kind::List, Argument::Good, false, result) != 0 {
                return;
            }
            let listed = List::from_bytes(&bytes);
            if self.nobody && listed.owner_uid == 0 {
                self.tally.complain(Kind::List, -i64::from(Code::EPERM.number()));
            }
        }
    }

    /// Counts and judges; gives the answer, folded.
    fn note(&self, kind: Kind, argument: Argument, stranger: bool, result: Result<i64, i32>) -> i64 {
        let answer = result.unwrap_or_else(|errno| -i64::from(errno));
        // The parent's knowledge of device and faults is not to be had here.
        let asked = Asked { kind, argument, gone: Gone::Maybe, faults: true, stranger, extension: self.extension };
        self.tally.count(kind, answer);
        if !asked.allows(answer) {
            self.tally.complain(kind, answer);
        }
        answer
    }
}
