//! The crate's queue, whose event descriptors never make a thread wait.
//!
//! QEMU's eventfds are non-blocking; those of a QEMU that a guest took over need not be: a full pipe for interrupts, or a counter that stands at
//! its end, would hold the thread that moves data, and with it everybody who waits for the device. So the flag is set when they arrive.
//! Everything else is [`VringMutex`]. A QEMU that takes the flag away again afterwards (descriptors share it) is not stopped by this; it holds
//! up its own device, and ending the enclave's process ends that too.

use std::fs::File;
use std::io;

use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;

use crate::face::Memory;

/// A queue as the device uses it.
#[derive(Clone)]
pub struct Vring(VringMutex);

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <VringMutex as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <VringMutex as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(memory, max_queue_size).map(Self)
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.0.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.0.get_mut()
    }

    fn add_used(&self, head: u16, bytes: u32) -> Result<(), Error> {
        self.0.add_used(head, bytes)
    }

    /// One that is signalled already, and would have to be waited for, is as good as signalled.
    fn signal_used_queue(&self) -> io::Result<()> {
        unless_it_would_wait(self.0.signal_used_queue(), ())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.0.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, next: u16) {
        self.0.set_queue_next_avail(next);
    }

    fn set_queue_next_used(&self, next: u16) {
        self.0.set_queue_next_used(next);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, entries: u16) {
        self.0.set_queue_size(entries);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(file.filter(set_nonblocking));
    }

    /// The crate would end the thread for an error: a kick that somebody else has read is none.
    fn read_kick(&self) -> io::Result<bool> {
        let result = self.0.read_kick();
        unless_it_would_wait(result, false)
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(file.filter(set_nonblocking));
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}

/// `false` if that cannot be: then it is not used.
fn set_nonblocking(file: &File) -> bool {
    rustix::io::ioctl_fionbio(file, true).is_ok()
}

fn unless_it_would_wait<T>(result: io::Result<T>, otherwise: T) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(otherwise),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use rustix::event::{EventfdFlags, eventfd};
    use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

    use super::*;

    /// A queue and the other descriptors of its kick and its call, which wait by themselves.
    fn vring() -> (Vring, File, File) {
        let vring = Vring::new(GuestMemoryAtomic::new(GuestMemoryMmap::new()), 16).unwrap();
        let [kick, call] = [(); 2].map(|()| File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
        vring.set_kick(Some(kick.try_clone().unwrap()));
        vring.set_call(Some(call.try_clone().unwrap()));
        (vring, kick, call)
    }

    #[test]
    fn an_interrupt_that_nobody_can_take_does_not_hold_up_the_device() {
        let (vring, _, call) = vring();
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        vring.signal_used_queue().unwrap();

        // A pipe that nobody reads.
        let (reader, writer): (OwnedFd, OwnedFd) = rustix::pipe::pipe().unwrap();
        vring.set_call(Some(File::from(writer)));
        for _ in 0..100_000 {
            vring.signal_used_queue().unwrap();
        }
        assert!(File::from(reader).read(&mut [0; 8]).is_ok());
    }

    #[test]
    fn a_kick_that_somebody_else_has_read_is_none() {
        let (vring, kick, _) = vring();
        vring.set_enabled(true);
        assert!(!vring.read_kick().unwrap());
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        assert!(vring.read_kick().unwrap());
        assert!(!vring.read_kick().unwrap());
    }
}
