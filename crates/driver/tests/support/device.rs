//! A device model that takes commands as function calls and misbehaves on request: [`Model`].

use std::collections::{BTreeMap, VecDeque};

use nitroxide_abi::pci::{self, Command, EnclaveStart, Reply, SlotAddMem, SlotAddVcpu, SlotFree};
use nitroxide_abi::{Code, SlotUid};
use nitroxide_driver::mailbox::words_of_reply;
use nitroxide_driver::{Device, Notice, SendError};

/// One slot as the device sees it.
#[derive(Clone, Debug, Default)]
pub struct DeviceSlot {
    pub state: u16,
    pub runs: Vec<(u64, u64)>,
    pub vcpus: Vec<u32>,
    pub cid: u64,
}

/// What happens to one command instead of, or after, its being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It is refused with this value; nothing is done.
    Refuse(i32),
    /// It is done, but its reply never comes.
    LoseReply,
    /// It is neither done nor answered.
    LoseCommand,
}

/// The device.
#[derive(Debug, Default)]
pub struct Model {
    pub max_regions: u64,
    pub next_uid: u64,
    next_cid: u64,
    pub slots: BTreeMap<u64, DeviceSlot>,
    /// Faults for the next commands of a kind, in order; `None` lets one pass.
    pub faults: Vec<(Command, VecDeque<Option<Fault>>)>,
    /// The device is gone.
    pub gone: bool,
    /// An event is raised while START runs.
    pub event_during_start: Option<u16>,
    pub events: u64,
    pub now_ns: u64,
    /// Every command and the slot it named.
    pub log: Vec<(Command, u64)>,
    /// SLOT_ADD_MEM requests: address and size.
    pub donated: Vec<(u64, u64)>,
    pub notices: Vec<String>,
    /// Why calls were refused.
    pub refusals: Vec<String>,
}

impl Model {
    pub fn new(max_regions: u64) -> Self {
        Self { max_regions, next_uid: 0x1122_3344_0000_0001, next_cid: 16, ..Self::default() }
    }

    /// The next command of this kind meets `fault`.
    pub fn fail_next(&mut self, command: Command, fault: Fault) {
        self.fail_later(command, 0, fault);
    }

    /// So does the one after `pass` others of its kind.
    pub fn fail_later(&mut self, command: Command, pass: usize, fault: Fault) {
        let mut queue: VecDeque<_> = std::iter::repeat_n(None, pass).collect();
        queue.push_back(Some(fault));
        self.faults.push((command, queue));
    }

    /// The enclave of a slot ends by itself; an event is raised.
    pub fn end(&mut self, slot: SlotUid, state: u16) {
        self.slots.get_mut(&slot.0).unwrap().state = state;
        self.events += 1;
    }

    /// Commands that were sent, without the slots.
    pub fn sent(&self) -> Vec<Command> {
        self.log.iter().map(|(command, _)| *command).collect()
    }

    pub fn take_fault(&mut self, command: Command) -> Option<Fault> {
        let position = self.faults.iter().position(|(of, _)| *of == command)?;
        let fault = self.faults[position].1.pop_front().flatten();
        if self.faults[position].1.is_empty() {
            self.faults.remove(position);
        }
        fault
    }

    /// Does the command and gives its reply.
    pub fn execute(&mut self, command: Command, request: &[u8]) -> Reply {
        match self.try_execute(command, request) {
            Ok(reply) => reply,
            Err(code) => Reply { rc: code.negative(), ..Reply::default() },
        }
    }

