//! Whether KVM truly works on this host.
//!
//! Some hosts offer a /dev/kvm that opens and answers but executes guests by emulating instructions, at 1 to 2 million a second: a kernel needs minutes
//! there. Neither open() nor the API version tells; CPU flags do mostly, a timed loop does always. Reasons: docs/engine.md, "KVM or TCG".

/// Asks the host, in the order of cost: CPU flags, the device file, a loop in a tiny guest.
///
/// # Errors
///
/// Why KVM does not work, as a sentence for people.
#[cfg(target_arch = "x86_64")]
pub(crate) fn probe() -> Result<(), String> {
    let flags = crate::tsc::cpu_flags();
    if !flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return Err("this machine's CPU offers no hardware virtualisation (no vmx or svm in /proc/cpuinfo)".to_owned());
    }
    loop_in_guest::probe()
}

/// Elsewhere the enclave's instructions are foreign, so KVM cannot execute them.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn probe() -> Result<(), String> {
    Err("KVM executes x86-64 enclaves only on x86-64 machines".to_owned())
}

#[cfg(target_arch = "x86_64")]
mod loop_in_guest {
    #![expect(unsafe_code, reason = "a guest's memory is mapped and handed to KVM")]

    use std::time::{Duration, Instant};

    use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit};
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    /// Where the guest's only page lies, in bytes of guest-physical memory.
    const PAGE: u64 = 0x1000;

    /// How often the loop of two instructions runs.
    const ROUNDS: u32 = 100_000;

    /// The longest time a real KVM takes: 5 million rounds a second, where 1000 million are usual and an emulated one makes 1.
    const LIMIT: Duration = Duration::from_millis(20);

    /// Executes the loop up to three times, since the host may be busy with something else for a while; one quick run is proof enough.
    pub(super) fn probe() -> Result<(), String> {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            best = best.min(run_once()?);
            if best <= LIMIT {
                return Ok(());
            }
        }
        let rate = f64::from(ROUNDS) * 2.0 / best.as_secs_f64() / 1e6;
        Err(format!("/dev/kvm executes only {rate:.1} million instructions a second: it is an emulation without hardware behind it"))
    }

    /// One guest of one page: `mov ecx, ROUNDS; again: dec ecx; jnz again; hlt`, in real mode.
    fn run_once() -> Result<Duration, String> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: kvm_ioctls::Error| format!("/dev/kvm: {what} failed: {error}")
        };
        let page = Page::new().ok_or("no memory for a probe of /dev/kvm")?;
        let kvm = Kvm::new().map_err(failed("opening"))?;
        let vm = kvm.create_vm().map_err(failed("creating a virtual machine"))?;
        let [a, b, c, d] = ROUNDS.to_le_bytes();
        page.write(&[0x66, 0xB9, a, b, c, d, 0x66, 0x49, 0x75, 0xFC, 0xF4]);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: PAGE,
            memory_size: PAGE,
            userspace_addr: page.address.expose_provenance() as u64,
        };
        // SAFETY: the page stays mapped until the VM and its vCPU are gone: they are declared after it, so they are dropped before it on every way out.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("giving memory"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(failed("creating a vCPU"))?;
        let mut segments = vcpu.get_sregs().map_err(failed("reading registers"))?;
        (segments.cs.base, segments.cs.selector) = (0, 0);
        vcpu.set_sregs(&segments).map_err(failed("setting registers"))?;
        vcpu.set_regs(&kvm_regs { rip: PAGE, rflags: 2, ..kvm_regs::default() }).map_err(failed("setting registers"))?;
        let begin = Instant::now();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(begin.elapsed()),
                Ok(other) => return Err(format!("/dev/kvm: a probe guest ended unexpectedly ({other:?})")),
                Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
                Err(error) => return Err(format!("/dev/kvm: running a guest failed: {error}")),
            }
        }
    }

    /// One page of our own memory.
    struct Page {
        address: *mut core::ffi::c_void,
    }

    impl Page {
        fn new() -> Option<Self> {
            // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
            let address = unsafe { mmap_anonymous(core::ptr::null_mut(), 4096, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) };
            address.ok().map(|address| Self { address })
        }

        /// Writes at the page's beginning; at most 4096 bytes.
        fn write(&self, bytes: &[u8]) {
            let length = bytes.len().min(4096);
            // SAFETY: the mapping is 4096 bytes long and writable, `bytes` lies elsewhere, and no guest runs yet.
            unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.cast::<u8>(), length) };
        }
    }

    impl Drop for Page {
        fn drop(&mut self) {
            // SAFETY: the mapping is ours, of this size, and nothing refers to it any more.
            let _ = unsafe { munmap(self.address, 4096) };
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn an_emulated_kvm_is_told_from_a_real_one() {
            if !std::path::Path::new("/dev/kvm").exists() {
                println!("skipped: no /dev/kvm here");
                return;
            }
            let real = crate::kvm::probe().is_ok();
            assert_eq!(probe().is_ok(), real, "{:?}", probe());
        }
    }
}
