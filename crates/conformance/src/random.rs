//! Random cases: a list of steps from a seed, with no look at answers.
//!
//! Half of them first lead one enclave close to its start, or few would ever come there. Steps whose differences are known (docs/conformance.md,
//! "Rules") are rare, since what follows them cannot be compared.

use nitroxide_abi::ioctl;

use crate::cases::POOL;
use crate::step::{Area, ENCLAVES, FREE_PAGES, FileCall, On, Op, Place, Pointer, Who};
use crate::transcript::Case;

const MIB: u64 = 1 << 20;
/// Steps of a case, without what closes it.
pub const DEFAULT_STEPS: usize = 20;

/// Numbers from a seed: splitmix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// One time in `times`.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Clone>(&mut self, list: &[T], otherwise: T) -> T {
        let index = self.below(u64::try_from(list.len()).unwrap_or(1));
        usize::try_from(index).ok().and_then(|index| list.get(index)).cloned().unwrap_or(otherwise)
    }
}

/// The case of one seed.
#[must_use]
pub fn case(seed: u64, steps: usize) -> Case {
    let mut numbers = Numbers::new(seed);
    let mut ops = Vec::new();
    let pool_changed = numbers.once_in(40);
    if pool_changed {
        ops.extend([pool_text(&mut numbers), Op::ReadPool]);
    }
    if numbers.once_in(12) {
        ops.push(Op::MaxRegions(u32::try_from(1 + numbers.below(4)).unwrap_or(1)));
    }
    let leads = numbers.once_in(2);
    if leads {
        ops.extend(lead(&mut numbers, 0));
    } else {
        ops.push(Op::Create { enclave: 0, pointer: Pointer::Good });
    }
    while ops.len() < steps {
        let next = op(&mut numbers);
        ops.push(next);
    }
    if pool_changed {
        for enclave in 0..ENCLAVES {
            ops.extend([Op::Unkeep(enclave), Op::Close(enclave)]);
        }
        ops.push(Op::WritePool { text: POOL.to_owned(), privileged: true });
    }
    Case { name: format!("s{seed}"), ops }
}

/// The cases of `count` seeds from `seed` on.
pub fn cases(seed: u64, count: u64, steps: usize) -> impl Iterator<Item = Case> {
    (0..count).map(move |index| case(seed.wrapping_add(index), steps))
}

/// Almost everything that a start needs.
fn lead(numbers: &mut Numbers, enclave: usize) -> Vec<Op> {
    let first = numbers.below(FREE_PAGES - 32);
    let split = 1 + numbers.below(31);
    let set = |first: u64, count: u64| Op::SetMemory {
        enclave,
        who: Who::Owner,
        flags: 0,
        place: Place::page(Area::Pages, first),
        size: count * 2 * MIB,
        pointer: Pointer::Good,
    };
    let vcpu = |cpu: u32| Op::AddVcpu { enclave, who: Who::Owner, cpu, pointer: Pointer::Good };
    let mut ops = vec![Op::Create { enclave, pointer: Pointer::Good }, set(first, split), set(first + split, 32 - split), vcpu(0), vcpu(0)];
    if numbers.once_in(4) {
        // Something is missing, or two have changed places.
        let one = usize::try_from(1 + numbers.below(4)).unwrap_or(1);
        if numbers.once_in(2) {
            ops.remove(one);
        } else {
            ops.swap(one, 2);
        }
    }
    if numbers.once_in(4) {
        let place = usize::try_from(numbers.below(6)).unwrap_or(0).min(ops.len());
        ops.insert(place, Op::Faults(fault(numbers)));
    }
    if !numbers.once_in(5) {
        ops.push(Op::Start { enclave, who: Who::Owner, flags: numbers.below(2), cid: 0, pointer: Pointer::Good });
    }
    ops
}

