//! The measured answers of the C driver (Linux 7.3.4), as far as the core gives them: docs/driver.md, "The oracle".
//!
//! Each test makes the calls of one run of the C driver and compares the lines. Lines that differ on purpose are in
//! `DIFFERENCES`, each with the weakness that it mends.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

mod support;

use std::fmt::Write as _;

use nitroxide_abi::pci::Command;
use nitroxide_abi::Code;
use nitroxide_driver::Machine;
use support::client::Mapped;
use support::device::Fault;
use support::machine::TestMachine;
use support::{Fixture, ARGUMENT, GIB, MIB};

/// The lines of one run.
#[derive(Default)]
struct Transcript(String);

impl Transcript {
    /// "label -> 0", "label -> 4" or "label -> NE_ERR_...".
    fn line<T: ToString>(&mut self, label: &str, result: Result<T, Code>) {
        let value = match result {
            Ok(value) => value.to_string(),
            Err(code) => code.name().to_owned(),
        };
        writeln!(self.0, "{label} -> {value}").unwrap();
    }

    fn unit(&mut self, label: &str, result: Result<(), Code>) {
        self.line(label, result.map(|()| 0));
    }

    fn is(&self, expected: &str) {
        let expected: String = expected.trim().lines().map(|line| format!("{}\n", line.trim())).collect();
        assert_eq!(self.0, expected);
    }
}

/// What our core answers where the C driver answers otherwise, and why. The tests below contain our lines.
const DIFFERENCES: &[(&str, &str, &str, &str)] = &[
    // line, C driver, ours, reason
    ("other enclave ADD 2 after failed add", "NE_ERR_VCPU_NOT_IN_CPU_POOL", "2", "W11: a refused CPU's core goes back to the pool"),
    ("retry same 2M", "NE_ERR_MEM_REGION_ALREADY_USED", "0", "W12: nothing was accepted, so nothing stays"),
    ("memfd hugetlb alias B (same phys)", "0", "NE_ERR_MEM_REGION_ALREADY_USED", "W13: a page belongs to one enclave, once"),
    ("second enclave, same phys", "0", "NE_ERR_MEM_REGION_ALREADY_USED", "W13: a page belongs to one enclave, once"),
    ("START device -5000", "-5000 as a return value", "EIO", "W5: only errnos reach user space"),
    ("START device -512", "errno 512", "EIO", "W5: only errnos reach user space"),
    ("START second cid 77", "77", "EADDRINUSE", "W15: the device refuses a CID that is in use"),
    ("hung up after event with SLOT_INFO error", "true", "false", "W2: a failed SLOT_INFO says nothing"),
    ("ADD_VCPU after failed SLOT_INFO", "0", "NE_ERR_NOT_IN_INIT_STATE", "W2: a failed SLOT_INFO says nothing"),
    ("1G page, size 2M", "0", "NE_ERR_INVALID_PAGE_SIZE", "W14: a page is given whole or not at all"),
    ("ADD auto after cpu2 re-onlined", "2", "4", "W18: the parent runs on it, so it is not given away"),
];

#[test]
fn every_difference_has_a_reason_and_is_measured_here() {
    for (line, theirs, ours, reason) in DIFFERENCES {
        assert!(theirs != ours && reason.starts_with('W'), "{line}");
        let measured = include_str!("oracle.rs").lines().any(|text| text.trim() == format!("{line} -> {ours}"));
        assert!(measured, "no transcript has: {line} -> {ours}");
    }
}

