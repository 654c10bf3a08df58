//! The directed cases: one for each part of the rules (docs/driver.md, "Order of checks" and what follows).
//!
//! They expect the pool `2-5` of six CPUs in cores of two threads, and leave it so.

mod pools;

use nitroxide_abi::{extension, ioctl};

use crate::step::{Area, FileCall, On, Op, Place, Pointer, Who};
use crate::transcript::Case;
use pools::{pool_and_enclaves, pool_grammar, pool_length, pool_none, pool_online_by_hand, pool_refused};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The pool that every case begins with.
pub const POOL: &str = "2-5";

/// The cases that leave the machine as it was.
#[must_use]
pub fn directed() -> Vec<Case> {
    let list: [(&str, Vec<Op>); 27] = [
        ("pool-none", pool_none()),
        ("pool-grammar", pool_grammar()),
        ("pool-refused", pool_refused()),
        ("pool-length", pool_length()),
        ("pool-and-enclaves", pool_and_enclaves()),
        ("pool-online-by-hand", pool_online_by_hand()),
        ("descriptors", descriptors()),
        ("unknown-commands", unknown_commands()),
        ("create", create_checks()),
        ("load-info", load_info_checks()),
        ("vcpu", vcpu_order()),
        ("vcpu-foreign", vcpu_foreign()),
        ("vcpu-device", vcpu_device()),
        ("memory-arguments", memory_arguments()),
        ("memory-pages", memory_pages()),
        ("memory-overlap", memory_overlap()),
        ("memory-runs", memory_runs()),
        ("memory-alias", memory_alias()),
        ("memory-device", memory_device()),
        ("memory-given-back", memory_given_back()),
        ("start-arguments", start_arguments()),
        ("start-and-states", start_and_states()),
        ("start-device", start_device()),
        ("events", events()),
        ("holders", holders()),
        ("slot-info-fails", slot_info_fails()),
        ("commands", commands()),
    ];
    list.into_iter().map(|(name, ops)| Case { name: name.to_owned(), ops }).collect()
}

/// Cases that the C driver does not get over: memory and CPUs stay away until its module is loaded anew (W10), calls last two minutes (W3), or the
/// kernel warns (W8). Each wants a machine of its own.
#[must_use]
pub fn dangerous() -> Vec<Case> {
    let list: [(&str, Vec<Op>); 4] = [
        ("w8-900-gib", [vec![create(0)], vec![set(0, Place::page(Area::Unmapped, 0), 900 * GIB)]].concat()),
        ("w3-lost-replies", [ready(0, 0), vec![faults("start@1=lost,add-vcpu@1=lost"), vcpu(0, 0), start(0, 0), start(0, 0)]].concat()),
        ("w10-free-fails", [ready(0, 0), vec![start(0, 0), faults("free=-EIO"), close(0), faults(""), pool("2-3"), create(1)]].concat()),
        (
            "w10-stop-fails",
            [ready(0, 0), vec![start(0, 0), faults("stop=-EIO"), close(0), Op::Usage, faults(""), pool("2-3"), create(1)]].concat(),
        ),
    ];
    list.into_iter().map(|(name, ops)| Case { name: name.to_owned(), ops }).collect()
}

/// Cases for machines of another shape: `numa` wants the pool `4-5` on a second node, `gigantic` a free huge page of 1 GiB and the pool `2-5`, `cores` a
/// machine whose cores have one thread or three, and the pool `3-5`.
#[must_use]
pub fn shapes() -> Vec<Case> {
    let list: [(&str, Vec<Op>); 3] = [("numa", numa()), ("gigantic", gigantic()), ("cores", cores())];
    list.into_iter().map(|(name, ops)| Case { name: name.to_owned(), ops }).collect()
}

fn numa() -> Vec<Op> {
    let mut ops = vec![Op::Online, create(0), pages(0, 0, 1), pages(0, 0, 1), pages(0, 4, 32)];
    ops.extend([set(0, Place::page(Area::Small, 0), 2 * MIB), vcpu(0, 0), vcpu(0, 0), start(0, 0), close(0)]);
    ops.extend([pool("2-5"), Op::ReadPool, Op::Online, pool("2-3"), Op::Online, create(0), pages(0, 40, 32), vcpu(0, 0), vcpu(0, 0)]);
    ops.extend([start(0, 0), close(0), pool("4-5"), Op::Online]);
    ops
}

