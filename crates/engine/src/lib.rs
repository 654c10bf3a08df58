//! Runs one enclave VM: from memory, vCPUs and a loaded image to an exit reason.
//!
//! [`Engine::discover`] finds a QEMU that works here; [`Engine::launch`] takes a [`VmSpec`] (file descriptors only, no paths) and gives a [`Vm`];
//! [`Vm::wait`] says how it ended. [`Engine::none`] is an engine without a virtual machine, for conformance runs.
//!
//! One file per question: `discover` and `answers` (which QEMU), `accelerate` (KVM or TCG, which clock), `command_line` (the guest kernel's parameters), `arguments`
//! (QEMU's own), `spawn`, `child` and `root` (the process and its confinement), `qmp` and `vm` (how it goes and ends), `console` (panics on the serial port).
//! Neighbours: `crates/enclave` launches; `crates/nsm` and `crates/vsock` are at the other end of the two device sockets. Reasons: docs/engine.md.

mod accelerate;
mod answers;
mod arguments;
mod bzimage;
mod child;
mod command_line;
mod confinement;
mod console;
mod discover;
mod kvm;
mod launch;
mod qmp;
mod root;
mod spawn;
mod spec;
mod tsc;
mod vm;

pub use accelerate::{Choice, Clock};
pub use confinement::{Confinement, Isolation};
pub use console::PanicWatch;
pub use discover::{DiscoverError, Discovery, Qemu, setup_root};
pub use launch::{Engine, LaunchError};
pub use spawn::SpawnError;
pub use spec::{Accelerator, FileRange, MAX_MEMORY_RUNS, SpecError, VirtioDiscovery, VmSpec};
pub use vm::{ExitReason, ExitReport, Vm, VmStopper};
