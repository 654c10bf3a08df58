//! Any text as fault rules: no panic, and what is understood is written so that it is understood as the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_device::Faults;

fuzz_target!(|text: &str| {
    if let Ok(faults) = text.parse::<Faults>() {
        assert_eq!(faults.to_string().parse(), Ok(faults));
    }
});