fn gigantic() -> Vec<Op> {
    let at = |offset: u64| Place { area: Area::Gigantic, offset };
    let mut ops = vec![create(0), set(0, at(2 * MIB), 2 * MIB), set(0, at(512 * MIB), 512 * MIB), set(0, at(0), GIB), Op::Usage];
    ops.extend([set(0, at(0), GIB), set(0, at(4 * MIB), 2 * MIB), vcpu(0, 0), vcpu(0, 0), start(0, 0), close(0), Op::Usage]);
    ops.extend([create(1), set(1, at(0), 2 * MIB), vcpu(1, 0), vcpu(1, 0), start(1, 0), close(1), Op::Usage]);
    ops
}

fn cores() -> Vec<Op> {
    let mut ops = vec![Op::Online, create(0)];
    ops.extend([0, 0, 4, 6, 0, 0, 3].map(|cpu| vcpu(0, cpu)));
    ops.extend([pages(0, 0, 32), create(1), start(0, 0), close(0), create(0), vcpu(0, 5), pages(0, 0, 32), start(0, 0), vcpu(0, 0)]);
    ops.extend([create(1), vcpu(1, 0), vcpu(1, 4), close(0), vcpu(1, 5), close(1)]);
    ops.extend(["3", "4-5", "2-5", "1-5", "3-5"].into_iter().flat_map(|text| [pool(text), Op::ReadPool, Op::Online]));
    ops
}

fn pool(text: &str) -> Op {
    Op::WritePool { text: text.to_owned(), privileged: true }
}
fn create(enclave: usize) -> Op {
    Op::Create { enclave, pointer: Pointer::Good }
}
fn vcpu(enclave: usize, cpu: u32) -> Op {
    vcpu_by(enclave, cpu, Who::Owner)
}
fn vcpu_by(enclave: usize, cpu: u32, who: Who) -> Op {
    Op::AddVcpu { enclave, who, cpu, pointer: Pointer::Good }
}
fn load_info(enclave: usize, flags: u64, who: Who) -> Op {
    Op::LoadInfo { enclave, who, flags, pointer: Pointer::Good }
}
fn set(enclave: usize, place: Place, size: u64) -> Op {
    set_by(enclave, place, size, 0, Who::Owner)
}
fn set_by(enclave: usize, place: Place, size: u64, flags: u64, who: Who) -> Op {
    Op::SetMemory { enclave, who, flags, place, size, pointer: Pointer::Good }
}
fn pages(enclave: usize, first: u64, count: u64) -> Op {
    set(enclave, Place::page(Area::Pages, first), count * 2 * MIB)
}
fn start(enclave: usize, cid: u64) -> Op {
    start_with(enclave, cid, 0, Who::Owner)
}
fn start_with(enclave: usize, cid: u64, flags: u64, who: Who) -> Op {
    Op::Start { enclave, who, flags, cid, pointer: Pointer::Good }
}
fn poll(enclave: usize) -> Op {
    Op::Poll { on: On::Enclave(enclave), who: Who::Owner }
}
fn close(enclave: usize) -> Op {
    Op::Close(enclave)
}
fn faults(rules: &str) -> Op {
    Op::Faults(rules.to_owned())
}

/// An enclave that lacks nothing but the start: 64 MiB from the `first` page on, one core.
fn ready(enclave: usize, first: u64) -> Vec<Op> {
    vec![create(enclave), pages(enclave, first, 32), vcpu(enclave, 0), vcpu(enclave, 0)]
}

fn descriptors() -> Vec<Op> {
    let calls = [FileCall::Read, FileCall::Write, FileCall::Seek, FileCall::Map, FileCall::CloseOnExec, FileCall::Link];
    let on = |on: On| calls.into_iter().map(move |call| Op::File { on, call });
    let mut ops: Vec<Op> = on(On::Device).collect();
    ops.push(Op::Poll { on: On::Device, who: Who::Owner });
    ops.push(create(0));
    ops.extend(on(On::Enclave(0)));
    ops.push(poll(0));
    ops
}

