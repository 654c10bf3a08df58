//! The image's measurements, computed on a thread of their own while the guest boots, awaited by whoever needs them.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
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

/// Held by whoever computes them: should it go without having said what they are, by a panic say, nobody waits for ever.
#[derive(Debug)]
pub(crate) struct Promise(pub(crate) Arc<Measured>);

impl Promise {
    /// As [`Measured::set`].
    pub(crate) fn set(&self, measurements: Option<Measurements>) {
        self.0.set(measurements);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Pending) {
            *state = State::Never;
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_whose_computation_panics_are_not_waited_for() {
        let measured = Arc::new(Measured::default());
        let promise = Promise(Arc::clone(&measured));
        let computing = std::thread::spawn(move || {
            let _promise = promise;
            std::panic::resume_unwind(Box::new("no thread for hashing"));
        });
        assert_eq!(measured.wait(None), None);
        assert!(computing.join().is_err());
    }
}