    fn try_execute(&mut self, command: Command, request: &[u8]) -> Result<Reply, Code> {
        let slot_uid = match command {
            Command::SlotAlloc => 0,
            _ => SlotFree::from_prefix(request).unwrap().slot_uid,
        };
        let mut reply = Reply { slot_uid, ..Reply::default() };
        if command == Command::SlotAlloc {
            let uid = self.next_uid;
            self.next_uid += 1;
            if uid != 0 {
                self.slots.insert(uid, DeviceSlot::default());
            }
            return Ok(Reply { slot_uid: uid, mem_regions: self.max_regions, ..reply });
        }
        let cids: Vec<u64> = self.slots.values().map(|slot| slot.cid).collect();
        let shared = self.slots.values().flat_map(|slot| slot.runs.clone()).collect::<Vec<_>>();
        let used = self.slots.values().flat_map(|slot| slot.vcpus.clone()).collect::<Vec<_>>();
        let max_regions = self.max_regions;
        let slot = self.slots.get_mut(&slot_uid).ok_or(Code::EINVAL)?;
        match command {
            Command::SlotFree => {
                // A real device would rather refuse; that nobody frees what runs is for the core to see to.
                assert_ne!(slot.state, pci::state::RUNNING, "a running slot was freed");
                self.slots.remove(&slot_uid);
            }
            Command::SlotAddMem => {
                let request = SlotAddMem::from_prefix(request).unwrap();
                assert!(shared.iter().all(|(start, size)| start + size <= request.paddr || request.paddr + request.size <= *start));
                if slot.state != pci::state::INIT || slot.runs.len() as u64 >= max_regions {
                    return Err(Code::EINVAL);
                }
                slot.runs.push((request.paddr, request.size));
                self.donated.push((request.paddr, request.size));
            }
            Command::SlotAddVcpu => {
                let request = SlotAddVcpu::from_prefix(request).unwrap();
                if slot.state != pci::state::INIT || used.contains(&request.vcpu_id) {
                    return Err(Code::EINVAL);
                }
                slot.vcpus.push(request.vcpu_id);
            }
            Command::EnclaveStart => {
                let request = EnclaveStart::from_prefix(request).unwrap();
                if slot.state != pci::state::INIT {
                    return Err(Code::EINVAL);
                }
                let cid = if request.enclave_cid == 0 { self.next_cid } else { request.enclave_cid };
                if cids.contains(&cid) {
                    return Err(Code::EADDRINUSE);
                }
                self.next_cid += 1;
                slot.cid = cid;
                slot.state = pci::state::RUNNING;
                reply.enclave_cid = cid;
                if let Some(state) = self.event_during_start.take() {
                    slot.state = state;
                    self.events += 1;
                }
            }
            Command::EnclaveStop => {
                if slot.state != pci::state::RUNNING {
                    return Err(Code::EINVAL);
                }
                slot.state = pci::state::STOPPED;
                slot.cid = 0;
            }
            Command::SlotInfo => {
                reply.state = slot.state;
                reply.mem_regions = slot.runs.len() as u64;
            }
            _ => return Err(Code::EINVAL),
        }
        Ok(reply)
    }
}

/// A reply of which only those words are right that the core says it looks at.
fn as_read(command: Command, reply: &Reply) -> Reply {
    let whole = reply.to_bytes();
    let mut bytes = [0xA5; Reply::SIZE];
    for at in words_of_reply(command) {
        bytes[*at..*at + 4].copy_from_slice(&whole[*at..*at + 4]);
    }
    Reply::from_bytes(&bytes)
}

impl Device for Model {
    fn send(&mut self, command: Command, request: &[u8]) -> Result<Reply, SendError> {
        if self.gone {
            return Err(SendError::Gone);
        }
        assert_eq!(request.len(), command.request_bytes());
        self.now_ns += 1_000;
        self.log.push((command, SlotFree::from_prefix(request).map_or(0, |request| request.slot_uid)));
        match self.take_fault(command) {
            None => Ok(as_read(command, &self.execute(command, request))),
            Some(Fault::Refuse(rc)) => Ok(as_read(command, &Reply { rc, ..Reply::default() })),
            Some(Fault::LoseReply) => {
                self.execute(command, request);
                Err(SendError::NoReply)
            }
            Some(Fault::LoseCommand) => Err(SendError::NoReply),
        }
    }

    fn events_seen(&mut self) -> u64 {
        self.events
    }

    fn now_ns(&mut self) -> u64 {
        self.now_ns
    }

    fn notice(&mut self, notice: &Notice) {
        self.notices.push(notice.to_string());
    }

    fn refused(&mut self, slot: SlotUid, why: &dyn std::fmt::Display) {
        self.refusals.push(format!("{slot}: {why}"));
    }
}
