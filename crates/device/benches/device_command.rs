//! How long the device itself takes for a command: round trips with a launcher that does nothing.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use nitroxide_abi::pci::{Command, SlotFree, SlotInfo};
use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Device, Faults, Limits};

fn device_command(criterion: &mut Criterion) {
    let device = Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default()));
    let alloc = || device.command(Command::SlotAlloc.number(), black_box(&[0])).map_or(0, |reply| reply.slot_uid);
    let mut group = criterion.benchmark_group("device_command");
    let request = SlotInfo { slot_uid: alloc() }.to_bytes();
    group.bench_function("slot_info", |bencher| {
        bencher.iter(|| device.command(Command::SlotInfo.number(), black_box(&request)));
    });
    group.bench_function("slot_alloc_and_free", |bencher| {
        bencher.iter(|| {
            let request = SlotFree { slot_uid: alloc() }.to_bytes();
            device.command(Command::SlotFree.number(), &request)
        });
    });
    group.finish();
}

criterion_group!(benches, device_command);
criterion_main!(benches);
