//! Random cases: a list of steps from a seed, with no look at answers.
//!
//! A `Guess` of what is open and how far it is chooses steps that have something to act on, and leads enclaves to their start and end. It need not be
//! right. Steps whose differences are known (docs/conformance.md, "Rules") are rare, since what follows them cannot be compared.

use nitroxide_abi::ioctl;

use crate::cases::POOL;
use crate::guess::{Guess, Stage};
use crate::step::{Area, ENCLAVES, FREE_PAGES, FileCall, On, Op, Place, Pointer, Who};
use crate::transcript::Case;

const MIB: u64 = 1 << 20;
/// Pages that a start needs.
const ENOUGH: u64 = 32;
/// Steps of a case, without what closes it.
pub const DEFAULT_STEPS: usize = 18;

/// Numbers from a seed: splitmix64 (Steele, Lea, Flood 2014). Nothing here asks for memory, since forked children use them.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The numbers of one thread of a run with this seed.
    pub(crate) fn of_thread(seed: u64, thread: u64) -> Self {
        // Another factor than the one below, or threads would walk the same sequence a step apart.
        Self(seed ^ thread.wrapping_mul(0xD134_2543_DE82_EF95))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `end`; 0 for an end of 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// One time in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Clone>(&mut self, list: &[T], otherwise: T) -> T {
        list.get(self.index(list.len())).cloned().unwrap_or(otherwise)
    }

    /// An index of a list of this length; 0 for an empty one.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(u64::try_from(length).unwrap_or(1))).unwrap_or(0)
    }
}

/// The case of one seed.
#[must_use]
pub fn case(seed: u64, steps: usize) -> Case {
    let mut numbers = Numbers::new(seed);
    let focus = numbers.pick(&[Focus::One, Focus::One, Focus::Two, Focus::Two, Focus::All], Focus::All);
    let mut maker = Maker { numbers, focus, guess: Guess::default(), ops: Vec::new() };
    let pool_changed = maker.numbers.once_in(40);
    if pool_changed {
        maker.change_pool();
    }
    if maker.numbers.once_in(16) {
        let count = u32::try_from(1 + maker.numbers.below(4)).unwrap_or(1);
        maker.push(Op::MaxRegions(count));
    }
    while maker.ops.len() < steps {
        let next = maker.next();
        maker.push(next);
    }
    if pool_changed {
        for enclave in 0..ENCLAVES {
            maker.push(Op::Unkeep(enclave));
            maker.push(Op::Close(enclave));
        }
        maker.push(Op::WritePool { text: POOL.to_owned(), privileged: true });
    }
    Case { name: format!("s{seed}"), ops: maker.ops }
}

/// The cases of `count` seeds from `seed` on.
pub fn cases(seed: u64, count: u64, steps: usize) -> impl Iterator<Item = Case> {
    (0..count).map(move |index| case(seed.wrapping_add(index), steps))
}

/// Which enclaves a case is mostly about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Focus {
    One,
    Two,
    All,
}

/// A case in the making.
struct Maker {
    numbers: Numbers,
    focus: Focus,
    guess: Guess,
    ops: Vec<Op>,
}

impl Maker {
    fn push(&mut self, op: Op) {
        self.guess.follow(&op);
        self.ops.push(op);
    }

    /// The pool's text while there is no enclave: rare, since CPUs are slow to come and go.
    fn change_pool(&mut self) {
        let text = self.numbers.pick(&["2-3", "4-5", "2-5\n", "2,3,4,5", "\n", "2-4", "0-3", "99", "4-N", "x", "2-5:2/2"], POOL);
        self.push(Op::WritePool { text: text.to_owned(), privileged: true });
        self.push(Op::ReadPool);
        if self.guess.cores_free() == 0 {
            self.push(Op::Create { enclave: 0, pointer: Pointer::Good });
            self.push(Op::WritePool { text: POOL.to_owned(), privileged: true });
        }
    }

