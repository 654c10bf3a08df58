//! One step of a case: [`Op`], and how it reads in a transcript.
//!
//! Steps name enclaves by index and memory by [`Place`], never by what an earlier answer was, so that one list runs on every target.

use std::fmt;

use nitroxide_abi::limits::GRANULE;

/// Enclaves that a case can have at once.
pub const ENCLAVES: usize = 3;
/// Huge pages of 2 MiB that a target has; the last three are those of the areas for odd mappings.
pub const PAGES: u64 = 104;
/// Pages that cases may give away freely.
pub const FREE_PAGES: u64 = PAGES - 3;

/// Who makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The process that made the enclave.
    Owner,
    /// A child that was forked for this call.
    Child,
    /// An older process that gets the descriptor over a socket.
    Other,
}

/// What the ioctl's argument points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pointer {
    /// Memory that can be read and written.
    Good,
    /// Nothing: address 0.
    Null,
    /// Memory that can only be read.
    ReadOnly,
}

/// A part of the owner's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// All pages, in the order of their physical addresses.
    Pages,
    /// The same pages a second time.
    Alias,
    /// The last page, read only.
    ReadOnly,
    /// The last page but one, without any access.
    NoAccess,
    /// 4 MiB of ordinary pages.
    Small,
    /// 4 MiB for which transparent huge pages were asked.
    Transparent,
    /// The last page but two; nothing behind it.
    Half,
    /// Nothing.
    Unmapped,
    /// Private huge pages, there after [`Op::Map`]; not touched before they are given.
    Private,
    /// A huge page of 1 GiB, where the machine has one.
    Gigantic,
    /// Address 0.
    Zero,
    /// The kernel's half.
    Kernel,
}

impl Area {
    /// Where it begins.
    #[must_use]
    pub const fn base(self) -> u64 {
        const FIRST: u64 = 0x1000_0000_0000;
        const APART: u64 = 1 << 40;
        match self {
            Self::Zero => 0,
            Self::Kernel => 0xffff_8000_0000_0000,
            Self::Pages => FIRST,
            Self::Alias => FIRST + APART,
            Self::ReadOnly => FIRST + 2 * APART,
            Self::NoAccess => FIRST + 3 * APART,
            Self::Small => FIRST + 4 * APART,
            Self::Transparent => FIRST + 5 * APART,
            Self::Half => FIRST + 6 * APART,
            Self::Unmapped => FIRST + 7 * APART,
            Self::Private => FIRST + 8 * APART,
            Self::Gigantic => FIRST + 9 * APART,
        }
    }
}

/// An address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The area.
    pub area: Area,
    /// Bytes from its beginning.
    pub offset: u64,
}

impl Place {
    /// The address in numbers.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.area.base().wrapping_add(self.offset)
    }

    /// The `index`th page of an area.
    #[must_use]
    pub const fn page(area: Area, index: u64) -> Self {
        Self { area, offset: index * GRANULE }
    }
}

/// A descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// `/dev/nitro_enclaves`, opened for reading only.
    Device,
    /// An enclave's.
    Enclave(usize),
}

/// What is tried with a descriptor besides ioctls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileCall {
    /// read().
    Read,
    /// write().
    Write,
    /// lseek() to the beginning.
    Seek,
    /// mmap().
    Map,
    /// F_GETFD: is it closed on exec?
    CloseOnExec,
    /// The link in /proc/self/fd.
    Link,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes `ne_cpus`; unprivileged: as user nobody, through a descriptor of root.
    WritePool {
        /// The text.
        text: String,
        /// As root?
        privileged: bool,
    },
    /// Reads `ne_cpus`.
    ReadPool,
    /// Which CPUs are online?
    Online,
    /// Brings a CPU online or takes it offline by hand.
    SetOnline {
        /// The CPU.
        cpu: u32,
        /// Online or offline.
        online: bool,
    },
    /// NE_CREATE_VM.
    Create {
        /// The enclave that it becomes.
        enclave: usize,
        /// The argument.
        pointer: Pointer,
    },
    /// NE_ADD_VCPU.
    AddVcpu {
        /// The enclave.
        enclave: usize,
        /// The caller.
        who: Who,
        /// The CPU, 0 for any.
        cpu: u32,
        /// The argument.
        pointer: Pointer,
    },
    /// NE_GET_IMAGE_LOAD_INFO.
    LoadInfo {
        /// The enclave.
        enclave: usize,
        /// The caller.
        who: Who,
        /// The flags.
        flags: u64,
        /// The argument.
        pointer: Pointer,
    },
    /// NE_SET_USER_MEMORY_REGION.
    SetMemory {
        /// The enclave.
        enclave: usize,
        /// The caller.
        who: Who,
        /// The flags.
        flags: u64,
        /// The address.
        place: Place,
        /// Bytes.
        size: u64,
        /// The argument.
        pointer: Pointer,
    },
    /// NE_START_ENCLAVE.
    Start {
        /// The enclave.
        enclave: usize,
        /// The caller.
        who: Who,
        /// The flags.
        flags: u64,
        /// The CID, 0 for any.
        cid: u64,
        /// The argument.
        pointer: Pointer,
    },
    /// An ioctl by its word.
    Ioctl {
        /// The descriptor.
        on: On,
        /// The word.
        word: u32,
    },
    /// Another call.
    File {
        /// The descriptor.
        on: On,
        /// The call.
        call: FileCall,
    },
    /// poll() for everything.
    Poll {
        /// The descriptor.
        on: On,
        /// The caller.
        who: Who,
    },
    /// The other process gets the descriptor and keeps it.
    Keep(usize),
    /// The other process closes what it kept.
    Unkeep(usize),
    /// The owner closes its descriptor.
    Close(usize),
    /// Maps so many private huge pages.
    Map(u64),
    /// Unmaps them.
    Unmap,
    /// How many huge pages are free, compared to the start?
    HugeFree,
    /// The device's fault rules (docs/device.md, "Faults").
    Faults(String),
    /// An event although nothing happened.
    Event,
    /// The enclave ends by itself.
    End(usize),
    /// How many pieces of memory slots made from now on may have.
    MaxRegions(u32),
    /// How much memory do slots have?
    Usage,
    /// From now on, count what the device is asked.
    CountCommands,
    /// How many commands has the device answered since?
    Commands,
}

