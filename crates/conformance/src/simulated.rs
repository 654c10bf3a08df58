//! The driver core with the device model, in this process: [`Core`].
//!
//! A small home: memory with the layout of a real machine's huge pages, one owner and two strangers, and an event worker that runs after each step.

mod memory;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nitroxide_abi::pci::{Command, Reply};
use nitroxide_abi::{Code, CpuId, extension, ioctl};
use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Faults, Limits};
use nitroxide_driver::extension::Home as Facts;
use nitroxide_driver::{CpuEntry, Cpus, Device, Enclave, Ledger, LedgerEntry, Machine, Notice, Pool, Region, SendError, Slot, call};

use self::memory::{Caller, Memory, Pinned};
use crate::step::{ENCLAVES, FileCall, On, Op, Pointer, Who};
use crate::transcript::Transcript;
use crate::{LEFT_OUT, NO_ENCLAVE, Target};

const MAX_STORAGE: u64 = 4096;

/// What NE_QUERY would say of this home; nobody asks.
const FACTS: Facts = Facts {
    home: extension::home::LIBRARY,
    backend: extension::backend::NONE,
    isolation: extension::isolation::NONE,
    errata: 0,
    features: 0,
};

type Home = Enclave<Pinned, Vec<Region<Pinned>>>;

/// The driver core and the device model.
pub struct Core {
    machine: Shared,
    device: Modelled,
    memory: Rc<RefCell<Memory>>,
    enclaves: [Entry; ENCLAVES],
    /// Closed, but not released yet.
    left_over: Vec<Home>,
    layout: Vec<u64>,
    pool: String,
    seen_events: u64,
}

