//! What an owner decides about its enclaves: [`LaunchOptions`] for all, [`SlotDetails`] for one, and where the parent's memory is.

use std::ffi::OsString;
use std::path::PathBuf;

use nitroxide_device::MemoryRun;
use nitroxide_engine::{Accelerator, FileRange, VirtioDiscovery};
use nitroxide_world::ParentIdentity;
use serde::{Deserialize, Serialize};

/// The parent's memory, as its owner knows it.
pub trait ParentMemory: Send + Sync {
    /// The file ranges behind a run of guest-physical addresses, in order; their sizes add up to the run's, each a multiple of 2 MiB.
    /// `None` if the parent has no such memory.
    ///
    /// Called for every SLOT_ADD_MEM, when the driver has written the content. What the ranges may be used for is said by [`MemoryMode`].
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>>;
}

/// Whose the memory is from ADD_MEM on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryMode {
    /// The enclave's alone: nobody else writes or reads it until the slot is freed. The VM runs in it, without the image's own pages.
    #[default]
    Private,
    /// The parent's: its content is copied when it is added.
    Copied,
    /// As `Copied`, and then the parent's pages are taken out of its file: it sees zeros there, and whatever it writes is not the enclave's.
    Isolated,
    /// Both have it: the VM runs in the parent's pages, at most 128 pieces of them. Only the image is copied, since it is checked. Once the
    /// slot is freed the pages are zero.
    Shared,
}

impl MemoryMode {
    /// Whether content is copied when memory is added.
    pub(crate) fn copies(self) -> bool {
        matches!(self, Self::Copied | Self::Isolated)
    }
}

/// Who is the parent that an enclave reaches over vsock as CID 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parent {
    /// Processes of this world: each port is a listener of its own.
    #[default]
    Processes,
    /// A virtual machine with a vsock device of its own ([`Endpoint::ParentVm`](nitroxide_world::Endpoint::ParentVm)), the heartbeat included.
    Vm,
}

/// What executes enclaves.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineChoice {
    /// QEMU: the one given, or whichever is found.
    Qemu(Option<PathBuf>),
    /// Nothing: enclaves start with any content and run until they are stopped. For tests of drivers and devices.
    None,
    /// QEMU, whichever is found.
    #[default]
    Auto,
}

/// How to run the enclave process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The program; `None` is this very one.
    pub path: Option<PathBuf>,
    /// Its arguments; the default is the hidden command `enclave-process`.
    pub arguments: Vec<OsString>,
}

impl Default for Program {
    fn default() -> Self {
        Self { path: None, arguments: vec!["enclave-process".into()] }
    }
}

/// What an owner decides about all enclaves of one device.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// The name an enclave asks for; made unique when it starts.
    pub name: String,
    /// The process whose heartbeat listener an enclave's first connection goes to.
    pub creator_pid: u32,
    /// What executes enclaves.
    pub engine: EngineChoice,
    /// What executes their instructions.
    pub accelerator: Accelerator,
    /// How their kernels find devices.
    pub discovery: VirtioDiscovery,
    /// Whose the memory is.
    pub memory: MemoryMode,
    /// Who the parent is to an enclave's vsock.
    pub parent: Parent,
    /// Who the parent is to those that read attestation documents.
    pub parent_identity: ParentIdentity,
    /// How to run the enclave process.
    pub program: Program,
}

impl LaunchOptions {
    /// Defaults for enclaves that this process creates under `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            creator_pid: std::process::id(),
            engine: EngineChoice::default(),
            accelerator: Accelerator::default(),
            discovery: VirtioDiscovery::default(),
            memory: MemoryMode::default(),
            parent: Parent::default(),
            parent_identity: ParentIdentity::default(),
            program: Program::default(),
        }
    }
}

/// What an owner decides about one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotDetails {
    /// The name it asks for.
    pub name: String,
    /// The process whose heartbeat listener its first connection goes to.
    pub creator_pid: u32,
}