#[test]
fn create_without_pool_and_with_bad_pointer() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(4);
    f.machine = TestMachine::with_threads(6, 2);
    t.line("write ne_cpus \"\\n\"", f.machine.write_pool("\n").map(|()| 0).map_err(Code::from));
    t.line("read", Ok(format!("{:?}", f.machine.read_pool())));
    t.line("CREATE_VM no pool", f.create(ARGUMENT).map(|_| 0));
    t.line("write ne_cpus \"2-5\\n\"", f.machine.write_pool("2-5\n").map(|()| 0).map_err(Code::from));
    t.line("read", Ok(format!("{:?}", f.machine.read_pool())));
    t.line("online", Ok(format!("{:?}", f.machine.online())));
    t.line("CREATE_VM NULL", f.create(0).map(|_| 0));
    t.line("sent", Ok(format!("{:?}", f.device.sent())));
    let enclave = f.create(ARGUMENT).unwrap();
    t.line("uid", Ok(enclave.slot_uid()));
    t.line("pool write while enclave exists", f.machine.write_pool("2-3").map(|()| 0).map_err(Code::from));
    t.line("read", Ok(format!("{:?}", f.machine.read_pool())));
    t.is(r#"
        write ne_cpus "\n" -> EINVAL
        read -> "\n"
        CREATE_VM no pool -> NE_ERR_NO_CPUS_AVAIL_IN_POOL
        write ne_cpus "2-5\n" -> 0
        read -> "2-5\n\n"
        online -> [0, 1]
        CREATE_VM NULL -> EFAULT
        sent -> [SlotAlloc, SlotFree]
        uid -> 0x1122334400000002
        pool write while enclave exists -> EPERM
        read -> "2-5\n\n"
    "#);
    assert_eq!(support::written_uid(&f.memory), enclave.slot_uid());
    f.close(enclave).unwrap();
    f.assert_nothing_held();
}

#[test]
fn image_load_info() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(4);
    let mut enclave = f.create(ARGUMENT).unwrap();
    t.line("flags=0", f.load_info(&mut enclave, 0));
    t.line("flags=2", f.load_info(&mut enclave, 2));
    t.line("flags=1", f.load_info(&mut enclave, 1));
    let mut client = f.memory.owner();
    t.line("NULL", f.call(&mut enclave, &mut client, nitroxide_abi::ioctl::GET_IMAGE_LOAD_INFO, 0));
    t.line("unknown 0xAE25", f.call(&mut enclave, &mut client, 0xAE25, 0));
    t.line("CREATE_VM on enclave fd", f.call(&mut enclave, &mut client, nitroxide_abi::ioctl::CREATE_VM, ARGUMENT));
    t.is("
        flags=0 -> NE_ERR_INVALID_FLAG_VALUE
        flags=2 -> NE_ERR_INVALID_FLAG_VALUE
        flags=1 -> 8388608
        NULL -> EFAULT
        unknown 0xAE25 -> ENOTTY
        CREATE_VM on enclave fd -> ENOTTY
    ");
}

#[test]
fn vcpu() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(4);
    let mut first = f.create(ARGUMENT).unwrap();
    let mut owner = f.memory.owner();
    t.line("ADD NULL", f.call(&mut first, &mut owner, nitroxide_abi::ioctl::ADD_VCPU, 0));
    t.line("ADD 1 (not in pool)", f.add_vcpu(&mut first, 1));
    t.line("ADD 6 (==nr)", f.add_vcpu(&mut first, 6));
    t.line("ADD ~0", f.add_vcpu(&mut first, u32::MAX));
    t.line("ADD auto", f.add_vcpu(&mut first, 0));
    t.line("ADD same", f.add_vcpu(&mut first, 2));
    t.line("ADD auto", f.add_vcpu(&mut first, 0));
    t.line("ADD 5", f.add_vcpu(&mut first, 5));
    t.line("ADD 5 again", f.add_vcpu(&mut first, 5));
    t.line("ADD auto -> sibling", f.add_vcpu(&mut first, 0));
    t.line("ADD auto, none left", f.add_vcpu(&mut first, 0));
    t.line("CREATE_VM when all cpus taken", f.create(ARGUMENT).map(|_| 0));
    f.close(first).unwrap();
    let mut second = f.create(ARGUMENT).unwrap();
    t.line("after close auto", f.add_vcpu(&mut second, 0));
    let mut child = f.memory.stranger();
    t.line("child ADD 4 (other mm)", f.add_vcpu_as(&mut second, &mut child, 4));
    t.line("child ADD auto (other mm)", f.add_vcpu_as(&mut second, &mut child, 0));
    t.line("child GET_IMAGE_LOAD_INFO", f.load_info(&mut second, 1));
    t.line("child START", f.start(&mut second, 0, 0));
    t.line("parent ADD auto", f.add_vcpu(&mut second, 0));
    t.line("parent ADD auto", f.add_vcpu(&mut second, 0));
    t.line("parent ADD auto", f.add_vcpu(&mut second, 0));
    t.is("
        ADD NULL -> EFAULT
        ADD 1 (not in pool) -> NE_ERR_VCPU_NOT_IN_CPU_POOL
        ADD 6 (==nr) -> NE_ERR_INVALID_VCPU
        ADD ~0 -> NE_ERR_INVALID_VCPU
        ADD auto -> 2
        ADD same -> NE_ERR_VCPU_ALREADY_USED
        ADD auto -> 3
        ADD 5 -> 5
        ADD 5 again -> NE_ERR_VCPU_ALREADY_USED
        ADD auto -> sibling -> 4
        ADD auto, none left -> NE_ERR_NO_CPUS_AVAIL_IN_POOL
        CREATE_VM when all cpus taken -> NE_ERR_NO_CPUS_AVAIL_IN_POOL
        after close auto -> 2
        child ADD 4 (other mm) -> EIO
        child ADD auto (other mm) -> EIO
        child GET_IMAGE_LOAD_INFO -> 8388608
        child START -> NE_ERR_NO_MEM_REGIONS_ADDED
        parent ADD auto -> 3
        parent ADD auto -> 4
        parent ADD auto -> 5
    ");
}

