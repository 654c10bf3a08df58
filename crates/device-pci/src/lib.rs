//! The Nitro Enclaves device as a PCI device for virtual machines, served over vfio-user.
//!
//! [`PciServer`] serves it at a UNIX socket, where QEMU's `vfio-user-pci` finds it: any VM becomes a parent instance, with the distribution's own
//! `nitro_enclaves` driver on top. Behind it stands one [`Device`](nitroxide_device::Device); [`ParentRam`] is the VM's memory, from which
//! drivers donate, and [`ParentVsock`] its way to talk to enclaves. Description with a picture: docs/device-pci.md.
//!
//! From the inside out: [`registers`], [`config`], `control` and [`msix`] are pure; [`function`] joins them with the device and its threads; `server` joins
//! that with crate `vfio_user`.
#![forbid(unsafe_code)]

pub mod config;
mod control;
pub mod function;
pub mod msix;
mod parent_vsock;
mod ram;
pub mod registers;
mod server;
mod socket;

pub use parent_vsock::{ParentVsock, ParentVsockError};
pub use ram::{ParentRam, Window};
pub use server::{PciServer, ServeError, ServerOptions, Stop};
pub use socket::BindError;

/// The addresses from `offset` on, to the end of what 64 bits can name.
pub(crate) fn addresses(offset: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(offset), |at| at.checked_add(1))
}
