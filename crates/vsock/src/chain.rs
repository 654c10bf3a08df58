//! A descriptor chain of any shape as a list of pieces of guest memory.
//!
//! Linux since 6.17 spreads one packet over dozens of descriptors, and RAM that consists of many regions cuts descriptors once more; so
//! nothing here assumes where the header ends or how many pieces there are. [`Segments`] is the list; `guest_io` moves its bytes.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::limits;
use crate::packet::HEADER_BYTES;

/// Who writes the chain's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The guest wrote them, we read (its TX queue).
    FromGuest,
    /// We write them, the guest reads (its RX queue).
    ToGuest,
}

/// A chain that breaks the rules: wrong direction, not in RAM, endless, too many pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// The buffers of one chain in order, with lengths that are true: each piece lies within one mapped region.
///
/// Having one proves that the memory is mapped, and nothing about its content, which the guest may change at any time.
#[derive(Debug, Default)]
pub struct Segments<'m> {
    slices: Vec<VolatileSlice<'m>>,
    bytes: usize,
}

impl<'m> Segments<'m> {
    /// An empty list; it is refilled for every chain so that its storage is asked for once.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the content by the buffers of `chain`.
    ///
    /// # Errors
    ///
    /// [`Malformed`]; the pieces before the fault are there then, so that a header among them still tells which connection is meant.
    pub fn fill(
        &mut self,
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        direction: Direction,
    ) -> Result<(), Malformed> {
        self.slices.clear();
        self.bytes = 0;
        let access = match direction {
            Direction::FromGuest => Permissions::Read,
            Direction::ToGuest => Permissions::Write,
        };
        // The iterator ends silently at a fault; a last descriptor that promises a next one gives it away. No descriptor at all is one too.
        let mut unfinished = true;
        for (count, descriptor) in chain.enumerate() {
            unfinished = descriptor.has_next();
            if count >= limits::SEGMENTS || descriptor.is_write_only() != (direction == Direction::ToGuest) {
                return Err(Malformed);
            }
            let length = usize::try_from(descriptor.len()).map_err(|_| Malformed)?;
            for slice in memory.get_slices(descriptor.addr(), length, access).map_err(|_| Malformed)? {
                let slice = slice.map_err(|_| Malformed)?;
                if self.slices.len() >= limits::SEGMENTS {
                    return Err(Malformed);
                }
                self.bytes = self.bytes.checked_add(slice.len()).ok_or(Malformed)?;
                self.slices.push(slice);
            }
        }
        if unfinished { Err(Malformed) } else { Ok(()) }
    }

    /// Length of all pieces together in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The pieces of the range of `length` bytes after the first `skip`, as far as the chain reaches.
    pub fn range(&self, skip: usize, length: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let (mut skip, mut left) = (skip, length);
        self.slices.iter().filter_map(move |slice| {
            let start = skip.min(slice.len());
            skip -= start;
            let take = left.min(slice.len() - start);
            left -= take;
            if take == 0 { None } else { slice.subslice(start, take).ok() }
        })
    }

    /// Copies the header out, once; `None` if the chain is shorter.
    #[must_use]
    pub fn read_header(&self) -> Option<[u8; HEADER_BYTES]> {
        let mut header = [0; HEADER_BYTES];
        (self.bytes >= HEADER_BYTES).then(|| {
            self.copy_out(0, &mut header);
            header
        })
    }

    /// Copies bytes from `skip` on into `target`, as many as there are.
    pub fn copy_out(&self, skip: usize, target: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.range(skip, target.len()) {
            if let Some(rest) = target.get_mut(done..) {
                done += slice.copy_to(rest);
            }
        }
        done
    }

    /// Writes the header to the chain's beginning; the caller has checked that it fits.
    pub fn write_header(&self, header: &[u8; HEADER_BYTES]) {
        let mut rest = header.as_slice();
        for slice in self.range(0, HEADER_BYTES) {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
        }
    }
}
