//! What SLOT_ADD_MEM costs for 512 MiB of a parent's RAM file, and giving them back: isolated against zero-copy.
//!
//! The parent has touched every page, as one with huge pages has; 16 MiB of them are an image, all others zero.
#![expect(clippy::expect_used, reason = "a benchmark that cannot be set up ends")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use nitroxide_abi::Gpa;
use nitroxide_device::{Launcher, MemoryRun};
use nitroxide_enclave::{LaunchOptions, MemoryMode, ParentMemory, ProcessLauncher};
use nitroxide_engine::FileRange;
use nitroxide_world::World;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 512 * MIB;

/// A parent with one file, in which addresses are offsets.
struct Parent(Arc<OwnedFd>);

impl ParentMemory for Parent {
    fn resolve(&self, run: MemoryRun) -> Option<Vec<FileRange>> {
        Some(vec![FileRange { file: Arc::clone(&self.0), offset: run.gpa.0, size: run.size }])
    }
}

/// Makes every page of the file be there.
fn fill(file: &OwnedFd) {
    let mut block = vec![0_u8; 1 << 20];
    for number in 0..SIZE / MIB {
        block.fill(u8::from((8..24).contains(&number)));
        let written = pwrite(file, &block, number * MIB).expect("memory");
        assert_eq!(written, block.len());
    }
}

fn donate(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a directory");
    let world = World::open(&folder.path().join("world")).expect("a world");
    let file = Arc::new(memfd_create("parent", MemfdFlags::CLOEXEC).expect("memory"));
    ftruncate(&file, SIZE).expect("memory");
    let mut group = criterion.benchmark_group("donate");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));
    for (name, mode) in [("isolated", MemoryMode::Isolated), ("zero_copy", MemoryMode::Shared)] {
        let options = LaunchOptions { memory: mode, ..LaunchOptions::new("bench") };
        let launcher = ProcessLauncher::new(world.clone(), Arc::new(Parent(Arc::clone(&file))), options);
        let slot = || {
            fill(&file);
            launcher.reserve_slot().expect("a slot")
        };
        let run = MemoryRun { gpa: Gpa(0), size: SIZE };
        group.bench_function(format!("{name}/add"), |bencher| {
            bencher.iter_batched(
                slot,
                |mut slot| {
                    slot.add_memory(run).expect("donated");
                    slot
                },
                BatchSize::PerIteration,
            );
        });
        group.bench_function(format!("{name}/free"), |bencher| {
            bencher.iter_batched(
                || {
                    let mut slot = slot();
                    slot.add_memory(run).expect("donated");
                    slot
                },
                drop,
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, donate);
criterion_main!(benches);