#[test]
fn cpu_that_was_brought_online_by_hand() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(4);
    let mut e = f.create(ARGUMENT).unwrap();
    f.machine.with_pool(|_, cpus| cpus.online[2] = true);
    t.line("ADD auto after cpu2 re-onlined", f.add_vcpu(&mut e, 0));
    t.line("ADD 2 after cpu2 re-onlined", f.add_vcpu(&mut e, 2));
    f.close(e).unwrap();
    t.line("write ne_cpus \"4-5\\n\"", f.machine.write_pool("4-5\n").map(|()| 0).map_err(Code::from));
    t.line("online", Ok(format!("{:?}", f.machine.online())));
    f.machine.with_pool(|_, cpus| cpus.online[2] = false);
    t.line("write ne_cpus \"2-3\\n\"", f.machine.write_pool("2-3\n").map(|()| 0).map_err(Code::from));
    t.line("read", Ok(format!("{:?}", f.machine.read_pool())));
    t.line("online", Ok(format!("{:?}", f.machine.online())));
    t.is(r#"
        ADD auto after cpu2 re-onlined -> 4
        ADD 2 after cpu2 re-onlined -> NE_ERR_VCPU_NOT_IN_CPU_POOL
        write ne_cpus "4-5\n" -> 0
        online -> [0, 1, 2, 3]
        write ne_cpus "2-3\n" -> EINVAL
        read -> "\n"
        online -> [0, 1, 3, 4, 5]
    "#);
}

#[test]
fn vcpu_refused_by_the_device_or_not_copied_out() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(4);
    let mut first = f.create(ARGUMENT).unwrap();
    f.device.fail_next(Command::SlotAddVcpu, Fault::Refuse(-22));
    t.line("ADD auto, device -22", f.add_vcpu(&mut first, 0));
    let mut second = f.create(ARGUMENT).unwrap();
    t.line("other enclave ADD 2 after failed add", f.add_vcpu(&mut second, 2));
    f.close(second).unwrap();
    t.line("first: retry auto", f.add_vcpu(&mut first, 0));
    f.memory.set_read_only(true);
    t.line("ADD auto with read-only arg", f.add_vcpu(&mut first, 0));
    f.memory.set_read_only(false);
    t.line("ADD auto", f.add_vcpu(&mut first, 0));
    t.is("
        ADD auto, device -22 -> EINVAL
        other enclave ADD 2 after failed add -> 2
        first: retry auto -> 2
        ADD auto with read-only arg -> EFAULT
        ADD auto -> 4
    ");
}

