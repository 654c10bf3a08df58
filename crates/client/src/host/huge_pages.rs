//! Which huge pages this machine has, and which of them to take for an enclave: the largest first, so that there are few regions.

use std::io;
use std::path::Path;

/// Where the kernel lists its huge page sizes (Documentation/admin-guide/mm/hugetlbpage.rst).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

/// The most that one region has. The driver keeps a list of its 2 MiB pages in one allocation, and 64 GiB are far below where that fails.
const MAX_REGION_BYTES: u64 = 64 << 30;

/// One huge page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageSize {
    /// Bytes of a page, a power of two.
    pub(super) bytes: u64,
    /// Pages that nobody has.
    pub(super) free: u64,
}

impl PageSize {
    /// The exponent of `bytes`.
    pub(super) fn shift(self) -> u32 {
        self.bytes.trailing_zeros()
    }
}

/// The sizes that an enclave can use, largest first.
pub(super) fn page_sizes() -> io::Result<Vec<PageSize>> {
    page_sizes_in(Path::new(HUGE_PAGES))
}

fn page_sizes_in(directory: &Path) -> io::Result<Vec<PageSize>> {
    let mut sizes = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let kib = name.to_str().and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok());
        let Some(bytes) = kib.and_then(|kib| kib.checked_mul(1024)) else { continue };
        let free = std::fs::read_to_string(entry.path().join("free_hugepages")).ok().and_then(|text| text.trim().parse().ok());
        // An enclave's memory comes in multiples of 2 MiB, so smaller huge pages (64 KiB on arm64) are refused by the driver.
        if bytes.is_power_of_two() && bytes >= nitroxide_abi::limits::GRANULE {
            sizes.push(PageSize { bytes, free: free.unwrap_or(0) });
        }
    }
    sizes.sort_by_key(|size| std::cmp::Reverse(size.bytes));
    Ok(sizes)
}

/// A piece of memory to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The pages it is made of.
    pub(super) page: PageSize,
    /// Bytes, a multiple of the page size.
    pub(super) bytes: u64,
}

/// Says which pieces to map for `wanted` bytes, and how many bytes are missing.
///
/// Takes as many of the largest pages as fit, then of the next smaller ones. What is left over when the small ones are used up is covered by one
/// larger page, so the pieces may be more than `wanted`. Pieces come largest pages first.
pub(super) fn plan(wanted: u64, sizes: &[PageSize]) -> (Vec<Piece>, u64) {
    let mut left = wanted;
    let mut taken: Vec<(PageSize, u64)> = Vec::new();
    for size in sizes {
        let pages = (left / size.bytes).min(size.free);
        taken.push((*size, pages));
        left -= pages * size.bytes;
    }
    if left > 0 {
        // From the smallest size up: the first that has a page left for the rest.
        if let Some(index) = taken.iter().rposition(|(size, pages)| size.bytes >= left && *pages < size.free) {
            // That page alone covers what the smaller ones were for.
            taken.truncate(index + 1);
            if let Some((_, pages)) = taken.last_mut() {
                *pages += 1;
                left = 0;
            }
        }
    }
    let pieces = taken.into_iter().flat_map(|(page, pages)| {
        let pages_per_piece = (MAX_REGION_BYTES / page.bytes).max(1);
        let whole = (0..pages / pages_per_piece).map(move |_| pages_per_piece);
        let rest = Some(pages % pages_per_piece).filter(|rest| *rest > 0);
        whole.chain(rest).map(move |pages| Piece { page, bytes: pages * page.bytes })
    });
    (pieces.collect(), left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn two_mib(free: u64) -> PageSize {
        PageSize { bytes: 2 * MIB, free }
    }

    fn one_gib(free: u64) -> PageSize {
        PageSize { bytes: GIB, free }
    }

    fn sizes_of(plan: &(Vec<Piece>, u64)) -> (Vec<(u64, u64)>, u64) {
        (plan.0.iter().map(|piece| (piece.page.bytes / MIB, piece.bytes / MIB)).collect(), plan.1 / MIB)
    }

    #[test]
    fn largest_pages_come_first_and_the_rest_is_one_piece() {
        let plan = plan(2 * GIB + 512 * MIB, &[one_gib(4), two_mib(1000)]);
        assert_eq!(sizes_of(&plan), (vec![(1024, 2048), (2, 512)], 0));
    }

    #[test]
    fn rest_without_small_pages_takes_one_large_page_more() {
        assert_eq!(sizes_of(&plan(GIB + 512 * MIB, &[one_gib(4), two_mib(0)])), (vec![(1024, 2048)], 0));
        assert_eq!(sizes_of(&plan(64 * MIB, &[one_gib(1), two_mib(10)])), (vec![(1024, 1024)], 0));
    }

    #[test]
    fn what_no_page_covers_is_missing() {
        assert_eq!(sizes_of(&plan(64 * MIB, &[two_mib(10)])), (vec![(2, 20)], 44));
        assert_eq!(sizes_of(&plan(64 * MIB, &[])), (vec![], 64));
        assert_eq!(sizes_of(&plan(2 * GIB, &[one_gib(1), two_mib(1)])), (vec![(1024, 1024), (2, 2)], 1022));
    }

    #[test]
    fn pieces_beyond_64_gib_are_split() {
        let plan = plan(130 * GIB, &[two_mib(1_000_000)]);
        assert_eq!(sizes_of(&plan).0, vec![(2, 65536), (2, 65536), (2, 2048)]);
    }

    #[test]
    fn sizes_are_read_from_sysfs_largest_first_without_small_ones() {
        let directory = tempfile::tempdir().unwrap();
        for (name, free) in [("hugepages-2048kB", "7"), ("hugepages-1048576kB", "1"), ("hugepages-64kB", "3"), ("other", "9")] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
            std::fs::write(directory.path().join(name).join("free_hugepages"), format!("{free}\n")).unwrap();
        }
        assert_eq!(page_sizes_in(directory.path()).unwrap(), [one_gib(1), two_mib(7)]);
    }
}
