//! One sequence on the core and on the reference, side by side.

use std::collections::{BTreeMap, VecDeque};

use nitroxide_abi::{Code, CpuId};
use nitroxide_driver::{call, Machine, Mailbox, SendError, Slot, State};

use crate::recorder::{Exchange, Recorder};
use crate::reference::{Life, Reference};
use crate::sequence::Operation;
use crate::support::client::{Mapped, Memory};
use crate::support::device::Model;
use crate::support::machine::TestMachine;
use crate::support::wire::Registers;
use crate::support::{Fixture, TestEnclave, ARGUMENT, GIB, MIB};

/// Few enough that the limit is met.
const MAX_REGIONS: u64 = 4;
/// The mailbox's time limit; deliveries are late by more or less than this.
const TIMEOUT_MS: u32 = 1_000;

/// Pool texts and what they stand for on eight CPUs with two threads per core.
const POOLS: [(&str, Result<&[u32], i64>); 8] = [
    ("2-7", Ok(&[2, 3, 4, 5, 6, 7])),
    ("2-7", Ok(&[2, 3, 4, 5, 6, 7])),
    ("4-5\n", Ok(&[4, 5])),
    ("N,6", Ok(&[6, 7])),
    ("\n", Err(-22)),
    ("2", Err(-22)),
    ("0-7", Err(-22)),
    ("2-9", Err(-34)),
];

/// How often things happened, to know that the test tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    calls: u64,
    successes: u64,
    started: u64,
    lost: u64,
    unsent: u64,
    kept_after_close: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.successes += other.successes;
        self.started += other.started;
        self.lost += other.lost;
        self.unsent += other.unsent;
        self.kept_after_close += other.kept_after_close;
    }

    /// A run of `sequences` that met all of this often enough.
    pub fn assert_rich(&self, sequences: u64) {
        let at_least = |count, percent| assert!(count * 100 >= sequences * percent, "too few: {self:?}");
        at_least(self.successes, 300);
        at_least(self.started, 50);
        at_least(self.lost, 10);
        at_least(self.unsent, 5);
        at_least(self.kept_after_close, 5);
    }
}

struct Run {
    fixture: Fixture<Recorder>,
    reference: Reference,
    /// Open enclaves, and closed ones that could not be given back yet.
    open: BTreeMap<u64, TestEnclave>,
    left: BTreeMap<u64, TestEnclave>,
    areas: [u64; 6],
    seen: Seen,
}

pub fn run(operations: &[Operation]) -> Result<Seen, String> {
    let mut run = Run::new();
    for operation in operations {
        run.step(*operation);
        run.compare().map_err(|difference| format!("{difference}\nafter {operation:?}"))?;
    }
    run.finish()?;
    Ok(run.seen)
}

impl Run {
    fn new() -> Self {
        let machine = TestMachine::with_threads(8, 2);
        let memory = Memory::new();
        let page = |gpa, size| Mapped { gpa, size, huge: true, node: 0, readable: true };
        let mut mapped = BTreeMap::new();
        let mut map = |pages: Vec<Mapped>| {
            let start = memory.map(pages.clone());
            let mut at = start;
            for page in pages {
                mapped.insert(at, page);
                at += page.size;
            }
            start
        };
        let base = 4 * GIB;
        let areas = [
            // Enough for two enclaves, in two runs.
            map([0, 1, 2, 4, 5].map(|index| page(base + index * 32 * MIB, 32 * MIB)).to_vec()),
            // Aliases of some of it, in another order.
            map([1, 0, 4].map(|index| page(base + index * 32 * MIB, 32 * MIB)).to_vec()),
            // A gigantic page, and one behind it.
            map(vec![page(8 * GIB, GIB), page(9 * GIB, 2 * MIB)]),
            // Scattered small ones, and one that is not huge.
            map([0, 2, 4, 5]
                .map(|index| page(12 * GIB + index * 2 * MIB, 2 * MIB))
                .into_iter()
                .chain([Mapped { huge: false, ..page(0, 2 * MIB) }])
                .collect()),
            // Two of another node.
            map([0, 1].map(|index| Mapped { node: 1, ..page(16 * GIB + index * 32 * MIB, 32 * MIB) }).to_vec()),
            // Nothing there.
            0x1000_0000_0000,
        ];
        let mailbox = Mailbox::new(Registers::new(Model::new(MAX_REGIONS))).with_timeout(TIMEOUT_MS);
        let device = Recorder { mailbox, record: Default::default() };
        let mut run = Self {
            fixture: Fixture { machine, device, memory },
            reference: Reference { mapped, ..Reference::default() },
            open: BTreeMap::new(),
            left: BTreeMap::new(),
            areas,
            seen: Seen::default(),
        };
        run.step(Operation::WritePool { text: 0 });
        run
    }

