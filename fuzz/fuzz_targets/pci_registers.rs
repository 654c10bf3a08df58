//! Any accesses of any width to every space of the PCI function, between SET_IRQS with and without eventfds, resets and enclaves that end by
//! themselves: no panic, no hang, and when the function is gone (its threads with it) nothing is given away.
#![no_main]

use std::fs::File;
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nitroxide_abi::SlotUid;
use nitroxide_abi::pci::{COMMAND, Command, ENABLE, REPLY, REQUEST, VERSION};
use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Device, Faults, Limits, Usage};
use nitroxide_device_pci::function::{Function, Space};

const LIMITS: Limits = Limits { max_slots: 4, max_regions: 8, max_vcpus: 5, max_memory_bytes: 1 << 30 };

fuzz_target!(|data: &[u8]| {
    let launcher = NullLauncher::default();
    let device = Arc::new(Device::new(LIMITS, Faults::none(), Arc::new(launcher.clone())));
    let mut input = Unstructured::new(data);
    let test_control = input.arbitrary().unwrap_or(false);
    let function = Function::new(&device, test_control).expect("a thread for the worker");
    function.write(Space::Registers, VERSION, &1_u16.to_le_bytes());
    function.write(Space::Registers, ENABLE, &[1]);
    // The end of the input is the end of the sequence.
    let _ = drive(&function, &launcher, &mut input);
    drop(function);
    assert_eq!((device.usage(), launcher.live_slots(), launcher.running()), (Usage::default(), 0, 0));
});

fn drive(function: &Function, launcher: &NullLauncher, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        match input.arbitrary::<u8>()? {
            // A command as a driver gives it, with what stands in the window.
            0..=79 => {
                let command = *input.choose(&Command::ALL)?;
                let request = input.bytes(usize::from(input.len() >= 24) * 24)?;
                function.write(Space::Registers, REQUEST, request);
                function.write(Space::Registers, COMMAND, &command.number().to_le_bytes());
                if input.arbitrary()? {
                    function.read(Space::Registers, REPLY, &mut [0; 72]);
                }
            }
            kind @ 80..=199 => {
                let space = *input.choose(&[Space::Registers, Space::Registers, Space::Config, Space::Interrupts])?;
                let offset = if kind < 90 { input.arbitrary()? } else { u64::from(input.arbitrary::<u16>()? % 0x220) };
                let width = input.int_in_range(0..=16)?;
                if kind % 2 == 0 {
                    function.write(space, offset, input.bytes(width.min(input.len()))?);
                } else {
                    let mut data = [0xAA; 16];
                    function.read(space, offset, &mut data[..width]);
                    if space == Space::Registers && offset >= 0x1F0 {
                        assert!(data[..width].iter().all(|byte| *byte == 0), "an unknown register is not zero");
                    }
                }
            }
            200..=219 => {
                let eventfds = (0..input.int_in_range(0..=2)?).filter_map(|_| eventfd()).collect();
                function.set_interrupts(input.arbitrary()?, input.arbitrary()?, input.arbitrary()?, eventfds);
            }
            220..=239 => {
                launcher.end(SlotUid(input.int_in_range(0..=8)?));
            }
            240..=247 => function.reset(),
            _ => function.write(Space::Registers, ENABLE, &[input.int_in_range(0..=1)?]),
        }
    }
    Ok(())
}

fn eventfd() -> Option<File> {
    let flags = rustix::event::EventfdFlags::CLOEXEC;
    rustix::event::eventfd(0, flags).ok().map(File::from)
}
