//! What the core wants from the calling program's side: [`Client`], and the memory it gives away: [`Pages`].

use nitroxide_abi::{Code, Gpa};

/// The program behind one call, and the pages it can give.
///
/// A home makes one value per call; it lives only as long as the call.
pub trait Client {
    /// Pages that are held for an enclave; dropping the value gives all of them back.
    type Pages: Pages;

    /// Copies from the program's memory. Called once per argument, before anything is decided on it.
    ///
    /// # Errors
    ///
    /// EFAULT if not all of it can be read.
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Code>;

    /// Copies to the program's memory.
    ///
    /// # Errors
    ///
    /// EFAULT if not all of it can be written.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Code>;

    /// As [`Client::read`], of a length that is known when the home is compiled: a kernel then need not look what memory it copies to.
    ///
    /// # Errors
    ///
    /// As there.
    fn read_array<const N: usize>(&mut self, address: u64) -> Result<[u8; N], Code> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    /// As [`Client::write`], of a length that is known when the home is compiled.
    ///
    /// # Errors
    ///
    /// As there.
    fn write_array<const N: usize>(&mut self, address: u64, bytes: &[u8; N]) -> Result<(), Code> {
        self.write(address, bytes)
    }

    /// Is this call made from the address space that made the enclave? Compared by a held reference, never by address (W7).
    fn is_owner(&self) -> bool;

    /// Can `size` bytes at `address` be the program's at all (`access_ok`)? True says nothing about whether they are mapped.
    fn is_user_range(&self, address: u64, size: u64) -> bool;

    /// Begins to collect the pages of a region of `size` bytes, a positive multiple of 2 MiB; none is pinned yet.
    ///
    /// # Errors
    ///
    /// ENOMEM if the bookkeeping cannot be had; that must not end in a kernel warning (W8).
    fn begin_pages(&mut self, size: u64) -> Result<Self::Pages, Code>;

    /// Faults in and pins, long-term and writable, the page at `address`, adds it to `pages` and describes it.
    ///
    /// A page that the core then refuses is already in `pages` and goes back with them (W1). Called with ascending addresses, each
    /// where the page before ended.
    ///
    /// # Errors
    ///
    /// EFAULT if there is no page, or not a writable one (W13); other codes as the kernel's pinning gives them.
    fn pin_next(&mut self, pages: &mut Self::Pages, address: u64) -> Result<Page, Code>;
}

/// The pages of one memory region, in the order of their virtual addresses.
pub trait Pages {
    /// How many pages were pinned.
    fn count(&self) -> usize;

    /// The page at `index`, described as when it was pinned; `None` beyond the last.
    fn get(&self, index: usize) -> Option<Page>;

    /// Gives back all pages from `count` on: they were never the device's.
    fn keep(&mut self, count: usize);
}

/// One page as the physical machine sees it. Nothing here is trusted to be aligned: the core checks it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// Physical address of the page's first byte.
    pub gpa: Gpa,
    /// Bytes of the whole page.
    pub size: u64,
    /// How far into the page the address lies that was asked for, in bytes; only 0 is accepted (273 otherwise).
    pub offset: u64,
    /// Is it a hugetlb page? Transparent huge pages are not.
    pub huge: bool,
    /// Its NUMA node.
    pub node: i32,
}