    fn registers(&mut self) -> &mut Registers {
        self.fixture.device.mailbox.port_mut()
    }

    /// The enclave that `which` means, taken out of its map.
    fn pick(from: &mut BTreeMap<u64, TestEnclave>, which: usize) -> Option<(u64, TestEnclave)> {
        let uid = *from.keys().nth(which % from.len().max(1))?;
        from.remove_entry(&uid)
    }

    fn step(&mut self, operation: Operation) {
        self.seen.calls += 1;
        match operation {
            Operation::Create { good_pointer } => self.create(good_pointer),
            Operation::Close { which } => {
                if let Some((uid, enclave)) = Self::pick(&mut self.open, which) {
                    self.release(uid, enclave);
                }
            }
            Operation::Retry { which } => {
                if let Some((uid, enclave)) = Self::pick(&mut self.left, which) {
                    self.release(uid, enclave);
                }
            }
            Operation::Events => self.events(),
            Operation::WritePool { text } => {
                let (text, cpus) = POOLS[text];
                let ours = code(self.fixture.machine.write_pool(text).map(|()| 0).map_err(Code::from));
                let theirs = self.reference.write_pool(text, cpus);
                assert_eq!(ours, theirs, "ours, theirs");
            }
            Operation::Withhold { cpu, withheld } => {
                let set = &mut self.reference.withheld;
                self.fixture.machine.with_pool(|_, cpus| if withheld { cpus.withheld.insert(cpu) } else { cpus.withheld.remove(&cpu) });
                if withheld {
                    set.insert(cpu)
                } else {
                    set.remove(&cpu)
                };
            }
            Operation::Foreign { cpu, foreign } => {
                self.fixture.machine.with_pool(|pool, _| pool.set_foreign(CpuId(cpu), foreign));
                self.reference.foreign(cpu, foreign);
            }
            Operation::Fault { command, pass, fault } => self.registers().model.fail_later(command, pass, fault),
            Operation::Deliver(delivery) => self.registers().deliveries.push_back(delivery),
            Operation::EventDuringStart { state } => self.registers().model.event_during_start = Some(state),
            Operation::End { which, state } => {
                let uid = self.open.keys().nth(which % self.open.len().max(1)).copied();
                let model = &mut self.registers().model;
                if let Some(slot) = uid.and_then(|uid| model.slots.get_mut(&uid)).filter(|slot| slot.state == 2) {
                    slot.state = state;
                }
                model.events += 1;
            }
            // The device is disabled first, as a home does it: nothing is left in it.
            Operation::Unplug => {
                self.registers().reset();
                self.registers().model.gone = true;
            }
            Operation::Reset => self.reset(),
            call => {
                let which = match call {
                    Operation::AddVcpu { which, .. }
                    | Operation::SetMemory { which, .. }
                    | Operation::LoadInfo { which, .. }
                    | Operation::Start { which, .. }
                    | Operation::Stop { which } => which,
                    _ => unreachable!("all others are above"),
                };
                if let Some((uid, mut enclave)) = Self::pick(&mut self.open, which) {
                    self.call(uid, &mut enclave, call);
                    self.open.insert(uid, enclave);
                }
            }
        }
        self.settle_record();
    }

    /// The reference has taken every command that the core has sent.
    fn settle_record(&mut self) {
        let left = &self.fixture.device.record;
        assert!(left.is_empty(), "more was sent than had to be: {left:?}");
    }