fn unknown_commands() -> Vec<Op> {
    let mut words = vec![0xAE25, 0x8008_AE25, ioctl::ADD_VCPU & 0xFFFF, ioctl::CREATE_VM ^ 0x1_0000, 0x8004_AE21, 0xC008_AE24];
    words.extend(extension::COMMANDS.iter().map(|command| command.word));
    words.extend([0, u32::MAX]);
    let mut ops = vec![create(0)];
    for on in [On::Device, On::Enclave(0)] {
        ops.extend(words.iter().map(|&word| Op::Ioctl { on, word }));
    }
    let enclave_words = [ioctl::ADD_VCPU, ioctl::GET_IMAGE_LOAD_INFO, ioctl::SET_USER_MEMORY_REGION, ioctl::START_ENCLAVE];
    ops.extend(enclave_words.map(|word| Op::Ioctl { on: On::Device, word }));
    ops.push(Op::Ioctl { on: On::Enclave(0), word: ioctl::CREATE_VM });
    ops
}

fn create_checks() -> Vec<Op> {
    vec![
        Op::Create { enclave: 0, pointer: Pointer::Null },
        Op::Create { enclave: 0, pointer: Pointer::ReadOnly },
        pool("2-3"),
        Op::ReadPool,
        pool(POOL),
        faults("alloc=-ENOSPC"),
        create(0),
        Op::Create { enclave: 0, pointer: Pointer::Null },
        pool(POOL),
        faults("alloc=-5000"),
        create(0),
        faults("alloc=-512"),
        create(0),
        faults("alloc=+5"),
        create(0),
        close(0),
        faults(""),
        create(0),
        vcpu(0, 2),
        vcpu(0, 4),
        create(1),
        Op::Create { enclave: 1, pointer: Pointer::Null },
        faults("alloc=-EIO"),
        create(1),
    ]
}

fn load_info_checks() -> Vec<Op> {
    let bad = |flags: u64, pointer: Pointer| Op::LoadInfo { enclave: 0, who: Who::Owner, flags, pointer };
    let mut ops = vec![create(0)];
    ops.extend([0, 1, 2, 3, u64::MAX, 1 << 32, (1 << 32) + 1].map(|flags| load_info(0, flags, Who::Owner)));
    ops.extend([bad(1, Pointer::Null), bad(0, Pointer::ReadOnly), bad(1, Pointer::ReadOnly)]);
    ops.extend([load_info(0, 1, Who::Child), load_info(0, 1, Who::Other), load_info(0, 2, Who::Child)]);
    ops
}

fn vcpu_order() -> Vec<Op> {
    let mut ops = vec![create(0), Op::AddVcpu { enclave: 0, who: Who::Owner, cpu: 9, pointer: Pointer::Null }];
    ops.extend([1, 6, 7, u32::MAX, 0].map(|cpu| vcpu(0, cpu)));
    ops.extend([2, 0, 5, 5, 0, 0, 2, 1, 6].map(|cpu| vcpu(0, cpu)));
    ops.extend([
        create(1),
        close(0),
        create(0),
        create(1),
        vcpu(0, 3),
        vcpu(1, 0),
        vcpu(1, 2),
        vcpu(0, 5),
        vcpu(0, 0),
        vcpu(1, 0),
        vcpu(1, 0),
        vcpu(0, 4),
    ]);
    ops.push(Op::AddVcpu { enclave: 0, who: Who::Owner, cpu: 2, pointer: Pointer::ReadOnly });
    ops.extend([close(1), vcpu(0, 4), close(0), create(2)]);
    ops.push(Op::AddVcpu { enclave: 2, who: Who::Owner, cpu: 0, pointer: Pointer::ReadOnly });
    ops.push(Op::AddVcpu { enclave: 2, who: Who::Owner, cpu: 0, pointer: Pointer::ReadOnly });
    ops.extend([vcpu(2, 0), vcpu(2, 3)]);
    ops
}

fn vcpu_foreign() -> Vec<Op> {
    vec![
        create(0),
        vcpu_by(0, 9, Who::Child),
        vcpu_by(0, 1, Who::Other),
        vcpu(0, 0),
        vcpu_by(0, 2, Who::Other),
        vcpu_by(0, 0, Who::Child),
        vcpu_by(0, 3, Who::Other),
        vcpu(0, 0),
        vcpu_by(0, 4, Who::Child),
        start_with(0, 0, 0, Who::Child),
        create(1),
        vcpu(1, 4),
        vcpu(0, 0),
    ]
}

fn vcpu_device() -> Vec<Op> {
    vec![
        create(0),
        vcpu(0, 0),
        faults("add-vcpu=-EINVAL"),
        vcpu(0, 0),
        vcpu(0, 9),
        vcpu(0, 2),
        faults("add-vcpu=-5000"),
        vcpu(0, 3),
        faults("add-vcpu=-512"),
        vcpu(0, 3),
        faults("add-vcpu=+5"),
        vcpu(0, 3),
        faults("add-vcpu@1=-EINVAL"),
        vcpu(0, 4),
        create(1),
        vcpu(1, 4),
    ]
}

