//! `wait`: until an enclave ends, and how it did.

use nitroxide_enclave::control;

use crate::{arguments::TargetArguments, ending::EndingJson, failure::Failure, output, remarks::Remarks, target, world};

/// Waits and prints the ending as JSON.
pub fn run(arguments: &TargetArguments, remarks: Remarks) -> Result<(), Failure> {
    let world = world::open()?;
    let slot_uid = target::find(&world, arguments)?;
    let description = control::describe(&world, slot_uid).map_err(target::failure)?;
    remarks.note(format!("Waiting for {} to end", description.enclave_name));
    let report = control::wait(&world, slot_uid).map_err(target::failure)?;
    output::json(&EndingJson::new(description.enclave_name, description.enclave_id, &report))
}
