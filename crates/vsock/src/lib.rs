//! A virtio-vsock device as a vhost-user backend: packets, credit, connections.

mod backend;
mod router;

pub use backend::{VsockBackend, VsockConfig, spawn};
pub use router::{ConnectRequest, Router};