fn memory_arguments() -> Vec<Op> {
    let first = Place::page(Area::Pages, 0);
    let odd = Place { area: Area::Pages, offset: 4096 };
    let mut ops = vec![create(0)];
    ops.push(Op::SetMemory { enclave: 0, who: Who::Owner, flags: 1, place: first, size: MIB, pointer: Pointer::Null });
    ops.extend([1, 2, u64::MAX, 1 << 32].map(|flags| set_by(0, first, 2 * MIB, flags, Who::Owner)));
    ops.extend([
        set_by(0, odd, MIB, 1, Who::Child),
        set_by(0, odd, MIB, 0, Who::Child),
        set_by(0, first, 2 * MIB, 0, Who::Other),
        set(0, first, MIB),
        set(0, first, 2 * MIB + 1),
        set(0, odd, 2 * MIB),
        set(0, odd, MIB),
        set(0, first, 0),
        set(0, odd, 0),
        set(0, Place::page(Area::Zero, 0), 2 * MIB),
        set(0, Place::page(Area::Zero, 0), 0),
        set(0, Place::page(Area::Zero, 1), 2 * MIB),
        set(0, Place::page(Area::Kernel, 0), 2 * MIB),
        set(0, Place::page(Area::Kernel, 0), 0),
        set(0, Place { area: Area::Kernel, offset: 1 }, 2 * MIB),
        set(0, first, u64::MAX - (2 * MIB - 1)),
        set(0, first, u64::MAX),
        set(0, first, 1 << 57),
        set(0, Place::page(Area::Unmapped, 0), 2 * MIB),
        set(0, Place::page(Area::Unmapped, 0), 300 * GIB),
        Op::SetMemory { enclave: 0, who: Who::Owner, flags: 0, place: first, size: 2 * MIB, pointer: Pointer::ReadOnly },
        start(0, 0),
    ]);
    ops
}

fn memory_pages() -> Vec<Op> {
    let at = |area: Area| Place::page(area, 0);
    let mut ops = vec![create(0)];
    ops.extend([Area::Small, Area::Transparent, Area::NoAccess, Area::Half].map(|area| set(0, at(area), 4 * MIB)));
    ops.extend([Area::Small, Area::NoAccess, Area::Half, Area::ReadOnly].map(|area| set(0, at(area), 2 * MIB)));
    ops.push(set(0, at(Area::Half), 2 * MIB));
    ops
}

fn memory_overlap() -> Vec<Op> {
    vec![
        create(0),
        pages(0, 8, 4),
        pages(0, 8, 4),
        pages(0, 9, 1),
        pages(0, 11, 2),
        pages(0, 7, 2),
        pages(0, 6, 8),
        pages(0, 9, 0),
        pages(0, 8, 0),
        pages(0, 12, 0),
        pages(0, 12, 1),
        pages(0, 7, 1),
        set(0, Place { area: Area::Pages, offset: 17 * MIB }, 2 * MIB),
        start(0, 0),
    ]
}

fn memory_runs() -> Vec<Op> {
    vec![
        Op::MaxRegions(3),
        create(0),
        pages(0, 0, 4),
        pages(0, 5, 1),
        pages(0, 4, 1),
        pages(0, 10, 1),
        pages(0, 10, 1),
        pages(0, 0, 1),
        set(0, Place::page(Area::Small, 0), 2 * MIB),
        start(0, 0),
        Op::MaxRegions(1),
        create(1),
        pages(1, 20, 2),
        pages(1, 30, 1),
        Op::MaxRegions(0),
        create(2),
        pages(2, 40, 1),
        start(2, 0),
        // The driver's own limit, where the device would take more; and the device's, where the driver would ask for more.
        close(0),
        Op::MaxRegions(2),
        create(0),
        Op::MaxRegions(9),
        pages(0, 50, 1),
        pages(0, 52, 1),
        pages(0, 54, 1),
        close(1),
        create(1),
        Op::MaxRegions(1),
        pages(1, 60, 1),
        pages(1, 62, 1),
    ]
}

