//! One thread of the stress: [`Worker::run`] makes random calls until it is told to stop, and judges every answer.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nitroxide_abi::extension::{self, EnclaveInfo, List, PoolInfo, Query, Stop};
use nitroxide_abi::limits::GRANULE;
use nitroxide_abi::{Code, ioctl};

use super::calls::{Argument, Asked, Gone, Kind};
use super::child::{Child, INHERITED};
use super::shared::{Enclave, NOTHING, PAGES, PAGES_EACH, SMALL, Shared, Thing, lock};
use crate::machine::{POOL, meminfo};
use crate::random::Numbers;
use crate::sys;

/// Enclaves that a thread has for itself at most.
const MOST_OWN: usize = 2;
/// Further descriptors of enclaves that a thread keeps at most.
const MOST_DUPS: usize = 4;
/// CPUs beyond every machine's.
const NO_CPU: u32 = 1 << 20;
/// How long an end that the device has announced may take to be seen. It only ends hangs.
const END_PATIENCE: Duration = Duration::from_secs(120);

/// What the device is told to do wrong. The refusals are those of [`super::calls::INJECTED`].
const FAULTS: [&str; 12] = [
    "alloc=-EAGAIN",
    "alloc@2=-EBUSY,alloc@3=delay:5ms",
    "add-vcpu@1-2=-EBUSY",
    "add-mem@3=-EAGAIN",
    "add-mem@2=-EBUSY,add-mem@5=delay:5ms",
    "start@1=-EBUSY",
    "start=delay:30ms",
    "any=delay:2ms",
    "any@5=spurious,any@9=spurious",
    "event=delay:20ms",
    "free=delay:10ms",
    "stop=delay:20ms",
];
/// The same for drivers that get over them.
const HARDER_FAULTS: [&str; 4] = ["stop@1-3=-EBUSY", "free@1=-EAGAIN", "free=-EBUSY", "info@1-2=-EBUSY"];

/// A thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    numbers: Numbers,
    number: u64,
    own: Vec<Arc<Enclave>>,
    dups: Vec<OwnedFd>,
    /// Does this thread make the device refuse at the moment?
    is_faulty: bool,
}

impl Worker {
    pub(super) fn new(shared: &Arc<Shared>, seed: u64, number: u64) -> Self {
        Self {
            shared: Arc::clone(shared),
            numbers: Numbers::of_thread(seed, number),
            number,
            own: Vec::new(),
            dups: Vec::new(),
            is_faulty: false,
        }
    }

