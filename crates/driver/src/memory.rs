//! Giving memory to an enclave: which ranges and pages may go, and what the device is told.
//!
//! The pages of a call are walked twice, once to count and check, once to send, so that no storage beside the home's own list
//! of pages is needed. Order of checks: docs/driver.md, "SET_USER_MEMORY_REGION".

use nitroxide_abi::ioctl::UserMemoryRegion;
use nitroxide_abi::pci::{Command, SlotAddMem};
use nitroxide_abi::{flags, limits};

use crate::client::{Client, Page, Pages};
use crate::device::DeviceError;
use crate::error::SetMemoryError;
use crate::runs::{Run, Runs};
use crate::{Device, Enclave, Machine, Region};

impl<P: Pages, R: AsRef<[Region<P>]> + AsMut<[Region<P>]>> Enclave<P, R> {
    /// Gives a range of the caller's memory to an enclave that is being set up.
    ///
    /// The caller keeps its mapping; the pages stay pinned until [`Enclave::release`].
    ///
    /// # Errors
    ///
    /// See [`SetMemoryError`]. Nothing has changed afterwards, unless the device took some of the range or did not answer: what it
    /// has or may have stays given away, and the same range is refused with 262 from then on (W12).
    pub fn set_memory<M: Machine>(
        &mut self,
        machine: &M,
        device: &mut impl Device,
        client: &mut impl Client<Pages = P>,
        request: &UserMemoryRegion,
    ) -> Result<(), SetMemoryError> {
        self.check_request(client, request)?;
        let pages = self.pin(client, request)?;
        self.check_room(&pages)?;
        self.claim(machine, &pages)?;
        self.send(machine, device, request, pages)
    }

    fn check_request(&self, client: &impl Client, request: &UserMemoryRegion) -> Result<(), SetMemoryError> {
        let (address, size) = (request.userspace_addr, request.memory_size);
        if request.flags >= flags::MEMORY_REGION_MAX_FLAG_VAL {
            return Err(SetMemoryError::BadFlags);
        }
        self.must_be_init(SetMemoryError::NotInit)?;
        if !client.is_owner() {
            return Err(SetMemoryError::NotOwner);
        }
        if size % limits::GRANULE != 0 {
            return Err(SetMemoryError::BadSize);
        }
        if address % limits::GRANULE != 0 {
            return Err(SetMemoryError::UnalignedAddress);
        }
        let end = address.checked_add(size).filter(|_| client.is_user_range(address, size)).ok_or(SetMemoryError::BadAddress)?;
        let overlaps = |region: &Region<P>| {
            let region_end = region.address.saturating_add(region.size);
            (region.address <= address && address < region_end) || (address <= region.address && region.address < end)
        };
        if self.regions().iter().any(overlaps) {
            return Err(SetMemoryError::AlreadyUsed);
        }
        if size == 0 {
            return Err(SetMemoryError::Empty);
        }
        Ok(())
    }

    /// Pins the range page by page, refusing the first that will not do.
    fn pin(&self, client: &mut impl Client<Pages = P>, request: &UserMemoryRegion) -> Result<P, SetMemoryError> {
        let mut pages = client.begin_pages(request.memory_size).map_err(SetMemoryError::Home)?;
        let mut done = 0_u64;
        while let Some(left) = request.memory_size.checked_sub(done).filter(|left| *left > 0) {
            let address = request.userspace_addr.checked_add(done).ok_or(SetMemoryError::BadAddress)?;
            let page = client.pin_next(&mut pages, address).map_err(SetMemoryError::Home)?;
            self.check_page(&page, left)?;
            done = done.checked_add(page.size).ok_or(SetMemoryError::BadPageSize)?;
        }
        Ok(pages)
    }

