//! A client's address space with made-up pages, and a count of what is pinned: [`Memory`], [`TestClient`], [`TestPages`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use nitroxide_abi::{Code, Gpa};
use nitroxide_driver::{Client, Page, Pages};

use super::MIB;

/// The end of user space, as on x86-64.
const USER_END: u64 = 0x7fff_ffff_f000;

/// One mapped page: what the core is told, and from where on it is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Mapped {
    pub gpa: u64,
    pub size: u64,
    pub huge: bool,
    pub node: i32,
    pub readable: bool,
}

#[derive(Default)]
struct Inner {
    pages: BTreeMap<u64, Mapped>,
    arguments: BTreeMap<u64, u8>,
    read_only: bool,
    pinned: usize,
    next_address: u64,
    next_gpa: u64,
    largest_bookkeeping: u64,
}

/// The address space of the client; a handle that can be cloned.
#[derive(Clone)]
pub struct Memory(Rc<RefCell<Inner>>);

impl Memory {
    pub fn new() -> Self {
        let inner = Inner { next_address: 0x7000_0000_0000, next_gpa: 0x1_0000_0000, largest_bookkeeping: 1 << 40, ..Inner::default() };
        Self(Rc::new(RefCell::new(inner)))
    }

    /// Maps contiguous 2 MiB pages and returns where; two calls are never adjacent, neither in virtual nor in physical memory.
    pub fn map_huge(&self, size: u64) -> u64 {
        let gpa = self.fresh_gpa(size);
        self.map_pages((0..size / (2 * MIB)).map(|index| gpa + index * 2 * MIB))
    }

    /// Maps 2 MiB pages at these physical addresses, behind one another.
    pub fn map_pages(&self, gpas: impl IntoIterator<Item = u64>) -> u64 {
        let pages = gpas.into_iter().map(|gpa| Mapped { gpa, size: 2 * MIB, huge: true, node: 0, readable: true });
        self.map(pages.collect::<Vec<_>>())
    }

    /// Maps pages behind one another, 1 GiB aligned.
    pub fn map(&self, pages: Vec<Mapped>) -> u64 {
        let address = self.0.borrow().next_address;
        let mut end = address;
        for page in pages {
            self.0.borrow_mut().pages.insert(end, page);
            end += page.size;
        }
        self.0.borrow_mut().next_address = (end + (1 << 30)).next_multiple_of(1 << 30);
        address
    }

    /// A free physical range, 1 GiB aligned.
    pub fn fresh_gpa(&self, size: u64) -> u64 {
        let mut inner = self.0.borrow_mut();
        let gpa = inner.next_gpa;
        inner.next_gpa = (gpa + size + 2 * MIB).next_multiple_of(1 << 30);
        gpa
    }

    /// Writes an ioctl's argument; arguments can be anywhere.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.0.borrow_mut().arguments.extend((address..).zip(bytes.iter().copied()));
    }

    pub fn take<const N: usize>(&self, address: u64) -> [u8; N] {
        let inner = self.0.borrow();
        std::array::from_fn(|index| inner.arguments[&(address + index as u64)])
    }

    /// From now on nothing can be written.
    pub fn set_read_only(&self, read_only: bool) {
        self.0.borrow_mut().read_only = read_only;
    }

    /// The largest region for which there is bookkeeping.
    pub fn set_largest_bookkeeping(&self, bytes: u64) {
        self.0.borrow_mut().largest_bookkeeping = bytes;
    }

    pub fn pinned(&self) -> usize {
        self.0.borrow().pinned
    }

    /// The process that made the enclave.
    pub fn owner(&self) -> TestClient {
        TestClient { memory: self.clone(), is_owner: true }
    }

    /// Another process that got the descriptor, with the same memory contents.
    pub fn stranger(&self) -> TestClient {
        TestClient { memory: self.clone(), is_owner: false }
    }
}

/// One caller.
pub struct TestClient {
    memory: Memory,
    is_owner: bool,
}

impl Client for TestClient {
    type Pages = TestPages;

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Code> {
        let inner = self.memory.0.borrow();
        for (address, byte) in (address..).zip(bytes) {
            *byte = *inner.arguments.get(&address).ok_or(Code::EFAULT)?;
        }
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Code> {
        let mut inner = self.memory.0.borrow_mut();
        if inner.read_only || address == 0 {
            return Err(Code::EFAULT);
        }
        inner.arguments.extend((address..).zip(bytes.iter().copied()));
        Ok(())
    }

    fn is_owner(&self) -> bool {
        self.is_owner
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        address <= USER_END && size <= USER_END - address
    }

    fn begin_pages(&mut self, size: u64) -> Result<TestPages, Code> {
        assert!(size > 0 && size % (2 * MIB) == 0, "the core asks for pages only after its checks");
        if size > self.memory.0.borrow().largest_bookkeeping {
            return Err(Code::ENOMEM);
        }
        Ok(TestPages { memory: self.memory.clone(), pages: Vec::new() })
    }

    fn pin_next(&mut self, pages: &mut TestPages, address: u64) -> Result<Page, Code> {
        let mut inner = self.memory.0.borrow_mut();
        let (start, mapped) = inner.pages.range(..=address).next_back().ok_or(Code::EFAULT)?;
        let offset = address - start;
        let mapped = *mapped;
        if offset >= mapped.size || !mapped.readable {
            return Err(Code::EFAULT);
        }
        inner.pinned += 1;
        let page = Page { gpa: Gpa(mapped.gpa), size: mapped.size, offset, huge: mapped.huge, node: mapped.node };
        pages.pages.push(page);
        Ok(page)
    }
}

/// Pinned pages; dropping them is counted.
#[derive(Debug)]
pub struct TestPages {
    memory: Memory,
    pages: Vec<Page>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Memory({} pinned)", self.pinned())
    }
}

impl Pages for TestPages {
    fn count(&self) -> usize {
        self.pages.len()
    }
    fn get(&self, index: usize) -> Option<Page> {
        self.pages.get(index).copied()
    }
    fn keep(&mut self, count: usize) {
        let dropped = self.pages.len().saturating_sub(count);
        self.pages.truncate(count);
        self.memory.0.borrow_mut().pinned -= dropped;
    }
}

impl Drop for TestPages {
    fn drop(&mut self) {
        self.memory.0.borrow_mut().pinned -= self.pages.len();
    }
}
