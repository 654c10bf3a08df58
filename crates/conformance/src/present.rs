//! Which enclaves there are in a case, read from its transcript.

use crate::step::ENCLAVES;
use crate::transcript::Line;

/// Which enclaves are there, after some steps of a case.
#[derive(Debug, Default)]
pub struct Present {
    open: [bool; ENCLAVES],
    kept: [bool; ENCLAVES],
}

impl Present {
    /// Takes note of a step.
    pub fn follow(&mut self, line: &Line) {
        let Some((enclave, what)) = enclave_of(&line.call) else { return };
        let (Some(open), Some(kept)) = (self.open.get_mut(enclave), self.kept.get_mut(enclave)) else { return };
        match what {
            _ if line.answer != "0" => {}
            "CREATE_VM" => *open = true,
            "kept by other" => *kept = true,
            "close" => *open = false,
            "close by other" => *kept = false,
            _ => {}
        }
    }

    /// Has its owner or the other process this enclave?
    pub fn has(&self, enclave: usize) -> bool {
        self.open.get(enclave) == Some(&true) || self.kept.get(enclave) == Some(&true)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        (0..ENCLAVES).filter(|enclave| self.has(*enclave)).count()
    }

    /// How many of them their owner has.
    pub fn open_count(&self) -> usize {
        self.open.iter().filter(|open| **open).count()
    }
}

/// The enclave that a step is about, and what it does with it.
pub fn enclave_of(call: &str) -> Option<(usize, &str)> {
    let (enclave, what) = call.strip_prefix('e')?.split_once(' ')?;
    Some((enclave.parse().ok()?, what))
}
