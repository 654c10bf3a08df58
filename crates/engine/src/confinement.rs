//! How much of the host a VM's process can still reach.
//!
//! [`Confinement`] is a fact about one process, reported with its [`Vm`](crate::Vm) and by `nitroxide doctor`; `child` brings it about. What each part is
//! good for: docs/engine.md, "Confinement".

use std::fmt;

/// Into which namespaces the process was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolation {
    /// User, mount, network, IPC, PID and UTS namespaces of its own.
    Full,
    /// The same but for the user namespace, which this host does not allow; the launching process was privileged.
    WithoutUser,
    /// None: this host allows no namespaces (a container's policy, a sysctl).
    #[default]
    Nothing,
}

/// What keeps one VM's process apart from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Confinement {
    /// Its namespaces.
    pub isolation: Isolation,
    /// Does it see an almost empty file tree instead of the host's?
    pub own_root: bool,
    /// Did it give up root for an unprivileged user? False also where the launching process was not root.
    pub dropped_root: bool,
    /// Does QEMU filter its own system calls (`-sandbox on`)?
    pub sandbox: bool,
}

impl fmt::Display for Confinement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.isolation {
            Isolation::Full => "own namespaces",
            Isolation::WithoutUser => "own namespaces but for users",
            Isolation::Nothing => "no namespaces (not allowed here)",
        })?;
        for (holds, text) in [(self.own_root, "own file tree"), (self.dropped_root, "root given up"), (self.sandbox, "system call filter")]
        {
            if holds {
                write!(formatter, ", {text}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confinement_is_told_in_words() {
        let full = Confinement { isolation: Isolation::Full, own_root: true, dropped_root: true, sandbox: true };
        assert_eq!(full.to_string(), "own namespaces, own file tree, root given up, system call filter");
        assert_eq!(Confinement::default().to_string(), "no namespaces (not allowed here)");
    }
}