impl Op {
    /// The enclave it is about.
    #[must_use]
    pub fn enclave(&self) -> Option<usize> {
        match self {
            Self::Create { enclave, .. }
            | Self::AddVcpu { enclave, .. }
            | Self::LoadInfo { enclave, .. }
            | Self::SetMemory { enclave, .. }
            | Self::Start { enclave, .. }
            | Self::Keep(enclave)
            | Self::Unkeep(enclave)
            | Self::Close(enclave)
            | Self::End(enclave) => Some(*enclave),
            Self::Ioctl { on: On::Enclave(enclave), .. }
            | Self::File { on: On::Enclave(enclave), .. }
            | Self::Poll { on: On::Enclave(enclave), .. } => Some(*enclave),
            _ => None,
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "",
            Self::Child => " by child",
            Self::Other => " by other",
        })
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Good => "",
            Self::Null => " at NULL",
            Self::ReadOnly => " at read-only",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{}", self.area, Bytes(self.offset))
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device => f.write_str("device"),
            Self::Enclave(enclave) => write!(f, "e{enclave}"),
        }
    }
}

/// Bytes, in MiB where that is exact.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        match self.0 {
            0 => f.write_str("0"),
            bytes if bytes % MIB == 0 && bytes < 1 << 50 => write!(f, "{}M", bytes / MIB),
            bytes => write!(f, "{bytes:#x}"),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WritePool { text, privileged } => {
                let short: String = text.chars().take(40).collect();
                let length = if text.len() > 40 { format!("... of {} bytes", text.len()) } else { String::new() };
                write!(f, "pool {short:?}{length}{}", if *privileged { "" } else { " by nobody" })
            }
            Self::ReadPool => f.write_str("read pool"),
            Self::Online => f.write_str("online CPUs"),
            Self::SetOnline { cpu, online } => write!(f, "cpu{cpu} {}", if *online { "online" } else { "offline" }),
            Self::Create { enclave, pointer } => write!(f, "e{enclave} CREATE_VM{pointer}"),
            Self::AddVcpu { enclave, who, cpu, pointer } => write!(f, "e{enclave} ADD_VCPU {cpu}{pointer}{who}"),
            Self::LoadInfo { enclave, who, flags, pointer } => write!(f, "e{enclave} LOAD_INFO flags {flags}{pointer}{who}"),
            Self::SetMemory { enclave, who, flags, place, size, pointer } => {
                write!(f, "e{enclave} SET_MEMORY {place} size {} flags {flags}{pointer}{who}", Bytes(*size))
            }
            Self::Start { enclave, who, flags, cid, pointer } => write!(f, "e{enclave} START cid {cid} flags {flags}{pointer}{who}"),
            Self::Ioctl { on, word } => write!(f, "{on} ioctl {word:#010x}"),
            Self::File { on, call } => write!(f, "{on} {call:?}"),
            Self::Poll { on, who } => write!(f, "{on} poll{who}"),
            Self::Keep(enclave) => write!(f, "e{enclave} kept by other"),
            Self::Unkeep(enclave) => write!(f, "e{enclave} close by other"),
            Self::Close(enclave) => write!(f, "e{enclave} close"),
            Self::Map(pages) => write!(f, "map {pages} private huge pages"),
            Self::Unmap => f.write_str("unmap"),
            Self::HugeFree => f.write_str("huge pages in use"),
            Self::Faults(rules) => write!(f, "faults {rules:?}"),
            Self::Event => f.write_str("event"),
            Self::End(enclave) => write!(f, "e{enclave} ends"),
            Self::MaxRegions(count) => write!(f, "max regions {count}"),
            Self::Usage => f.write_str("memory of slots"),
            Self::CountCommands => f.write_str("count commands"),
            Self::Commands => f.write_str("commands to the device"),
        }
    }
}