fn op(numbers: &mut Numbers) -> Op {
    let enclave = numbers.pick(&[0, 0, 0, 0, 1, 1, 2], 0);
    let on = if numbers.once_in(8) { On::Device } else { On::Enclave(enclave) };
    match numbers.below(100) {
        0..=11 => Op::Create { enclave, pointer: pointer(numbers) },
        12..=29 => add_vcpu(numbers, enclave),
        30..=34 => {
            Op::LoadInfo { enclave, who: who(numbers), flags: numbers.pick(&[1, 1, 1, 0, 2, u64::MAX], 1), pointer: pointer(numbers) }
        }
        35..=56 => set_memory(numbers, enclave),
        57..=67 => start(numbers, enclave),
        68..=73 => Op::Poll { on, who: who(numbers) },
        74..=80 => Op::Close(enclave),
        81..=83 => Op::Keep(enclave),
        84..=85 => Op::Unkeep(enclave),
        86..=88 => Op::End(enclave),
        89 => Op::Event,
        90..=92 => Op::Faults(fault(numbers)),
        93 => {
            let word = numbers.pick(&[0xAE25, ioctl::CREATE_VM, 0, u32::MAX, ioctl::ADD_VCPU ^ 0x4_0000], 0);
            // On the device it would make an enclave that no step can close.
            Op::Ioctl { on: if word == ioctl::CREATE_VM { On::Enclave(enclave) } else { on }, word }
        }
        94 => Op::File { on, call: numbers.pick(&[FileCall::Read, FileCall::Write, FileCall::Seek, FileCall::Map], FileCall::Read) },
        // Most writes meet an enclave and change nothing; those that do not are undone at once, since the CPUs are slow to come and go.
        95 => Op::WritePool { text: POOL.to_owned(), privileged: false },
        96 => Op::ReadPool,
        97 => Op::MaxRegions(u32::try_from(numbers.below(6)).unwrap_or(0)),
        _ => Op::Usage,
    }
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

fn add_vcpu(numbers: &mut Numbers, enclave: usize) -> Op {
    let cpu = numbers.pick(&[0, 0, 0, 2, 3, 4, 5, 1, 6, u32::MAX], 0);
    // A foreign caller is W11's beginning.
    let who = if numbers.once_in(40) { Who::Other } else { Who::Owner };
    Op::AddVcpu { enclave, who, cpu, pointer: pointer(numbers) }
}

fn set_memory(numbers: &mut Numbers, enclave: usize) -> Op {
    let count = numbers.pick(&[1, 1, 2, 4, 8, 16, 32, 32], 1);
    let first = numbers.below(FREE_PAGES - count);
    let mut place = Place::page(Area::Pages, first);
    let mut size = count * 2 * MIB;
    match numbers.below(32) {
        0 => size = numbers.pick(&[0, MIB, 2 * MIB + 4096, u64::MAX, 1 << 57], 0),
        1 => place.offset += 4096,
        2 => place = Place::page(numbers.pick(&[Area::Small, Area::Zero, Area::Kernel, Area::Unmapped, Area::NoAccess], Area::Zero), 0),
        3 => place = Place::page(Area::Half, 0),
        4 if numbers.once_in(4) => place = Place::page(Area::Alias, first),
        _ => {}
    }
    let flags = if numbers.once_in(20) { 1 } else { 0 };
    Op::SetMemory { enclave, who: who(numbers), flags, place, size, pointer: pointer(numbers) }
}

fn start(numbers: &mut Numbers, enclave: usize) -> Op {
    let cid = numbers.pick(&[0, 0, 0, 0, 77, 78, 1, 3, 4, 0xFFFF_FFFE, 0xFFFF_FFFF, 1 << 32], 0);
    let flags = numbers.pick(&[0, 0, 0, 1, 1, 2], 0);
    Op::Start { enclave, who: who(numbers), flags, cid, pointer: pointer(numbers) }
}

fn fault(numbers: &mut Numbers) -> String {
    let command = numbers.pick(&["start", "start", "alloc", "add-mem", "add-vcpu", "info"], "start");
    // Refused vCPUs, memory and SLOT_INFO begin W11, W12 and W2.
    let rare = !matches!(command, "start" | "alloc");
    if rare && !numbers.once_in(3) {
        return String::new();
    }
    let action = numbers.pick(&["-EIO", "-EINVAL", "-ENOMEM", "-5000", "-512", "+5"], "-EIO");
    let when = numbers.pick(&["", "@1", "@2"], "");
    format!("{command}{when}={action}")
}

fn pool_text(numbers: &mut Numbers) -> Op {
    let text = numbers.pick(&["2-3", "4-5", "2-5\n", "2,3,4,5", "\n", "2-4", "0-3", "99", "4-N", "x", "2-5:2/2"], POOL);
    Op::WritePool { text: text.to_owned(), privileged: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_steps_each_time_and_another_seed_others() {
        assert_eq!(case(7, 20).ops, case(7, 20).ops);
        assert_ne!(case(7, 20).ops, case(8, 20).ops);
    }
}