#[test]
fn memory_arguments() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(4);
    let mut e = f.create(ARGUMENT).unwrap();
    let m = f.memory.map_huge(16 * MIB);
    let small = f.memory.map(vec![Mapped { gpa: 0x1000, size: 4096, huge: false, node: 0, readable: true }]);
    t.unit("size 1M", f.set_memory(&mut e, m, MIB));
    t.unit("addr+4096", f.set_memory(&mut e, m + 4096, 2 * MIB));
    t.unit("size bad and addr bad", f.set_memory(&mut e, m + 4096, MIB));
    t.unit("size 0", f.set_memory(&mut e, m, 0));
    t.unit("flags 1", f.set_memory_flags(&mut e, m, 2 * MIB, 1));
    t.unit("flags 1 + bad size", f.set_memory_flags(&mut e, m, MIB, 1));
    t.unit("addr 0 size 2M", f.set_memory(&mut e, 0, 2 * MIB));
    t.unit("kernel addr", f.set_memory(&mut e, 0xffff_8000_0000_0000, 2 * MIB));
    t.unit("size ~2M mask", f.set_memory(&mut e, m, u64::MAX - (2 * MIB - 1)));
    t.unit("unmapped", f.set_memory(&mut e, 0x1000_0000_0000, 2 * MIB));
    let mut owner = f.memory.owner();
    t.line("NULL arg", f.call(&mut e, &mut owner, nitroxide_abi::ioctl::SET_USER_MEMORY_REGION, 0));
    t.unit("normal page", f.set_memory(&mut e, small, 2 * MIB));
    t.unit("8 MiB (contig merge)", f.set_memory(&mut e, m, 8 * MIB));
    t.unit("same again", f.set_memory(&mut e, m, 8 * MIB));
    t.unit("inside", f.set_memory(&mut e, m + 2 * MIB, 2 * MIB));
    t.unit("overlap tail+new", f.set_memory(&mut e, m + 6 * MIB, 4 * MIB));
    t.unit("size 0 inside existing", f.set_memory(&mut e, m + 2 * MIB, 0));
    t.unit("size 0 at new", f.set_memory(&mut e, m + 8 * MIB, 0));
    t.unit("next 2M", f.set_memory(&mut e, m + 8 * MIB, 2 * MIB));
    // The C driver's run had pages that did not merge, so that its fourth region was the last; ours are apart on purpose.
    for index in 0..3 {
        let separate = f.memory.map_huge(2 * MIB);
        t.unit(&format!("separate 2M #{index}"), f.set_memory(&mut e, separate, 2 * MIB));
    }
    t.line("4M where 2nd half unmapped", f.set_memory(&mut e, m + 14 * MIB, 4 * MIB).map(|()| 0));
    f.memory.set_largest_bookkeeping(GIB);
    t.unit("region 900 GiB", f.set_memory(&mut e, 0x2000_0000_0000, 900 * GIB));
    t.line("runs", Ok(format!("{:?}", f.device.donated.iter().map(|(_, size)| size / MIB).collect::<Vec<_>>())));
    t.is("
        size 1M -> NE_ERR_INVALID_MEM_REGION_SIZE
        addr+4096 -> NE_ERR_UNALIGNED_MEM_REGION_ADDR
        size bad and addr bad -> NE_ERR_INVALID_MEM_REGION_SIZE
        size 0 -> ENOMEM
        flags 1 -> NE_ERR_INVALID_FLAG_VALUE
        flags 1 + bad size -> NE_ERR_INVALID_FLAG_VALUE
        addr 0 size 2M -> EFAULT
        kernel addr -> NE_ERR_INVALID_MEM_REGION_ADDR
        size ~2M mask -> NE_ERR_INVALID_MEM_REGION_ADDR
        unmapped -> EFAULT
        NULL arg -> EFAULT
        normal page -> NE_ERR_MEM_NOT_HUGE_PAGE
        8 MiB (contig merge) -> 0
        same again -> NE_ERR_MEM_REGION_ALREADY_USED
        inside -> NE_ERR_MEM_REGION_ALREADY_USED
        overlap tail+new -> NE_ERR_MEM_REGION_ALREADY_USED
        size 0 inside existing -> NE_ERR_MEM_REGION_ALREADY_USED
        size 0 at new -> ENOMEM
        next 2M -> 0
        separate 2M #0 -> 0
        separate 2M #1 -> 0
        separate 2M #2 -> NE_ERR_MEM_MAX_REGIONS
        4M where 2nd half unmapped -> EFAULT
        region 900 GiB -> ENOMEM
        runs -> [8, 2, 2, 2]
    ");
    let mut child = f.memory.stranger();
    let region = nitroxide_abi::ioctl::UserMemoryRegion { flags: 0, memory_size: MIB, userspace_addr: 1 };
    assert_eq!(f.set_memory_as(&mut e, &mut child, region), Err(Code::EIO));
    f.close(e).unwrap();
    f.assert_nothing_held();
}

