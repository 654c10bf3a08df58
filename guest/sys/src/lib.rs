//! The few system calls of a guest program that std and rustix lack.
//!
//! [`vsock`]: AF_VSOCK streams; [`nsm`]: one request to `/dev/nsm`; [`requests`]: what can be asked there; [`signals`]: waiting for signals as PID 1 does;
//! [`net`]: bringing up the loopback interface. Everything is blocking and small: the users are static programs that run
//! inside an enclave (`guest/init`, `guest/hello`, `guest/probe`). Each module that needs `unsafe` says why.

pub mod net;
pub mod nsm;
pub mod requests;
pub mod signals;
pub mod vsock;
