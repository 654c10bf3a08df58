//! The home for unmodified clients: a program runs as if this machine had `/dev/nitro_enclaves`.
//!
//! [`run`] starts it below a supervisor that gets to see, by seccomp user notification, the few system calls that matter ([`filter`]) and answers
//! them; all others are made as ever. The driver behind it is the same core as in the kernel, on a device in the supervisor's process
//! ([`nitroxide_client::ServedDevice`]). No privilege, no module and no reserved huge page is needed. docs/user-home.md describes the whole.
//!
//! `layout` has the processes, `supervisor` sorts the calls, `paths`, `enclaves`, `huge` and `donation` answer them, `caller` is who makes one,
//! `handed` tells when a descriptor was closed for the last time.

mod answer;
mod caller;
mod donation;
mod enclaves;
pub mod filter;
mod handed;
mod huge;
mod layout;
mod paths;
mod program;
mod supervisor;
mod sys;
mod vsock;
mod workers;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use layout::{Ended, Execution, MARK, RunError, become_program, is_supervised, run};
pub use program::ProgramError;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
