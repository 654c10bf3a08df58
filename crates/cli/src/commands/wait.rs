//! `wait`: until an enclave ends, and how it did.

use std::{
    thread,
    time::{Duration, Instant},
};

use nitroxide_enclave::control::{self, ControlError};

use crate::{arguments::TargetArguments, ending::EndingJson, failure::Failure, output, remarks::Remarks, target, world};

/// How long an owner may take to let go of an enclave that has ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits and prints the ending as JSON.
pub fn run(arguments: &TargetArguments, remarks: Remarks) -> Result<(), Failure> {
    let world = world::open()?;
    let slot_uid = target::find(&world, arguments)?;
    let description = control::describe(&world, slot_uid).map_err(target::failure)?;
    remarks.note(format!("Waiting for {} to end", description.enclave_name));
    let report = control::wait(&world, slot_uid).map_err(|error| match error {
        // It was there a moment ago.
        ControlError::NotFound(_) => target::failure(ControlError::Gone),
        error => target::failure(error),
    })?;
    // The report comes before the enclave's owner has let go of it; whoever waited wants it to be gone.
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE && world.enclaves().is_ok_and(|slots| slots.contains(&slot_uid)) {
        thread::sleep(Duration::from_millis(10));
    }
    output::json(&EndingJson::new(description.enclave_name, description.enclave_id, &report))
}
