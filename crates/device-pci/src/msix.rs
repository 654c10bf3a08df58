//! The two interrupt vectors: raised through eventfds that QEMU gives and takes back while a driver sets them up.
//!
//! Between "disable all" and the next SET_IRQS there is no eventfd; an interrupt raised then is kept and delivered with the next one (docs/device-pci.md,
//! "Interrupts"). Flags: `struct vfio_irq_set` in the kernel's `include/uapi/linux/vfio.h`.

use std::fs::File;
use std::io::Write;

use nitroxide_abi::pci::MIN_VECTORS;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

const COUNT: usize = MIN_VECTORS as usize;

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

/// The vectors.
#[derive(Debug, Default)]
pub struct Vectors([Vector; COUNT]);

#[derive(Debug, Default)]
struct Vector {
    /// What the guest's interrupt is raised through.
    eventfd: Option<File>,
    /// Has one been raised that could not be delivered yet?
    pending: bool,
    masked: bool,
}

impl Vectors {
    /// Raises a vector, now or as soon as it can be delivered. Unknown vectors are ignored.
    pub fn raise(&mut self, vector: u16) {
        if let Some(vector) = self.0.get_mut(usize::from(vector)) {
            vector.pending = true;
            vector.deliver();
        }
    }

    /// Forgets what could not be delivered.
    pub fn forget_pending(&mut self) {
        for vector in &mut self.0 {
            vector.pending = false;
        }
    }

    /// The pending bits as the table's bit array has them, first byte.
    #[must_use]
    pub fn pending_bits(&self) -> u8 {
        self.0.iter().rev().fold(0, |bits, vector| bits << 1 | u8::from(vector.pending))
    }

    /// Carries out a SET_IRQS of the MSI-X index. Vectors that do not exist and combinations without meaning are ignored.
    pub fn set(&mut self, flags: u32, start: u32, count: u32, eventfds: Vec<File>) {
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if flags & ACTION_TRIGGER != 0 {
            if flags & DATA_EVENTFD != 0 {
                let mut eventfds = eventfds.into_iter();
                for vector in self.0.iter_mut().skip(start).take(count) {
                    // Without a file the vector is taken back.
                    vector.eventfd = eventfds.next().filter(never_blocks);
                    vector.deliver();
                }
            } else if flags & DATA_NONE != 0 && count == 0 {
                for vector in &mut self.0 {
                    vector.eventfd = None;
                }
            } else if flags & (DATA_NONE | DATA_BOOL) != 0 {
                // "As if it had happened", for user-space drivers that test their handler.
                for vector in self.0.iter_mut().skip(start).take(count) {
                    vector.pending = true;
                    vector.deliver();
                }
            }
        } else if flags & (ACTION_MASK | ACTION_UNMASK) != 0 {
            for vector in self.0.iter_mut().skip(start).take(count) {
                vector.masked = flags & ACTION_MASK != 0;
                vector.deliver();
            }
        }
    }
}

impl Vector {
    fn deliver(&mut self) {
        if !self.pending || self.masked {
            return;
        }
        if let Some(eventfd) = &mut self.eventfd {
            // A counter that is full is one that will wake its reader all the same; a descriptor that is no eventfd is QEMU's own loss.
            let _ = eventfd.write(&1_u64.to_ne_bytes());
            self.pending = false;
        }
    }
}

/// Makes sure that a write to it can never hold up the device.
fn never_blocks(file: &File) -> bool {
    fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::NONBLOCK)).is_ok()
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn counter() -> (File, File) {
        let file = File::from(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        (file.try_clone().unwrap(), file)
    }

    fn count(file: &File) -> u64 {
        let mut value = [0; 8];
        match rustix::io::read(file, &mut value) {
            Ok(8) => u64::from_ne_bytes(value),
            _ => 0,
        }
    }

    /// What QEMU 11.1.3 sends while Linux enables MSI-X with two vectors, without the descriptors.
    #[test]
    fn an_interrupt_in_the_gap_of_the_set_up_is_delivered_after_it() {
        let mut vectors = Vectors::default();
        vectors.set(DATA_EVENTFD | ACTION_TRIGGER, 0, 1, vec![]);
        vectors.set(DATA_NONE | ACTION_TRIGGER, 0, 0, vec![]);
        let (first, ours) = counter();
        vectors.set(DATA_EVENTFD | ACTION_TRIGGER, 0, 1, vec![ours]);
        vectors.set(DATA_NONE | ACTION_TRIGGER, 0, 0, vec![]);
        vectors.raise(0);
        vectors.raise(0);
        vectors.raise(1);
        assert_eq!((count(&first), vectors.pending_bits()), (0, 0b11));
        let (zero, ours) = counter();
        vectors.set(DATA_EVENTFD | ACTION_TRIGGER, 0, 1, vec![ours]);
        let (one, ours) = counter();
        vectors.set(DATA_EVENTFD | ACTION_TRIGGER, 1, 1, vec![ours]);
        assert_eq!((count(&zero), count(&one), vectors.pending_bits()), (1, 1, 0));
        vectors.raise(1);
        assert_eq!((count(&zero), count(&one)), (0, 1));
    }

    #[test]
    fn a_masked_vector_is_delivered_when_it_is_unmasked() {
        let mut vectors = Vectors::default();
        let (first, ours) = counter();
        vectors.set(DATA_EVENTFD | ACTION_TRIGGER, 0, 1, vec![ours]);
        vectors.set(DATA_NONE | ACTION_MASK, 0, 1, vec![]);
        vectors.raise(0);
        assert_eq!((count(&first), vectors.pending_bits()), (0, 1));
        vectors.set(DATA_NONE | ACTION_UNMASK, 0, 1, vec![]);
        assert_eq!((count(&first), vectors.pending_bits()), (1, 0));
    }

    #[test]
    fn nonsense_is_ignored() {
        let mut vectors = Vectors::default();
        vectors.raise(2);
        vectors.set(u32::MAX, u32::MAX, u32::MAX, vec![]);
        vectors.set(0, 0, u32::MAX, vec![counter().1]);
        vectors.raise(0);
        vectors.forget_pending();
        assert_eq!(vectors.pending_bits(), 0);
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let mut vectors = Vectors::default();
        let file = File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        (&file).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        vectors.set(DATA_EVENTFD | ACTION_TRIGGER, 0, 1, vec![file]);
        vectors.raise(0);
    }
}
