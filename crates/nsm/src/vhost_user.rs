//! What QEMU tells the device over the vhost-user socket: features, guest memory, the one queue and its eventfds.
//!
//! [`Handler`] is the state between messages; the crate `vhost` reads and writes the messages, [`crate::backend`] calls it and
//! looks after the queue. Written here rather than taken from a framework so that one thread, a connected socket and no file
//! suffice, and a queue that the guest broke only rests. Protocol: QEMU `docs/interop/vhost-user.rst`.

use crate::module::Module;
use crate::virtqueue::{Exchange, MAX_SIZE, Progress};
use std::fs::File;
use std::io;
use std::sync::Arc;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// How many regions guest memory may have: as many as vhost in the kernel takes.
const MAX_REGIONS: u64 = 509;

const FEATURES: u64 = (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// One region of guest memory as QEMU knows it.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    /// Where it is in QEMU's own address space; queue addresses are given in these terms.
    user_address: u64,
    /// Where the guest sees it.
    guest_address: u64,
    /// How many bytes.
    size: u64,
}

/// The device's one queue.
#[derive(Debug)]
struct Ring {
    queue: Queue,
    /// The guest wrote to the queue.
    kick: Option<File>,
    /// Interrupts the guest.
    call: Option<File>,
    /// Has QEMU allowed data to flow?
    enabled: bool,
    /// Is it unusable: not set up yet, set up wrongly, or broken by the guest since?
    broken: bool,
}

/// The device between two messages. Lives on one thread.
#[derive(Debug)]
pub(crate) struct Handler {
    module: Module,
    memory: GuestMemoryMmap,
    mappings: Vec<Mapping>,
    ring: Ring,
    exchange: Exchange,
}

impl Handler {
    pub(crate) fn new(module: Module) -> io::Result<Self> {
        let queue = Queue::new(MAX_SIZE).map_err(io::Error::other)?;
        Ok(Self {
            module,
            memory: GuestMemoryMmap::new(),
            mappings: Vec::new(),
            ring: Ring { queue, kick: None, call: None, enabled: false, broken: true },
            exchange: Exchange::default(),
        })
    }

    pub(crate) const fn module(&self) -> &Module {
        &self.module
    }

    pub(crate) const fn module_mut(&mut self) -> &mut Module {
        &mut self.module
    }

    /// The eventfd to wait for, while there is something to do when it fires.
    pub(crate) fn kick(&self) -> Option<&File> {
        self.ring.kick.as_ref().filter(|_| self.runs())
    }

    /// Stops listening to an eventfd that is none.
    pub(crate) fn drop_kick(&mut self) {
        self.ring.kick = None;
    }

