//! Events of the device: a [`Bell`] that the device rings, and a thread that then looks at the enclaves.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Inner, lock};

/// How long until something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Something to be rung from any thread without waiting. Clones are the same bell.
#[derive(Debug, Clone)]
pub(crate) struct Bell(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    eventfd: OwnedFd,
    rings: AtomicU64,
    stopped: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Parts { eventfd, rings: AtomicU64::new(0), stopped: AtomicBool::new(false) })))
    }

    /// Rings. The count goes up before anybody can be woken.
    pub(crate) fn ring(&self) {
        self.0.rings.fetch_add(1, Ordering::SeqCst);
        self.wake();
    }

    /// How often it was rung.
    pub(crate) fn rings(&self) -> u64 {
        self.0.rings.load(Ordering::SeqCst)
    }

    /// Ends the thread that waits.
    pub(crate) fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Lets the waiting thread look, without counting.
    pub(crate) fn wake(&self) {
        // It fails only when 2^64 - 2 wake-ups are pending, and then one more changes nothing.
        let _ = rustix::io::write(&self.0.eventfd, &1_u64.to_ne_bytes());
    }

    fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// Waits until it is rung, or for a limited time.
    fn wait(&self, limit: Option<Duration>) {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = [PollFd::new(&self.0.eventfd, PollFlags::IN)];
        // Whatever it returns, EINTR included: looking once too often does no harm.
        let _ = poll(&mut fds, limit.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.eventfd, &mut count);
    }
}

/// The watching thread: looks at every open enclave after each event, and tries again what could not be done.
pub(crate) fn run(inner: &Inner) {
    let mut limit = None;
    while !inner.bell.is_stopped() {
        inner.bell.wait(limit);
        let again = look_at_all(inner) | free_leftovers(inner);
        limit = again.then_some(RETRY);
    }
}

/// Says whether some enclave's state is not known.
fn look_at_all(inner: &Inner) -> bool {
    let open: Vec<_> = {
        let mut enclaves = lock(&inner.enclaves);
        enclaves.open.retain(|enclave| enclave.strong_count() > 0);
        enclaves.open.iter().filter_map(std::sync::Weak::upgrade).collect()
    };
    open.iter().fold(false, |again, enclave| enclave.event(inner) | again)
}

/// Says whether closed enclaves are left that cannot be freed.
fn free_leftovers(inner: &Inner) -> bool {
    let leftover = std::mem::take(&mut lock(&inner.enclaves).leftover);
    if leftover.is_empty() {
        return false;
    }
    let still_left: Vec<_> = leftover.into_iter().filter(|enclave| enclave.release(inner).is_err()).collect();
    let mut enclaves = lock(&inner.enclaves);
    enclaves.leftover.extend(still_left);
    !enclaves.leftover.is_empty()
}
