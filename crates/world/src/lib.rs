//! One parent's shared state on disk: claims, control sockets, vsock rendezvous.
