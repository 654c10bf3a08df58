//! The pool as text, as `ne_cpus` takes and shows it: [`Pool::write`] and [`Pool::read`].
//!
//! Order of checks and the odd corners that programs rely on (an empty text clears the pool *and* fails): docs/driver.md,
//! "The CPU pool".

use nitroxide_abi::limits::POOL_TEXT_BYTES;
use nitroxide_abi::CpuId;

use crate::cpulist::for_each_range;
use crate::error::PoolError;
use crate::pool::{CpuEntry, Place, Pool};
use crate::Cpus;

/// What was last written successfully, byte for byte; empty after a failure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolText {
    bytes: [u8; POOL_TEXT_BYTES],
    length: usize,
}

impl PoolText {
    pub(crate) const EMPTY: Self = Self { bytes: [0; POOL_TEXT_BYTES], length: 0 };

    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&[])
    }

    /// Keeps `text`, if it leaves room for the closing NUL that the C driver stores with it.
    fn store(&mut self, text: &[u8]) -> Result<(), PoolError> {
        let target = self.bytes.get_mut(..text.len()).filter(|_| text.len() < POOL_TEXT_BYTES).ok_or(PoolError::TextTooLong)?;
        target.copy_from_slice(text);
        self.length = text.len();
        Ok(())
    }
}

impl<T: AsRef<[CpuEntry]> + AsMut<[CpuEntry]>> Pool<T> {
    /// Replaces the pool by the CPUs of a text; a NUL ends it.
    ///
    /// The caller's privilege (EPERM) is the home's check and comes first. The old pool is taken down before the new text is looked
    /// at, as in mainline: after any failure but EPERM there is no pool.
    ///
    /// # Errors
    ///
    /// See [`PoolError`]; mainline's codes in mainline's order.
    pub fn write(&mut self, text: &[u8], cpus: &mut impl Cpus) -> Result<(), PoolError> {
        // Slots count from before they are asked for until the device has freed them, under this same lock: no enclave can come
        // into being between this check and the change (W16), and one that could not be freed keeps the pool as it is (W10).
        if self.slots > 0 || self.table.as_ref().iter().any(|entry| entry.place == Place::Foreign) {
            return Err(PoolError::EnclavesExist);
        }
        self.clear(cpus);
        let text = text.split(|byte| *byte == 0).next().unwrap_or(&[]);
        self.set_up(text, cpus).inspect_err(|_| self.forget())?;
        self.text.store(text).inspect_err(|_| self.clear(cpus))
    }

    /// The text that was written, followed by a newline of its own; only that newline if there is no pool.
    ///
    /// Returns the pieces to write one after the other.
    #[must_use]
    pub fn read(&self) -> (&[u8], &'static [u8]) {
        (self.text.as_bytes(), b"\n")
    }

    /// Brings all CPUs of the pool online and forgets it; also for the end of the driver. Only without slots.
    pub fn clear(&mut self, cpus: &mut impl Cpus) {
        for (cpu, _) in self.numbered().filter(|(_, entry)| entry.place != Place::Outside) {
            // A CPU that does not come back cannot be helped from here; the parent's administrator sees it offline.
            let _ = cpus.set_online(cpu, true);
        }
        self.forget();
    }

    fn forget(&mut self) {
        self.table.as_mut().fill(CpuEntry::default());
        self.text = PoolText::EMPTY;
        self.node = -1;
        self.threads_per_core = 0;
    }

    fn set_up(&mut self, text: &[u8], cpus: &mut impl Cpus) -> Result<(), PoolError> {
        self.mark_listed(text, cpus)?;
        self.check_online_and_node(cpus)?;
        self.check_cores(cpus)?;
        self.take_offline(cpus)
    }

    fn mark_listed(&mut self, text: &[u8], cpus: &impl Cpus) -> Result<(), PoolError> {
        let known = u32::try_from(self.table.as_ref().len()).unwrap_or(u32::MAX);
        let table = self.table.as_mut();
        for_each_range(text, cpus.count().min(known), |first, last| {
            let (Ok(first), Ok(last)) = (usize::try_from(first), usize::try_from(last)) else { return };
            for entry in table.get_mut(first..=last).unwrap_or_default() {
                entry.place = Place::Free;
            }
        })?;
        if self.has_free_core() {
            Ok(())
        } else {
            Err(PoolError::Empty)
        }
    }

    fn check_online_and_node(&mut self, cpus: &impl Cpus) -> Result<(), PoolError> {
        let mut node = None;
        for (cpu, _, _) in self.cpus() {
            if !cpus.is_online(cpu) {
                return Err(PoolError::Offline(cpu));
            }
            let of_this = cpus.node_of(cpu);
            if of_this < 0 || *node.get_or_insert(of_this) != of_this {
                return Err(PoolError::OtherNode(cpu));
            }
        }
        self.node = node.unwrap_or(-1);
        Ok(())
    }

    /// Groups the CPUs by sibling sets, and refuses the parent's core and half cores.
    fn check_cores(&mut self, cpus: &impl Cpus) -> Result<(), PoolError> {
        if self.membership(CpuId(0)).0 {
            return Err(PoolError::CpuZero);
        }
        for (cpu, entry) in (0..).map(CpuId).zip(self.table.as_mut()).filter(|(cpu, _)| cpus.is_online(*cpu)) {
            entry.core = cpus.core_of(cpu).0;
        }
        let is_online = |(cpu, _): &(CpuId, CpuEntry)| cpus.is_online(*cpu);
        let zeroth = self.entry(CpuId(0)).map_or(0, |entry| entry.core);
        if let Some((cpu, _)) = self.numbered().find(|(_, entry)| entry.place == Place::Free && entry.core == zeroth) {
            return Err(PoolError::SiblingOfCpuZero(cpu));
        }
        // A core is whole if its lowest CPU is listed exactly when each of its CPUs is.
        for (cpu, entry) in self.numbered().filter(is_online) {
            let listed = entry.place == Place::Free;
            let core_listed = self.membership(CpuId(entry.core)).0;
            if listed && !core_listed {
                return Err(PoolError::HalfCore(CpuId(entry.core)));
            }
            if core_listed && !listed {
                return Err(PoolError::HalfCore(cpu));
            }
        }
        let first = self.cpus().next().map(|(_, core, _)| core);
        let threads = self.cpus().filter(|(_, core, _)| Some(*core) == first).count();
        self.threads_per_core = u32::try_from(threads).unwrap_or(u32::MAX);
        Ok(())
    }

    fn take_offline(&mut self, cpus: &mut impl Cpus) -> Result<(), PoolError> {
        let failed = self
            .numbered()
            .filter(|(_, entry)| entry.place == Place::Free)
            .find_map(|(cpu, _)| cpus.set_online(cpu, false).err().map(|code| (cpu, code)));
        let Some((failed, code)) = failed else { return Ok(()) };
        for (cpu, _) in self.numbered().filter(|(cpu, entry)| entry.place == Place::Free && *cpu < failed) {
            let _ = cpus.set_online(cpu, true);
        }
        Err(PoolError::Hotplug(failed, code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w20_text_of_511_bytes_is_kept_and_of_512_refused() {
        let mut text = PoolText::EMPTY;
        assert_eq!(text.store(&[b','; 511]), Ok(()));
        assert_eq!(text.as_bytes().len(), 511);
        assert_eq!(text.store(&[b','; 512]), Err(PoolError::TextTooLong));
    }

    #[test]
    fn entries_start_outside_the_pool() {
        assert_eq!(CpuEntry::default().place, Place::Outside);
    }
}
