//! Any commands with any request bytes, from a driver that respects nothing, between enclaves that end by themselves: no panic, no refusal
//! that changes something, and after a reset nothing is held.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nitroxide_abi::SlotUid;
use nitroxide_abi::pci::Command;
use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Device, Faults, Limits, Usage};

const LIMITS: Limits = Limits { max_slots: 4, max_regions: 8, max_vcpus: 5, max_memory_bytes: 1 << 30 };

fuzz_target!(|data: &[u8]| {
    let launcher = NullLauncher::default();
    let device = Device::new(LIMITS, Faults::none(), Arc::new(launcher.clone()));
    // The end of the input is the end of the sequence.
    let _ = drive(&device, &launcher, &mut Unstructured::new(data));
    let usage = device.usage();
    assert!(usage.slots <= 4 && usage.regions <= 32 && usage.memory_bytes <= 1 << 30 && usage.vcpus <= 20);
    assert_eq!(usage.slots, launcher.live_slots());
    device.reset();
    assert_eq!((device.usage(), launcher.live_slots(), launcher.running()), (Usage::default(), 0, 0));
});

fn drive(device: &Device, launcher: &NullLauncher, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        let uid = u64::from(input.int_in_range(0_u8..=8)?);
        match input.arbitrary::<u8>()? {
            0..=200 => {
                let command = *input.choose(&Command::ALL)?;
                let mut request = [0; 24];
                request[..8].copy_from_slice(&uid.to_le_bytes());
                // Mostly small multiples of 1 MiB: numbers that mean something.
                for (index, field) in request[8..].chunks_exact_mut(8).enumerate() {
                    let value = match input.arbitrary::<u8>()? {
                        0..=15 => input.arbitrary::<u64>()?,
                        value if command == Command::SlotAddMem => u64::from(value % 96) << (20 + index % 2),
                        value => u64::from(value % 8),
                    };
                    field.copy_from_slice(&value.to_le_bytes());
                }
                if command == Command::SlotAlloc {
                    request[0] = 0;
                }
                let before = device.usage();
                let reply = device.command(command.number(), &request).expect("no fault loses a reply");
                assert!(reply.rc >= 0 || device.usage() == before, "a refused command has changed something");
            }
            201..=220 => {
                let number = input.arbitrary()?;
                let length = input.int_in_range(0..=40)?;
                let _ = device.command(number, input.bytes(length)?);
            }
            221..=250 => {
                launcher.end(SlotUid(uid));
            }
            _ => device.reset(),
        }
    }
    Ok(())
}
