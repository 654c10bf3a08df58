//! A small interpreter of classic BPF, and three things said with it: each instruction is the one meant, each call of the table is notified or
//! not, and the program agrees with a predicate in plain Rust.

use nitroxide_abi::ioctl;
use proptest::prelude::*;

use super::*;

/// `struct seccomp_data`.
#[derive(Clone, Copy, Debug)]
struct Call {
    number: i64,
    architecture: u32,
    arguments: [u64; 6],
}

impl Call {
    fn bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[0..4].copy_from_slice(&u32::try_from(self.number).unwrap().to_le_bytes());
        bytes[4..8].copy_from_slice(&self.architecture.to_le_bytes());
        bytes[8..16].copy_from_slice(&0x1234_5678_9ABC_u64.to_le_bytes());
        for (index, argument) in self.arguments.iter().enumerate() {
            bytes[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
        }
        bytes
    }
}

/// Runs a program as the kernel would, refusing what its checker refuses (kernel/seccomp.c, seccomp_check_filter()).
fn interpret(program: &[Instruction], call: &Call) -> u32 {
    let data = call.bytes();
    let mut accumulator = 0_u32;
    let mut at = 0;
    loop {
        let instruction = program.get(at).expect("it does not run over its end");
        at += 1;
        match instruction.code {
            0x20 => {
                let offset = usize::try_from(instruction.number).unwrap();
                assert!(offset % 4 == 0 && offset < 64, "loads are whole words of the data");
                accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x54 => accumulator &= instruction.number,
            0x15 => at += usize::from(if accumulator == instruction.number { instruction.when_true } else { instruction.when_false }),
            0x06 => return instruction.number,
            other => panic!("instruction {other:#x}"),
        }
    }
}

const ALL: &[Part] = &[Part::Commands, Part::Paths, Part::HugePages, Part::Sockets];

fn whole() -> Vec<Instruction> {
    program(&rules(ALL))
}

#[test]
fn instructions_of_a_rule_are_the_ones_of_the_kernels_headers() {
    const RULE: Rule = Rule { call: 9, any: &[low(3, 0x40000, 0x40000), When::NonNull { argument: 1 }] };
    let is = |instruction: &Instruction| {
        let number = i64::from(instruction.number);
        (instruction.code, instruction.when_true, instruction.when_false, number)
    };
    assert_eq!(
        program(&[RULE]).iter().map(is).collect::<Vec<_>>(),
        [
            (0x20, 0, 0, 4),           // A = architecture
            (0x15, 1, 0, 0xC000_003E), // ours: go on
            (0x06, 0, 0, 0x7FFF_0000), // else allow
            (0x20, 0, 0, 0),           // A = number of the call
            (0x15, 0, 10, 9),          // not 9: over the body
            (0x20, 0, 0, 40),          // A = low half of argument 3
            (0x54, 0, 0, 0x40000),     // A &= mask
            (0x15, 0, 1, 0x40000),     // equal: notify
            (0x06, 0, 0, 0x7FC0_0000),
            (0x20, 0, 0, 24), // A = low half of argument 1
            (0x15, 0, 2, 0),  // not zero: notify
            (0x20, 0, 0, 28), // A = high half
            (0x15, 1, 0, 0),  // zero, too: over the notification
            (0x06, 0, 0, 0x7FC0_0000),
            (0x06, 0, 0, 0x7FFF_0000),
            (0x06, 0, 0, 0x7FFF_0000),
        ]
    );
}

#[test]
fn low_looks_at_the_masked_low_half_alone() {
    const RULE: Rule = Rule { call: 5, any: &[low(2, 0xF0, 0x20)] };
    let program = program(&[RULE]);
    for (argument, answer) in
        [(0x20, NOTIFY), (0x2F, NOTIFY), (0xFFFF_FFFF_FFFF_FF2F, NOTIFY), (0x30, ALLOW), (0, ALLOW), (0x20_0000_0000, ALLOW)]
    {
        let call = Call { number: 5, architecture: ARCHITECTURE, arguments: [0x20, 0x20, argument, 0x20, 0x20, 0x20] };
        assert_eq!(interpret(&program, &call), answer, "{argument:#x}");
    }
}

#[test]
fn non_null_looks_at_both_halves() {
    let program = program(&[Rule { call: 5, any: &[When::NonNull { argument: 5 }] }]);
    for (argument, answer) in [(0, ALLOW), (1, NOTIFY), (1 << 32, NOTIFY), (u64::MAX, NOTIFY)] {
        let call = Call { number: 5, architecture: ARCHITECTURE, arguments: [7, 7, 7, 7, 7, argument] };
        assert_eq!(interpret(&program, &call), answer, "{argument:#x}");
    }
}

#[test]
fn any_of_several_conditions_is_enough_and_rules_do_not_touch_each_other() {
    const RULES: [Rule; 3] = [
        Rule { call: 1, any: &[low(0, 0xFF, 1), low(1, 0xFF, 2)] },
        Rule { call: 2, any: &[When::Always] },
        Rule { call: 3, any: &[low(0, u32::MAX, 9)] },
    ];
    let program = program(&RULES);
    let ask = |number, first, second| {
        interpret(&program, &Call { number, architecture: ARCHITECTURE, arguments: [first, second, 0, 0, 0, 0] }) == NOTIFY
    };
    assert!(ask(1, 1, 0) && ask(1, 0, 2) && ask(1, 1, 2) && !ask(1, 0, 0) && !ask(1, 2, 1));
    assert!(ask(2, 0, 0) && ask(3, 9, 0) && !ask(3, 1, 2) && !ask(4, 9, 2));
}

#[test]
fn every_call_of_the_table_is_notified_or_left_alone() {
    const HUGETLB: u64 = 0x40000;
    let table: &[(i64, [u64; 6], bool)] = &[
        (libc::SYS_ioctl, [3, ioctl::CREATE_VM.into(), 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, ioctl::ADD_VCPU.into(), 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, ioctl::GET_IMAGE_LOAD_INFO.into(), 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, ioctl::SET_USER_MEMORY_REGION.into(), 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, ioctl::START_ENCLAVE.into(), 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, 0xAE20, 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, 0xAE3F, 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, 0xFFFF_FFFF_0000_AE20, 0, 0, 0, 0], true),
        // KVM_GET_API_VERSION, KVM_RUN, KVM_SET_USER_MEMORY_REGION; TCGETS; FIONBIO
        (libc::SYS_ioctl, [3, 0xAE00, 0, 0, 0, 0], false),
        (libc::SYS_ioctl, [3, 0xAE80, 0, 0, 0, 0], false),
        (libc::SYS_ioctl, [3, 0x4020_AE46, 0, 0, 0, 0], false),
        (libc::SYS_ioctl, [3, 0x5401, 0, 0, 0, 0], false),
        (libc::SYS_ioctl, [3, 0x5421, 0, 0, 0, 0], false),
        // IOCTL_VM_SOCKETS_GET_LOCAL_CID and its neighbour
        (libc::SYS_ioctl, [3, 0x7B9, 0, 0, 0, 0], true),
        (libc::SYS_ioctl, [3, 0x7BA, 0, 0, 0, 0], false),
        (libc::SYS_socket, [40, 1, 0, 0, 0, 0], true),
        (libc::SYS_socket, [40 | 1 << 32, 1, 0, 0, 0, 0], true),
        (libc::SYS_socket, [2, 1, 0, 0, 0, 0], false),
        (libc::SYS_socketpair, [40, 1, 0, 4, 0, 0], false),
        (libc::SYS_bind, [3, 1, 16, 0, 0, 0], true),
        (libc::SYS_connect, [3, 1, 16, 0, 0, 0], true),
        (libc::SYS_listen, [3, 128, 0, 0, 0, 0], false),
        (libc::SYS_getsockname, [3, 1, 2, 0, 0, 0], true),
        (libc::SYS_getpeername, [3, 1, 2, 0, 0, 0], true),
        (libc::SYS_accept, [3, 1, 2, 0, 0, 0], true),
        (libc::SYS_accept, [3, 0, 0, 0, 0, 0], false),
        (libc::SYS_accept4, [3, 1, 2, 0x80000, 0, 0], true),
        (libc::SYS_accept4, [3, 0, 0, 0x80000, 0, 0], false),
        (libc::SYS_setsockopt, [3, 40, 6, 1, 16, 0], true),
        (libc::SYS_setsockopt, [3, 1, 40, 1, 16, 0], false),
        (libc::SYS_getsockopt, [3, 40, 0, 1, 2, 0], true),
        (libc::SYS_getsockopt, [3, 1, 39, 1, 2, 0], true),
        (libc::SYS_getsockopt, [3, 1, 4, 1, 2, 0], false),
        (libc::SYS_sendto, [3, 1, 4, 0, 1, 16], false),
        (libc::SYS_recvfrom, [3, 1, 4, 0, 1, 2], false),
        (libc::SYS_shutdown, [3, 1, 0, 0, 0, 0], true),
        (libc::SYS_mmap, [0, 0x20_0000, 3, 0x22 | HUGETLB, u64::MAX, 0], true),
        (libc::SYS_mmap, [0, 0x20_0000, 3, 0x22 | HUGETLB | 21 << 26, u64::MAX, 0], true),
        (libc::SYS_mmap, [0, 4096, 3, 0x22, u64::MAX, 0], false),
        (libc::SYS_mmap, [0, 4096, 3, HUGETLB << 32 | 0x22, u64::MAX, 0], false),
        // A file, shared; the same with MAP_SHARED_VALIDATE; private; shared and anonymous
        (libc::SYS_mmap, [0, 4096, 3, 1, 5, 0], true),
        (libc::SYS_mmap, [0, 4096, 3, 3, 5, 0], false),
        (libc::SYS_mmap, [0, 4096, 3, 2, 5, 0], false),
        (libc::SYS_mmap, [0, 4096, 3, 0x21, u64::MAX, 0], false),
        (libc::SYS_fstatfs, [5, 1, 0, 0, 0, 0], true),
        (libc::SYS_memfd_create, [1, 4, 0, 0, 0, 0], true),
        (libc::SYS_memfd_create, [1, 3, 0, 0, 0, 0], false),
        (libc::SYS_open, [1, 2, 0, 0, 0, 0], true),
        (libc::SYS_creat, [1, 0, 0, 0, 0, 0], true),
        (libc::SYS_openat, [5, 1, 0, 0, 0, 0], true),
        (libc::SYS_openat2, [5, 1, 2, 24, 0, 0], true),
        (libc::SYS_stat, [1, 2, 0, 0, 0, 0], true),
        (libc::SYS_lstat, [1, 2, 0, 0, 0, 0], true),
        (libc::SYS_access, [1, 4, 0, 0, 0, 0], true),
        (libc::SYS_faccessat, [5, 1, 4, 0, 0, 0], true),
        (libc::SYS_faccessat2, [5, 1, 4, 0x200, 0, 0], true),
        (libc::SYS_readlink, [1, 2, 3, 0, 0, 0], true),
        (libc::SYS_readlinkat, [5, 1, 2, 3, 0, 0], true),
        (libc::SYS_getxattr, [1, 2, 3, 4, 0, 0], true),
        (libc::SYS_lgetxattr, [1, 2, 3, 4, 0, 0], true),
        (libc::SYS_listxattr, [1, 2, 3, 0, 0, 0], true),
        (libc::SYS_llistxattr, [1, 2, 3, 0, 0, 0], true),
        (libc::SYS_fgetxattr, [5, 2, 3, 4, 0, 0], false),
        (libc::SYS_newfstatat, [5, 1, 2, 0, 0, 0], true),
        (libc::SYS_newfstatat, [5, 1, 2, 0x100, 0, 0], true),
        (libc::SYS_newfstatat, [5, 1, 2, 0x1000, 0, 0], false),
        (libc::SYS_statx, [5, 1, 0x100, 0x7FF, 2, 0], true),
        (libc::SYS_statx, [5, 1, 0x1000, 0x7FF, 2, 0], false),
        (libc::SYS_fstat, [5, 2, 0, 0, 0, 0], false),
        (libc::SYS_read, [5, 2, 3, 0, 0, 0], false),
        (libc::SYS_execve, [1, 2, 3, 0, 0, 0], false),
        (libc::SYS_clone3, [1, 88, 0, 0, 0, 0], false),
        (libc::SYS_close, [5, 0, 0, 0, 0, 0], false),
        (libc::SYS_poll, [5, 1, 0, 0, 0, 0], false),
    ];
    let program = whole();
    for (number, arguments, notified) in table {
        let call = Call { number: *number, architecture: ARCHITECTURE, arguments: *arguments };
        assert_eq!(interpret(&program, &call) == NOTIFY, *notified, "{call:x?}");
    }
}

#[test]
fn calls_of_another_architecture_and_of_x32_are_left_alone() {
    let program = whole();
    let open = Call { number: libc::SYS_openat, architecture: ARCHITECTURE, arguments: [0; 6] };
    assert_eq!(interpret(&program, &open), NOTIFY);
    assert_eq!(interpret(&program, &Call { architecture: 0x4000_0003, ..open }), ALLOW); // i386
    assert_eq!(interpret(&program, &Call { number: open.number | 0x4000_0000, ..open }), ALLOW); // x32
}

#[test]
fn no_two_rules_are_for_one_call_and_the_program_is_one_the_kernel_takes() {
    let rules = rules(ALL);
    for (index, rule) in rules.iter().enumerate() {
        assert!(rules[..index].iter().all(|other| other.call != rule.call), "{rule:?} stands twice");
    }
    let program = whole();
    assert!(program.len() < 4096);
    for (index, instruction) in program.iter().enumerate().filter(|(_, instruction)| instruction.code == JUMP_EQUAL) {
        let furthest = index + 1 + usize::from(instruction.when_true.max(instruction.when_false));
        assert!(furthest < program.len(), "{instruction:?} jumps out");
    }
}

/// The same said in plain Rust, from docs/user-home.md.
fn wanted(call: &Call) -> bool {
    let low = |index: usize| u32::try_from(call.arguments[index] & 0xFFFF_FFFF).unwrap();
    call.architecture == ARCHITECTURE
        && match call.number {
            libc::SYS_ioctl => ((low(1) >> 8) & 0xFF == 0xAE && (0x20..0x40).contains(&(low(1) & 0xFF))) || low(1) == 0x7B9,
            libc::SYS_socket => low(0) == 40,
            libc::SYS_accept | libc::SYS_accept4 => call.arguments[1] != 0,
            libc::SYS_setsockopt => low(1) == 40,
            libc::SYS_getsockopt => low(1) == 40 || low(2) == 39,
            libc::SYS_mmap => low(3) & 0x40000 != 0 || low(3) & 0x2F == 1,
            libc::SYS_memfd_create => low(1) & 4 != 0,
            libc::SYS_newfstatat => low(3) & 0x1000 == 0,
            libc::SYS_statx => low(2) & 0x1000 == 0,
            number => [
                libc::SYS_open,
                libc::SYS_creat,
                libc::SYS_openat,
                libc::SYS_openat2,
                libc::SYS_stat,
                libc::SYS_lstat,
                libc::SYS_access,
                libc::SYS_faccessat,
                libc::SYS_faccessat2,
                libc::SYS_readlink,
                libc::SYS_readlinkat,
                libc::SYS_getxattr,
                libc::SYS_lgetxattr,
                libc::SYS_listxattr,
                libc::SYS_llistxattr,
                libc::SYS_bind,
                libc::SYS_connect,
                libc::SYS_shutdown,
                libc::SYS_fstatfs,
                libc::SYS_getsockname,
                libc::SYS_getpeername,
            ]
            .contains(&number),
        }
}

/// Arguments in which the bits that matter come up often.
fn argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0xAE00_u64..0xAF00).prop_flat_map(|word| any::<u64>().prop_map(move |high| (high & !0xFFFF) | word)),
        prop::sample::select(vec![0, 1, 3, 4, 0x21, 39, 40, 0x7B9, 0x28_0000_0000, 0x1000, 0x40000, 0x1000_0000_0000, 0x4_0000_0000_0000]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn program_agrees_with_the_predicate(
        number in prop_oneof![0_i64..480, prop::sample::select(rules(ALL)).prop_map(|rule| rule.call)],
        architecture in prop_oneof![9 => Just(ARCHITECTURE), 1 => any::<u32>()],
        arguments in prop::array::uniform6(argument()),
    ) {
        let call = Call { number, architecture, arguments };
        prop_assert_eq!(interpret(&whole(), &call) == NOTIFY, wanted(&call), "{:x?}", call);
    }
}
