//! The image's measurements, computed on a thread of their own while the guest boots, awaited by whoever needs them.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use nitroxide_eif::Measurements;

/// Measurements that are there, will be there, or never will.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
enum State {
    #[default]
    Pending,
    Known(Measurements),
    /// Not measured: there is no image, or it could not be read to its end.
    Never,
}

impl Measured {
    /// Says what they are, or that they never will be known.
    pub(crate) fn set(&self, measurements: Option<Measurements>) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = measurements.map_or(State::Never, State::Known);
        self.changed.notify_all();
    }

    /// Waits for them; `None` when they never will be known, or are not within `patience`.
    pub(crate) fn wait(&self, patience: Option<Duration>) -> Option<Measurements> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_pending = |state: &mut State| matches!(state, State::Pending);
        let state = match patience {
            Some(patience) => self.changed.wait_timeout_while(state, patience, is_pending).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait_while(state, is_pending).unwrap_or_else(PoisonError::into_inner),
        };
        match *state {
            State::Known(measurements) => Some(measurements),
            State::Pending | State::Never => None,
        }
    }
}
