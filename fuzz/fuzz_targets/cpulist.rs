//! Any text as the CPU pool: a pool of whole cores without CPU 0, or an error and no pool; what is read is what was written.
#![no_main]
#![allow(dead_code, reason = "the machine is shared with the crate's own tests")]

#[path = "../../crates/driver/tests/support/machine.rs"]
mod machine;

use libfuzzer_sys::fuzz_target;
use machine::TestMachine;
use nitroxide_driver::Machine;

fuzz_target!(|input: &[u8]| {
    let machine = TestMachine::with_threads(64, 2);
    let result = machine.with_pool(|pool, cpus| pool.write(input, cpus));
    machine.with_pool(|pool, cpus| {
        let (text, end) = pool.read();
        let written = input.split(|byte| *byte == 0).next().unwrap_or(&[]);
        assert_eq!(text, if result.is_ok() { written } else { &[] });
        assert_eq!(end, b"\n");
        let members: Vec<u32> = pool.cpus().map(|(cpu, _, _)| cpu.0).collect();
        assert_eq!(members.is_empty(), result.is_err());
        assert!(members.chunks(2).all(|core| core.len() == 2 && core[0] % 2 == 0 && core[1] == core[0] + 1 && core[0] > 1));
        assert!((0..64).all(|cpu| cpus.online[cpu as usize] != members.contains(&cpu)));
    });
});
