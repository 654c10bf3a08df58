//! A virtio-vsock device as a vhost-user backend: packets, credit, connections.