fn memory_alias() -> Vec<Op> {
    let alias = |enclave: usize, page: u64, count: u64| set(enclave, Place::page(Area::Alias, page), count * 2 * MIB);
    vec![
        create(0),
        pages(0, 0, 2),
        alias(0, 4, 1),
        alias(0, 1, 1),
        create(1),
        alias(1, 0, 2),
        pages(1, 0, 1),
        alias(1, 8, 2),
        Op::Usage,
        close(0),
        pages(1, 1, 1),
        create(2),
        faults("add-mem=-EIO"),
        pages(2, 8, 1),
    ]
}

fn memory_device() -> Vec<Op> {
    vec![
        create(0),
        faults("add-mem=-EIO"),
        set(0, Place::page(Area::Small, 0), 2 * MIB),
        pages(0, 0, 2),
        faults("add-mem=-5000"),
        pages(0, 2, 1),
        faults("add-mem=+5"),
        pages(0, 3, 1),
        faults(""),
        pages(0, 4, 1),
        Op::Usage,
        start(0, 0),
        pages(0, 0, 2),
    ]
}

fn memory_given_back() -> Vec<Op> {
    let private = |page: u64| Place::page(Area::Private, page);
    vec![
        Op::HugeFree,
        Op::Map(4),
        create(0),
        set(0, private(0), 2 * MIB),
        set(0, private(1), 2 * MIB),
        set(0, private(3), 4 * MIB),
        Op::Unmap,
        Op::HugeFree,
        set(0, private(0), 2 * MIB),
        set(0, private(2), 2 * MIB),
        Op::Map(4),
        set(0, private(0), 2 * MIB),
        Op::Unmap,
        Op::HugeFree,
        close(0),
        Op::HugeFree,
        Op::Map(1),
        create(1),
        faults("add-mem=-EIO"),
        set(1, private(0), 2 * MIB),
        Op::Unmap,
        Op::HugeFree,
        close(1),
        Op::HugeFree,
        // Overlaps are by address, also where other pages are there by now.
        faults(""),
        Op::Map(6),
        create(0),
        set(0, private(2), 4 * MIB),
        Op::Unmap,
        Op::Map(6),
        set(0, private(1), 4 * MIB),
        set(0, private(3), 4 * MIB),
        set(0, private(0), 12 * MIB),
        set(0, private(0), 4 * MIB),
        Op::Unmap,
        close(0),
        Op::HugeFree,
    ]
}

fn start_arguments() -> Vec<Op> {
    let mut ops = vec![create(0), Op::Start { enclave: 0, who: Who::Owner, flags: 9, cid: 1, pointer: Pointer::Null }];
    ops.extend([2, 3, u64::MAX, 1 << 32].map(|flags| start_with(0, 1, flags, Who::Owner)));
    let cids = [1, 2, 3, 4, 0xFFFF_FFFE, 0xFFFF_FFFF, 1 << 32, (1 << 32) + 1233, u64::MAX, 0];
    ops.extend(cids.map(|cid| start(0, cid)));
    ops.extend([
        vcpu(0, 0),
        start(0, 0),
        pages(0, 0, 31),
        start(0, 0),
        pages(0, 31, 1),
        start(0, 0),
        close(0),
        create(0),
        pages(0, 0, 31),
        start(0, 0),
        pages(0, 31, 1),
        start(0, 0),
        start(0, 3),
        vcpu(0, 3),
        start(0, 0),
        vcpu(0, 0),
        start_with(0, 0, 1, Who::Owner),
        start(0, 0),
        load_info(0, 1, Who::Owner),
    ]);
    ops
}

fn running_calls() -> Vec<Op> {
    let first = Place::page(Area::Pages, 50);
    vec![
        start(0, 0),
        start(0, 2),
        start_with(0, 0, 2, Who::Owner),
        start_with(0, 2, 2, Who::Owner),
        vcpu(0, 0),
        vcpu(0, 99),
        vcpu_by(0, 0, Who::Child),
        Op::AddVcpu { enclave: 0, who: Who::Owner, cpu: 0, pointer: Pointer::Null },
        load_info(0, 1, Who::Owner),
        load_info(0, 0, Who::Owner),
        set(0, first, 2 * MIB),
        set_by(0, first, MIB, 1, Who::Owner),
        set_by(0, first, MIB, 0, Who::Child),
        Op::Start { enclave: 0, who: Who::Owner, flags: 2, cid: 0, pointer: Pointer::Null },
        poll(0),
    ]
}