    fn next(&mut self) -> Op {
        let enclave = match self.focus {
            Focus::One => self.numbers.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2], 0),
            Focus::Two => self.numbers.pick(&[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2], 0),
            Focus::All => self.numbers.pick(&[0, 0, 0, 1, 1, 2], 0),
        };
        if self.numbers.once_in(12) {
            return self.besides();
        }
        match self.guess.stage(enclave) {
            Stage::Closed => {
                let exhausted = self.guess.cores_free() == 0;
                match self.guess.any_open() {
                    // Often enough that all cores are taken.
                    Some(open) if exhausted && !self.numbers.once_in(4) => self.on(open),
                    Some(open) if !exhausted && self.numbers.once_in(3) => self.on(open),
                    _ => Op::Create { enclave, pointer: pointer(&mut self.numbers) },
                }
            }
            Stage::Kept { running } if running && self.numbers.once_in(2) => Op::End(enclave),
            Stage::Kept { .. } => Op::Unkeep(enclave),
            Stage::Init | Stage::Running | Stage::Ended => self.on(enclave),
        }
    }

    /// A step of an enclave that is open.
    fn on(&mut self, enclave: usize) -> Op {
        let on = On::Enclave(enclave);
        let stage = self.guess.stage(enclave);
        // Few would come to their start otherwise.
        if self.focus != Focus::All && stage == Stage::Init && !self.numbers.once_in(2) {
            return self.towards_start(enclave);
        }
        match (self.numbers.below(100), stage) {
            (0..=59, Stage::Init) => self.towards_start(enclave),
            (0..=14, Stage::Running) => Op::End(enclave),
            (15..=34, Stage::Running) | (0..=19, Stage::Ended) => Op::Poll { on, who: who(&mut self.numbers) },
            (20..=34, Stage::Ended) | (84..=89, _) => Op::Close(enclave),
            (35..=39, Stage::Running) => Op::Event,
            (90..=91, _) if !self.guess.is_kept(enclave) => Op::Keep(enclave),
            (90..=91, _) => Op::Unkeep(enclave),
            (92..=94, _) => Op::Poll { on, who: who(&mut self.numbers) },
            (95, _) => {
                let word = self.numbers.pick(&[0xAE25, ioctl::CREATE_VM, 0, u32::MAX, ioctl::ADD_VCPU ^ 0x4_0000], 0);
                Op::Ioctl { on, word }
            }
            (96, _) => Op::File { on, call: self.file_call() },
            (97, Stage::Init) => Op::End(enclave),
            (60..=66, _) => load_info(&mut self.numbers, enclave),
            (67..=73, _) => self.start(enclave),
            (74..=78, _) => self.add_vcpu(enclave),
            _ => self.set_memory(enclave),
        }
    }

    /// What this enclave lacks; mostly right.
    fn towards_start(&mut self, enclave: usize) -> Op {
        let missing = ENOUGH.saturating_sub(self.guess.pages(enclave));
        let wants_cpu = self.guess.misses_vcpus(enclave);
        if missing > 0 && !(wants_cpu && self.numbers.once_in(3)) {
            let most = self.numbers.pick(&[missing, missing, missing, 16, 8], missing).clamp(1, missing);
            if let Some((first, count)) = self.free_pages(most) {
                return set(enclave, Place::page(Area::Pages, first), count * 2 * MIB);
            }
        }
        if wants_cpu {
            let cpu = self.numbers.pick(&[0, 0, 0, 2, 3, 4, 5], 0);
            return Op::AddVcpu { enclave, who: Who::Owner, cpu, pointer: Pointer::Good };
        }
        let (flags, cid) = (self.numbers.pick(&[0, 0, 1], 0), self.numbers.pick(&[0, 0, 0, 77, 78, 4], 0));
        Op::Start { enclave, who: who(&mut self.numbers), flags, cid, pointer: pointer(&mut self.numbers) }
    }

    /// Pages that nobody has: the first of them, and how many, at most `most`.
    fn free_pages(&mut self, most: u64) -> Option<(u64, u64)> {
        let from = self.numbers.below(FREE_PAGES);
        let first = (from..FREE_PAGES).chain(0..from).find(|page| self.guess.is_free(*page))?;
        let count = (first..FREE_PAGES).take_while(|page| self.guess.is_free(*page)).take(usize::try_from(most).unwrap_or(1)).count();
        Some((first, u64::try_from(count).unwrap_or(1)))
    }

    /// A step that is about no enclave, or about the device's manners.
    fn besides(&mut self) -> Op {
        match self.numbers.below(40) {
            0..=8 => Op::Usage,
            9..=18 => Op::Faults(fault(&mut self.numbers)),
            // A pool that is in use is refused at once.
            19..=26 if self.guess.is_surely_used() => {
                let text = self.numbers.pick(&["2-3", "\n", "x", "99", "2-5", "4-N"], POOL);
                Op::WritePool { text: text.to_owned(), privileged: true }
            }
            19..=26 => Op::ReadPool,
            27..=28 => Op::WritePool { text: POOL.to_owned(), privileged: false },
            29..=31 => Op::ReadPool,
            32 => Op::MaxRegions(u32::try_from(self.numbers.below(6)).unwrap_or(0)),
            33..=34 => Op::Poll { on: On::Device, who: who(&mut self.numbers) },
            35..=36 => Op::File { on: On::Device, call: self.file_call() },
            // NE_CREATE_VM would make an enclave that no step can close.
            _ => Op::Ioctl { on: On::Device, word: self.numbers.pick(&[0xAE25, 0, u32::MAX, ioctl::ADD_VCPU, ioctl::START_ENCLAVE], 0) },
        }
    }

    fn file_call(&mut self) -> FileCall {
        self.numbers.pick(&[FileCall::Read, FileCall::Write, FileCall::Seek, FileCall::Map], FileCall::Read)
    }

    fn add_vcpu(&mut self, enclave: usize) -> Op {
        let numbers = &mut self.numbers;
        let cpu = numbers.pick(&[0, 0, 2, 3, 4, 5, 1, 6, u32::MAX], 0);
        // A foreign caller is W11's beginning.
        let who = if numbers.once_in(10) { Who::Other } else { Who::Owner };
        Op::AddVcpu { enclave, who, cpu, pointer: pointer(numbers) }
    }

    fn set_memory(&mut self, enclave: usize) -> Op {
        let most = self.numbers.pick(&[1, 1, 2, 4, 8], 1);
        let (mut first, mut count) = self.free_pages(most).unwrap_or((0, 1));
        if self.numbers.once_in(3) {
            // Perhaps somebody's.
            count = most;
            first = self.numbers.below(FREE_PAGES - count);
        }
        let numbers = &mut self.numbers;
        let mut place = Place::page(Area::Pages, first);
        let mut size = count * 2 * MIB;
        match numbers.below(24) {
            0..=2 => size = numbers.pick(&[0, MIB, 2 * MIB + 4096, u64::MAX, 1 << 57], 0),
            3 => place.offset += 4096,
            4..=6 => {
                let area = numbers.pick(&[Area::Small, Area::Zero, Area::Kernel, Area::Unmapped, Area::NoAccess], Area::Zero);
                place = Place::page(area, 0);
            }
            7 => place = Place::page(Area::Half, 0),
            8 if numbers.once_in(4) => place = Place::page(Area::Alias, first),
            _ => {}
        }
        let flags = if numbers.once_in(12) { 1 } else { 0 };
        Op::SetMemory { enclave, who: who(numbers), flags, place, size, pointer: pointer(numbers) }
    }

    fn start(&mut self, enclave: usize) -> Op {
        let numbers = &mut self.numbers;
        let cid = numbers.pick(&[0, 0, 0, 0, 77, 78, 1, 3, 4, 0xFFFF_FFFE, 0xFFFF_FFFF, 1 << 32], 0);
        let flags = numbers.pick(&[0, 0, 0, 1, 1, 2], 0);
        Op::Start { enclave, who: who(numbers), flags, cid, pointer: pointer(numbers) }
    }
}