    /// Runs until the end; then everything of it is closed.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.shared.drain.load(Ordering::SeqCst) {
                self.let_go();
                std::thread::sleep(Duration::from_micros(300));
                continue;
            }
            self.step();
        }
        self.let_go();
    }

    fn let_go(&mut self) {
        self.own.clear();
        self.dups.clear();
        for place in &self.shared.places {
            // Not with the place locked: a close can take long.
            let enclave = lock(place).take();
            drop(enclave);
        }
    }

    fn step(&mut self) {
        match self.numbers.below(100) {
            0..=3 => self.create(),
            4..=16 => self.life(),
            17..=31 => self.with_enclave(Self::add_vcpu),
            32..=45 => self.with_enclave(Self::set_memory),
            46..=49 => self.with_enclave(Self::load_info),
            50..=55 => self.with_enclave(Self::start),
            56..=60 => self.with_enclave(Self::poll),
            61..=71 => self.close(),
            72..=75 => self.move_to_place(),
            76..=77 => self.dup(),
            78..=79 => self.with_enclave(Self::stop),
            80..=81 => self.with_enclave(Self::info),
            82..=83 => self.list(),
            84 => self.pool_info(),
            85 => self.query(),
            86..=87 => self.with_enclave(Self::fdinfo),
            88 => self.unknown(),
            89 => self.write_pool(),
            90 => self.read_pool(),
            91 => self.look_at_memory(),
            92 => self.fork_and_kill(),
            93 => self.event(),
            94..=97 => self.with_enclave(Self::end),
            98 => self.faults(),
            _ => std::thread::sleep(Duration::from_micros(self.numbers.below(2000))),
        }
    }

    /// One of its own, or one that lies where every thread can take it.
    fn with_enclave(&mut self, act: fn(&mut Self, &Enclave)) {
        let enclave = if self.numbers.below(10) < 6 {
            let index = self.numbers.index(self.own.len());
            self.own.get(index).cloned()
        } else {
            let index = self.numbers.index(self.shared.places.len());
            self.shared.places.get(index).and_then(|place| lock(place).clone())
        };
        let Some(enclave) = enclave else { return };
        act(self, &enclave);
        // Nothing more is to be had from those whose device has gone.
        if enclave.gone() != Gone::No && self.numbers.once_in(4) {
            self.own.retain(|own| own.serial != enclave.serial);
            for place in &self.shared.places {
                let gone = lock(place).take_if(|there| there.serial == enclave.serial);
                drop(gone);
            }
        }
    }

    /// A call on an enclave, counted and judged.
    fn call(&self, enclave: &Enclave, kind: Kind, word: u32, argument: Argument, bytes: &mut [u8]) -> i64 {
        let (before, faults) = (enclave.gone(), self.shared.faults.now());
        let result = match argument {
            Argument::Null => sys::ioctl(enclave.fd.as_raw_fd(), word, 0),
            _ => sys::ioctl_with(enclave.fd.as_raw_fd(), word, bytes),
        };
        let answer = fold(result);
        // Gone for long before it began; or perhaps at its end.
        let gone = if before == Gone::Yes {
            Gone::Yes
        } else if enclave.gone() == Gone::No {
            Gone::No
        } else {
            Gone::Maybe
        };
        let asked = self.asked(kind, argument, gone, faults);
        self.shared.note(&asked, answer, &|| format!("thread {}, enclave {}, {bytes:?}", self.number, enclave.serial));
        answer
    }

    /// A call on the node, counted and judged.
    fn node_call(&self, kind: Kind, word: u32, argument: Argument, bytes: &mut [u8]) -> i64 {
        let (before, faults) = (self.shared.bound.now(), self.shared.faults.now());
        let result = match argument {
            Argument::Null => sys::ioctl(self.shared.device.as_raw_fd(), word, 0),
            _ => sys::ioctl_with(self.shared.device.as_raw_fd(), word, bytes),
        };
        let answer = fold(result);
        let asked = self.asked(kind, argument, self.shared.node_gone(before), faults);
        self.shared.note(&asked, answer, &|| format!("thread {}", self.number));
        answer
    }

    fn asked(&self, kind: Kind, argument: Argument, gone: Gone, faults_before: u64) -> Asked {
        let faults = self.shared.faults.met(faults_before);
        Asked { kind, argument, gone, faults, stranger: false, extension: self.shared.driver.extension }
    }

    fn make(&mut self) -> Option<Arc<Enclave>> {
        let before = self.shared.bound.now();
        let argument = if self.numbers.once_in(20) { Argument::Null } else { Argument::Good };
        let mut uid = [0; 8];
        let answer = self.node_call(Kind::Create, ioctl::CREATE_VM, argument, &mut uid);
        let fd = sys::own(answer)?;
        Some(Enclave::new(&self.shared, fd, u64::from_le_bytes(uid), before))
    }

    fn create(&mut self) {
        if self.own.len() < MOST_OWN {
            let made = self.make();
            self.own.extend(made);
        }
    }

    /// A whole set-up in one go, in the pages that are this thread's; it stays open or not.
    fn life(&mut self) {
        if self.own.len() >= MOST_OWN {
            self.own.remove(0);
        }
        let Some(enclave) = self.make() else { return };
        let first = self.number * PAGES_EACH;
        if first + PAGES_EACH <= self.shared.pages {
            self.give(&enclave, first, PAGES_EACH);
        }
        for _ in 0..2 {
            self.add(&enclave, 0, Argument::Good);
        }
        self.start(&enclave);
        match self.numbers.below(6) {
            0 => self.end(&enclave),
            1 => self.stop(&enclave),
            _ => self.poll(&enclave),
        }
        if self.numbers.once_in(3) {
            self.own.push(enclave);
        }
    }

    fn add_vcpu(&mut self, enclave: &Enclave) {
        match self.numbers.below(20) {
            0 => self.add(enclave, 0, Argument::Null),
            1 => self.add(enclave, NO_CPU, Argument::Bad(&[Code::INVALID_VCPU])),
            2..=5 => {
                let cpu = u32::try_from(1 + self.numbers.below(12)).unwrap_or(1);
                self.add(enclave, cpu, Argument::Good);
            }
            _ => self.add(enclave, 0, Argument::Good),
        }
    }

    fn add(&self, enclave: &Enclave, cpu: u32, argument: Argument) {
        let mut bytes = cpu.to_le_bytes();
        if cpu != 0 && argument == Argument::Good {
            // A number that the machine may not have.
            let before = self.shared.faults.now();
            let (was, answer) = (enclave.gone(), fold(sys::ioctl_with(enclave.fd.as_raw_fd(), ioctl::ADD_VCPU, &mut bytes)));
            let gone = if was == Gone::No && enclave.gone() == Gone::No { Gone::No } else { Gone::Maybe };
            self.shared.tally.count(Kind::AddVcpu, answer);
            let asked = self.asked(Kind::AddVcpu, argument, gone, before);
            if !asked.allows(answer) && answer != -i64::from(Code::INVALID_VCPU.number()) {
                self.shared.fail(format!("thread {}: ADD_VCPU {cpu} -> {} ({asked:?})", self.number, super::calls::answer_text(answer)));
            }
            if answer == 0 {
                enclave.take(Thing::Cpu(u32::from_le_bytes(bytes)));
            }
            return;
        }
        if self.call(enclave, Kind::AddVcpu, ioctl::ADD_VCPU, argument, &mut bytes) == 0 {
            enclave.take(Thing::Cpu(u32::from_le_bytes(bytes)));
        }
    }

    fn set_memory(&mut self, enclave: &Enclave) {
        let pages = self.shared.pages;
        let page = self.numbers.below(pages);
        let at = PAGES + page * GRANULE;
        let refusals = self.shared.driver.mends(1);
        let count = 1 + self.numbers.below(6).min(pages - page - 1);
        let which = self.numbers.below(24);
        let ask = |address, memory_size, flags, argument| {
            let mut bytes = ioctl::UserMemoryRegion { flags, memory_size, userspace_addr: address }.to_bytes();
            self.call(enclave, Kind::SetMemory, ioctl::SET_USER_MEMORY_REGION, argument, &mut bytes);
        };
        match which {
            0 => ask(at, GRANULE, 0, Argument::Null),
            1 => ask(at, GRANULE, 1, Argument::Bad(&[Code::INVALID_FLAG_VALUE])),
            2 => ask(at, GRANULE + 4096, 0, Argument::Bad(&[Code::INVALID_MEM_REGION_SIZE])),
            3 => ask(at + 4096, GRANULE, 0, Argument::Bad(&[Code::UNALIGNED_MEM_REGION_ADDR])),
            4 => ask(0xffff_8000_0000_0000, GRANULE, 0, Argument::Bad(&[Code::INVALID_MEM_REGION_ADDR])),
            5 => ask(at, 0, 0, Argument::Bad(&[Code::ENOMEM])),
            6 => ask(NOTHING, GRANULE, 0, Argument::Bad(&[Code::EFAULT])),
            // What the C driver loses.
            7 if refusals => ask(SMALL, GRANULE, 0, Argument::Bad(&[Code::MEM_NOT_HUGE_PAGE])),
            8 if refusals => ask(PAGES + (pages - 2) * GRANULE, 4 * GRANULE, 0, Argument::Bad(&[Code::EFAULT])),
            9..=12 if self.number * PAGES_EACH + PAGES_EACH <= pages => self.give(enclave, self.number * PAGES_EACH, PAGES_EACH),
            _ => self.give(enclave, page, count),
        }
    }

    fn give(&self, enclave: &Enclave, page: u64, count: u64) {
        let region = ioctl::UserMemoryRegion { flags: 0, memory_size: count * GRANULE, userspace_addr: PAGES + page * GRANULE };
        let answer = self.call(enclave, Kind::SetMemory, ioctl::SET_USER_MEMORY_REGION, Argument::Good, &mut region.to_bytes());
        if answer == 0 {
            (page..page + count).for_each(|page| enclave.take(Thing::Page(page)));
        }
    }

    fn load_info(&mut self, enclave: &Enclave) {
        let (flags, argument) = match self.numbers.below(8) {
            0 => (1, Argument::Null),
            1 => (2, Argument::Bad(&[Code::INVALID_FLAG_VALUE])),
            _ => (1, Argument::Good),
        };
        let mut bytes = ioctl::ImageLoadInfo { flags, memory_offset: 0 }.to_bytes();
        self.call(enclave, Kind::LoadInfo, ioctl::GET_IMAGE_LOAD_INFO, argument, &mut bytes);
    }

    fn start(&mut self, enclave: &Enclave) {
        let (flags, enclave_cid, argument) = match self.numbers.below(20) {
            0 => (0, 0, Argument::Null),
            1 => (2, 0, Argument::Bad(&[Code::INVALID_FLAG_VALUE])),
            2 => (0, 3, Argument::Bad(&[Code::INVALID_ENCLAVE_CID])),
            3..=5 => (1, 100 + self.numbers.below(4), Argument::Good),
            _ => (0, 0, Argument::Good),
        };
        let mut bytes = ioctl::EnclaveStartInfo { flags, enclave_cid }.to_bytes();
        if self.call(enclave, Kind::Start, ioctl::START_ENCLAVE, argument, &mut bytes) == 0 && enclave.started.swap(true, Ordering::SeqCst)
        {
            self.shared.fail(format!("thread {}: enclave {} was started twice", self.number, enclave.serial));
        }
    }

    fn poll(&mut self, enclave: &Enclave) {
        let timeout = if self.numbers.once_in(8) { 20 } else { 0 };
        self.look(enclave, timeout);
    }

    /// Has it ended?
    fn look(&self, enclave: &Enclave, timeout_ms: i32) -> bool {
        let before = enclave.hung_up.load(Ordering::SeqCst);
        let answer = fold(sys::poll(enclave.fd.as_raw_fd(), timeout_ms));
        self.shared.tally.count(Kind::Poll, answer.min(0));
        let hung_up = answer == i64::from(libc::POLLHUP);
        if !hung_up && (answer != 0 || before) {
            self.shared
                .fail(format!("thread {}: poll of enclave {} gives {answer:#x}, hung up before: {before}", self.number, enclave.serial));
        }
        enclave.hung_up.fetch_or(hung_up, Ordering::SeqCst);
        hung_up
    }

    fn close(&mut self) {
        if self.numbers.once_in(3) && !self.dups.is_empty() {
            self.shared.tally.count(Kind::Close, 0);
            let index = self.numbers.index(self.dups.len());
            drop(self.dups.swap_remove(index));
        } else if !self.own.is_empty() {
            let index = self.numbers.index(self.own.len());
            drop(self.own.swap_remove(index));
        } else {
            let index = self.numbers.index(self.shared.places.len());
            let enclave = self.shared.places.get(index).and_then(|place| lock(place).take());
            drop(enclave);
        }
    }

    /// Now every thread can take it.
    fn move_to_place(&mut self) {
        let index = self.numbers.index(self.shared.places.len());
        if let (Some(enclave), Some(place)) = (self.own.pop(), self.shared.places.get(index)) {
            let before = lock(place).replace(enclave);
            drop(before);
        }
    }

    fn dup(&mut self) {
        let index = self.numbers.index(self.own.len());
        let Some(enclave) = self.own.get(index).filter(|_| self.dups.len() < MOST_DUPS) else { return };
        let dup = enclave.fd.try_clone();
        self.shared.tally.count(Kind::Dup, dup.as_ref().err().and_then(std::io::Error::raw_os_error).map_or(0, |errno| -i64::from(errno)));
        self.dups.extend(dup);
    }

    fn stop(&mut self, enclave: &Enclave) {
        let (size, argument) = match self.numbers.below(8) {
            0 => (8, Argument::Null),
            1 => (7, Argument::Bad(&[Code::EINVAL])),
            _ => (8, Argument::Good),
        };
        let answer = self.call(enclave, Kind::Stop, extension::STOP, argument, &mut Stop { size, flags: 0 }.to_bytes());
        if answer == 0 && !self.look(enclave, 0) {
            self.shared.fail(format!("thread {}: enclave {} is stopped but not hung up", self.number, enclave.serial));
        }
    }

    fn info(&mut self, enclave: &Enclave) {
        let mut bytes = EnclaveInfo { size: 120, ..EnclaveInfo::default() }.to_bytes();
        if self.call(enclave, Kind::Info, extension::ENCLAVE_INFO, Argument::Good, &mut bytes) == 0 {
            let info = EnclaveInfo::from_bytes(&bytes);
            let in_order =
                (info.started_ns == 0 || info.created_ns <= info.started_ns) && (info.ended_ns == 0 || info.created_ns <= info.ended_ns);
            if info.slot_uid != enclave.uid || !in_order || !info.memory_size.is_multiple_of(GRANULE) {
                self.shared.fail(format!("thread {}: ENCLAVE_INFO of slot {:#x} is {info:?}", self.number, enclave.uid));
            }
        }
    }

    fn list(&mut self) {
        let mut before = 0;
        let mut bytes = List { size: 72, ..List::default() }.to_bytes();
        for _ in 0..256 {
            if self.node_call(Kind::List, extension::LIST, Argument::Good, &mut bytes) != 0 {
                return;
            }
            let uid = List::from_bytes(&bytes).slot_uid;
            if uid <= before {
                self.shared.fail(format!("thread {}: LIST gives slot {uid:#x} after {before:#x}", self.number));
            }
            before = uid;
        }
    }

    fn pool_info(&mut self) {
        let mut bytes = PoolInfo { size: 296, ..PoolInfo::default() }.to_bytes();
        if self.node_call(Kind::PoolInfo, extension::POOL_INFO, Argument::Good, &mut bytes) == 0 {
            let info = PoolInfo::from_bytes(&bytes);
            let ones = |mask: &[u64; 16]| mask.iter().map(|word| word.count_ones()).sum::<u32>();
            if ones(&info.pool_mask) != info.cpus || ones(&info.free_mask) != info.free_cpus || info.free_cores > info.cores {
                self.shared.fail(format!("thread {}: POOL_INFO is {info:?}", self.number));
            }
        }
    }

    fn query(&mut self) {
        let mut bytes = Query { size: 152, ..Query::default() }.to_bytes();
        self.node_call(Kind::Query, extension::QUERY, Argument::Good, &mut bytes);
        self.node_call(Kind::Version, extension::GET_API_VERSION, Argument::Good, &mut [0; 8]);
    }

    fn fdinfo(&mut self, enclave: &Enclave) {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", enclave.fd.as_raw_fd()));
        self.shared.tally.count(Kind::FdInfo, errno(text.as_ref().err()));
        let line = format!("ne_slot_uid:\t{:#x}\n", enclave.uid);
        if text.as_ref().map_or(true, |text| self.shared.driver.extension && !text.contains(&line)) {
            self.shared.fail(format!("thread {}: fdinfo of slot {:#x} is {text:?}", self.number, enclave.uid));
        }
    }

    fn unknown(&mut self) {
        self.node_call(Kind::Unknown, 0xAE7F, Argument::Good, &mut [0; 16]);
        self.with_enclave(|worker, enclave| {
            worker.call(enclave, Kind::Unknown, ioctl::CREATE_VM, Argument::Good, &mut [0; 16]);
        });
    }

    /// The pool as it is, while others have enclaves: EPERM nearly always.
    fn write_pool(&mut self) {
        if self.shared.driver.mends(16) && self.shared.open.load(Ordering::SeqCst) > 0 {
            let text = self.shared.pool.clone();
            write_pool(&self.shared, &text);
        }
    }

    fn read_pool(&mut self) {
        let text = fs::read(POOL);
        self.shared.tally.count(Kind::PoolRead, errno(text.as_ref().err()));
        // Without a pool it is a lone newline; what was written may have a newline of its own.
        let is_known = |text: &Vec<u8>| text == b"\n" || text.trim_ascii() == self.shared.pool.trim_ascii();
        if !text.as_ref().is_ok_and(is_known) {
            self.shared.fail(format!("thread {}: the pool is {text:?}", self.number));
        }
    }

    fn look_at_memory(&mut self) {
        self.shared.tally.count(Kind::Meminfo, 0);
        let (free, total) = (meminfo("HugePages_Free"), meminfo("HugePages_Total"));
        if free < 0 || free > total {
            self.shared.fail(format!("thread {}: {free} of {total} huge pages are free", self.number));
        }
    }

    fn fork_and_kill(&mut self) {
        let mut held: Vec<Arc<Enclave>> = self.own.clone();
        held.extend(self.shared.places.iter().filter_map(|place| lock(place).clone()));
        let mut inherited: [Option<RawFd>; INHERITED] = [None; INHERITED];
        for (place, enclave) in inherited.iter_mut().zip(&held) {
            *place = Some(enclave.fd.as_raw_fd());
        }
        let first_page = (self.number * PAGES_EACH).min(self.shared.pages.saturating_sub(PAGES_EACH));
        let child = Child {
            numbers: Numbers::of_thread(self.numbers.next(), self.number),
            tally: self.shared.tally,
            node: self.shared.device.as_raw_fd(),
            inherited,
            extension: self.shared.driver.extension,
            pages: self.shared.pages,
            first_page,
            own_pages: PAGES_EACH.min(self.shared.pages),
            nobody: self.numbers.once_in(4),
        };
        self.shared.children.fetch_add(1, Ordering::SeqCst);
        match sys::fork_from_threads(|| child.run()) {
            Ok(child) => {
                sys::pause_us(u32::try_from(500 + self.numbers.below(25_000)).unwrap_or(1000));
                sys::kill_child(child);
                self.shared.tally.count(Kind::Fork, 0);
            }
            Err(error) => self.shared.fail(format!("thread {}: fork: {error}", self.number)),
        }
        self.shared.children.fetch_sub(1, Ordering::SeqCst);
    }

    fn event(&mut self) {
        if self.shared.tell("event") {
            self.shared.tally.count(Kind::Event, 0);
        }
    }

    /// The device ends an enclave; it has to be seen.
    fn end(&mut self, enclave: &Enclave) {
        if !enclave.started.load(Ordering::SeqCst) || !self.shared.tell(&format!("end {:#x}", enclave.uid)) {
            return;
        }
        self.shared.tally.count(Kind::End, 0);
        // Another enclave may have its slot's number after an unbind.
        let began = Instant::now();
        while !self.look(enclave, 10) {
            if enclave.gone() != Gone::No || self.shared.stop.load(Ordering::Relaxed) {
                return;
            }
            if began.elapsed() > END_PATIENCE {
                self.shared.fail(format!("thread {}: the end of enclave {} is not seen", self.number, enclave.serial));
                return;
            }
            // A look that the device refused is made up for by the next call.
            let mut bytes = ioctl::ImageLoadInfo { flags: 1, memory_offset: 0 }.to_bytes();
            self.call(enclave, Kind::LoadInfo, ioctl::GET_IMAGE_LOAD_INFO, Argument::Good, &mut bytes);
        }
    }

    /// The device refuses commands for a while, for everybody.
    fn faults(&mut self) {
        if self.is_faulty || self.shared.control.is_none() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let Ok(_alone) = shared.faulty.try_lock() else { return };
        let hard = shared.driver.mends(10) && shared.driver.mends(2) && self.numbers.once_in(3);
        let list: &[&str] = if hard { &HARDER_FAULTS } else { &FAULTS };
        let rules = list.get(self.numbers.index(list.len())).copied().unwrap_or_default();
        shared.faults.step();
        // Refused while the device is off.
        shared.tally.count(Kind::Faults, if shared.tell(&format!("faults {rules}")) { 0 } else { -i64::from(libc::ENODEV) });
        self.is_faulty = true;
        for _ in 0..10 + self.numbers.below(30) {
            self.step();
        }
        self.is_faulty = false;
        clear_faults(&shared);
        shared.faults.step();
    }
}

