//! The semantics once more, as plainly as possible: sets, maps and numbers, nothing of the core's code.
//!
//! Each method does one call on the model. It takes the record of what the device was sent, insists that it is what the call had to
//! send, and returns the number that the caller gets: 0 or more, or a negative code.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use nitroxide_abi::pci::{Command, Reply};
use nitroxide_driver::SendError;

use crate::recorder::Exchange;
use crate::support::client::Mapped;

const MIB: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Life {
    Setup,
    Running,
    Ended,
    Odd,
    Gone,
}

/// One enclave.
#[derive(Debug)]
pub struct One {
    pub uid: u64,
    pub life: Life,
    pub most_runs: u64,
    pub added: BTreeSet<u32>,
    /// CPUs of its cores.
    pub cpus: BTreeSet<u32>,
    pub ranges: Vec<(u64, u64)>,
    /// Physical addresses of its pages, each with its size.
    pub pages: BTreeMap<u64, u64>,
    pub runs: u64,
    pub bytes: u64,
    pub hup: bool,
    pub maybe_started: bool,
    pub maybe_freed: bool,
}

/// What a command came to.
enum Came {
    Fine(Reply),
    Refused(i64),
    Unsent,
    Silence,
    Gone,
}

type Record = VecDeque<Exchange>;

#[derive(Debug, Default)]
pub struct Reference {
    /// Core number (its lowest CPU) of each CPU in the pool.
    pub pool: BTreeMap<u32, u32>,
    pub text: String,
    pub foreign: BTreeSet<u32>,
    pub withheld: BTreeSet<u32>,
    pub enclaves: BTreeMap<u64, One>,
    /// Pages as the client maps them, by address.
    pub mapped: BTreeMap<u64, Mapped>,
}

impl Reference {
    pub fn free(&self) -> BTreeSet<u32> {
        let taken: BTreeSet<u32> = self.enclaves.values().flat_map(|one| one.cpus.iter().copied()).collect();
        self.pool.keys().copied().filter(|cpu| !taken.contains(cpu) && !self.foreign.contains(cpu)).collect()
    }

    pub fn pages(&self) -> usize {
        self.enclaves.values().map(|one| one.pages.len()).sum()
    }

    pub fn write_pool(&mut self, text: &str, cpus: Result<&[u32], i64>) -> i64 {
        if !self.enclaves.is_empty() || !self.foreign.is_empty() {
            return -1;
        }
        self.pool.clear();
        self.text.clear();
        match cpus {
            Err(code) => code,
            Ok(cpus) => {
                self.pool = cpus.iter().map(|cpu| (*cpu, cpu & !1)).collect();
                self.text = text.to_owned();
                0
            }
        }
    }

    pub fn foreign(&mut self, cpu: u32, foreign: bool) {
        let pair = [cpu & !1, cpu | 1];
        if !foreign {
            self.foreign.retain(|cpu| !pair.contains(cpu));
        } else if self.free().contains(&cpu) {
            self.foreign.extend(pair);
        }
    }

    /// Create; `Ok` with the uid if there is an enclave now, whatever the caller got.
    pub fn create(&mut self, good_pointer: bool, record: &mut Record) -> (i64, Option<u64>) {
        if self.free().is_empty() {
            return (-272, None);
        }
        let reply = match came(record, Command::SlotAlloc, &[0]) {
            Came::Fine(reply) => reply,
            other => return (number(&other), None),
        };
        let one = One {
            uid: reply.slot_uid,
            life: Life::Setup,
            most_runs: reply.mem_regions,
            added: BTreeSet::new(),
            cpus: BTreeSet::new(),
            ranges: Vec::new(),
            pages: BTreeMap::new(),
            runs: 0,
            bytes: 0,
            hup: false,
            maybe_started: false,
            maybe_freed: false,
        };
        self.enclaves.insert(one.uid, one);
        if good_pointer {
            return (0, Some(reply.slot_uid));
        }
        self.release(reply.slot_uid, record);
        (-14, Some(reply.slot_uid))
    }

    pub fn add_vcpu(&mut self, uid: u64, cpu: u32, owner: bool, record: &mut Record) -> i64 {
        if let Some(code) = self.not_in_setup(uid) {
            return code;
        }
        if cpu >= 8 {
            return -271;
        }
        let free = self.free();
        let one = &self.enclaves[&uid];
        let chosen = if cpu != 0 {
            if one.added.contains(&cpu) {
                return -256;
            }
            if !one.cpus.contains(&cpu) && (!free.contains(&cpu) || (owner && self.withheld_core(cpu))) {
                return -257;
            }
            cpu
        } else if let Some(own) = one.cpus.difference(&one.added).next() {
            *own
        } else if let Some(new) = free.iter().find(|cpu| !owner || !self.withheld_core(**cpu)) {
            *new
        } else {
            return -272;
        };
        if !owner {
            return -5;
        }
        let one = self.enclaves.get_mut(&uid).unwrap();
        let is_new = !one.cpus.contains(&chosen);
        one.cpus.extend([chosen & !1, chosen | 1]);
        let request: Vec<u8> = [&uid.to_le_bytes()[..], &chosen.to_le_bytes(), &[0; 4]].concat();
        let result = came(record, Command::SlotAddVcpu, &request);
        match result {
            Came::Fine(_) => {
                one.added.insert(chosen);
                return chosen.into();
            }
            Came::Silence => {}
            Came::Refused(_) | Came::Unsent | Came::Gone => {
                if is_new {
                    one.cpus.retain(|cpu| cpu & !1 != chosen & !1);
                }
            }
        }
        self.note_gone(uid, &result);
        number(&result)
    }

