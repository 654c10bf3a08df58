//! The stages of an enclave's start and end, and when each was reached.
//!
//! Times are readings of CLOCK_MONOTONIC, which all processes of one machine share, so the owner's and the enclave process's can be
//! subtracted. For tests, an enclave process stops for ever at the stage that the environment variable `NITROXIDE_PAUSE` names.

use std::sync::{Mutex, PoisonError};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The variable that names the stage at which an enclave process is to stop, in snake case.
pub const PAUSE_VARIABLE: &str = "NITROXIDE_PAUSE";

/// A point that an enclave reaches once, in this order; `Heartbeat` only if its guest says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Stage {
    /// The owner was asked to start the enclave.
    Requested,
    /// The owner has spawned the process.
    Spawned,
    /// The process runs.
    Begun,
    /// It has everything that its owner sends.
    Received,
    /// It holds its CID and its name.
    Claimed,
    /// Kernel and ramdisks are copied out of the memory.
    Extracted,
    /// The image is found good.
    Verified,
    /// NSM, vsock, console and control are served.
    Served,
    /// QEMU is about to be executed.
    Launching,
    /// The guest runs.
    Running,
    /// The guest has connected to the heartbeat port.
    Heartbeat,
    /// The VM is gone.
    Ended,
}

impl Stage {
    /// The name in snake case, as in JSON and for `NITROXIDE_PAUSE`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Spawned => "spawned",
            Self::Begun => "begun",
            Self::Received => "received",
            Self::Claimed => "claimed",
            Self::Extracted => "extracted",
            Self::Verified => "verified",
            Self::Served => "served",
            Self::Launching => "launching",
            Self::Running => "running",
            Self::Heartbeat => "heartbeat",
            Self::Ended => "ended",
        }
    }
}

/// When a stage was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// Which.
    pub stage: Stage,
    /// CLOCK_MONOTONIC in nanoseconds.
    pub at_ns: u64,
}

/// The present reading of CLOCK_MONOTONIC in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock starts near zero at boot: it is neither negative nor near its end for centuries.
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// The stages reached so far. The first time counts.
#[derive(Debug, Default)]
pub struct Stages {
    reached: Mutex<Vec<StageTime>>,
}

impl Stages {
    /// Notes that a stage is reached now; returns the note, or `None` if it was reached before.
    pub fn reach(&self, stage: Stage) -> Option<StageTime> {
        let time = StageTime { stage, at_ns: monotonic_ns() };
        self.add(time).then_some(time)
    }

    /// Adds a note that was made elsewhere; returns whether it was new.
    pub fn add(&self, time: StageTime) -> bool {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = reached.iter().all(|earlier| earlier.stage != time.stage);
        if is_new {
            reached.push(time);
        }
        is_new
    }

    /// All notes so far, by their times: those of the owner arrive after the process's first.
    #[must_use]
    pub fn all(&self) -> Vec<StageTime> {
        let mut all = self.reached.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.sort_by_key(|time| time.at_ns);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_keeps_its_first_time() {
        let stages = Stages::default();
        assert!(stages.add(StageTime { stage: Stage::Heartbeat, at_ns: 1 }));
        assert!(!stages.add(StageTime { stage: Stage::Heartbeat, at_ns: 2 }));
        assert_eq!(stages.all(), [StageTime { stage: Stage::Heartbeat, at_ns: 1 }]);
        assert!(stages.reach(Stage::Ended).is_some());
        assert!(stages.add(StageTime { stage: Stage::Requested, at_ns: 0 }));
        assert_eq!(stages.all().first().map(|time| time.stage), Some(Stage::Requested));
    }

    #[test]
    fn the_name_is_the_one_in_json() {
        for stage in [Stage::Requested, Stage::Heartbeat, Stage::Launching] {
            assert_eq!(serde_json::to_string(&stage).unwrap(), format!("\"{}\"", stage.name()));
        }
    }
}
