//! What a device event means for one enclave. Events carry nothing: the device is asked for the state of each that runs.

use nitroxide_abi::extension::exit_reason;

use crate::{Device, Enclave, Notice, State};

/// What came of looking at one enclave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventOutcome {
    /// Nothing changed, or it does not run.
    Unchanged,
    /// It ended: poll reports POLLHUP from now on, and waiters are to be woken.
    Ended,
    /// Its state could not be learned; nothing changed. The home looks again at the next event, or soon.
    Unknown,
}

impl<P, R> Enclave<P, R> {
    /// Asks the device about this enclave, if it runs.
    ///
    /// Called by the home for every enclave after an event. A refused or missing SLOT_INFO changes nothing (W2).
    pub fn device_event(&mut self, device: &mut impl Device) -> EventOutcome {
        if self.summary.state != State::Running {
            return EventOutcome::Unchanged;
        }
        self.summary.events = self.summary.events.saturating_add(1);
        match self.ask_state(device) {
            Ok(State::Running) => EventOutcome::Unchanged,
            Ok(state) => {
                self.summary.state = state;
                self.end(device, exit_reason::ENDED);
                EventOutcome::Ended
            }
            Err(_) if self.summary.state == State::Gone => EventOutcome::Ended,
            Err(error) => {
                device.notice(&Notice::StateUnknown { slot: self.slot, error });
                EventOutcome::Unknown
            }
        }
    }
}