    fn create(&mut self, good_pointer: bool) {
        let argument = if good_pointer { ARGUMENT } else { 0 };
        let slot = Slot::allocate(&self.fixture.machine, &mut self.fixture.device);
        let mut ours = slot.as_ref().map(|_| 0).map_err(|error| error.code());
        let mut enclave = slot.ok().map(|slot| {
            let storage = (0..MAX_REGIONS).map(|_| Default::default()).collect();
            TestEnclave::new(&slot, storage, &mut self.fixture.device)
        });
        if let Some(made) = &mut enclave {
            let mut client = self.fixture.memory.owner();
            if let Err(code) = call::create_vm(&mut client, made.slot_uid(), argument) {
                ours = Err(code);
                let _ = made.release(&self.fixture.machine, &mut self.fixture.device);
            }
        }
        let mut record = std::mem::take(&mut self.fixture.device.record);
        self.seen.note(&record);
        let (theirs, uid) = self.reference.create(good_pointer, &mut record);
        self.fixture.device.record = record;
        assert_eq!(code(ours), theirs, "ours, theirs");
        let (Some(uid), Some(enclave)) = (uid, enclave) else { return };
        assert_eq!(enclave.slot_uid().0, uid);
        if theirs == 0 {
            self.open.insert(uid, enclave);
        } else if self.reference.enclaves.contains_key(&uid) {
            self.left.insert(uid, enclave);
        }
    }

    fn call(&mut self, uid: u64, enclave: &mut TestEnclave, operation: Operation) {
        let fixture = &mut self.fixture;
        let events = fixture.device.mailbox.port_mut().model.events;
        let ours = code(match operation {
            Operation::AddVcpu { cpu, owner, .. } => {
                let mut client = if owner { fixture.memory.owner() } else { fixture.memory.stranger() };
                fixture.add_vcpu_as(enclave, &mut client, cpu).map(u64::from)
            }
            Operation::SetMemory { area, offset, size, flags, owner, .. } => {
                let mut client = if owner { fixture.memory.owner() } else { fixture.memory.stranger() };
                let region = nitroxide_abi::ioctl::UserMemoryRegion {
                    flags,
                    memory_size: size * MIB,
                    userspace_addr: self.areas[area] + offset * MIB,
                };
                fixture.set_memory_as(enclave, &mut client, region).map(|()| 0)
            }
            Operation::LoadInfo { flags, .. } => fixture.load_info(enclave, flags),
            Operation::Start { flags, cid, .. } => fixture.start(enclave, flags, cid),
            _ => enclave.stop(&mut fixture.device).map(|()| 0).map_err(Code::from),
        });
        let event = fixture.device.mailbox.port_mut().model.events != events;
        let mut record = std::mem::take(&mut fixture.device.record);
        self.seen.note(&record);
        let reference = &mut self.reference;
        let theirs = match operation {
            Operation::AddVcpu { cpu, owner, .. } => reference.add_vcpu(uid, cpu, owner, &mut record),
            Operation::SetMemory { area, offset, size, flags, owner, .. } => {
                let address = self.areas[area] + offset * MIB;
                reference.set_memory(uid, address, size * MIB, flags, owner, &mut record)
            }
            Operation::LoadInfo { flags, .. } => reference.load_info(uid, flags),
            Operation::Start { flags, cid, .. } => reference.start(uid, flags, cid, event, &mut record),
            _ => reference.stop(uid, &mut record),
        };
        self.fixture.device.record = record;
        assert_eq!(ours, theirs, "ours, theirs");
        self.seen.successes += u64::from(ours >= 0);
        self.seen.started += u64::from(ours >= 0 && matches!(operation, Operation::Start { .. }));
    }

    fn release(&mut self, uid: u64, mut enclave: TestEnclave) {
        let ours = enclave.release(&self.fixture.machine, &mut self.fixture.device).is_ok();
        let mut record = std::mem::take(&mut self.fixture.device.record);
        self.seen.note(&record);
        let theirs = self.reference.release(uid, &mut record);
        self.fixture.device.record = record;
        assert_eq!(ours, theirs, "released: ours, theirs");
        if !ours {
            self.seen.kept_after_close += 1;
            self.left.insert(uid, enclave);
        }
    }

    fn events(&mut self) {
        let uids: Vec<u64> = self.open.keys().chain(self.left.keys()).copied().collect();
        for uid in uids {
            let enclave = self.open.get_mut(&uid).or_else(|| self.left.get_mut(&uid)).unwrap();
            enclave.device_event(&mut self.fixture.device);
            let mut record = std::mem::take(&mut self.fixture.device.record);
            self.seen.note(&record);
            self.reference.event(uid, &mut record);
            self.fixture.device.record = record;
        }
    }

    fn reset(&mut self) {
        self.registers().reset();
        self.registers().model.gone = false;
        self.fixture.device.mailbox.was_reset();
        for enclave in self.open.values_mut().chain(self.left.values_mut()) {
            enclave.device_gone(&mut self.fixture.device);
        }
        self.reference.reset();
    }

