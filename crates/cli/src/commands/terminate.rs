//! `terminate-enclave`: ends one enclave, or all of this user.

use nitroxide_enclave::control;
use nitroxide_world::World;
use serde::Serialize;

use crate::{arguments::TerminateArguments, failure::Failure, output, remarks::Remarks, target, world};

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Terminated {
    #[serde(skip_serializing_if = "Option::is_none")]
    enclave_name: Option<String>,
    #[serde(rename = "EnclaveID")]
    enclave_id: String,
    terminated: bool,
}

/// Ends the enclaves and prints an object for each.
pub fn run(arguments: &TerminateArguments, remarks: Remarks) -> Result<(), Failure> {
    let world = world::open()?;
    if arguments.all {
        let mut result = Ok(());
        for slot_uid in world.enclaves().map_err(|error| target::failure(control::ControlError::World(error)))? {
            // One that cannot be ended does not keep the others alive; the last failure is the command's.
            if let Err(failure) = terminate(&world, slot_uid, remarks) {
                result = Err(failure);
            }
        }
        return result;
    }
    terminate(&world, target::find(&world, &arguments.target)?, remarks)
}

fn terminate(world: &World, slot_uid: u64, remarks: Remarks) -> Result<(), Failure> {
    // Only for its names: an enclave that does not describe itself can still be ended.
    let (enclave_name, enclave_id) = match control::describe_now(world, slot_uid) {
        Ok(description) => (Some(description.enclave_name), description.enclave_id),
        Err(_) => (None, nitroxide_world::enclave_id(slot_uid)),
    };
    let progress = remarks.spinner(&format!("Ending {}", enclave_name.as_deref().unwrap_or(&enclave_id)));
    control::terminate(world, slot_uid).map_err(target::failure)?;
    drop(progress);
    output::json(&Terminated { enclave_name, enclave_id, terminated: true })
}