fn set(enclave: usize, place: Place, size: u64) -> Op {
    Op::SetMemory { enclave, who: Who::Owner, flags: 0, place, size, pointer: Pointer::Good }
}

fn load_info(numbers: &mut Numbers, enclave: usize) -> Op {
    Op::LoadInfo { enclave, who: who(numbers), flags: numbers.pick(&[1, 1, 1, 0, 2, u64::MAX], 1), pointer: pointer(numbers) }
}

fn who(numbers: &mut Numbers) -> Who {
    if numbers.once_in(6) { Who::Other } else { Who::Owner }
}

fn pointer(numbers: &mut Numbers) -> Pointer {
    match numbers.below(24) {
        0 => Pointer::Null,
        1 => Pointer::ReadOnly,
        _ => Pointer::Good,
    }
}

fn fault(numbers: &mut Numbers) -> String {
    let command = numbers.pick(&["start", "start", "alloc", "add-mem", "add-mem", "add-vcpu", "add-vcpu", "info", "info"], "start");
    // Refused vCPUs, memory and SLOT_INFO begin W11, W12 and W2.
    let rare = !matches!(command, "start" | "alloc");
    if rare && numbers.once_in(5) {
        return String::new();
    }
    let action = numbers.pick(&["-EIO", "-EINVAL", "-ENOMEM", "-5000", "-512", "+5"], "-EIO");
    let when = numbers.pick(&["", "@1", "@1", "@2"], "");
    format!("{command}{when}={action}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_steps_each_time_and_another_seed_others() {
        assert_eq!(case(7, 20).ops, case(7, 20).ops);
        assert_ne!(case(7, 20).ops, case(8, 20).ops);
    }

    #[test]
    fn threads_of_one_seed_do_not_walk_the_same_sequence() {
        let mut seen = std::collections::BTreeSet::new();
        for thread in (0..8).chain([u64::MAX]) {
            let mut numbers = Numbers::of_thread(0, thread);
            assert!((0..500).all(|_| seen.insert(numbers.next())), "thread {thread}");
        }
        assert_eq!(Numbers::of_thread(0, 3).next(), Numbers::of_thread(0, 3).next());
    }
}
