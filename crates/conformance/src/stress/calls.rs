//! Kinds of calls, what each may answer ([`Asked::allows`]), and how often it did ([`Tally`]).
//!
//! Threads get in each other's way, so a call has a set of possible answers and not one. The set is as narrow as the caller's knowledge allows: from
//! docs/driver.md, "Order of checks".

use std::sync::atomic::{AtomicU64, Ordering};

use nitroxide_abi::Code;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Create,
    AddVcpu,
    LoadInfo,
    SetMemory,
    Start,
    Poll,
    Close,
    Dup,
    Query,
    Info,
    List,
    Stop,
    PoolInfo,
    Version,
    Unknown,
    FdInfo,
    PoolWrite,
    PoolRead,
    Meminfo,
    Fork,
    Event,
    End,
    Faults,
    Unbind,
    Bind,
}

/// Their names, in the order of [`Kind`].
const NAMES: [&str; 25] = [
    "CREATE_VM",
    "ADD_VCPU",
    "LOAD_INFO",
    "SET_MEMORY",
    "START",
    "poll",
    "close",
    "dup",
    "QUERY",
    "ENCLAVE_INFO",
    "LIST",
    "STOP",
    "POOL_INFO",
    "GET_API_VERSION",
    "unknown ioctl",
    "fdinfo",
    "pool write",
    "pool read",
    "meminfo",
    "fork and kill",
    "device event",
    "device end",
    "device faults",
    "unbind",
    "bind",
];

impl Kind {
    pub(super) fn name(self) -> &'static str {
        NAMES.get(self as usize).copied().unwrap_or("unknown")
    }
}

/// Codes by which the device refuses commands on purpose; no check answers them.
pub(super) const INJECTED: [Code; 2] = [Code::EAGAIN, Code::EBUSY];

/// May the device have gone from under a call?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    No,
    Maybe,
    Yes,
}

/// How a call's argument was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Argument {
    /// Nothing is wrong with it by itself.
    Good,
    /// It cannot be read.
    Null,
    /// A value is refused with one of these, if nothing else is first.
    Bad(&'static [Code]),
}

/// A call, and what its caller knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) kind: Kind,
    pub(super) argument: Argument,
    pub(super) gone: Gone,
    /// Was the device told to refuse commands at some time of the call?
    pub(super) faults: bool,
    /// Did another address space make the enclave?
    pub(super) stranger: bool,
    /// Has the driver the project's own commands?
    pub(super) extension: bool,
}

impl Asked {
    /// Is this answer possible? Values are 0 and up, codes are negative.
    pub(super) fn allows(&self, answer: i64) -> bool {
        let Some(code) = answer.checked_neg().filter(|code| *code > 0) else { return self.allows_success() };
        let Some(code) = i32::try_from(code).ok().and_then(Code::new) else { return false };
        if self.is_ours() && !self.extension {
            return code == Code::ENOTTY;
        }
        let is_command = matches!(self.kind, Kind::Create | Kind::AddVcpu | Kind::SetMemory | Kind::Start | Kind::Stop);
        match (self.argument, self.kind) {
            (Argument::Null, _) if code == Code::EFAULT => return true,
            // Read first, so that nothing else can be the answer, unless the node has no device. NE_CREATE_VM alone writes last.
            (Argument::Null, Kind::List | Kind::PoolInfo | Kind::Query) => return self.gone != Gone::No && code == Code::ENODEV,
            (Argument::Null, kind) if kind != Kind::Create => return false,
            (Argument::Bad(codes), _) if codes.contains(&code) => return true,
            _ => {}
        }
        if self.gone != Gone::No && code == Code::ENODEV && self.looks_at_device() {
            return true;
        }
        if self.gone == Gone::Yes && self.looks_at_device() {
            return false;
        }
        // No CPU comes or goes while a driver is being bound to a device (drivers/pci/pci-driver.c, pci_call_probe).
        if self.gone != Gone::No && code == Code::EBUSY && self.kind == Kind::PoolWrite {
            return true;
        }
        if self.faults && is_command && INJECTED.contains(&code) {
            return true;
        }
        if self.stranger && code == Code::EIO && matches!(self.kind, Kind::AddVcpu | Kind::SetMemory) {
            return true;
        }
        self.usual().contains(&code)
    }

