//! The return code of a refused command, as the device writes it into its reply.
//!
//! A [`DeviceCode`] is the negative number at offset 0 of a reply (`docs/device.md`, "Replies"). Codes come from three places: the checks of
//! [`Device`](crate::Device), a [`Launcher`](crate::Launcher), and injected [`Faults`](crate::Faults), which may be any negative number.

use core::fmt;

use nitroxide_abi::Code;

/// A negative return code of a device command: a negated Linux errno or a negated `NE_ERR_*` code.
///
/// Having one proves that the number is below zero. It does not prove that a driver will pass it on: drivers accept errnos 1 to 133 and the
/// codes 256 to 275, and turn anything else into EIO.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceCode(i32);

impl DeviceCode {
    /// No such slot, no slot with such a CID, or no further slot.
    pub const ENOENT: Self = Self(-2);
    /// The device could not do it for a reason of its own; its log says which.
    pub const EIO: Self = Self(-5);
    /// No room for more memory.
    pub const ENOMEM: Self = Self(-12);
    /// The range is not memory of the parent.
    pub const EFAULT: Self = Self(-14);
    /// What is asked for is being used.
    pub const EBUSY: Self = Self(-16);
    /// The device is being reset.
    pub const ENODEV: Self = Self(-19);
    /// The command is unknown, its request too short, or its values make no sense.
    pub const EINVAL: Self = Self(-22);
    /// A limit of the device is reached.
    pub const ENOSPC: Self = Self(-28);
    /// Another enclave has this CID.
    pub const EADDRINUSE: Self = Self(-98);
    /// Something took longer than it may.
    pub const ETIMEDOUT: Self = Self(-110);

    /// A constant of this crate; `rc` is below zero.
    pub(crate) const fn constant(rc: i32) -> Self {
        assert!(rc < 0, "a refusal is negative");
        Self(rc)
    }

    /// The number in the reply, below zero.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// The code for a number below zero; `None` for zero and above, which mean success.
    #[must_use]
    pub const fn from_raw(rc: i32) -> Option<Self> {
        if rc < 0 { Some(Self(rc)) } else { None }
    }

    /// The number without its sign, as a client sees it in `errno`.
    #[must_use]
    pub const fn errno(self) -> u32 {
        self.0.unsigned_abs()
    }
}

impl From<Code> for DeviceCode {
    fn from(code: Code) -> Self {
        Self(code.negative())
    }
}

impl fmt::Display for DeviceCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.checked_neg().and_then(Code::new).filter(|code| code.name() != "unknown") {
            Some(code) => write!(f, "-{}", code.name()),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Debug for DeviceCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceCode({self})")
    }
}
