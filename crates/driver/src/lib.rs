//! The Nitro Enclaves driver core: every check, the accounting and the states; no_std, no allocation, no I/O.
//!
//! A *home* (a kernel module, a supervisor in user space, a library inside a program) brings locks, pages, CPUs, a clock and a
//! way to talk to the device; this crate brings the rules. The home implements four small traits:
//!
//! - [`Device`]: sends one command and brings its reply; over real registers a [`Mailbox`] does that and needs only a [`Port`];
//! - [`Client`]: the memory of the calling program, and whether it is the one that made the enclave;
//! - [`Cpus`]: the machine's CPUs;
//! - [`Machine`]: what all enclaves of one parent share, behind the home's locks: the CPU [`Pool`] and the [`Ledger`] of pages.
//!
//! One enclave is an [`Enclave`]; it begins as a [`Slot`] and ends with [`Enclave::release`]. [`call`] takes ioctl words and
//! does the copying; the methods behind it can be called alone. Order of checks, states and decisions: docs/driver.md.
//!
//! Lock order: list of enclaves (home) > enclave > pool, ledger > device. The core never holds the pool or the ledger while it
//! waits for the device.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod call;
mod client;
pub mod cpulist;
mod cpus;
mod device;
mod enclave;
mod error;
mod event;
pub mod extension;
mod image;
mod ledger;
mod machine;
pub mod mailbox;
mod memory;
mod pool;
mod pool_text;
mod release;
mod runs;
mod slot;
mod start;
mod vcpu;

pub use client::{Client, Page, Pages};
pub use cpus::Cpus;
pub use device::{sanitise, Device, DeviceError, Notice, SendError};
pub use enclave::{Enclave, Region, State, Summary};
pub use error::{AddVcpuError, CreateError, ImageLoadInfoError, PoolError, SetMemoryError, StartError, StopError};
pub use event::EventOutcome;
pub use ledger::{Ledger, LedgerEntry};
pub use machine::Machine;
pub use mailbox::{Mailbox, Port};
pub use pool::{CpuEntry, Pool};
pub use runs::{Run, Runs};
pub use slot::Slot;