    fn allows_success(&self) -> bool {
        if self.argument != Argument::Good || (self.is_ours() && !self.extension) || self.kind == Kind::Unknown {
            return false;
        }
        // A stranger's calls never come so far that they give something.
        let given = matches!(self.kind, Kind::AddVcpu | Kind::SetMemory);
        !(given && self.stranger || self.gone == Gone::Yes && self.looks_at_device())
    }

    fn is_ours(&self) -> bool {
        matches!(self.kind, Kind::Query | Kind::Info | Kind::List | Kind::Stop | Kind::PoolInfo | Kind::Version)
    }

    /// Is the answer ENODEV once the device is gone?
    fn looks_at_device(&self) -> bool {
        !matches!(
            self.kind,
            Kind::Info | Kind::Poll | Kind::FdInfo | Kind::Close | Kind::Dup | Kind::Meminfo | Kind::PoolRead | Kind::PoolWrite
        )
    }

    /// What other threads can bring about at any time.
    fn usual(&self) -> &'static [Code] {
        match self.kind {
            // Every slot of the device is in use.
            Kind::Create => &[Code::NO_CPUS_AVAIL_IN_POOL, Code::ENOSPC],
            Kind::AddVcpu => &[Code::NOT_IN_INIT_STATE, Code::NO_CPUS_AVAIL_IN_POOL, Code::VCPU_ALREADY_USED, Code::VCPU_NOT_IN_CPU_POOL],
            Kind::LoadInfo => &[Code::NOT_IN_INIT_STATE],
            Kind::SetMemory => &[Code::NOT_IN_INIT_STATE, Code::MEM_REGION_ALREADY_USED],
            Kind::Start => &[
                Code::NOT_IN_INIT_STATE,
                Code::NO_MEM_REGIONS_ADDED,
                Code::ENCLAVE_MEM_MIN_SIZE,
                Code::NO_VCPUS_ADDED,
                Code::FULL_CORES_NOT_USED,
                Code::EADDRINUSE,
            ],
            Kind::List => &[Code::ENOENT],
            Kind::Stop => &[Code::NOT_IN_RUNNING_STATE],
            Kind::Unknown => &[Code::ENOTTY],
            // The second one by a caller who may not even open the file.
            Kind::PoolWrite => &[Code::EPERM, Code::EACCES],
            _ => &[],
        }
    }
}

/// Codes lie below.
const CODES: usize = 512;
/// Answers that cannot be; those that are kept.
const KEPT: usize = 16;
/// Words of a [`Tally`].
pub(super) const WORDS: usize = NAMES.len() * CODES + 1 + 2 * KEPT;

/// Counts of answers in memory that children share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tally(pub(super) &'static [AtomicU64]);

