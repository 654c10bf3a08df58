//! How long a command takes from the write of the command register to the reply's interrupt, as the server of the PCI function sees it: registers,
//! worker thread and device, with a launcher that does nothing and without the socket to QEMU.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use nitroxide_abi::pci::{COMMAND, Command, ENABLE, REPLY, REQUEST, Reply, SlotInfo, VERSION};
use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Device, Faults, Limits};
use nitroxide_device_pci::function::{Function, Space};
use rustix::event::{EventfdFlags, eventfd};

/// SET_IRQS: one eventfd per vector, trigger.
const SET_TRIGGER: u32 = 0x24;

fn register_command(criterion: &mut Criterion) {
    let device = Arc::new(Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default())));
    let function = Function::new(&device, false).expect("a thread for the worker");
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let theirs = File::from(interrupt.try_clone().expect("a descriptor"));
    function.set_interrupts(SET_TRIGGER, 0, 1, vec![theirs]);
    function.write(Space::Registers, VERSION, &1_u16.to_le_bytes());
    function.write(Space::Registers, ENABLE, &[1]);
    let slot_uid = round_trip(&function, &interrupt, Command::SlotAlloc, &[0]).slot_uid;
    let request = SlotInfo { slot_uid }.to_bytes();
    criterion.bench_function("register_command/slot_info", |bencher| {
        bencher.iter(|| round_trip(&function, &interrupt, Command::SlotInfo, &request));
    });
    criterion.bench_function("register_command/read_of_four_bytes", |bencher| {
        bencher.iter(|| function.read(Space::Registers, REPLY, &mut [0; 4]));
    });
}

/// Request, command, interrupt, reply: in the widths of Linux' driver on x86.
fn round_trip(function: &Function, interrupt: &OwnedFd, command: Command, request: &[u8]) -> Reply {
    for (piece, at) in request.chunks(4).zip((REQUEST..).step_by(4)) {
        function.write(Space::Registers, at, piece);
    }
    function.write(Space::Registers, COMMAND, &command.number().to_le_bytes());
    // The descriptor was made non-blocking for the device's side, which shares its flags.
    while rustix::io::read(interrupt, &mut [0; 8]).is_err() {
        let mut polled = [rustix::event::PollFd::new(interrupt, rustix::event::PollFlags::IN)];
        let _ = rustix::event::poll(&mut polled, None);
    }
    let mut bytes = [0; 72];
    for (piece, at) in bytes.chunks_mut(4).zip((REPLY..).step_by(4)) {
        function.read(Space::Registers, at, piece);
    }
    Reply::from_bytes(&bytes)
}

criterion_group!(benches, register_command);
criterion_main!(benches);