    /// Looks at the queue and interrupts the guest if it was given something. Returns whether to look again soon.
    pub(crate) fn advance(&mut self) -> bool {
        if !self.runs() {
            return false;
        }
        let Progress { used, more } = match self.exchange.advance(&mut self.ring.queue, &self.memory, &mut self.module) {
            Ok(progress) => progress,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "virtio-nsm");
                self.ring.broken = true;
                // What was given back before the fault is the guest's; an interrupt too many does no harm here.
                Progress { used: true, more: false }
            }
        };
        if used && self.ring.queue.needs_notification(&self.memory).unwrap_or(true) {
            self.interrupt();
        }
        more
    }

    fn interrupt(&self) {
        if let Some(call) = &self.ring.call
            && let Err(error) = rustix::io::write(call, &1_u64.to_ne_bytes())
            && error != rustix::io::Errno::AGAIN
        // it is signalled already, as often as can be
        {
            tracing::warn!(%error, "The guest's NSM driver could not be interrupted");
        }
    }

    fn runs(&self) -> bool {
        self.ring.enabled && !self.ring.broken && self.ring.queue.ready() && self.ring.kick.is_some()
    }

    fn only_queue(&mut self, index: impl Into<u32>) -> Result<&mut Ring> {
        if index.into() == 0 { Ok(&mut self.ring) } else { Err(Error::InvalidParam) }
    }

    fn guest_address(&self, user_address: u64) -> Result<GuestAddress> {
        let found = self.mappings.iter().find_map(|mapping| {
            let offset = user_address.checked_sub(mapping.user_address).filter(|offset| *offset < mapping.size)?;
            mapping.guest_address.checked_add(offset)
        });
        found.map(GuestAddress).ok_or(Error::InvalidParam)
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<(GuestRegionMmap, Mapping)> {
    let (user_address, guest_address, size) = (region.user_addr, region.guest_phys_addr, region.memory_size);
    let mapped = GuestRegionMmap::new(region.mmap_region(file)?, GuestAddress(guest_address)).ok_or(Error::InvalidParam)?;
    Ok((mapped, Mapping { user_address, guest_address, size }))
}

/// Lets nobody wait for an eventfd. QEMU's own are so; those of a QEMU that a guest took over could hold up this thread for ever, by a counter that
/// stands at its end. (It can take the flag away again, since descriptors share it: then its own device waits until the process is ended.)
fn without_waiting(file: Option<File>) -> Result<Option<File>> {
    if let Some(file) = &file {
        rustix::io::ioctl_fionbio(file, true).map_err(|error| Error::ReqHandlerError(error.into()))?;
    }
    Ok(file)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

const NOT_OFFERED: Error = Error::InvalidOperation("virtio-nsm does not offer this");

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.ring.enabled = false;
        self.exchange.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        self.ring.queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.ring.enabled = true; // without them there is no message that would enable it
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mapped = regions.iter().zip(files).map(|(region, file)| map(region, file)).collect::<Result<Vec<_>>>()?;
        let (regions, mappings): (Vec<_>, Vec<_>) = mapped.into_iter().unzip();
        self.memory = GuestMemoryMmap::from_regions(regions).map_err(failed)?;
        self.mappings = mappings;
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.mappings.len() as u64 >= MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        let (mapped, mapping) = map(region, file)?;
        self.memory = self.memory.insert_region(Arc::new(mapped)).map_err(failed)?;
        self.mappings.push(mapping);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let guest_address = region.guest_phys_addr;
        let (memory, _) = self.memory.remove_region(GuestAddress(guest_address), region.memory_size).map_err(failed)?;
        self.memory = memory;
        self.mappings.retain(|mapping| mapping.guest_address != guest_address);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.only_queue(index)?.queue.try_set_size(size).map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.only_queue(index)?.broken = true; // until everything is in its place
        let (descriptor, used, available) = (self.guest_address(descriptor)?, self.guest_address(used)?, self.guest_address(available)?);
        let Ring { queue, broken, .. } = &mut self.ring;
        queue.try_set_desc_table_address(descriptor).map_err(|_| Error::InvalidParam)?;
        queue.try_set_avail_ring_address(available).map_err(|_| Error::InvalidParam)?;
        queue.try_set_used_ring_address(used).map_err(|_| Error::InvalidParam)?;
        // SET_VRING_BASE tells only where the available ring goes on; the used ring's place stands in guest memory.
        let next_used = queue.used_idx(&self.memory, std::sync::atomic::Ordering::Relaxed).map_err(failed)?;
        queue.set_next_used(next_used.0);
        *broken = false;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let next = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.only_queue(index)?.queue.set_next_avail(next);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.only_queue(index)?;
        ring.queue.set_ready(false);
        (ring.kick, ring.call) = (None, None);
        let next = ring.queue.next_avail();
        // QEMU stops a queue when the guest resets the device: what it still asked for, nobody waits for any more.
        self.exchange.reset();
        Ok(VhostUserVringState::new(index, u32::from(next)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.only_queue(index)?;
        ring.queue.set_ready(file.is_some());
        ring.kick = without_waiting(file)?;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.only_queue(index)?.call = without_waiting(file)?;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.only_queue(index).map(|_| ())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.only_queue(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(NOT_OFFERED)
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}
