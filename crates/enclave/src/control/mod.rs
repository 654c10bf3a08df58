//! Talking to a running enclave: the protocol of its control socket, the server, and functions for clients.
//!
//! The socket is `enclaves/<enclave id>.sock` of the world; the kernel tells the server who connects (SO_PEERCRED), and it answers the enclave's own user
//! and root. One connection carries one request. docs/enclave.md, "Control".

mod client;
mod frame;
mod protocol;
mod server;

pub use client::{ConsoleStream, ControlError, Selector, console, describe, describe_now, find, list, logs, terminate, wait};
pub use protocol::{Answer, Command, Failure, MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, Reply, Request, VERSION};
pub use server::{Controlled, ServeError, Server};
