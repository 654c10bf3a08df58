//! Which system calls of a client are looked at: [`rules`], and the seccomp program that they become, [`program`].
//!
//! Pure: numbers in, instructions out. The program is classic BPF over `struct seccomp_data` (linux/seccomp.h): call number at byte 0,
//! architecture at byte 4, six arguments of 64 bits from byte 16. It never looks behind a pointer, so what it notifies about is a
//! superset of what matters; the supervisor lets the rest go on. Calls without a rule are allowed whatever their arguments are, and so
//! stay in the kernel's own table of calls for which no filter has to run.

use nitroxide_abi::ioctl::MAGIC;

use crate::vsock::{AF_VSOCK, GET_LOCAL_CID};

/// One instruction, laid out as `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How many instructions are skipped if the comparison holds.
    pub when_true: u8,
    /// How many if it does not.
    pub when_false: u8,
    /// Its number: an offset, a mask, a value.
    pub number: u32,
}

/// `SECCOMP_RET_ALLOW`: the call is made.
pub const ALLOW: u32 = 0x7FFF_0000;
/// `SECCOMP_RET_USER_NOTIF`: the supervisor decides.
pub const NOTIFY: u32 = 0x7FC0_0000;

/// `AUDIT_ARCH_*` of the calls that are looked at: this program's own. Those of another architecture, 32-bit ones among them, are never.
#[cfg(target_arch = "x86_64")]
pub const ARCHITECTURE: u32 = 0xC000_003E;
/// `AUDIT_ARCH_*` of the calls that are looked at: this program's own. Those of another architecture, 32-bit ones among them, are never.
#[cfg(target_arch = "aarch64")]
pub const ARCHITECTURE: u32 = 0xC000_00B7;

const OFFSET_CALL: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

/// `BPF_LD | BPF_W | BPF_ABS`
const LOAD: u16 = 0x20;
/// `BPF_JMP | BPF_JEQ | BPF_K`
const JUMP_EQUAL: u16 = 0x15;
/// `BPF_ALU | BPF_AND | BPF_K`
const AND: u16 = 0x54;
/// `BPF_RET | BPF_K`
const RETURN: u16 = 0x06;

/// When a call is notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// If the low half of this argument (0 to 5), masked, has this value. The kernel takes such arguments as 32-bit numbers.
    Low {
        /// Which argument.
        argument: u8,
        /// The bits that are looked at.
        mask: u32,
        /// What they must be.
        value: u32,
    },
    /// If this argument (0 to 5) is no null pointer.
    NonNull {
        /// Which argument.
        argument: u8,
    },
}

/// When one system call is notified: if any of the conditions holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The call's number (`SYS_*`).
    pub call: i64,
    /// The conditions, at most eight.
    pub any: &'static [When],
}

/// Parts of what a client can be shown; each has its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The commands of the driver.
    Commands,
    /// The files by which clients find it.
    Paths,
    /// Huge pages that need not be reserved.
    HugePages,
    /// AF_VSOCK.
    Sockets,
}

const fn low(argument: u8, mask: u32, value: u32) -> When {
    When::Low { argument, mask, value }
}

#[expect(clippy::cast_sign_loss, reason = "the flags are bits")]
const fn bits(flags: libc::c_int) -> u32 {
    flags as u32
}

/// Commands 0x20 to 0x3F of the driver's letter: the five old ones, ours, and those we do not have, which must be ENOTTY. KVM uses the same letter, but
/// none of these numbers.
const COMMANDS: &[Rule] = &[Rule {
    call: libc::SYS_ioctl,
    // The last is that of /dev/vsock.
    any: &[low(1, 0xFFE0, ((MAGIC as u32) << 8) | 0x20), low(1, u32::MAX, GET_LOCAL_CID)],
}];

/// Calls with an address in them, of all sockets: a filter does not know which one it is. None that moves data is among them.
const SOCKETS: &[Rule] = &[
    Rule { call: libc::SYS_socket, any: &[low(0, u32::MAX, AF_VSOCK)] },
    Rule { call: libc::SYS_bind, any: &[When::Always] },
    Rule { call: libc::SYS_connect, any: &[When::Always] },
    // On a UNIX socket it would do something to one that is not connected.
    Rule { call: libc::SYS_shutdown, any: &[When::Always] },
    Rule { call: libc::SYS_getsockname, any: &[When::Always] },
    Rule { call: libc::SYS_getpeername, any: &[When::Always] },
    Rule { call: libc::SYS_accept, any: &[When::NonNull { argument: 1 }] },
    Rule { call: libc::SYS_accept4, any: &[When::NonNull { argument: 1 }] },
    Rule { call: libc::SYS_setsockopt, any: &[low(1, u32::MAX, AF_VSOCK)] },
    // SO_DOMAIN tells the family; other levels have an option of that number, too.
    Rule { call: libc::SYS_getsockopt, any: &[low(1, u32::MAX, AF_VSOCK), low(2, u32::MAX, bits(libc::SO_DOMAIN))] },
];

