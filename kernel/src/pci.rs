// SPDX-License-Identifier: GPL-2.0
//! Binding to the PCI function 1d0f:e4c1: probe, remove, shutdown.
//!
//! [`Bound`] owns what a bound device has; dropped in the order of its fields it takes everything down.

use kernel::bindings;
use kernel::device::{self, Core};
use kernel::driver::{DriverLayout, RegistrationOps};
use kernel::irq::{Flags, Registration};
use kernel::pci::{self, IrqType, IrqTypes, IrqVectorRegistration};
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;
use nitroxide_abi::pci as registers;

use crate::device::{EventInterrupt, NitroDevice, Registers, ReplyInterrupt, REGISTER_BYTES};
use crate::file::DeviceNode;

/// Vectors that MSI-X can have: all that the device declares are asked for (PCI Local Bus 3.0, 6.8.2.3).
const MOST_VECTORS: u32 = 2048;

/// What a bound device has; the order of the fields is the order in which they go.
#[pin_data]
pub(crate) struct Bound<'bound> {
    /// First nobody can open the node any more.
    #[pin]
    _node: DeviceNode,
    /// Then the device is switched off and its enclaves are told; that needs the interrupts no more.
    _switched_on: SwitchedOn,
    _interrupts: Interrupts<'bound>,
    _enabled: Enabled<'bound>,
}

/// Vectors and their handlers; a struct of their own, since only a struct's fields go in a certain order, and a closure's captures do not.
struct Interrupts<'bound> {
    _event: Pin<KBox<Registration<'bound, EventInterrupt>>>,
    _reply: Pin<KBox<Registration<'bound, ReplyInterrupt>>>,
    _vectors: KBox<IrqVectorRegistration<'bound>>,
}

/// A device that takes part in the bus: its memory is decoded, and it may be a master. The kernel counts who wants that; dropped, one fewer does.
struct Enabled<'bound>(&'bound pci::Device<device::Bound>);

impl<'bound> Enabled<'bound> {
    fn new(device: &'bound pci::Device<Core<'_>>) -> Result<Self> {
        device.enable_device_mem()?;
        let enabled = Self(device);
        device.set_master();
        Ok(enabled)
    }
}

impl Drop for Enabled<'_> {
    fn drop(&mut self) {
        // The kernel crate's device is the kernel's own (`repr(transparent)`).
        let raw: *mut bindings::pci_dev = core::ptr::from_ref(self.0).cast_mut().cast();
        // SAFETY: The device is there and still bound, or being unbound, as long as the reference; `new` has enabled it.
        unsafe { bindings::pci_clear_master(raw) };
        // SAFETY: As above.
        unsafe { bindings::pci_disable_device(raw) };
    }
}

/// A device that is published or about to be; dropped, it is off and unpublished.
struct SwitchedOn(Arc<NitroDevice>);

impl Drop for SwitchedOn {
    fn drop(&mut self) {
        self.0.switch_off();
    }
}

/// The driver.
pub(crate) struct Driver;

kernel::pci_device_table!(
    IDS,
    <Driver as pci::Driver>::IdInfo,
    [(pci::DeviceId::from_id(pci::Vendor::AMAZON, registers::DEVICE_ID as u32), ())]
);

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = Bound<'bound>;
    const ID_TABLE: pci::IdTable<Self::IdInfo> = &IDS;

    fn probe<'bound>(device: &'bound pci::Device<Core<'_>>, _info: Option<&'bound ()>) -> impl PinInit<Bound<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let home = crate::home().ok_or(ENODEV)?;
            if home.device().is_some() {
                dev_err!(device, "another Nitro Enclaves device is in use already; this one is left alone\n");
                return Err(EBUSY);
            }
            let enabled = Enabled::new(device)?;
            let bar = device.iomap_region_sized::<REGISTER_BYTES>(registers::BAR.into(), c"nitro_enclaves")?;

            // Everything that an interrupt touches is there before the first can come (W6).
            let registers = Registers::new(bar.into_devres()?)?;
            let nitro = NitroDevice::new(registers.clone(), home.clone())?;
            let queue = crate::queue().ok_or(ENODEV)?;

            let types = IrqTypes::default().with(IrqType::MsiX);
            let vectors = KBox::new(device.alloc_irq_vectors(registers::MIN_VECTORS.into(), MOST_VECTORS, types)?, GFP_KERNEL)?;
            // SAFETY: The box does not move what it holds, and it is dropped after both handlers that borrow it: here by the order in which they are made, later by
            // that of the fields of `Interrupts`.
            let borrowed: &'bound IrqVectorRegistration<'bound> = unsafe { &*core::ptr::from_ref(&*vectors) };
            let handler = Ok::<_, Error>(ReplyInterrupt(registers.clone()));
            let vector = borrowed.index(registers::VECTOR_REPLY.into())?;
            // SAFETY: The registration is dropped with `Bound`, never forgotten.
            let reply = unsafe { Registration::new(vector.into(), Flags::TRIGGER_NONE, c"enclave_cmd", handler) };
            let reply = KBox::pin_init(reply, GFP_KERNEL)?;
            let handler = Ok::<_, Error>(EventInterrupt { device: nitro.clone(), queue });
            let vector = borrowed.index(registers::VECTOR_EVENT.into())?;
            // SAFETY: As above.
            let event = unsafe { Registration::new(vector.into(), Flags::TRIGGER_NONE, c"enclave_evt", handler) };
            let event = KBox::pin_init(event, GFP_KERNEL)?;
            let interrupts = Interrupts { _event: event, _reply: reply, _vectors: vectors };

            let switched_on = SwitchedOn(nitro.clone());
            registers.enable()?;
            home.publish(nitro)?;
            Ok(try_pin_init!(Bound {
                _node <- DeviceNode::register(),
                _switched_on: switched_on,
                _interrupts: interrupts,
                _enabled: enabled,
            }? Error))
        })
    }
}

/// `pci::Adapter` with what it leaves out: a shutdown callback.
pub(crate) struct Adapter;

// SAFETY: The same facts as of `pci::Adapter<Driver>`, which does all the work.
unsafe impl DriverLayout for Adapter {
    type DriverType = bindings::pci_driver;
    type DriverData<'bound> = Bound<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = core::mem::offset_of!(bindings::pci_driver, driver);
}

// SAFETY: Registers and unregisters by `pci::Adapter<Driver>`.
unsafe impl RegistrationOps for Adapter {
    unsafe fn register(driver: &Opaque<bindings::pci_driver>, name: &'static CStr, module: &'static ThisModule) -> Result {
        // SAFETY: It is not registered yet, so nobody else reads or writes it.
        unsafe { (*driver.get()).shutdown = Some(shutdown) };
        // SAFETY: This function's own contract.
        unsafe { <pci::Adapter<Driver> as RegistrationOps>::register(driver, name, module) }
    }

    unsafe fn unregister(driver: &Opaque<bindings::pci_driver>) {
        // SAFETY: This function's own contract.
        unsafe { <pci::Adapter<Driver> as RegistrationOps>::unregister(driver) }
    }
}

/// Before the machine goes down or another kernel is started, enclaves end: the device must not use their memory any more.
///
/// There is one device, so which one is meant needs no look.
///
/// # Safety
///
/// None: it looks at nothing that is given.
unsafe extern "C" fn shutdown(_device: *mut bindings::pci_dev) {
    if let Some(device) = crate::home().and_then(|home| home.device()) {
        device.switch_off();
    }
}
