//! The Nitro Secure Module: PCRs, CBOR messages, and the virtio-nsm device as a vhost-user backend.
//!
//! Three layers, each usable alone. [`PcrBank`] keeps the registers and their locks. [`Module`] answers one request with one
//! response: [`request`] and [`response`] are the two halves of its CBOR. [`virtqueue`] finds requests and room for responses in
//! guest memory. [`spawn`] puts all of it behind a socket for QEMU's `vhost-user-test-device,virtio-id=33`.
//!
//! The enclave process calls [`spawn`] and hands [`NsmBackend::take_frontend`] to the engine. Documents are signed by
//! `nitroxide-attestation`. Behaviour: docs/nsm.md, Linux `drivers/misc/nsm.c`.

#![forbid(unsafe_code)]

mod backend;
mod module;
mod pcr;
pub mod request;
pub mod response;
mod vhost_user;
pub mod virtqueue;

pub use backend::{NsmBackend, NsmConfig, spawn};
pub use module::{Identity, Module, RANDOM_BYTES};
pub use nitroxide_attestation::{MAX_FIELD_BYTES, MAX_PCRS, Pcr, Pki, PkiError, Timestamp, in_one_line};
pub use pcr::{BOOT_LOCKED_PCRS, DEBUG_ZEROED_PCRS, InitialPcrs, PcrBank};
