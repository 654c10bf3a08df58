//! Which running enclave a command means: by id, by name, or by either.

use nitroxide_enclave::control::{self, ControlError, Selector};
use nitroxide_world::{World, slot_of_enclave_id};

use crate::{arguments::TargetArguments, codes::ErrorCode, failure::Failure};

/// Finds the slot uid of the enclave that is meant.
pub fn find(world: &World, target: &TargetArguments) -> Result<u64, Failure> {
    control::find(world, &selector(target)?).map_err(failure)
}

fn selector(target: &TargetArguments) -> Result<Selector, Failure> {
    match (&target.enclave, &target.enclave_id, &target.enclave_name) {
        (_, Some(id), _) => Ok(Selector::Id(id.clone())),
        (_, _, Some(name)) => Ok(Selector::Name(name.clone())),
        // A name that looks like an id cannot be given (see `request`).
        (Some(either), _, _) if slot_of_enclave_id(either).is_some() => Ok(Selector::Id(either.clone())),
        (Some(either), _, _) => Ok(Selector::Name(either.clone())),
        (None, None, None) => Err(Failure::new(ErrorCode::MISSING_ARGUMENT, "Which enclave? Give its name or its id")),
    }
}

/// What a failed conversation with an enclave's process means.
pub fn failure(error: ControlError) -> Failure {
    let (code, message) = match &error {
        ControlError::NotFound(_) => return Failure::new(ErrorCode::NAMING, error.to_string()),
        ControlError::NotDebug(_) => {
            return Failure::new(ErrorCode::CONSOLE_CONNECT, error.to_string())
                .help("Start the enclave with --debug-mode, or read what it has printed with `nitroxide logs`.");
        }
        ControlError::NotAllowed(_) => (ErrorCode::NOT_EXECUTED, "The enclave belongs to somebody else"),
        ControlError::Gone => (ErrorCode::ENCLAVE_PROCESS_CONNECTION, "The enclave has ended"),
        ControlError::Silent => (ErrorCode::CONNECT_TIMEOUT, "The enclave's process does not answer"),
        ControlError::World(_) => (ErrorCode::READ_DISK, "Running enclaves cannot be listed"),
        _ => (ErrorCode::ENCLAVE_PROCESS_CONNECTION, "The enclave's process cannot be asked"),
    };
    Failure::new(code, message).because(error)
}
