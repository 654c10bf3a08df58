//! The memory of the [`Core`](super::Core)'s one machine, and its callers.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use nitroxide_abi::limits::GRANULE;
use nitroxide_abi::{Code, Gpa};
use nitroxide_driver::{Client, Page, Pages};

use crate::step::{Area, PAGES, Pointer};

/// The end of user space on x86-64.
const USER_END: u64 = 0x7fff_ffff_f000;
/// The largest bookkeeping that the kernel hands out: 4 MiB of ranges of 16 bytes, one per 2 MiB.
const LARGEST_REGION: u64 = (4 << 20) / 16 * GRANULE;
const SMALL_BYTES: u64 = 4 << 20;

/// All of a machine's huge pages, and the private ones that the case maps.
pub struct Memory {
    /// Physical addresses of the pages, ascending.
    gpas: Vec<u64>,
    /// Those of the private pages; `None` while a page was not touched.
    private: Vec<Option<u64>>,
    /// Private pages that are mapped.
    mapped: u64,
    /// Private pages that enclaves hold.
    pinned_private: Vec<u64>,
    next_private: u64,
    /// Is there a page of 1 GiB?
    pub gigantic: bool,
}

impl Memory {
    /// Huge pages in physically contiguous stretches of `layout`.
    pub fn new(layout: &[u64]) -> Self {
        let mut gpas = Vec::new();
        let mut next = 1 << 32;
        for stretch in layout {
            gpas.extend((0..*stretch).map(|index| next + index * GRANULE));
            next += (stretch + 1) * GRANULE;
        }
        gpas.truncate(usize::try_from(PAGES).unwrap_or(usize::MAX));
        Self { gpas, private: Vec::new(), mapped: 0, pinned_private: Vec::new(), next_private: 1 << 40, gigantic: false }
    }

    /// Maps so many private pages.
    pub fn map(&mut self, pages: u64) -> String {
        if self.mapped != 0 {
            return "in use".to_owned();
        }
        self.mapped = pages;
        self.private = (0..pages).map(|_| None).collect();
        "0".to_owned()
    }

    /// Unmaps them.
    pub fn unmap(&mut self) {
        self.private.clear();
        self.mapped = 0;
    }

    /// Private pages that are not free.
    pub fn in_use(&self) -> usize {
        let all: BTreeSet<u64> = self.private.iter().flatten().chain(&self.pinned_private).copied().collect();
        all.len()
    }

    /// The page at an address: physical address, bytes of the page, offset in it, huge.
    fn page(&mut self, address: u64) -> Result<Page, Code> {
        let within = |area: Area, bytes: u64| address.checked_sub(area.base()).filter(|offset| *offset < bytes);
        let huge = |gpa: u64, offset: u64| Page { gpa: Gpa(gpa), size: GRANULE, offset: offset % GRANULE, huge: true, node: 0 };
        for area in [Area::Pages, Area::Alias] {
            if let Some(offset) = within(area, PAGES * GRANULE) {
                let gpa = usize::try_from(offset / GRANULE).ok().and_then(|index| self.gpas.get(index)).ok_or(Code::EFAULT)?;
                return Ok(huge(*gpa, offset));
            }
        }
        if let Some(offset) = within(Area::Half, GRANULE) {
            let gpa = self.gpas.iter().rev().nth(2).ok_or(Code::EFAULT)?;
            return Ok(huge(*gpa, offset));
        }
        for area in [Area::Small, Area::Transparent] {
            if within(area, SMALL_BYTES).is_some() {
                return Ok(Page { gpa: Gpa(0x1000), size: 4096, offset: 0, huge: false, node: 0 });
            }
        }
        if let Some(offset) = within(Area::Private, self.mapped * GRANULE) {
            let next = self.next_private;
            let place = usize::try_from(offset / GRANULE).ok().and_then(|index| self.private.get_mut(index)).ok_or(Code::EFAULT)?;
            if place.is_none() {
                // Never next to another.
                self.next_private = next + 2 * GRANULE;
            }
            return Ok(huge(*place.get_or_insert(next), offset));
        }
        const GIGANTIC: u64 = 1 << 30;
        if let Some(offset) = within(Area::Gigantic, GIGANTIC).filter(|_| self.gigantic) {
            return Ok(Page { gpa: Gpa(1 << 39), size: GIGANTIC, offset, huge: true, node: 0 });
        }
        // Area::ReadOnly and Area::NoAccess among them: pages are pinned for writing.
        Err(Code::EFAULT)
    }
}

/// One call's caller.
pub struct Caller {
    pub memory: Rc<RefCell<Memory>>,
    pub owner: bool,
    pub pointer: Pointer,
    /// What its pointer points to.
    pub argument: Vec<u8>,
}

impl Client for Caller {
    type Pages = Pinned;

    fn read(&mut self, _address: u64, bytes: &mut [u8]) -> Result<(), Code> {
        if self.pointer == Pointer::Null {
            return Err(Code::EFAULT);
        }
        bytes.iter_mut().zip(&self.argument).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn write(&mut self, _address: u64, bytes: &[u8]) -> Result<(), Code> {
        if self.pointer != Pointer::Good {
            return Err(Code::EFAULT);
        }
        bytes.clone_into(&mut self.argument);
        Ok(())
    }

    fn is_owner(&self) -> bool {
        self.owner
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        USER_END.checked_sub(address).is_some_and(|room| size <= room)
    }

    fn begin_pages(&mut self, size: u64) -> Result<Pinned, Code> {
        if size > LARGEST_REGION {
            return Err(Code::ENOMEM);
        }
        Ok(Pinned { memory: Rc::clone(&self.memory), pages: Vec::new() })
    }

    fn pin_next(&mut self, pages: &mut Pinned, address: u64) -> Result<Page, Code> {
        let mut memory = self.memory.borrow_mut();
        let page = memory.page(address)?;
        memory.pinned_private.extend(Some(page.gpa.0).filter(|gpa| *gpa >= 1 << 40));
        pages.pages.push(page);
        Ok(page)
    }
}

/// Pages of one region.
pub struct Pinned {
    memory: Rc<RefCell<Memory>>,
    pages: Vec<Page>,
}

impl Pinned {
    fn give_back(&mut self, from: usize) {
        let mut memory = self.memory.borrow_mut();
        for page in self.pages.drain(from.min(self.pages.len())..) {
            if let Some(place) = memory.pinned_private.iter().position(|gpa| *gpa == page.gpa.0) {
                memory.pinned_private.swap_remove(place);
            }
        }
    }
}

impl Pages for Pinned {
    fn count(&self) -> usize {
        self.pages.len()
    }
    fn get(&self, index: usize) -> Option<Page> {
        self.pages.get(index).copied()
    }
    fn keep(&mut self, count: usize) {
        self.give_back(count);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.give_back(0);
    }
}
