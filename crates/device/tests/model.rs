//! Random command sequences against a small model that is written differently: pages in a set, slots in a list, no phases.
//!
//! Also: no bytes make the device panic, and after a reset nothing is held, whatever went before.

#![expect(clippy::unwrap_used, reason = "a model in a test may panic")]

mod support;

use std::collections::BTreeSet;

use nitroxide_abi::pci::Command;
use nitroxide_abi::{Code, SlotUid};
use nitroxide_device::{Limits, Usage};
use proptest::prelude::*;
use support::*;

const LIMITS: Limits = Limits { max_slots: 3, max_regions: 4, max_vcpus: 3, max_memory_bytes: 200 * MIB };

/// One step of a sequence. `slot` is an index into all slots ever allocated; beyond them it is an unknown uid.
#[derive(Debug, Clone)]
enum Step {
    Alloc,
    Free { slot: usize },
    AddMem { slot: usize, at_mib: u64, size_mib: u64 },
    AddVcpu { slot: usize, cpu: u32 },
    AddBulk { slot: usize, count: u64 },
    Start { slot: usize, cid: u64, flags: u64 },
    Stop { slot: usize },
    EndsByItself { slot: usize },
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let slot = 0_usize..5;
    prop_oneof![
        4 => Just(Step::Alloc),
        2 => slot.clone().prop_map(|slot| Step::Free { slot }),
        8 => (slot.clone(), prop_oneof![(0_u64..60).prop_map(|n| n * 4), 0_u64..240], prop_oneof![Just(64_u64), 0_u64..70])
            .prop_map(|(slot, at_mib, size_mib)| Step::AddMem { slot, at_mib, size_mib }),
        5 => (slot.clone(), 0_u32..6).prop_map(|(slot, cpu)| Step::AddVcpu { slot, cpu }),
        1 => (slot.clone(), 0_u64..4).prop_map(|(slot, count)| Step::AddBulk { slot, count }),
        6 => (slot.clone(), prop_oneof![Just(0_u64), 0_u64..7, Just(1 << 32)], prop_oneof![9 => 0_u64..2, 1 => 2_u64..4])
            .prop_map(|(slot, cid, flags)| Step::Start { slot, cid, flags }),
        2 => slot.clone().prop_map(|slot| Step::Stop { slot }),
        2 => slot.prop_map(|slot| Step::EndsByItself { slot }),
        1 => Just(Step::Reset),
    ]
}

#[derive(Debug, Clone, Default)]
struct Slot {
    uid: u64,
    pages: BTreeSet<u64>,
    runs: usize,
    cpus: BTreeSet<u32>,
    bulk: u64,
    /// 0 for a slot that was never started.
    cid: u64,
    runs_now: bool,
}

#[derive(Debug, Default)]
struct Model {
    slots: Vec<Slot>,
}

fn code(code: Code) -> i64 {
    i64::from(code.negative())
}

