//! KVM or TCG, and by which clock a TCG guest keeps time.
//!
//! [`choose`] decides from what the caller wants, what this host can do (asked once per process) and which kernel is booted. KVM's own question,
//! whether it truly works, is in `kvm`; the host's counter in `tsc`. Why the clock matters: docs/engine.md, "The clock".

use std::sync::OnceLock;

use crate::bzimage::KernelVersion;
use crate::spec::Accelerator;
use crate::{kvm, tsc};

/// The first Linux that knows `tsc_early_khz=` (Documentation/admin-guide/kernel-parameters.txt; commit bd35c77e32e4, 5.8).
const KNOWS_TSC_EARLY_KHZ: KernelVersion = KernelVersion { major: 5, minor: 8 };

/// What a VM runs on and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Whether KVM executes the guest; else TCG does.
    pub kvm: bool,
    /// By what the guest keeps time.
    pub clock: Clock,
    /// Why not KVM, for people; empty where it is KVM or was not asked for.
    pub reason: String,
}

/// By what a guest keeps time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// KVM's paravirtual clock.
    Kvm,
    /// The host's time stamp counter, whose frequency the guest kernel is told (`tsc_early_khz=`).
    HostCounter {
        /// Its frequency in kHz.
        khz: u64,
    },
    /// The number of executed instructions (`-icount shift=auto`): slower, for kernels and hosts where the counter does not do.
    Instructions,
}

/// Whether KVM truly works on this host; if not, why. Asked once per process.
pub(crate) fn kvm_works() -> &'static Result<(), String> {
    static WORKS: OnceLock<Result<(), String>> = OnceLock::new();
    WORKS.get_or_init(kvm::probe)
}

/// Chooses for a kernel of that version (none = not known, such as an image for another architecture or an ELF file).
///
/// # Errors
///
/// Why KVM does not work, where it was demanded.
pub(crate) fn choose(wanted: Accelerator, kernel: Option<KernelVersion>) -> Result<Choice, String> {
    let reason = match wanted {
        Accelerator::Tcg => String::new(),
        Accelerator::Auto | Accelerator::Kvm => match kvm_works() {
            Ok(()) => return Ok(Choice { kvm: true, clock: Clock::Kvm, reason: String::new() }),
            Err(reason) if wanted == Accelerator::Kvm => return Err(reason.clone()),
            Err(reason) => reason.clone(),
        },
    };
    Ok(Choice { kvm: false, clock: tcg_clock(kernel, tsc::khz()), reason })
}

fn tcg_clock(kernel: Option<KernelVersion>, khz: Option<u64>) -> Clock {
    match khz {
        Some(khz) if kernel.is_none_or(|version| version >= KNOWS_TSC_EARLY_KHZ) => Clock::HostCounter { khz },
        _ => Clock::Instructions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: Option<u64> = Some(2_600_000); // arbitrary

    fn version(major: u32, minor: u32) -> Option<KernelVersion> {
        Some(KernelVersion { major, minor })
    }

    #[test]
    fn kernels_that_know_the_parameter_get_the_hosts_counter() {
        for kernel in [version(5, 8), version(6, 0), version(7, 3), None] {
            assert_eq!(tcg_clock(kernel, KHZ), Clock::HostCounter { khz: 2_600_000 });
        }
    }

    #[test]
    fn older_kernels_count_instructions() {
        for kernel in [version(4, 14), version(5, 7)] {
            assert_eq!(tcg_clock(kernel, KHZ), Clock::Instructions);
        }
    }

    #[test]
    fn a_counter_that_changes_its_rate_is_not_used() {
        assert_eq!(tcg_clock(version(7, 3), None), Clock::Instructions);
    }

    #[test]
    fn tcg_is_chosen_where_demanded() {
        assert!(!choose(Accelerator::Tcg, None).unwrap().kvm);
    }

    #[test]
    fn demanding_kvm_gives_kvm_or_says_why_not() {
        match (choose(Accelerator::Kvm, None), kvm_works()) {
            (Ok(choice), Ok(())) => assert!(choice.kvm),
            (Err(reason), Err(why)) => assert_eq!(&reason, why),
            other => panic!("{other:?}"),
        }
    }
}