    /// The two agree on everything that can be seen, and the device has nothing that is thought to be free.
    fn compare(&mut self) -> Result<(), String> {
        let free: Vec<u32> = self.reference.free().into_iter().collect();
        same("free CPUs", self.fixture.machine.free(), free)?;
        same("pool text", self.fixture.machine.read_pool(), format!("{}\n", self.reference.text))?;
        same("pinned pages", self.fixture.memory.pinned(), self.reference.pages())?;
        let slots = self.fixture.machine.with_pool(|pool, _| pool.slots() as usize);
        same("slots", slots, self.reference.enclaves.len())?;
        for (uid, enclave) in self.open.iter().chain(&self.left) {
            let one = &self.reference.enclaves[uid];
            let life = match enclave.state() {
                State::Init => Life::Setup,
                State::Running => Life::Running,
                State::Stopped => Life::Ended,
                State::Other(_) => Life::Odd,
                State::Gone => Life::Gone,
            };
            same("life", life, one.life)?;
            let summary = enclave.summary();
            same("hang-up", summary.hung_up, one.hup)?;
            same(
                "runs, bytes, vCPUs",
                (summary.runs, summary.memory_bytes, summary.vcpus as usize),
                (one.runs, one.bytes, one.added.len()),
            )?;
        }
        let held: Vec<(u64, u64)> = self.registers().model.slots.values().flat_map(|slot| slot.runs.clone()).collect();
        let pages: BTreeMap<u64, u64> = self.reference.enclaves.values().flat_map(|one| one.pages.clone()).collect();
        for (start, size) in held {
            let covered: u64 = pages.range(start..start + size).map(|(_, size)| *size).sum();
            same("pages of a run that the device has", covered, size)?;
        }
        let vcpus: Vec<u32> = self.registers().model.slots.values().flat_map(|slot| slot.vcpus.clone()).collect();
        let free = self.fixture.machine.free();
        if let Some(cpu) = vcpus.iter().find(|cpu| free.contains(cpu)) {
            return Err(format!("the device has CPU {cpu}, which is thought to be free"));
        }
        same("commands given while a reply was on its way", self.registers().overruns, 0)
    }

    /// Everything is closed; after at most one reset nothing is held, by the core or by the device.
    fn finish(&mut self) -> Result<(), String> {
        self.registers().model.faults.clear();
        self.registers().deliveries.clear();
        for _ in 0..3 {
            while let Some((uid, enclave)) = Self::pick(&mut self.open, 0) {
                self.release(uid, enclave);
            }
            for (uid, enclave) in std::mem::take(&mut self.left) {
                self.release(uid, enclave);
            }
        }
        let orphans = self.registers().model.slots.len() > self.reference.enclaves.len();
        if !self.reference.enclaves.is_empty() || orphans || self.fixture.device.mailbox.is_stuck() {
            // Only a reply that never came keeps anything from being given back.
            if !self.seen.lost_any() {
                return Err(format!("kept although every reply came: {:?}", self.reference.enclaves));
            }
            self.reset();
            for (uid, enclave) in std::mem::take(&mut self.left) {
                self.release(uid, enclave);
            }
        }
        for cpu in 0..8 {
            self.step(Operation::Foreign { cpu, foreign: false });
        }
        self.compare()?;
        same("slots of the device", self.registers().model.slots.len(), 0)?;
        self.fixture.assert_nothing_held();
        Ok(())
    }
}

impl Seen {
    fn note(&mut self, record: &VecDeque<Exchange>) {
        for exchange in record {
            self.lost += u64::from(exchange.outcome == Err(SendError::NoReply));
            self.unsent += u64::from(exchange.outcome == Err(SendError::NotSent));
        }
    }

    fn lost_any(&self) -> bool {
        self.lost > 0
    }
}

#[expect(clippy::needless_pass_by_value, reason = "most callers have values")]
fn same<T: PartialEq + std::fmt::Debug>(what: &str, ours: T, theirs: T) -> Result<(), String> {
    if ours == theirs {
        Ok(())
    } else {
        Err(format!("{what}: ours {ours:?}, theirs {theirs:?}"))
    }
}

fn code<T: TryInto<i64>>(result: Result<T, Code>) -> i64
where
    T::Error: std::fmt::Debug,
{
    match result {
        Ok(value) => value.try_into().unwrap(),
        Err(code) => i64::from(code.negative()),
    }
}