impl Model {
    fn find(&mut self, uid: u64) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.uid == uid)
    }

    fn pages(&self) -> usize {
        self.slots.iter().map(|slot| slot.pages.len()).sum()
    }

    fn vcpus(slot: &Slot) -> u64 {
        u64::try_from(slot.cpus.len()).unwrap() + slot.bulk
    }

    fn add_mem(&mut self, uid: u64, at_mib: u64, size_mib: u64) -> i64 {
        let wanted: BTreeSet<u64> = (at_mib / 2..(at_mib + size_mib) / 2).collect();
        let held: BTreeSet<u64> = self.slots.iter().flat_map(|slot| slot.pages.iter().copied()).collect();
        let total = self.pages() + wanted.len();
        let Some(slot) = self.find(uid) else { return -2 };
        if slot.cid != 0 {
            code(Code::NOT_IN_INIT_STATE)
        } else if size_mib == 0 || at_mib % 2 + size_mib % 2 != 0 {
            -22
        } else if slot.runs == 4 {
            code(Code::MEM_MAX_REGIONS)
        } else if total > 100 {
            -12
        } else if !held.is_disjoint(&wanted) {
            code(Code::MEM_REGION_ALREADY_USED)
        } else {
            slot.pages.extend(wanted);
            slot.runs += 1;
            0
        }
    }

    fn add_vcpu(&mut self, uid: u64, cpu: u32) -> i64 {
        let held = self.slots.iter().any(|slot| slot.cpus.contains(&cpu));
        let Some(slot) = self.find(uid) else { return -2 };
        if slot.cid != 0 {
            code(Code::NOT_IN_INIT_STATE)
        } else if Self::vcpus(slot) == 3 {
            -28
        } else if held {
            code(Code::VCPU_ALREADY_USED)
        } else {
            slot.cpus.insert(cpu);
            0
        }
    }

    fn add_bulk(&mut self, uid: u64, count: u64) -> i64 {
        let Some(slot) = self.find(uid).filter(|_| count > 0) else { return if count == 0 { -22 } else { -2 } };
        if slot.cid != 0 {
            code(Code::NOT_IN_INIT_STATE)
        } else if Self::vcpus(slot) + count > 3 {
            -28
        } else {
            slot.bulk += count;
            0
        }
    }

    fn start(&mut self, uid: u64, cid: u64, flags: u64) -> i64 {
        let used: BTreeSet<u64> = self.slots.iter().filter(|slot| slot.runs_now).map(|slot| slot.cid).collect();
        let Some(slot) = self.find(uid) else { return -2 };
        if flags > 1 {
            code(Code::INVALID_FLAG_VALUE)
        } else if (1..4).contains(&cid) || cid > 0xFFFF_FFFE {
            code(Code::INVALID_ENCLAVE_CID)
        } else if slot.cid != 0 {
            code(Code::NOT_IN_INIT_STATE)
        } else if slot.runs == 0 {
            code(Code::NO_MEM_REGIONS_ADDED)
        } else if slot.pages.len() < 32 {
            code(Code::ENCLAVE_MEM_MIN_SIZE)
        } else if Self::vcpus(slot) == 0 {
            code(Code::NO_VCPUS_ADDED)
        } else if used.contains(&cid) {
            -98
        } else {
            slot.cid = if cid == 0 { (16..).find(|cid| !used.contains(cid)).unwrap() } else { cid };
            slot.runs_now = true;
            0
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn device_answers_as_the_model_does(steps in proptest::collection::vec(step(), 1..60)) {
        let (device, launcher) = device(LIMITS, "");
        let mut model = Model::default();
        let mut uids: Vec<u64> = Vec::new();
        let mut events = 0;
        for step in steps {
            let uid_of = |slot: usize| uids.get(uids.len().saturating_sub(4) + slot).copied().unwrap_or(4711);
            match step {
                Step::Alloc => {
                    let reply = send(&device, Command::SlotAlloc, &[0]);
                    prop_assert_eq!(reply.rc, if model.slots.len() == 3 { -28 } else { 0 });
                    if reply.rc == 0 {
                        prop_assert!(reply.slot_uid != 0 && !uids.contains(&reply.slot_uid));
                        uids.push(reply.slot_uid);
                        model.slots.push(Slot { uid: reply.slot_uid, ..Slot::default() });
                    }
                }
                Step::Free { slot } => {
                    let uid = uid_of(slot);
                    let known = model.find(uid).is_some();
                    model.slots.retain(|slot| slot.uid != uid);
                    prop_assert_eq!(free(&device, uid).rc, if known { 0 } else { -2 });
                }
                Step::AddMem { slot, at_mib, size_mib } => {
                    let uid = uid_of(slot);
                    let rc = add_mem(&device, uid, at_mib * MIB, size_mib * MIB).rc;
                    prop_assert_eq!(i64::from(rc), model.add_mem(uid, at_mib, size_mib));
                }
                Step::AddVcpu { slot, cpu } => {
                    let uid = uid_of(slot);
                    prop_assert_eq!(i64::from(add_vcpu(&device, uid, cpu).rc), model.add_vcpu(uid, cpu));
                }
                Step::AddBulk { slot, count } => {
                    let uid = uid_of(slot);
                    prop_assert_eq!(i64::from(add_bulk_vcpus(&device, uid, count).rc), model.add_bulk(uid, count));
                }
                Step::Start { slot, cid, flags } => {
                    let uid = uid_of(slot);
                    let reply = start(&device, uid, cid, flags);
                    prop_assert_eq!(i64::from(reply.rc), model.start(uid, cid, flags));
                    if reply.rc == 0 {
                        prop_assert_eq!(Some(reply.enclave_cid), model.find(uid).map(|slot| slot.cid));
                    }
                }
                Step::Stop { slot } => {
                    let uid = uid_of(slot);
                    let known = model.find(uid).map(|slot| slot.runs_now = false).is_some();
                    prop_assert_eq!(stop(&device, uid).rc, if known { 0 } else { -2 });
                }
                Step::EndsByItself { slot } => {
                    let uid = uid_of(slot);
                    let ran = model.find(uid).is_some_and(|slot| std::mem::take(&mut slot.runs_now));
                    prop_assert_eq!(launcher.end(SlotUid(uid)), ran);
                    events += u16::from(ran);
                }
                Step::Reset => {
                    device.reset();
                    model.slots.clear();
                }
            }
            // Nothing leaks and nothing is forgotten, at any time.
            let expected = Usage {
                slots: model.slots.len(),
                regions: model.slots.iter().map(|slot| slot.runs).sum(),
                memory_bytes: 2 * MIB * u64::try_from(model.pages()).unwrap(),
                vcpus: model.slots.iter().map(Model::vcpus).sum(),
            };
            prop_assert_eq!(device.usage(), expected);
            prop_assert_eq!(launcher.live_slots(), model.slots.len());
            prop_assert_eq!(launcher.running(), model.slots.iter().filter(|slot| slot.runs_now).count());
            for slot in &model.slots {
                let told = info(&device, slot.uid);
                let state = match slot { Slot { cid: 0, .. } => 0, Slot { runs_now: true, .. } => 2, _ => 0xFFFF };
                prop_assert_eq!((told.rc, told.state, told.mem_regions), (0, state, u64::try_from(slot.runs).unwrap()));
            }
            prop_assert_eq!(device.event_counter().events, events);
        }
        device.reset();
        prop_assert_eq!((device.usage(), launcher.live_slots(), launcher.running()), (Usage::default(), 0, 0));
    }

    #[test]
    fn no_bytes_make_the_device_panic_and_a_reset_frees_all(
        commands in proptest::collection::vec((0_u32..14, proptest::collection::vec(any::<u8>(), 0..40), 0_u8..5), 0..50)
    ) {
        let (device, launcher) = device(LIMITS, "");
        for (number, mut request, uid) in commands {
            // The null launcher's uids are small: point most requests at one that may exist.
            for (byte, value) in request.iter_mut().zip([uid, 0, 0, 0, 0, 0, 0, 0]) {
                *byte = value;
            }
            let reply = device.command(number, &request).unwrap();
            prop_assert!(reply.rc <= 0);
        }
        device.reset();
        prop_assert_eq!((device.usage(), launcher.live_slots()), (Usage::default(), 0));
    }
}
