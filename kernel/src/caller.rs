// SPDX-License-Identifier: GPL-2.0
//! The process that makes a call: its memory and its pages ([`Caller`], [`PinnedPages`]).

use kernel::alloc::allocator::KVmalloc;
use kernel::alloc::{flags, Vec};
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::uaccess::{UserPtr, UserSlice};
use nitroxide_abi::{limits, Code};
use nitroxide_driver::{Client, Page, Pages};

use crate::parameter;
use crate::sys::{self, LockedPages, PinnedPage};

/// The largest region: bookkeeping of 4 MiB at 8 bytes per page of 2 MiB, 1 TiB of memory. The C driver's arrays have the same bound
/// from kmalloc, but warn of it (W8).
const MOST_PAGES: u64 = (4 << 20) / 8;

/// Pages of one region; dropped, all of them are unpinned.
#[derive(Default)]
pub(crate) struct PinnedPages {
    pages: Vec<PinnedPage, KVmalloc>,
    /// What of them is counted against the creator's limit; none unless the module was told to count.
    charge: Option<LockedPages>,
}

impl Pages for PinnedPages {
    fn count(&self) -> usize {
        self.pages.len()
    }

    fn get(&self, index: usize) -> Option<Page> {
        self.pages.get(index).map(PinnedPage::describe)
    }

    fn keep(&mut self, count: usize) {
        self.pages.truncate(count);
        if let Some(charge) = &mut self.charge {
            charge.keep(self.pages.iter().fold(0, |sum, page| page.describe().size.saturating_add(sum)));
        }
    }
}

/// The current process, for one call.
pub(crate) struct Caller<'a> {
    /// The address space that made the enclave; none for calls that have no enclave.
    pub(crate) owner: Option<&'a Mm>,
}

impl Caller<'_> {
    fn slice(address: u64, length: usize) -> Result<UserSlice, Code> {
        let address = usize::try_from(address).map_err(|_| Code::EFAULT)?;
        Ok(UserSlice::new(UserPtr::from_addr(address), length))
    }
}

impl Client for Caller<'_> {
    type Pages = PinnedPages;

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Code> {
        Self::slice(address, bytes.len())?.reader().read_slice(bytes).map_err(|_| Code::EFAULT)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Code> {
        Self::slice(address, bytes.len())?.writer().write_slice(bytes).map_err(|_| Code::EFAULT)
    }

    fn read_array<const N: usize>(&mut self, address: u64) -> Result<[u8; N], Code> {
        Self::slice(address, N)?.reader().read().map_err(|_| Code::EFAULT)
    }

    fn write_array<const N: usize>(&mut self, address: u64, bytes: &[u8; N]) -> Result<(), Code> {
        Self::slice(address, N)?.writer().write(bytes).map_err(|_| Code::EFAULT)
    }

    /// The enclave holds a reference to its creator's address space, so that no other one can have its address (W7).
    fn is_owner(&self) -> bool {
        let current = kernel::current!().mm().map(|mm| mm.as_raw());
        self.owner.is_some_and(|owner| current == Some(owner.as_raw()))
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        sys::is_user_range(address, size)
    }

    fn begin_pages(&mut self, size: u64) -> Result<PinnedPages, Code> {
        if size / limits::GRANULE > MOST_PAGES {
            return Err(Code::ENOMEM);
        }
        let owner = self.owner.filter(|_| parameter::accounts_memlock());
        // All of it before the first page is pinned: a region beyond the limit costs nothing.
        let charge = owner.map(|owner| LockedPages::charge(owner, size)).transpose()?;
        Ok(PinnedPages { pages: Vec::new(), charge })
    }

    fn pin_next(&mut self, pages: &mut PinnedPages, address: u64) -> Result<Page, Code> {
        // Grows with what is really pinned: asking for much reserves nothing.
        pages.pages.reserve(1, flags::GFP_KERNEL_ACCOUNT | flags::__GFP_NOWARN).map_err(|_| Code::ENOMEM)?;
        let pinned = PinnedPage::pin(address)?;
        let page = pinned.describe();
        pages.pages.push_within_capacity(pinned).map_err(|_| Code::ENOMEM)?;
        Ok(page)
    }
}
