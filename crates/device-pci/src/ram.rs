//! The parent VM's memory: which guest-physical addresses are which bytes of which file.
//!
//! QEMU tells its memory as windows (DMA_MAP) that come and go; [`ParentRam`] finds the file ranges behind what a driver donates. Windows are QEMU's,
//! which is trusted with its own memory; addresses are the guest's, which is not. docs/device-pci.md, "Donated memory".

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nitroxide_device::MemoryRun;
use nitroxide_enclave::ParentMemory;
use nitroxide_engine::FileRange;
use rustix::fs::fstat;

/// A piece of guest-physical memory as QEMU announces it.
#[derive(Debug)]
pub struct Window {
    /// Where it begins in guest-physical memory.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
    /// May it be read?
    pub readable: bool,
    /// May it be written?
    pub writable: bool,
    /// The file; ROM and devices have none.
    pub file: Option<OwnedFd>,
}

/// The windows that there are at the moment.
#[derive(Debug, Default)]
pub struct ParentRam {
    windows: Mutex<BTreeMap<u64, Mapped>>,
}

#[derive(Debug)]
struct Mapped {
    size: u64,
    file_offset: u64,
    /// The file, if memory can be donated from it; one handle for all windows of one file.
    file: Option<Shared>,
}

#[derive(Debug, Clone)]
struct Shared {
    identity: (u64, u64),
    handle: Arc<OwnedFd>,
}

impl ParentRam {
    /// No memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a window. One that begins at the same address replaces the earlier one.
    pub fn map(&self, window: Window) {
        let Window { iova, size, file_offset, readable, writable, file } = window;
        if size == 0 || iova.checked_add(size - 1).is_none() || file_offset.checked_add(size).is_none() {
            tracing::warn!(iova, size, file_offset, "A window of the parent's memory wraps and is ignored.");
            return;
        }
        let mut windows = self.lock();
        let file = file.filter(|_| readable && writable).and_then(|file| {
            let status = fstat(&file).ok()?;
            let identity = (status.st_dev, status.st_ino);
            // The same file comes with every window under another number.
            let known = windows.values().filter_map(|mapped| mapped.file.as_ref()).find(|known| known.identity == identity).cloned();
            Some(known.unwrap_or_else(|| Shared { identity, handle: Arc::new(file) }))
        });
        windows.insert(iova, Mapped { size, file_offset, file });
    }

    /// Removes the window with exactly this address and size; what was donated from it stays donated.
    pub fn unmap(&self, iova: u64, size: u64) {
        let mut windows = self.lock();
        if windows.get(&iova).is_some_and(|mapped| mapped.size == size) {
            windows.remove(&iova);
        }
    }

    /// Removes all windows.
    pub fn unmap_all(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapped>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ParentMemory for ParentRam {
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
        let windows = self.lock();
        let end = run.gpa.0.checked_add(run.size)?;
        let mut at = run.gpa.0;
        let mut ranges = Vec::new();
        while at < end {
            let (iova, mapped) = windows.range(..=at).next_back()?;
            let within = at - iova;
            let left = mapped.size.checked_sub(within).filter(|left| *left > 0)?;
            let file = mapped.file.as_ref()?;
            let size = left.min(end - at);
            ranges.push(FileRange { file: Arc::clone(&file.handle), offset: mapped.file_offset.checked_add(within)?, size });
            at = at.checked_add(size)?;
        }
        Some(ranges)
    }
}