fn start_and_states() -> Vec<Op> {
    let mut ops = ready(0, 0);
    ops.extend([poll(0), start(0, 77)]);
    ops.extend(running_calls());
    ops.extend([Op::Event, poll(0), Op::End(0), poll(0), poll(0), Op::Poll { on: On::Enclave(0), who: Who::Child }, Op::End(0)]);
    ops.extend(running_calls());
    ops.extend([Op::Usage, close(0), Op::Usage]);
    ops.extend(ready(1, 0));
    ops.extend([start(1, 77), close(1)]);
    ops.extend(ready(0, 0));
    ops.extend(ready(1, 32));
    ops.extend([start(0, 77), start(1, 77), start(1, 78), start(1, 0)]);
    ops.push(close(0));
    ops.extend(ready(0, 0));
    ops.push(Op::Start { enclave: 0, who: Who::Owner, flags: 0, cid: 77, pointer: Pointer::ReadOnly });
    ops.extend([start(0, 0), poll(0)]);
    ops
}

fn start_device() -> Vec<Op> {
    let mut ops = ready(0, 0);
    for code in ["-EINVAL", "-EIO", "-ENOSPC", "-NE_ERR_INVALID_ENCLAVE_CID", "-5000", "-512", "-4", "-85", "-276"] {
        ops.extend([faults(&format!("start={code}")), start(0, 0), vcpu(0, 2)]);
    }
    ops.extend([faults("start=+5"), start(0, 0), start(0, 0)]);
    ops.extend(ready(1, 32));
    ops.extend([faults("start=cid:99"), start(1, 0)]);
    ops
}

fn events() -> Vec<Op> {
    let mut ops = [ready(0, 0), ready(1, 32)].concat();
    ops.extend([Op::Event, poll(0), Op::End(0), start(0, 0), Op::Event, poll(0), poll(1), start(1, 0), Op::Event, poll(0), poll(1)]);
    ops.extend([Op::End(1), poll(0), poll(1), start(1, 0), Op::End(0), poll(0), poll(1), create(2), vcpu(2, 0)]);
    ops.extend([close(1), vcpu(2, 0), close(0), vcpu(2, 2), Op::Usage]);
    ops.extend([close(2)]);
    ops.extend(ready(0, 0));
    ops.extend([start(0, 0), faults("info=state:1"), Op::Event, poll(0), vcpu(0, 0), faults("")]);
    ops
}

fn holders() -> Vec<Op> {
    let mut ops = ready(0, 0);
    ops.extend([Op::Keep(0), start_with(0, 0, 0, Who::Other), start(0, 0), start_with(0, 0, 0, Who::Child)]);
    ops.extend([
        Op::Poll { on: On::Enclave(0), who: Who::Other },
        close(0),
        Op::Usage,
        pool("2-3"),
        Op::End(0),
        Op::Unkeep(0),
        Op::Usage,
        pool("2-3"),
        pool(POOL),
    ]);
    ops.extend(ready(1, 0));
    ops.extend([Op::Keep(1), Op::Unkeep(1), start_with(1, 0, 1, Who::Child), close(1), Op::Usage, create(1), vcpu(1, 0)]);
    ops
}

/// What the device is asked: once for each thing, never for what is refused before, and STOP before SLOT_FREE only where the enclave runs.
fn commands() -> Vec<Op> {
    let counted = |ops: Vec<Op>| [vec![Op::CountCommands], ops, vec![Op::Commands]].concat();
    let refused = vec![load_info(0, 1, Who::Owner), vcpu(0, 1), set(0, Place::page(Area::Small, 0), 2 * MIB), start(0, 0), poll(0)];
    let list = [
        vec![create(0)],
        refused,
        vec![pages(0, 0, 32)],
        vec![vcpu(0, 0)],
        vec![vcpu(0, 0)],
        vec![Op::Event],
        vec![start(0, 0)],
        vec![start(0, 0), pages(0, 40, 1)],
        vec![Op::Event],
        vec![close(0)],
        vec![create(0), close(0)],
        ready(0, 0),
        vec![start(0, 0), Op::End(0), Op::Event],
        vec![close(0)],
        vec![Op::Create { enclave: 0, pointer: Pointer::Null }],
    ];
    list.into_iter().flat_map(counted).collect()
}

fn slot_info_fails() -> Vec<Op> {
    let mut ops = ready(0, 0);
    ops.extend([start(0, 0), faults("info=-EIO"), Op::Event, faults(""), poll(0), vcpu(0, 0), start(0, 0), Op::End(0), poll(0)]);
    ops
}