    /// `left`: bytes of the request from this page on.
    fn check_page(&self, page: &Page, left: u64) -> Result<(), SetMemoryError> {
        if !page.huge {
            return Err(SetMemoryError::NotHugePage);
        }
        // A page is given whole or not at all: 2 MiB of a 1 GiB page would give away 1 GiB (W14).
        if page.size == 0 || page.size % limits::GRANULE != 0 || page.offset != 0 || page.size > left {
            return Err(SetMemoryError::BadPageSize);
        }
        if page.node != self.node {
            return Err(SetMemoryError::OtherNode);
        }
        if page.gpa.0 % limits::GRANULE != 0 || page.gpa.0.checked_add(page.size).is_none() {
            return Err(SetMemoryError::UnalignedPage);
        }
        Ok(())
    }

    /// Do the runs fit into what the device takes, and the region into the table?
    fn check_room(&self, pages: &P) -> Result<(), SetMemoryError> {
        let runs = u64::try_from(Runs::new(pages).count()).unwrap_or(u64::MAX);
        let after = self.summary.runs.saturating_add(runs);
        if after > self.summary.max_regions || self.region_count >= self.regions.as_ref().len() {
            return Err(SetMemoryError::TooManyRegions);
        }
        Ok(())
    }

    /// Enters all runs in the ledger, or none (W13).
    fn claim(&self, machine: &impl Machine, pages: &P) -> Result<(), SetMemoryError> {
        let holder = self.holder;
        machine.with_ledger(|ledger| {
            for (index, run) in Runs::new(pages).enumerate() {
                if let Err(error) = ledger.claim(holder, run) {
                    Runs::new(pages).take(index).for_each(|claimed| ledger.release(holder, claimed));
                    return Err(error);
                }
            }
            Ok(())
        })
    }

    /// Tells the device run by run, and keeps what it took or may have taken.
    fn send(
        &mut self,
        machine: &impl Machine,
        device: &mut impl Device,
        request: &UserMemoryRegion,
        mut pages: P,
    ) -> Result<(), SetMemoryError> {
        let mut kept = Kept::default();
        let mut result = Ok(());
        for run in Runs::new(&pages) {
            result = self.send_run(device, run, &mut kept);
            if result.is_err() {
                break;
            }
        }
        let holder = self.holder;
        if result.is_err() {
            machine.with_ledger(|ledger| Runs::new(&pages).skip(kept.runs).for_each(|run| ledger.release(holder, run)));
            pages.keep(kept.pages);
        }
        if kept.runs > 0 {
            self.enter(request, pages);
        }
        result.map_err(SetMemoryError::Device)
    }

    fn send_run(&mut self, device: &mut impl Device, run: Run, kept: &mut Kept) -> Result<(), DeviceError> {
        let command = SlotAddMem { slot_uid: self.slot.0, paddr: run.gpa.0, size: run.size }.to_bytes();
        let result = self.exchange(device, Command::SlotAddMem, &command).map(|_| ());
        let accepted = result.is_ok();
        if accepted {
            self.summary.memory_bytes = self.summary.memory_bytes.saturating_add(run.size);
        }
        // Without a reply the device may have the run: it counts against the limit and stays pinned, but is no memory to start with.
        if accepted || result == Err(DeviceError::NoReply) {
            self.summary.runs = self.summary.runs.saturating_add(1);
            kept.runs = kept.runs.saturating_add(1);
            kept.pages = kept.pages.saturating_add(run.pages);
        }
        result
    }

    /// Remembers the range that was asked for, even if the device took only a part of it.
    fn enter(&mut self, request: &UserMemoryRegion, pages: P) {
        let index = self.region_count;
        if let Some(region) = self.regions.as_mut().get_mut(index) {
            *region = Region { address: request.userspace_addr, size: request.memory_size, pages: Some(pages) };
            self.region_count = index.saturating_add(1);
        }
    }

    /// The memory regions it has, in the order of the calls.
    #[must_use]
    pub fn regions(&self) -> &[Region<P>] {
        self.regions.as_ref().get(..self.region_count).unwrap_or(&[])
    }
}

/// What of one call the device has or may have.
#[derive(Default)]
struct Kept {
    runs: usize,
    pages: usize,
}