const HUGE_PAGES: &[Rule] = &[
    Rule {
        call: libc::SYS_mmap,
        any: &[
            low(3, bits(libc::MAP_HUGETLB), bits(libc::MAP_HUGETLB)),
            // A file that is shared may be one of huge pages. MAP_SHARED_VALIDATE, which does the same, is let through: so is the call made again.
            low(3, bits(libc::MAP_TYPE | libc::MAP_ANONYMOUS), bits(libc::MAP_SHARED)),
        ],
    },
    Rule { call: libc::SYS_fstatfs, any: &[When::Always] },
    Rule { call: libc::SYS_memfd_create, any: &[low(1, libc::MFD_HUGETLB, libc::MFD_HUGETLB)] },
];

const PATHS: &[Rule] = &[
    Rule { call: libc::SYS_openat, any: &[When::Always] },
    Rule { call: libc::SYS_openat2, any: &[When::Always] },
    Rule { call: libc::SYS_faccessat, any: &[When::Always] },
    Rule { call: libc::SYS_faccessat2, any: &[When::Always] },
    Rule { call: libc::SYS_readlinkat, any: &[When::Always] },
    // `ls -l` asks for them.
    Rule { call: libc::SYS_getxattr, any: &[When::Always] },
    Rule { call: libc::SYS_lgetxattr, any: &[When::Always] },
    Rule { call: libc::SYS_listxattr, any: &[When::Always] },
    Rule { call: libc::SYS_llistxattr, any: &[When::Always] },
    // With AT_EMPTY_PATH it is nearly always fstat(), on a descriptor.
    Rule { call: libc::SYS_newfstatat, any: &[low(3, bits(libc::AT_EMPTY_PATH), 0)] },
    Rule { call: libc::SYS_statx, any: &[low(2, bits(libc::AT_EMPTY_PATH), 0)] },
];

/// The calls that newer architectures do without.
#[cfg(target_arch = "x86_64")]
const OLD_PATHS: &[Rule] = &[
    Rule { call: libc::SYS_open, any: &[When::Always] },
    Rule { call: libc::SYS_creat, any: &[When::Always] },
    Rule { call: libc::SYS_stat, any: &[When::Always] },
    Rule { call: libc::SYS_lstat, any: &[When::Always] },
    Rule { call: libc::SYS_access, any: &[When::Always] },
    Rule { call: libc::SYS_readlink, any: &[When::Always] },
];
#[cfg(not(target_arch = "x86_64"))]
const OLD_PATHS: &[Rule] = &[];

/// The rules of these parts.
#[must_use]
pub fn rules(parts: &[Part]) -> Vec<Rule> {
    let of = |part: &Part| match part {
        Part::Commands => [COMMANDS, &[]],
        Part::Paths => [PATHS, OLD_PATHS],
        Part::HugePages => [HUGE_PAGES, &[]],
        Part::Sockets => [SOCKETS, &[]],
    };
    parts.iter().flat_map(of).flatten().copied().collect()
}

/// The program for these rules, of which no two are for the same call.
///
/// # Panics
///
/// If a rule has more conditions than a jump reaches over, which no input brings about: rules are constants.
#[must_use]
pub fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![load(OFFSET_ARCHITECTURE), jump_equal(ARCHITECTURE, 1, 0), give(ALLOW), load(OFFSET_CALL)];
    for rule in rules {
        let body = body(rule);
        let length = u8::try_from(body.len()).expect("the conditions of a rule are few");
        // A number beyond 32 bits is no call's.
        program.push(jump_equal(u32::try_from(rule.call).unwrap_or(u32::MAX), 0, length));
        program.extend(body);
    }
    program.push(give(ALLOW));
    program
}

/// What follows when the number is the rule's; it always returns, since the accumulator has lost the number.
fn body(rule: &Rule) -> Vec<Instruction> {
    let mut body = Vec::new();
    for when in rule.any {
        match *when {
            When::Always => body.push(give(NOTIFY)),
            When::Low { argument, mask, value } => {
                body.extend([load(low_half(argument)), and(mask), jump_equal(value, 0, 1), give(NOTIFY)]);
            }
            When::NonNull { argument } => body.extend([
                load(low_half(argument)),
                jump_equal(0, 0, 2),
                load(low_half(argument).saturating_add(4)),
                jump_equal(0, 1, 0),
                give(NOTIFY),
            ]),
        }
    }
    body.push(give(ALLOW));
    body
}

/// Where the low half of an argument is; all architectures here are little-endian.
fn low_half(argument: u8) -> u32 {
    u32::from(argument).saturating_mul(8).saturating_add(OFFSET_ARGUMENTS)
}

fn load(offset: u32) -> Instruction {
    Instruction { code: LOAD, when_true: 0, when_false: 0, number: offset }
}

fn and(mask: u32) -> Instruction {
    Instruction { code: AND, when_true: 0, when_false: 0, number: mask }
}

fn jump_equal(value: u32, when_true: u8, when_false: u8) -> Instruction {
    Instruction { code: JUMP_EQUAL, when_true, when_false, number: value }
}

fn give(value: u32) -> Instruction {
    Instruction { code: RETURN, when_true: 0, when_false: 0, number: value }
}

#[cfg(test)]
mod tests;
