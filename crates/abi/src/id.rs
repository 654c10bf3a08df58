//! Numbers that must not be mixed up, each a type of its own: [`SlotUid`], [`Cid`], [`CpuId`], [`Gpa`].

use core::fmt;

/// A slot's number, chosen by the device at SLOT_ALLOC and valid until SLOT_FREE; zero never names a slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SlotUid(pub u64);

/// A vsock context id. Enclaves have 4 and up; 0 in a request lets the device choose.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Cid(pub u32);

/// A Linux CPU number of the parent. CPU 0 always stays with the parent, so 0 in a request means "any" ([`CpuId::ANY`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct CpuId(pub u32);

/// A physical address as the parent sees it (guest-physical, if the parent is a VM), in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Gpa(pub u64);

impl CpuId {
    /// "The next free one": the value of the ADD_VCPU argument that lets the driver choose.
    pub const ANY: Self = Self(0);
}

impl Cid {
    /// "Let the device choose": the value of the START_ENCLAVE argument for it.
    pub const ANY: Self = Self(0);
    /// The parent, as seen by enclaves.
    pub const PARENT: Self = Self(3);
}

impl fmt::Display for SlotUid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}", self.0)
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

impl fmt::Display for CpuId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}", self.0)
    }
}
