//! The home for unmodified clients: a program runs as if this machine had `/dev/nitro_enclaves`.
//!
//! [`filter`] decides in the kernel which system calls are looked at, by a seccomp program of our own. docs/user-home.md describes the whole.

pub mod filter;