#[test]
fn memory_refused_by_the_device_and_shared() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    let m = f.memory.map_huge(4 * MIB);
    f.device.fail_next(Command::SlotAddMem, Fault::Refuse(-12));
    t.unit("SET 2M, device -12", f.set_memory(&mut e, m, 2 * MIB));
    t.unit("retry same 2M", f.set_memory(&mut e, m, 2 * MIB));
    t.unit("other 2M", f.set_memory(&mut e, m + 2 * MIB, 2 * MIB));
    t.line("START (below 64M)", f.start(&mut e, 0, 0));
    let gpa = f.memory.fresh_gpa(4 * MIB);
    let (a, b) = (f.memory.map_pages([gpa]), f.memory.map_pages([gpa]));
    t.unit("memfd hugetlb alias A", f.set_memory(&mut e, a, 2 * MIB));
    t.unit("memfd hugetlb alias B (same phys)", f.set_memory(&mut e, b, 2 * MIB));
    let mut second = f.create(ARGUMENT).unwrap();
    t.unit("second enclave, same phys", f.set_memory(&mut second, b, 2 * MIB));
    t.is("
        SET 2M, device -12 -> ENOMEM
        retry same 2M -> 0
        other 2M -> 0
        START (below 64M) -> NE_ERR_ENCLAVE_MEM_MIN_SIZE
        memfd hugetlb alias A -> 0
        memfd hugetlb alias B (same phys) -> NE_ERR_MEM_REGION_ALREADY_USED
        second enclave, same phys -> NE_ERR_MEM_REGION_ALREADY_USED
    ");
}

#[test]
fn gigantic_pages_and_other_nodes() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    let huge = |gpa, size, node| Mapped { gpa, size, huge: true, node, readable: true };
    let giant = f.memory.map(vec![huge(f.memory.fresh_gpa(GIB), GIB, 0)]);
    t.unit("1G page, size 2M", f.set_memory(&mut e, giant, 2 * MIB));
    t.unit("1G page, +2M size 2M (tail)", f.set_memory(&mut e, giant + 2 * MIB, 2 * MIB));
    t.unit("1G page size 1G at +512M", f.set_memory(&mut e, giant + 512 * MIB, GIB));
    t.unit("1G page size 1G", f.set_memory(&mut e, giant, GIB));
    let far = f.memory.map(vec![huge(f.memory.fresh_gpa(2 * MIB), 2 * MIB, 1)]);
    t.unit("page of node 1, pool of node 0", f.set_memory(&mut e, far, 2 * MIB));
    let odd = f.memory.map(vec![huge(f.memory.fresh_gpa(2 * MIB), 64 << 10, 0)]);
    t.unit("64 KiB huge page", f.set_memory(&mut e, odd, 2 * MIB));
    let askew = f.memory.map(vec![huge(f.memory.fresh_gpa(4 * MIB) + MIB, 2 * MIB, 0)]);
    t.unit("misaligned page", f.set_memory(&mut e, askew, 2 * MIB));
    let none = f.memory.map(vec![Mapped { readable: false, ..huge(f.memory.fresh_gpa(2 * MIB), 2 * MIB, 0) }]);
    t.unit("PROT_NONE hugetlb map", f.set_memory(&mut e, none, 2 * MIB));
    t.is("
        1G page, size 2M -> NE_ERR_INVALID_PAGE_SIZE
        1G page, +2M size 2M (tail) -> NE_ERR_INVALID_PAGE_SIZE
        1G page size 1G at +512M -> NE_ERR_INVALID_PAGE_SIZE
        1G page size 1G -> 0
        page of node 1, pool of node 0 -> NE_ERR_MEM_DIFFERENT_NUMA_NODE
        64 KiB huge page -> NE_ERR_INVALID_PAGE_SIZE
        misaligned page -> EINVAL
        PROT_NONE hugetlb map -> EFAULT
    ");
    assert_eq!(f.memory.pinned(), 1);
}

