//! The life of one enclave in its process: starting, running, ended; and who wants it to end.
//!
//! Everybody who waits for the enclave waits here: the process itself, `terminate`, `wait`.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nitroxide_engine::VmStopper;

use crate::report::{EndReport, State};

/// The shared state.
#[derive(Debug, Default)]
pub(crate) struct Life {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Stops the VM; none before it runs.
    stopper: Option<VmStopper>,
    /// Does somebody want it to end?
    stop_requested: bool,
    /// Has the owner let go?
    owner_left: bool,
    /// How did it end?
    report: Option<EndReport>,
}

impl Life {
    /// Asks for the end: at once if the VM runs, as soon as it does otherwise. Does not wait.
    pub(crate) fn request_stop(&self) {
        self.stop(&mut self.lock());
    }

    /// Says that the owner has let go, which also asks for the end.
    pub(crate) fn owner_left(&self) {
        let mut inner = self.lock();
        inner.owner_left = true;
        self.stop(&mut inner);
    }

    /// Says that the VM runs.
    pub(crate) fn runs(&self, stopper: VmStopper) {
        let mut inner = self.lock();
        if inner.stop_requested {
            stopper.stop();
        }
        inner.stopper = Some(stopper);
    }

    /// Says that the VM has ended.
    pub(crate) fn ended(&self, report: EndReport) {
        self.lock().report.get_or_insert(report);
        self.changed.notify_all();
    }

    /// Whether somebody asked for the end.
    pub(crate) fn is_stop_requested(&self) -> bool {
        self.lock().stop_requested
    }

    /// Waits until the VM has ended; `None` when it has not within `patience`.
    pub(crate) fn wait_for_end(&self, patience: Duration) -> Option<EndReport> {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |inner| inner.report.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.report.clone()
    }

    /// Waits until the owner has let go.
    pub(crate) fn wait_for_owner_s_leave(&self) {
        let _left = self.changed.wait_while(self.lock(), |inner| !inner.owner_left);
    }

    /// Where the enclave is in its life.
    pub(crate) fn state(&self) -> State {
        let inner = self.lock();
        match (&inner.report, &inner.stopper) {
            (Some(_), _) => State::Terminating,
            (None, Some(_)) if inner.stop_requested => State::Terminating,
            (None, Some(_)) => State::Running,
            (None, None) => State::Empty,
        }
    }

    /// How it ended; none before.
    pub(crate) fn report(&self) -> Option<EndReport> {
        self.lock().report.clone()
    }

    fn stop(&self, inner: &mut MutexGuard<'_, Inner>) {
        inner.stop_requested = true;
        if let Some(stopper) = &inner.stopper {
            stopper.stop();
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