#[derive(Default)]
struct Entry {
    home: Option<Home>,
    open: bool,
    kept: bool,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Core {
    /// A machine of `cpus` CPUs in cores of `threads`, with huge pages in physically contiguous stretches of `layout`, and a pool.
    #[must_use]
    pub fn new(cpus: u32, threads: u32, layout: &[u64], pool: &str) -> Self {
        let device = Modelled::new();
        let machine = Shared::new(cpus, threads.max(1));
        let mut core = Self {
            machine,
            device,
            memory: Rc::new(RefCell::new(Memory::new(layout))),
            enclaves: Default::default(),
            left_over: Vec::new(),
            layout: layout.to_vec(),
            pool: pool.to_owned(),
            seen_events: 0,
        };
        core.perform(&Op::WritePool { text: pool.to_owned(), privileged: true });
        core
    }

    /// A machine like the one of a transcript, as far as its head says.
    #[must_use]
    pub fn like(transcript: &Transcript) -> Self {
        let cpus = transcript.head_value("cpus").and_then(|list| list.rsplit('-').next()?.parse::<u32>().ok()).map_or(6, |last| last + 1);
        let siblings = transcript.head_value("cpu 0 with").unwrap_or("0-1");
        let threads = siblings.rsplit(['-', ',']).next().and_then(|last| last.parse::<u32>().ok()).map_or(1, |last| last + 1);
        let layout: Vec<u64> = transcript.head_value("layout").unwrap_or("104").split(' ').filter_map(|word| word.parse().ok()).collect();
        let pool = transcript.head_value("pool").unwrap_or("2-5");
        let core = Self::new(cpus, threads, &layout, "");
        // Not what a driver can see, but what the test has made: where the nodes other than 0 begin, and a page of 1 GiB.
        let second = transcript.head_value("second node from").and_then(|cpu| cpu.parse().ok());
        core.machine.inner.borrow_mut().1.second_node = second;
        core.memory.borrow_mut().gigantic = transcript.head_value("gigantic").is_some();
        Self { pool: pool.to_owned(), ..core }.with_pool(pool)
    }

    fn with_pool(mut self, pool: &str) -> Self {
        self.perform(&Op::WritePool { text: pool.to_owned(), privileged: true });
        self
    }

    fn client(&self, who: Who, pointer: Pointer, argument: &[u8]) -> Caller {
        Caller { memory: Rc::clone(&self.memory), owner: who == Who::Owner, pointer, argument: argument.to_vec() }
    }

    /// What the worker of a home does: looks at every enclave after events.
    fn work(&mut self) {
        let events = self.device.events_seen();
        if events == self.seen_events {
            return;
        }
        self.seen_events = events;
        for entry in &mut self.enclaves {
            if let Some(home) = &mut entry.home {
                home.device_event(&mut self.device);
            }
        }
        for home in &mut self.left_over {
            home.device_event(&mut self.device);
        }
    }

    fn create(&mut self, enclave: usize, pointer: Pointer) -> String {
        if self.enclaves.get(enclave).is_none_or(|entry| entry.home.is_some()) {
            return "in use".to_owned();
        }
        let slot = match Slot::allocate(&self.machine, &mut self.device) {
            Ok(slot) => slot,
            Err(error) => return Code::from(error).name().to_owned(),
        };
        let storage = (0..slot.max_regions().min(MAX_STORAGE)).map(|_| Region::default()).collect();
        let home = Enclave::new(&slot, storage, &mut self.device);
        let written = call::create_vm(&mut self.client(Who::Owner, pointer, &[0; 8]), home.slot_uid(), 1);
        if let Err(code) = written {
            self.release(home);
            return code.name().to_owned();
        }
        if let Some(entry) = self.enclaves.get_mut(enclave) {
            *entry = Entry { home: Some(home), open: true, kept: false };
        }
        "0".to_owned()
    }

    fn call(&mut self, enclave: usize, who: Who, pointer: Pointer, word: u32, argument: &[u8]) -> Option<Result<(i64, Vec<u8>), Code>> {
        let mut client = self.client(who, pointer, argument);
        let entry = self.enclaves.get_mut(enclave).filter(|entry| entry.open)?;
        let home = entry.home.as_mut()?;
        let address = if pointer == Pointer::Null { 0 } else { 1 };
        let result = if call::enclave_call_needs_lock(word) {
            call::enclave_call(home, &self.machine, &mut self.device, &mut client, word, address)
        } else {
            call::enclave_look(&home.summary(), &self.machine, &mut client, &FACTS, word, address)
        };
        Some(result.map(|value| (value.into(), client.argument)))
    }

    fn enclave_call(&mut self, op: &Op) -> Option<String> {
        let told = |who: Who, text: String| if who == Who::Child { "0".to_owned() } else { text };
        let name = |code: Code| code.name().to_owned();
        Some(match *op {
            Op::AddVcpu { enclave, who, cpu, pointer } => match self.call(enclave, who, pointer, ioctl::ADD_VCPU, &cpu.to_le_bytes())? {
                Ok((_, bytes)) => told(who, format!("0 cpu {}", u32::from_le_bytes(bytes.try_into().unwrap_or_default()))),
                Err(code) => name(code),
            },
            Op::LoadInfo { enclave, who, flags, pointer } => {
                let argument = ioctl::ImageLoadInfo { flags, memory_offset: 7 }.to_bytes();
                match self.call(enclave, who, pointer, ioctl::GET_IMAGE_LOAD_INFO, &argument)? {
                    Ok((_, bytes)) => {
                        let info = ioctl::ImageLoadInfo::from_prefix(&bytes)?;
                        told(who, format!("0 flags {} offset {}", info.flags, info.memory_offset))
                    }
                    Err(code) => name(code),
                }
            }
            Op::SetMemory { enclave, who, flags, place, size, pointer } => {
                let region = ioctl::UserMemoryRegion { flags, memory_size: size, userspace_addr: place.address() };
                match self.call(enclave, who, pointer, ioctl::SET_USER_MEMORY_REGION, &region.to_bytes())? {
                    Ok((value, _)) => value.to_string(),
                    Err(code) => name(code),
                }
            }
            Op::Start { enclave, who, flags, cid, pointer } => {
                let argument = ioctl::EnclaveStartInfo { flags, enclave_cid: cid }.to_bytes();
                match self.call(enclave, who, pointer, ioctl::START_ENCLAVE, &argument)? {
                    Ok((_, bytes)) => told(who, format!("0 cid {}", ioctl::EnclaveStartInfo::from_prefix(&bytes)?.enclave_cid)),
                    Err(code) => name(code),
                }
            }
            _ => return None,
        })
    }

    fn raw(&mut self, on: On, word: u32) -> Option<String> {
        let result = match on {
            On::Device if word == ioctl::CREATE_VM => return None,
            // This home has none of it.
            _ if is_of_the_home(word) => return Some(LEFT_OUT.to_owned()),
            On::Device => Err(Code::ENOTTY),
            On::Enclave(enclave) => self.call(enclave, Who::Owner, Pointer::Good, word, &[0; 32])?.map(|(value, _)| value),
        };
        Some(result.map_or_else(|code| code.name().to_owned(), |value| value.to_string()))
    }

    fn poll(&self, on: On) -> String {
        let On::Enclave(enclave) = on else { return "0x5".to_owned() };
        let home = self.enclaves.get(enclave).filter(|entry| entry.open).and_then(|entry| entry.home.as_ref());
        home.map_or_else(|| NO_ENCLAVE.to_owned(), |home| if home.hung_up() { "0x10" } else { "0x0" }.to_owned())
    }

    fn file(&self, on: On, call: FileCall) -> String {
        let there = match on {
            On::Device => true,
            On::Enclave(enclave) => self.enclaves.get(enclave).is_some_and(|entry| entry.open),
        };
        let enclave = matches!(on, On::Enclave(_));
        match call {
            _ if !there => NO_ENCLAVE,
            FileCall::Read => "EINVAL",
            FileCall::Write if enclave => "EINVAL",
            // It was opened for reading only.
            FileCall::Write => "EBADF",
            FileCall::Seek => "0",
            FileCall::Map => "ENODEV",
            FileCall::CloseOnExec => "1",
            FileCall::Link if enclave => "anon_inode:ne-vm",
            FileCall::Link => "/dev/nitro_enclaves",
        }
        .to_owned()
    }

    fn holder(&mut self, enclave: usize, change: impl FnOnce(&mut Entry) -> bool) -> String {
        let Some(entry) = self.enclaves.get_mut(enclave) else { return NO_ENCLAVE.to_owned() };
        if !change(entry) {
            return NO_ENCLAVE.to_owned();
        }
        let gone = !entry.open && !entry.kept;
        if let Some(home) = entry.home.take_if(|_| gone) {
            self.release(home);
        }
        "0".to_owned()
    }

    fn release(&mut self, home: Home) {
        self.left_over.push(home);
        let (machine, device) = (&self.machine, &mut self.device);
        self.left_over.retain_mut(|home| home.release(machine, device).is_err());
    }

    fn end(&mut self, enclave: usize) -> String {
        let Some(uid) = self.enclaves.get(enclave).and_then(|entry| entry.home.as_ref()).map(Home::slot_uid) else {
            return NO_ENCLAVE.to_owned();
        };
        if self.device.model.report_end(uid) { "0" } else { "refused" }.to_owned()
    }

    fn write_pool(&mut self, text: &str, privileged: bool) -> String {
        if !privileged {
            return Code::EPERM.name().to_owned();
        }
        let result = self.machine.with_pool(|pool, cpus| pool.write(text.as_bytes(), cpus));
        result.map_or_else(|error| Code::from(error).name().to_owned(), |()| text.len().to_string())
    }
}

/// Of the extension all but STOP is the home's.
fn is_of_the_home(word: u32) -> bool {
    word != extension::STOP && extension::COMMANDS.iter().any(|command| command.word == word)
}

impl Target for Core {
    fn head(&self) -> Vec<(String, String)> {
        let cpus = self.machine.inner.borrow().1.online.len();
        let threads = self.machine.inner.borrow().1.threads;
        let pairs = [
            ("transcript", "1".to_owned()),
            ("target", "core".to_owned()),
            ("kernel", "none".to_owned()),
            ("module", "nitroxide-driver".to_owned()),
            ("pool", self.pool.trim().to_owned()),
            ("cpus", format!("0-{}", cpus.saturating_sub(1))),
            ("cpu 0 with", if threads > 1 { format!("0-{}", threads - 1) } else { "0".to_owned() }),
            ("layout", self.layout.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")),
            ("control", "direct".to_owned()),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn perform(&mut self, op: &Op) -> String {
        let answer = match op {
            Op::WritePool { text, privileged } => self.write_pool(text, *privileged),
            Op::ReadPool => self.machine.with_pool(|pool, _| {
                let (text, end) = pool.read();
                format!("{:?}", String::from_utf8_lossy(&[text, end].concat()))
            }),
            Op::Online => list(&self.machine.inner.borrow().1.online),
            Op::SetOnline { cpu, online } => self
                .machine
                .with_pool(|_, cpus| cpus.set_online(CpuId(*cpu), *online).map_or_else(|code| code.name().to_owned(), |()| "0".to_owned())),
            Op::Create { enclave, pointer } => self.create(*enclave, *pointer),
            Op::AddVcpu { .. } | Op::LoadInfo { .. } | Op::SetMemory { .. } | Op::Start { .. } => {
                self.enclave_call(op).unwrap_or_else(|| NO_ENCLAVE.to_owned())
            }
            Op::Ioctl { on, word } => self.raw(*on, *word).unwrap_or_else(|| NO_ENCLAVE.to_owned()),
            Op::File { on, call } => self.file(*on, *call),
            Op::Poll { on, .. } => self.poll(*on),
            Op::Keep(enclave) => self.holder(*enclave, |entry| entry.open && !std::mem::replace(&mut entry.kept, true)),
            Op::Unkeep(enclave) => self.holder(*enclave, |entry| std::mem::take(&mut entry.kept)),
            Op::Close(enclave) => self.holder(*enclave, |entry| std::mem::take(&mut entry.open)),
            Op::Map(pages) => self.memory.borrow_mut().map(*pages),
            Op::Unmap => {
                self.memory.borrow_mut().unmap();
                "0".to_owned()
            }
            Op::HugeFree => self.memory.borrow().in_use().to_string(),
            Op::Faults(rules) => match rules.parse::<Faults>() {
                Ok(faults) => {
                    self.device.model.set_faults(faults);
                    "0".to_owned()
                }
                Err(_) => "refused".to_owned(),
            },
            Op::Event => {
                self.device.model.raise_spurious_event();
                "0".to_owned()
            }
            Op::End(enclave) => self.end(*enclave),
            Op::MaxRegions(count) => {
                self.device.model.set_max_regions(*count);
                "0".to_owned()
            }
            Op::CountCommands => {
                self.device.commands = 0;
                "0".to_owned()
            }
            Op::Commands => self.device.commands.to_string(),
            Op::Usage => format!("{}M", self.device.model.usage().memory_bytes >> 20),
        };
        self.work();
        answer
    }
}

/// CPU numbers as the kernel writes a list of them.
fn list(online: &[bool]) -> String {
    let mut text = String::new();
    let mut index = 0;
    while index < online.len() {
        let length = online.iter().skip(index).take_while(|online| **online).count();
        if length > 0 {
            let comma = if text.is_empty() { "" } else { "," };
            text += &if length == 1 { format!("{comma}{index}") } else { format!("{comma}{index}-{}", index + length - 1) };
        }
        index += length.max(1);
    }
    text
}

/// The device model as the core's device.
struct Modelled {
    model: nitroxide_device::Device,
    events: Arc<AtomicU64>,
    commands: u64,
}

impl Modelled {
    fn new() -> Self {
        let model = nitroxide_device::Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default()));
        let events = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&events);
        model.on_event(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        Self { model, events, commands: 0 }
    }
}

impl Device for Modelled {
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        self.commands += 1;
        self.model.command(command.number(), request).ok_or(SendError::NoReply)
    }
    fn events_seen(&mut self) -> u64 {
        self.events.load(Ordering::SeqCst)
    }
    fn now_ns(&mut self) -> u64 {
        0
    }
    fn notice(&mut self, _notice: &Notice) {}
}

struct CpuSet {
    online: Vec<bool>,
    threads: u32,
    claimed: BTreeSet<u32>,
    /// The first CPU of node 1.
    second_node: Option<u32>,
}

impl Cpus for CpuSet {
    fn count(&self) -> u32 {
        u32::try_from(self.online.len()).unwrap_or(u32::MAX)
    }
    fn is_online(&self, cpu: CpuId) -> bool {
        usize::try_from(cpu.0).ok().and_then(|cpu| self.online.get(cpu)).copied().unwrap_or(false)
    }
    fn core_of(&self, cpu: CpuId) -> CpuId {
        let first = cpu.0 - cpu.0 % self.threads;
        (first..first + self.threads).map(CpuId).find(|cpu| self.is_online(*cpu)).unwrap_or(cpu)
    }
    fn node_of(&self, cpu: CpuId) -> i32 {
        i32::from(self.second_node.is_some_and(|second| cpu.0 >= second))
    }
    fn set_online(&mut self, cpu: CpuId, online: bool) -> Result<(), Code> {
        let place = usize::try_from(cpu.0).ok().and_then(|cpu| self.online.get_mut(cpu)).ok_or(Code::ENOENT)?;
        *place = online;
        Ok(())
    }
    fn claim(&mut self, cpu: CpuId) -> bool {
        !self.is_online(cpu) && self.claimed.insert(cpu.0)
    }
    fn unclaim(&mut self, cpu: CpuId) {
        self.claimed.remove(&cpu.0);
    }
}

struct Shared {
    inner: RefCell<(Pool<Vec<CpuEntry>>, CpuSet)>,
    ledger: RefCell<Ledger<Vec<LedgerEntry>>>,
}

impl Shared {
    fn new(cpus: u32, threads: u32) -> Self {
        let count = usize::try_from(cpus).unwrap_or(0);
        let pool = Pool::new(vec![CpuEntry::default(); count]);
        let set = CpuSet { online: vec![true; count], threads, claimed: BTreeSet::new(), second_node: None };
        Self { inner: RefCell::new((pool, set)), ledger: RefCell::new(Ledger::new(vec![LedgerEntry::default(); 4096])) }
    }
}

impl Machine for Shared {
    type CpuTable = Vec<CpuEntry>;
    type RunTable = Vec<LedgerEntry>;
    type Cpus = CpuSet;

    fn with_pool<T>(&self, act: impl FnOnce(&mut Pool<Vec<CpuEntry>>, &mut CpuSet) -> T) -> T {
        let (pool, cpus) = &mut *self.inner.borrow_mut();
        act(pool, cpus)
    }

    fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger<Vec<LedgerEntry>>) -> T) -> T {
        act(&mut self.ledger.borrow_mut())
    }
}