/// The seven steps of the C driver's own KUnit test, as regions of one call.
#[test]
fn runs_merge_only_ascending() {
    let page = |gpa, size| Mapped { gpa, size, huge: true, node: 0, readable: true };
    let pages = [page(2 * MIB, 2 * MIB), page(0, 2 * MIB), page(6 * MIB, 4 * MIB), page(10 * MIB, 4 * MIB)];
    for (count, runs) in [(1, &[(2, 2)][..]), (2, &[(2, 2), (0, 2)]), (3, &[(2, 2), (0, 2), (6, 4)]), (4, &[(2, 2), (0, 2), (6, 8)])] {
        let mut f = Fixture::new(3);
        let mut e = f.create(ARGUMENT).unwrap();
        let address = f.memory.map(pages[..count].to_vec());
        let size = pages[..count].iter().map(|page| page.size).sum();
        assert_eq!(f.set_memory(&mut e, address, size), Ok(()));
        let donated: Vec<_> = f.device.donated.iter().map(|(gpa, size)| (gpa / MIB, size / MIB)).collect();
        assert_eq!(donated, runs);
    }
    for bad in [page(0x1000, 2 * MIB), page(2 * MIB, 0x1000)] {
        let mut f = Fixture::new(3);
        let mut e = f.create(ARGUMENT).unwrap();
        let address = f.memory.map(vec![bad]);
        assert!(f.set_memory(&mut e, address, 2 * MIB).is_err());
        assert_eq!(f.device.donated, []);
    }
}

#[test]
fn start() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(200);
    let mut e = f.create(ARGUMENT).unwrap();
    t.line("START empty", f.start(&mut e, 0, 0));
    t.line("START flags 2", f.start(&mut e, 2, 0));
    t.line("START flags 2 + cid 1", f.start(&mut e, 2, 1));
    for cid in 1..=3 {
        t.line("START cid 1..3 empty enclave", f.start(&mut e, 0, cid));
    }
    t.line("START cid u32max", f.start(&mut e, 0, 0xffff_ffff));
    t.line("START cid > u32", f.start(&mut e, 0, 0x1_0000_0004));
    t.line("START cid u32max-1 (empty)", f.start(&mut e, 0, 0xffff_fffe));
    let mut owner = f.memory.owner();
    t.line("START NULL", f.call(&mut e, &mut owner, nitroxide_abi::ioctl::START_ENCLAVE, 0));
    let m = f.memory.map_huge(64 * MIB);
    t.unit("62M", f.set_memory(&mut e, m, 62 * MIB));
    t.line("START 62M no vcpu", f.start(&mut e, 0, 0));
    t.unit("+2M", f.set_memory(&mut e, m + 62 * MIB, 2 * MIB));
    t.line("START 64M no vcpu", f.start(&mut e, 0, 0));
    f.add_vcpu(&mut e, 0).unwrap();
    t.line("START 1 of 2 threads", f.start(&mut e, 0, 0));
    f.add_vcpu(&mut e, 0).unwrap();
    for rc in [-22, -5000, -512] {
        f.device.fail_next(Command::EnclaveStart, Fault::Refuse(rc));
        t.line(&format!("START device {rc}"), f.start(&mut e, 0, 0));
    }
    t.line("START debug", f.start(&mut e, 1, 0));
    t.line("START again", f.start(&mut e, 0, 0));
    t.line("ADD_VCPU running", f.add_vcpu(&mut e, 0));
    t.unit("SET_MEM running", f.set_memory(&mut e, m, 2 * MIB));
    t.unit("SET_MEM running bad flag", f.set_memory_flags(&mut e, m, 2 * MIB, 1));
    t.line("LOAD_INFO running", f.load_info(&mut e, 1));
    t.line("LOAD_INFO running flags 0", f.load_info(&mut e, 0));
    t.line("START running cid=2", f.start(&mut e, 0, 2));
    t.line("hung up", Ok(e.hung_up()));
    f.device.end(e.slot_uid(), 0xFFFF);
    e.device_event(&mut f.device);
    t.line("hung up after end", Ok(e.hung_up()));
    t.line("START stopped", f.start(&mut e, 0, 0));
    t.line("ADD_VCPU stopped", f.add_vcpu(&mut e, 0));
    t.is("
        START empty -> NE_ERR_NO_MEM_REGIONS_ADDED
        START flags 2 -> NE_ERR_INVALID_FLAG_VALUE
        START flags 2 + cid 1 -> NE_ERR_INVALID_FLAG_VALUE
        START cid 1..3 empty enclave -> NE_ERR_INVALID_ENCLAVE_CID
        START cid 1..3 empty enclave -> NE_ERR_INVALID_ENCLAVE_CID
        START cid 1..3 empty enclave -> NE_ERR_INVALID_ENCLAVE_CID
        START cid u32max -> NE_ERR_INVALID_ENCLAVE_CID
        START cid > u32 -> NE_ERR_INVALID_ENCLAVE_CID
        START cid u32max-1 (empty) -> NE_ERR_NO_MEM_REGIONS_ADDED
        START NULL -> EFAULT
        62M -> 0
        START 62M no vcpu -> NE_ERR_ENCLAVE_MEM_MIN_SIZE
        +2M -> 0
        START 64M no vcpu -> NE_ERR_NO_VCPUS_ADDED
        START 1 of 2 threads -> NE_ERR_FULL_CORES_NOT_USED
        START device -22 -> EINVAL
        START device -5000 -> EIO
        START device -512 -> EIO
        START debug -> 16
        START again -> NE_ERR_NOT_IN_INIT_STATE
        ADD_VCPU running -> NE_ERR_NOT_IN_INIT_STATE
        SET_MEM running -> NE_ERR_NOT_IN_INIT_STATE
        SET_MEM running bad flag -> NE_ERR_INVALID_FLAG_VALUE
        LOAD_INFO running -> NE_ERR_NOT_IN_INIT_STATE
        LOAD_INFO running flags 0 -> NE_ERR_NOT_IN_INIT_STATE
        START running cid=2 -> NE_ERR_INVALID_ENCLAVE_CID
        hung up -> false
        hung up after end -> true
        START stopped -> NE_ERR_NOT_IN_INIT_STATE
        ADD_VCPU stopped -> NE_ERR_NOT_IN_INIT_STATE
    ");
}

