//! The Nitro Enclaves device: slots, commands, events, limits and injected faults.