impl Tally {
    /// Counts an answer.
    pub(super) fn count(&self, kind: Kind, answer: i64) {
        let code = usize::try_from(answer.saturating_neg()).unwrap_or(0).min(CODES - 1);
        if let Some(word) = self.0.get(kind as usize * CODES + code) {
            word.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Keeps an answer of a child that cannot be; it has no other way to tell.
    pub(super) fn complain(&self, kind: Kind, answer: i64) {
        let (Some(count), base) = (self.0.get(NAMES.len() * CODES), NAMES.len() * CODES + 1) else { return };
        let index = usize::try_from(count.fetch_add(1, Ordering::Relaxed)).unwrap_or(KEPT);
        if let (true, Some([what, said])) = (index < KEPT, self.0.get(base + 2 * index..base + 2 * index + 2)) {
            what.store(kind as u64, Ordering::Relaxed);
            said.store(answer.cast_unsigned(), Ordering::Relaxed);
        }
    }

    /// What children complained of.
    pub(super) fn complaints(&self) -> Vec<String> {
        let base = NAMES.len() * CODES + 1;
        let count = self.0.get(base - 1).map_or(0, |count| count.load(Ordering::Relaxed));
        let count = usize::try_from(count).unwrap_or(KEPT);
        let kept = self.0.get(base..).unwrap_or_default().chunks_exact(2).take(count);
        let mut lines: Vec<String> = kept
            .filter_map(|pair| {
                let [what, said] = pair else { return None };
                let name = usize::try_from(what.load(Ordering::Relaxed)).ok().and_then(|place| NAMES.get(place)).copied();
                Some(format!("a child: {} -> {}", name.unwrap_or("unknown"), answer_text(said.load(Ordering::Relaxed).cast_signed())))
            })
            .collect();
        if count > KEPT {
            lines.push(format!("and {} more answers of children that cannot be", count - KEPT));
        }
        lines
    }

    /// How often a kind of call succeeded.
    pub(super) fn successes(&self, kind: Kind) -> u64 {
        self.0.get(kind as usize * CODES).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// A line for each call and answer that occurred.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, codes) in NAMES.iter().zip(self.0.chunks_exact(CODES)) {
            let counts = (0..).zip(codes).map(|(code, word)| (code, word.load(Ordering::Relaxed))).filter(|(_, count)| *count > 0);
            lines.extend(counts.map(|(code, count): (i64, u64)| {
                format!("{name}: {} -> {count}", if code == 0 { "0".to_owned() } else { answer_text(-code) })
            }));
        }
        lines
    }

    /// All calls.
    pub(super) fn total(&self) -> u64 {
        self.0.iter().take(NAMES.len() * CODES).map(|word| word.load(Ordering::Relaxed)).sum()
    }
}

/// A value, or the name of a code.
pub(super) fn answer_text(answer: i64) -> String {
    if answer < 0 { crate::real::code(answer.saturating_neg()) } else { answer.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: Asked =
        Asked { kind: Kind::AddVcpu, argument: Argument::Good, gone: Gone::No, faults: false, stranger: false, extension: true };

    fn code(code: Code) -> i64 {
        code.negative().into()
    }

    #[test]
    fn answers_that_no_order_of_events_can_bring_about_are_not_allowed() {
        assert!(ADD.allows(0) && ADD.allows(code(Code::NOT_IN_INIT_STATE)));
        for never in [Code::EIO, Code::EFAULT, Code::ENODEV, Code::EINTR, Code::ETIMEDOUT, Code::EAGAIN, Code::ENOTTY] {
            assert!(!ADD.allows(code(never)), "{never}");
        }
        assert!(!ADD.allows(-5000));
    }

    #[test]
    fn what_the_caller_knows_widens_the_set_or_narrows_it() {
        assert!(Asked { faults: true, ..ADD }.allows(code(Code::EAGAIN)));
        let stranger = Asked { stranger: true, ..ADD };
        assert!(stranger.allows(code(Code::EIO)) && !stranger.allows(0));
        assert!(Asked { gone: Gone::Maybe, ..ADD }.allows(0) && Asked { gone: Gone::Maybe, ..ADD }.allows(code(Code::ENODEV)));
        let gone = Asked { gone: Gone::Yes, ..ADD };
        assert!(gone.allows(code(Code::ENODEV)) && !gone.allows(0) && !gone.allows(code(Code::NOT_IN_INIT_STATE)));
        let null = Asked { argument: Argument::Null, ..ADD };
        assert!(null.allows(code(Code::EFAULT)) && !null.allows(0) && !null.allows(code(Code::NOT_IN_INIT_STATE)));
        let bad = Asked { argument: Argument::Bad(&[Code::INVALID_VCPU]), ..ADD };
        assert!(bad.allows(code(Code::INVALID_VCPU)) && bad.allows(code(Code::NOT_IN_INIT_STATE)) && !bad.allows(0));
    }

    #[test]
    fn a_driver_without_our_commands_says_so() {
        let list = Asked { kind: Kind::List, extension: false, ..ADD };
        assert!(list.allows(code(Code::ENOTTY)) && !list.allows(0) && !list.allows(code(Code::ENOENT)));
    }

    #[test]
    fn every_kind_has_its_name() {
        assert_eq!((Kind::Create.name(), Kind::Bind.name()), ("CREATE_VM", "bind"));
        assert_eq!(Kind::Bind as usize + 1, NAMES.len());
    }
}
