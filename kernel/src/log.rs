// SPDX-License-Identifier: GPL-2.0
//! The core's notices in the kernel's log ([`notice`]), and its values there ([`Shown`]).

use kernel::fmt;
use kernel::prelude::*;
use nitroxide_driver::Notice;

use crate::{statistics, sys};

/// What the core has to say to the machine's owner.
pub(crate) fn notice(notice: &Notice) {
    line(notice);
}

/// A line for the machine's owner, unless there were many a moment ago: a device that answers nonsense must not fill the log.
pub(crate) fn line(text: &dyn core::fmt::Display) {
    statistics::NOTICES.count();
    if sys::may_log() {
        pr_warn!("{}\n", Shown(text));
    }
}

/// Lets the kernel's printing macros, which know only types of the kernel crate, print what has a `Display` of its own.
pub(crate) struct Shown<'a, T: core::fmt::Display + ?Sized>(pub(crate) &'a T);

impl<T: core::fmt::Display + ?Sized> fmt::Display for Shown<'_, T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        core::fmt::Display::fmt(self.0, formatter)
    }
}