    fn withheld_core(&self, cpu: u32) -> bool {
        self.withheld.contains(&(cpu & !1)) || self.withheld.contains(&(cpu | 1))
    }

    pub fn load_info(&self, uid: u64, flags: u64) -> i64 {
        match self.not_in_setup(uid) {
            Some(code) => code,
            None if flags != 1 => -274,
            None => 8 << 20,
        }
    }

    pub fn set_memory(&mut self, uid: u64, address: u64, size: u64, flags: u64, owner: bool, record: &mut Record) -> i64 {
        if flags > 0 {
            return -274;
        }
        if let Some(code) = self.not_in_setup(uid) {
            return code;
        }
        if !owner {
            return -5;
        }
        if size % (2 * MIB) > 0 {
            return -259;
        }
        if address % (2 * MIB) > 0 {
            return -261;
        }
        let within = |at: u64, range: &(u64, u64)| range.0 <= at && at < range.0 + range.1;
        if self.enclaves[&uid].ranges.iter().any(|range| within(address, range) || within(range.0, &(address, size))) {
            return -262;
        }
        if size == 0 {
            return -12;
        }
        let mut pages = Vec::new();
        let mut at = address;
        while at < address + size {
            let Some((start, page)) = self.mapped.range(..=at).next_back().filter(|(start, page)| at < *start + page.size) else {
                return -14;
            };
            if !page.huge {
                return -263;
            }
            if page.size % (2 * MIB) > 0 || *start != at || at + page.size > address + size {
                return -273;
            }
            if page.node != 0 {
                return -264;
            }
            pages.push((page.gpa, page.size));
            at += page.size;
        }
        let mut runs: Vec<Vec<(u64, u64)>> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.last().is_some_and(|last| last.0 + last.1 == page.0) => run.push(page),
                _ => runs.push(vec![page]),
            }
        }
        let one = &self.enclaves[&uid];
        if one.runs + runs.len() as u64 > one.most_runs {
            return -265;
        }
        let mut seen: Vec<(u64, u64)> = self.enclaves.values().flat_map(|one| one.pages.iter().map(|(a, b)| (*a, *b))).collect();
        for page in runs.iter().flatten() {
            if seen.iter().any(|other| other.0 < page.0 + page.1 && page.0 < other.0 + other.1) {
                return -262;
            }
            seen.push(*page);
        }
        self.give(uid, (address, size), &runs, record)
    }

    fn give(&mut self, uid: u64, range: (u64, u64), runs: &[Vec<(u64, u64)>], record: &mut Record) -> i64 {
        let mut gave = false;
        let mut answer = 0;
        for run in runs {
            let bytes: u64 = run.iter().map(|page| page.1).sum();
            let request: Vec<u8> = [uid, run[0].0, bytes].iter().flat_map(|word| word.to_le_bytes()).collect();
            let result = came(record, Command::SlotAddMem, &request);
            let one = self.enclaves.get_mut(&uid).unwrap();
            let (taken, counted) = match result {
                Came::Fine(_) => (true, bytes),
                Came::Silence => (true, 0),
                Came::Refused(_) | Came::Unsent | Came::Gone => (false, 0),
            };
            one.bytes += counted;
            if taken {
                gave = true;
                one.runs += 1;
                one.pages.extend(run.iter().copied());
            }
            if !matches!(result, Came::Fine(_)) {
                answer = number(&result);
                self.note_gone(uid, &result);
                break;
            }
        }
        if gave {
            self.enclaves.get_mut(&uid).unwrap().ranges.push(range);
        }
        answer
    }

    /// `event`: did an event come while the device was starting it?
    pub fn start(&mut self, uid: u64, flags: u64, cid: u64, event: bool, record: &mut Record) -> i64 {
        if flags > 1 {
            return -274;
        }
        if [1, 2, 3].contains(&cid) || cid > 0xffff_fffe {
            return -275;
        }
        if let Some(code) = self.not_in_setup(uid) {
            return code;
        }
        let one = &self.enclaves[&uid];
        if one.runs == 0 {
            return -266;
        }
        if one.bytes < 64 * MIB {
            return -268;
        }
        if one.added.is_empty() {
            return -267;
        }
        if one.added != one.cpus {
            return -269;
        }
        let request: Vec<u8> = [uid, cid, flags].iter().flat_map(|word| word.to_le_bytes()).collect();
        let result = came(record, Command::EnclaveStart, &request);
        let Came::Fine(reply) = result else {
            self.enclaves.get_mut(&uid).unwrap().maybe_started |= matches!(result, Came::Silence);
            self.note_gone(uid, &result);
            return number(&result);
        };
        self.enclaves.get_mut(&uid).unwrap().life = Life::Running;
        if event {
            self.event(uid, record);
        }
        reply.enclave_cid.try_into().unwrap()
    }

    pub fn event(&mut self, uid: u64, record: &mut Record) {
        if self.enclaves[&uid].life != Life::Running {
            return;
        }
        let result = came(record, Command::SlotInfo, &uid.to_le_bytes());
        let one = self.enclaves.get_mut(&uid).unwrap();
        if let Came::Fine(reply) = result {
            one.life = life_of(reply.state);
            one.hup |= one.life != Life::Running;
        }
        self.note_gone(uid, &result);
    }

    pub fn stop(&mut self, uid: u64, record: &mut Record) -> i64 {
        match self.enclaves[&uid].life {
            Life::Running => {}
            Life::Gone => return -19,
            _ => return -276,
        }
        let result = came(record, Command::EnclaveStop, &uid.to_le_bytes());
        if let Came::Fine(_) = result {
            let one = self.enclaves.get_mut(&uid).unwrap();
            one.life = Life::Ended;
            one.maybe_started = false;
            one.hup = true;
            return 0;
        }
        self.note_gone(uid, &result);
        number(&result)
    }

    /// Whether it is over.
    pub fn release(&mut self, uid: u64, record: &mut Record) -> bool {
        let over = self.end(uid, record) && self.let_go(uid, record);
        if over {
            self.enclaves.remove(&uid);
        }
        over
    }

    fn end(&mut self, uid: u64, record: &mut Record) -> bool {
        let one = &self.enclaves[&uid];
        let runs = matches!(one.life, Life::Running | Life::Odd) || (one.life == Life::Setup && one.maybe_started);
        if !runs || one.maybe_freed {
            return true;
        }
        let result = came(record, Command::EnclaveStop, &uid.to_le_bytes());
        self.note_gone(uid, &result);
        match result {
            Came::Fine(_) => {
                let one = self.enclaves.get_mut(&uid).unwrap();
                one.life = Life::Ended;
                one.maybe_started = false;
                true
            }
            Came::Gone => true,
            Came::Refused(_) => {
                let result = came(record, Command::SlotInfo, &uid.to_le_bytes());
                self.note_gone(uid, &result);
                matches!(result, Came::Fine(reply) if life_of(reply.state) != Life::Running)
            }
            Came::Unsent | Came::Silence => false,
        }
    }

    fn let_go(&mut self, uid: u64, record: &mut Record) -> bool {
        if self.enclaves[&uid].life == Life::Gone {
            return true;
        }
        let result = came(record, Command::SlotFree, &uid.to_le_bytes());
        self.note_gone(uid, &result);
        match result {
            Came::Fine(_) | Came::Gone => true,
            Came::Refused(-22) if self.enclaves[&uid].maybe_freed => {
                let result = came(record, Command::SlotInfo, &uid.to_le_bytes());
                self.note_gone(uid, &result);
                matches!(result, Came::Refused(-22))
            }
            Came::Silence => {
                self.enclaves.get_mut(&uid).unwrap().maybe_freed = true;
                false
            }
            Came::Refused(_) | Came::Unsent => false,
        }
    }

    pub fn reset(&mut self) {
        for one in self.enclaves.values_mut() {
            one.life = Life::Gone;
            one.hup = true;
        }
    }

    fn not_in_setup(&self, uid: u64) -> Option<i64> {
        match self.enclaves[&uid].life {
            Life::Setup => None,
            Life::Gone => Some(-19),
            Life::Running | Life::Ended | Life::Odd => Some(-270),
        }
    }

    fn note_gone(&mut self, uid: u64, result: &Came) {
        if let (Came::Gone, Some(one)) = (result, self.enclaves.get_mut(&uid)) {
            one.life = Life::Gone;
            one.hup = true;
        }
    }
}

fn life_of(state: u16) -> Life {
    match state {
        2 => Life::Running,
        0xFFFF => Life::Ended,
        _ => Life::Odd,
    }
}

/// The next command of the record, which must be this one.
fn came(record: &mut Record, command: Command, request: &[u8]) -> Came {
    let next = record.pop_front().unwrap_or_else(|| panic!("{command:?} was not sent"));
    assert_eq!((next.command, &next.request[..]), (command, request), "another command was sent");
    match next.outcome {
        Ok(reply) if reply.rc < 0 => Came::Refused(reply.rc.into()),
        Ok(reply) => Came::Fine(reply),
        Err(SendError::NotSent) => Came::Unsent,
        Err(SendError::NoReply) => Came::Silence,
        Err(SendError::Gone) => Came::Gone,
    }
}

fn number(came: &Came) -> i64 {
    match came {
        Came::Fine(_) => 0,
        Came::Refused(rc) if (-133..0).contains(rc) && ![-4, -85].contains(rc) => *rc,
        Came::Refused(rc) if (-275..=-256).contains(rc) => *rc,
        Came::Refused(_) => -5,
        Came::Unsent | Came::Silence => -110,
        Came::Gone => -19,
    }
}
