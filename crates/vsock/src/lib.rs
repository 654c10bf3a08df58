//! A virtio-vsock device as a vhost-user backend: packets, credit, connections.
//!
//! [`spawn`] starts a device for one guest and gives a [`VsockBackend`]; QEMU gets its socket. A [`VsockServer`] listens for QEMU instead, and
//! for the next one after it. What the guest connects to, a [`Router`]
//! decides; programs of the host connect through a listener ([`VsockConfig::listener`]) or by [`VsockBackend::connect`]. Protocol rules,
//! addressing and limits: `docs/vsock.md`. Source of the protocol: virtio 1.3, section 5.10; of the wire to QEMU: `vhost-user.rst`.
//!
//! From the inside out: `packet` and `credit` are pure; `chain` and `guest_io` touch guest memory; `backlog` and `connection` are one
//! connection, `table` all of them; `device` joins them with queues and streams; `face` and `service` join that with vhost-user and threads,
//! `backend` and `server` own it.
//!
//! # Security
//!
//! Everything the guest writes is hostile: descriptors, headers, lengths, credit. A broken packet costs its connection; a broken queue costs
//! the guest its device. Nothing the guest does makes this crate ask for memory beyond the named limits (module `limits`).

mod backend;
mod backlog;
mod chain;
mod config;
mod connection;
mod credit;
mod device;
mod face;
mod guest_io;
mod limits;
mod packet;
mod router;
mod server;
mod service;
mod table;
mod vring;

pub use backend::{VsockBackend, spawn};
pub use config::{Peer, VsockConfig};
pub use device::Statistics;
pub use router::{ConnectRequest, Route, Router};
pub use server::VsockServer;

/// The device without vhost, for the fuzz target: queues that were made up in, nothing but a verdict out. No stable interface.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::device::{Device, Interrupts, Rings};
}
