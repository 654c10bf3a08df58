//! The Nitro Enclaves device: slots, commands, events, limits and injected faults.
//!
//! [`Device`] is the model behind every face: a plain function call in process (this crate's own [`Device::command`]) or a PCI device over
//! vfio-user (`crates/device-pci`). It owns the rules and the accounting; what exists outside this process it has from a [`Launcher`]. A
//! driver reaches it with the eleven commands of the PCI protocol and gets 72-byte replies, see `docs/device.md`.
//!
//! It refuses what Linux' driver lets through: the same memory or vCPU twice, a CID in use, ranges that wrap or are not aligned.
//! [`Faults`] make single commands fail, answer late or lose their reply, so that drivers and clients can be tested against misfortune.
//!
//! ```
//! use std::sync::Arc;
//!
//! use nitroxide_abi::pci::Command;
//! use nitroxide_device::testing::NullLauncher;
//! use nitroxide_device::{Device, Faults, Limits};
//!
//! let faults: Faults = "alloc@2=-ENOSPC".parse()?;
//! let device = Device::new(Limits::default(), faults, Arc::new(NullLauncher::default()));
//! let first = device.command(Command::SlotAlloc.number(), &[0]).expect("no fault loses the reply");
//! assert_eq!((first.rc, first.mem_regions), (0, 4096));
//! let second = device.command(Command::SlotAlloc.number(), &[0]).expect("no fault loses the reply");
//! assert_eq!(second.rc, -28);
//! # Ok::<(), nitroxide_device::ParseFaultsError>(())
//! ```

#![forbid(unsafe_code)]

mod code;
mod commands;
mod device;
mod fault;
mod launcher;
mod limits;
mod ranges;
mod slots;
pub mod testing;

pub use code::DeviceCode;
pub use device::{Device, Usage};
pub use fault::{Faults, ParseFaultsError};
pub use launcher::{EndedNotifier, Launcher, MemoryRun, Slot, StartRequest};
pub use limits::Limits;
