//! The end of an enclave: stopped, freed, and only then its pages and cores given back.
//!
//! Order: docs/driver.md, "Last close". What the device did not confirm is kept, shown and tried again (W10).

use nitroxide_abi::extension::{exit_reason, trouble};
use nitroxide_abi::pci::{Command, EnclaveStop, SlotFree};

use crate::client::Pages;
use crate::device::DeviceError;
use crate::error::StopError;
use crate::slot::uncount;
use crate::{Device, Enclave, Machine, Notice, Region, State};

impl<P: Pages, R: AsRef<[Region<P>]> + AsMut<[Region<P>]>> Enclave<P, R> {
    /// Ends the enclave after the last close: STOP if it may run, SLOT_FREE, then pages and cores.
    ///
    /// Afterwards the home forgets it. After an error the home keeps it in its list, where it holds everything it had, and calls this
    /// again: soon, at every later close, and when the device was reset (then after [`Enclave::device_gone`]).
    ///
    /// # Errors
    ///
    /// The device did not confirm that it let go. The closing program never sees this.
    pub fn release(&mut self, machine: &impl Machine, device: &mut impl Device) -> Result<(), DeviceError> {
        if self.released {
            return Ok(());
        }
        self.summary.trouble |= trouble::CLOSED;
        if let Err(error) = self.make_sure_it_stopped(device) {
            self.summary.trouble |= trouble::STOP_FAILED;
            device.notice(&Notice::StopFailed { slot: self.slot, error });
            return Err(error);
        }
        self.summary.trouble &= !trouble::STOP_FAILED;
        if let Err(error) = self.free(device) {
            self.summary.trouble |= trouble::FREE_FAILED;
            device.notice(&Notice::FreeFailed { slot: self.slot, error });
            return Err(error);
        }
        self.summary.trouble &= !trouble::FREE_FAILED;
        self.give_back(machine);
        Ok(())
    }

    /// The device is gone and has nothing of the enclave any more: what the enclave had goes back, though its descriptor is open.
    ///
    /// Does nothing while the device is there. The enclave stays and answers ENODEV; its last close finds nothing left to do.
    pub fn give_back_gone(&mut self, machine: &impl Machine) {
        if self.summary.state == State::Gone && !self.released {
            self.give_back(machine);
        }
    }

    fn make_sure_it_stopped(&mut self, device: &mut impl Device) -> Result<(), DeviceError> {
        let may_run = match self.summary.state {
            State::Running | State::Other(_) => true,
            State::Init => self.start_in_doubt,
            State::Stopped | State::Gone => false,
        };
        // After a FREE without a reply the slot may be gone, and STOP could only be refused; it was stopped before that FREE.
        if !may_run || self.free_in_doubt {
            return Ok(());
        }
        match self.exchange_stop(device) {
            Ok(()) | Err(DeviceError::Gone) => Ok(()),
            // A refusal may just mean that it had ended by itself, or that a STOP without a reply had been done.
            Err(error @ DeviceError::Refused { .. }) => match self.ask_state(device) {
                Ok(State::Running) | Err(_) => Err(error),
                Ok(_) => Ok(()),
            },
            Err(error) => Err(error),
        }
    }

    fn free(&mut self, device: &mut impl Device) -> Result<(), DeviceError> {
        let request = SlotFree { slot_uid: self.slot.0 }.to_bytes();
        let error = match self.exchange(device, Command::SlotFree, &request) {
            Ok(_) | Err(DeviceError::Gone) => return Ok(()),
            Err(error) => error,
        };
        if self.free_in_doubt && error.says_no_such_slot() && self.ask_state(device).is_err_and(DeviceError::says_no_such_slot) {
            device.notice(&Notice::FreedAfterAll { slot: self.slot });
            return Ok(());
        }
        self.free_in_doubt |= error == DeviceError::NoReply;
        Err(error)
    }

    fn give_back(&mut self, machine: &impl Machine) {
        let holder = self.holder;
        // Before the pages: whoever gets one of them may give it away at once.
        machine.with_ledger(|ledger| ledger.release_all(holder));
        for region in self.regions.as_mut() {
            *region = Region::default();
        }
        self.region_count = 0;
        machine.with_pool(|pool, cpus| pool.give_back(cpus, holder));
        uncount(machine);
        self.released = true;
    }
}

impl<P, R> Enclave<P, R> {
    /// Ends a running enclave without closing it (NE_STOP); poll reports POLLHUP from now on.
    ///
    /// Any holder of the descriptor may do it, as with the start.
    ///
    /// # Errors
    ///
    /// 276 if it does not run; the device's code, and it keeps running as far as is known.
    pub fn stop(&mut self, device: &mut impl Device) -> Result<(), StopError> {
        match self.summary.state {
            State::Running => {}
            State::Gone => return Err(DeviceError::Gone.into()),
            State::Init | State::Stopped | State::Other(_) => return Err(StopError::NotRunning),
        }
        self.exchange_stop(device)?;
        self.end(device, exit_reason::STOPPED);
        Ok(())
    }

    /// Tells the device to stop it; a success is remembered.
    fn exchange_stop(&mut self, device: &mut impl Device) -> Result<(), DeviceError> {
        let request = EnclaveStop { slot_uid: self.slot.0 }.to_bytes();
        self.exchange(device, Command::EnclaveStop, &request)?;
        self.summary.state = State::Stopped;
        Ok(())
    }
}
