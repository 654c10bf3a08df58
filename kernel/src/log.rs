// SPDX-License-Identifier: GPL-2.0
//! Values of the core in the kernel's log: [`Shown`].

use kernel::fmt;

/// Lets the kernel's printing macros, which know only types of the kernel crate, print what has a `Display` of its own.
pub(crate) struct Shown<'a, T: core::fmt::Display>(pub(crate) &'a T);

impl<T: core::fmt::Display> fmt::Display for Shown<'_, T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        core::fmt::Display::fmt(self.0, formatter)
    }
}