/// The device does everything again; tried until it hears, since it does not while it is off.
pub(super) fn clear_faults(shared: &Shared) {
    let began = Instant::now();
    while !shared.tell("faults ") {
        if began.elapsed() > END_PATIENCE {
            shared.fail("the device's faults cannot be cleared".to_owned());
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Writes to the pool's parameter; judged where it must not be anything but EPERM or success.
pub(super) fn write_pool(shared: &Shared, text: &[u8]) -> i64 {
    let before = shared.bound.now();
    let result = OpenOptions::new().write(true).open(POOL).and_then(|mut file| file.write(text));
    let answer = errno(result.as_ref().err());
    let gone = shared.node_gone(before);
    let asked = Asked { kind: Kind::PoolWrite, argument: Argument::Good, gone, faults: false, stranger: false, extension: true };
    shared.note(&asked, answer, &|| format!("pool {:?}", String::from_utf8_lossy(text)));
    answer
}

fn fold(result: Result<i64, i32>) -> i64 {
    result.unwrap_or_else(|errno| -i64::from(errno))
}

/// An error as a negative code, 0 without one.
fn errno(error: Option<&std::io::Error>) -> i64 {
    error.and_then(std::io::Error::raw_os_error).map_or(0, |errno| -i64::from(errno))
}