#[test]
fn given_cids_spurious_events_and_failures_of_slot_info() {
    let mut t = Transcript::default();
    let mut f = Fixture::new(200);
    let mut e = f.ready();
    t.line("START given cid 77", f.start(&mut e, 0, 77));
    let mut second = f.ready();
    t.line("START second cid 77", f.start(&mut second, 0, 77));
    f.device.events += 1;
    e.device_event(&mut f.device);
    t.line("hung up after spurious event", Ok(e.hung_up()));
    f.device.fail_next(Command::SlotInfo, Fault::Refuse(-5));
    e.device_event(&mut f.device);
    t.line("hung up after event with SLOT_INFO error", Ok(e.hung_up()));
    t.line("ADD_VCPU after failed SLOT_INFO", f.add_vcpu(&mut e, 0));
    f.memory.set_read_only(true);
    t.line("START ro arg", f.start(&mut second, 0, 0));
    f.memory.set_read_only(false);
    t.line("START again", f.start(&mut second, 0, 0));
    f.device.fail_next(Command::SlotAlloc, Fault::Refuse(-28));
    f.machine = TestMachine::with_threads(4, 2);
    f.machine.write_pool("2-3").unwrap();
    t.line("CREATE_VM device -28", f.create(ARGUMENT).map(|_| 0));
    t.is("
        START given cid 77 -> 77
        START second cid 77 -> EADDRINUSE
        hung up after spurious event -> false
        hung up after event with SLOT_INFO error -> false
        ADD_VCPU after failed SLOT_INFO -> NE_ERR_NOT_IN_INIT_STATE
        START ro arg -> EFAULT
        START again -> NE_ERR_NOT_IN_INIT_STATE
        CREATE_VM device -28 -> ENOSPC
    ");
}
