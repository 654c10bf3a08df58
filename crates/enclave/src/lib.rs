//! The enclave process: one per running enclave; it owns image, VM, NSM, vsock, console and control socket.
//!
//! Two sides. An owner (a program with a device in it) uses [`ProcessLauncher`], which implements the device's
//! [`Launcher`](nitroxide_device::Launcher): every successful START spawns a process and hands it memory, claims and wishes. The process runs
//! [`run_process`], and everything that belongs to the enclave ends with it; it ends when its owner does. Anybody of the same user speaks to
//! it through [`control`].
//!
//! Owner's side: `launcher`, `slot`, `gathered` (memory), `options`. Between them: `packet`. The process: `process`, `bring_up`, `refused`, `life`,
//! `memory`, `image`, `measured`, `router`, [`console`], `followers`, `controls`. For both: [`report`], [`stage`]. Description with a picture: docs/enclave.md.
#![forbid(unsafe_code)]

pub mod console;
pub mod control;
pub mod report;
pub mod stage;

mod bring_up;
mod controls;
mod followers;
mod gathered;
mod given;
mod image;
mod launcher;
mod life;
mod measured;
mod memory;
mod options;
mod packet;
mod process;
mod refused;
mod router;
mod slot;

pub use launcher::{Happening, ProcessLauncher, Refusal, SlotRecord};
pub use options::{EngineChoice, LaunchOptions, MemoryMode, Parent, ParentMemory, Program, SlotDetails};
pub use process::{ProcessError, run_process};
