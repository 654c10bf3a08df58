//! The device's vhost-user face: what crate `vhost-user-backend` asks for, answered by [`Device`].
//!
//! Queues: 0 to the guest (RX), 1 from the guest (TX), 2 events. QEMU keeps the event queue to itself; a frontend that hands it over finds that
//! its buffers are left alone, since there is no migration and so no event. Source: virtio 1.3, section 5.10; QEMU `docs/interop/vhost-user.rst`.

use std::io;
use std::ops::Deref;
use std::sync::MutexGuard;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::device::{Device, Rings};
use crate::service::{SharedDevice, lock};
use crate::vring::Vring;

const RX: usize = 0;
const TX: usize = 1;
const QUEUES: usize = 3;

/// Number of the event that the device's own descriptor stands for; the crate keeps 0 to `QUEUES` for itself.
pub const HOST_EVENT: u64 = QUEUES as u64 + 1;

/// Entries of a queue at most. QEMU gives 128.
const QUEUE_ENTRIES: usize = 1024;

/// The guest's memory as the frontend describes it, replaced as a whole.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A device with what vhost needs beside it, for one front-end.
#[derive(Debug)]
pub struct Face {
    device: SharedDevice,
    memory: Memory,
    exit: (EventConsumer, EventNotifier),
}

impl Face {
    /// A face for `device`; `memory` is the one that the daemon is made with.
    ///
    /// # Errors
    ///
    /// What the system says about an eventfd.
    pub fn new(device: SharedDevice, memory: Memory) -> io::Result<Self> {
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self { device, memory, exit })
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        lock(&self.device)
    }
}

impl VhostUserBackend for Face {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_ENTRIES
    }

    /// No feature of section 5.10.3 is offered, which means stream sockets and nothing else.
    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// CONFIG gives the guest its CID; CONFIGURE_MEM_SLOTS lets its RAM have more than 8 regions.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {} // the queues know it

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = u64::from(self.device().guest_cid()).to_le_bytes();
        let (Ok(offset), Ok(size)) = (usize::try_from(offset), usize::try_from(size)) else { return Vec::new() };
        // The crate takes a wrong length for an error of ours and tells the frontend so.
        offset.checked_add(size).and_then(|end| config.get(offset..end)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(()) // `self.memory` is the same object and shows the new regions
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().ok()?, self.exit.1.try_clone().ok()?))
    }

    fn reset_device(&self) {
        self.device().stop();
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        if usize::try_from(queue).is_ok_and(|queue| queue == RX || queue == TX) {
            self.device().stop();
        }
        Ok(())
    }

    /// Any event leads to the same work. It never gives an error: the crate would end the thread for it.
    fn handle_event(&self, event: u16, _events: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        let mut device = self.device();
        if u64::from(event) == HOST_EVENT {
            device.host_events();
        }
        let (Some(rx), Some(tx)) = (vrings.get(RX), vrings.get(TX)) else { return Ok(()) };
        let interrupts = {
            let memory = self.memory.memory();
            let (mut rx, mut tx) = (rx.get_mut(), tx.get_mut());
            if !(rx.is_enabled() && rx.get_queue().ready() && tx.is_enabled() && tx.get_queue().ready()) {
                return Ok(());
            }
            device.start();
            device.process(&mut Rings { memory: memory.deref(), rx: rx.get_queue_mut(), tx: tx.get_queue_mut() })
        };
        for (wanted, vring) in [(interrupts.rx, rx), (interrupts.tx, tx)] {
            if wanted && let Err(error) = vring.signal_used_queue() {
                tracing::debug!(%error, "An interrupt could not be sent.");
            }
        }
        Ok(())
    }
}
