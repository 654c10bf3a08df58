//! The Nitro Enclaves interface, defined once: everything two parties must agree on, and nothing that decides.
//!
//! - [`ioctl`]: the five commands of `/dev/nitro_enclaves` and their structs; [`flags`] and [`limits`] go with them.
//! - [`extension`]: our own commands beside the five, and [`sized`], the one rule by which their structs grow.
//! - [`pci`]: registers, commands and replies of the PCI device that drivers talk to.
//! - [`reserved`]: words, flags and codes that others use, so that we never give them a second meaning.
//! - [`Code`]: every code that a call can answer, with its name and a plain text; [`SlotUid`], [`Cid`], [`CpuId`], [`Gpa`].
//!
//! The C header `include/uapi/linux/nitro_enclaves.h` is generated from this crate (`examples/header.rs`). Layouts and their
//! reasons: docs/abi.md. Everything is little endian on the wire, whatever the host; no struct has hidden padding.

#![no_std]
#![forbid(unsafe_code)]

pub mod code;
pub mod extension;
pub mod flags;
mod id;
pub mod ioctl;
pub mod limits;
pub mod pci;
pub mod reserved;
pub mod sized;
pub mod table;
pub mod wire;

pub use code::Code;
pub use id::{Cid, CpuId, Gpa, SlotUid};
