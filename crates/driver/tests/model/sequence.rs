//! Random sequences of calls and misfortunes, and how a failing one is made short.

use nitroxide_abi::pci::Command;

use crate::support::device::Fault;
use crate::support::wire::Delivery;

/// One step. `which` picks an enclave of those that are open, or closed and not yet given back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    Create {
        good_pointer: bool,
    },
    AddVcpu {
        which: usize,
        cpu: u32,
        owner: bool,
    },
    SetMemory {
        which: usize,
        area: usize,
        offset: u64,
        size: u64,
        flags: u64,
        owner: bool,
    },
    LoadInfo {
        which: usize,
        flags: u64,
    },
    Start {
        which: usize,
        flags: u64,
        cid: u64,
    },
    Stop {
        which: usize,
    },
    Close {
        which: usize,
    },
    Retry {
        which: usize,
    },
    /// The enclave ends, or its device says something odd, and an event is raised.
    End {
        which: usize,
        state: u16,
    },
    /// The home's event worker walks over all enclaves.
    Events,
    WritePool {
        text: usize,
    },
    /// The home finds a CPU that it will not give, or gets it back.
    Withhold {
        cpu: u32,
        withheld: bool,
    },
    Foreign {
        cpu: u32,
        foreign: bool,
    },
    Fault {
        command: Command,
        pass: usize,
        fault: Fault,
    },
    Deliver(Delivery),
    EventDuringStart {
        state: u16,
    },
    Unplug,
    Reset,
}

/// splitmix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }
}

pub fn generate(seed: u64) -> Vec<Operation> {
    let mut random = Random::new(seed);
    let random = &mut random;
    let mut operations = Vec::new();
    let length = 4 + random.below(28);
    let misfortune = random.pick(&[0, 5, 15, 30]);
    for _ in 0..length {
        if random.chance(misfortune) {
            operations.push(misfortune_of(random));
        }
        if random.chance(15) {
            almost_ready(random, &mut operations);
        }
        operations.push(call(random));
    }
    operations
}

/// What leads to an enclave that can start, most of the time.
fn almost_ready(random: &mut Random, operations: &mut Vec<Operation>) {
    let which = usize::try_from(random.below(3)).unwrap();
    operations.push(Operation::Create { good_pointer: true });
    let offset = random.pick(&[0, 32, 64]);
    operations.push(Operation::SetMemory { which, area: 0, offset, size: random.pick(&[64, 64, 96, 32]), flags: 0, owner: true });
    for _ in 0..random.pick(&[1, 2, 2, 2, 3]) {
        operations.push(Operation::AddVcpu { which, cpu: 0, owner: true });
    }
    operations.push(Operation::Start { which, flags: random.below(2), cid: random.pick(&[0, 0, 77]) });
}

fn call(random: &mut Random) -> Operation {
    let which = usize::try_from(random.below(4)).unwrap();
    let owner = random.chance(92);
    match random.below(100) {
        0..=13 => Operation::Create { good_pointer: random.chance(93) },
        14..=32 => Operation::AddVcpu { which, cpu: random.pick(&[0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, u32::MAX]), owner },
        33..=52 => Operation::SetMemory {
            which,
            area: usize::try_from(random.below(6)).unwrap(),
            offset: random.pick(&[0, 0, 2, 32, 64, 96, 1, 1024, 1030]),
            size: random.pick(&[32, 32, 64, 64, 2, 4, 0, 1, 6, 1024, 1026, 4096]),
            flags: random.pick(&[0, 0, 0, 0, 0, 1]),
            owner,
        },
        53..=55 => Operation::LoadInfo { which, flags: random.below(3) },
        56..=66 => Operation::Start {
            which,
            flags: random.pick(&[0, 1, 0, 1, 2]),
            cid: random.pick(&[0, 0, 0, 4, 77, 77, 1, 3, 0xffff_ffff, 1 << 33]),
        },
        67..=69 => Operation::Stop { which },
        70..=79 => Operation::Close { which },
        80..=83 => Operation::Retry { which },
        84..=87 => Operation::End { which, state: random.pick(&[0xFFFF, 0xFFFF, 0xFFFF, 2, 5, 0]) },
        88..=91 => Operation::Events,
        92..=95 => Operation::WritePool { text: usize::try_from(random.below(8)).unwrap() },
        96 => Operation::Withhold { cpu: u32::try_from(random.below(8)).unwrap(), withheld: random.chance(50) },
        97 => Operation::Foreign { cpu: u32::try_from(random.below(8)).unwrap(), foreign: random.chance(40) },
        98 => Operation::Unplug,
        _ => Operation::Reset,
    }
}

fn misfortune_of(random: &mut Random) -> Operation {
    const COMMANDS: [Command; 7] = [
        Command::EnclaveStart,
        Command::EnclaveStop,
        Command::SlotAlloc,
        Command::SlotFree,
        Command::SlotAddMem,
        Command::SlotAddVcpu,
        Command::SlotInfo,
    ];
    match random.below(10) {
        0..=5 => {
            let fault = match random.below(10) {
                0..=6 => Fault::Refuse(random.pick(&[-5, -12, -16, -28, -5000, -270, -300, -512])),
                7 | 8 => Fault::LoseReply,
                _ => Fault::LoseCommand,
            };
            Operation::Fault { command: random.pick(&COMMANDS), pass: usize::try_from(random.below(3)).unwrap(), fault }
        }
        6..=8 => Operation::Deliver(Delivery {
            delay_ms: random.pick(&[0, 10, 900, 1500, 2500]),
            silent: random.chance(30),
            spurious: random.chance(30),
        }),
        _ => Operation::EventDuringStart { state: random.pick(&[0xFFFF, 2]) },
    }
}

/// Leaves out whatever is not needed for the failure.
pub fn shrink(mut operations: Vec<Operation>, fails: impl Fn(&[Operation]) -> bool) -> Vec<Operation> {
    loop {
        let shorter = (0..operations.len()).map(|index| {
            let mut without = operations.clone();
            without.remove(index);
            without
        });
        match shorter.into_iter().find(|candidate| fails(candidate)) {
            Some(found) => operations = found,
            None => return operations,
        }
    }
}
