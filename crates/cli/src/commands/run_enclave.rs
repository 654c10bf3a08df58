//! `run-enclave`: an enclave in the background.

use nitroxide_world::slot_of_enclave_id;

use crate::{
    Dialect,
    arguments::{DeviceKind, RunEnclaveArguments},
    codes::ErrorCode,
    commands::console,
    failure::Failure,
    output, owner,
    remarks::Remarks,
    request::{self, LaunchRequest},
};

/// Starts it and prints what it is.
pub fn run(mut arguments: RunEnclaveArguments, device: DeviceKind, dialect: Dialect, remarks: Remarks) -> Result<(), Failure> {
    if let Some(config) = &arguments.config {
        arguments = request::read_config(config, arguments.resources.local.clone(), arguments.resources.parent.clone(), arguments.no_wait)?;
    }
    if device == DeviceKind::Host && nitroxide_user_home::is_supervised() {
        // An enclave has one control socket in its world, and there the one of its own process is in use.
        return Err(Failure::new(
            ErrorCode::INVALID_ARGUMENT,
            "Below `nitroxide exec` an enclave of its device cannot be kept in the background",
        )
        .help("Leave out --device host (and NITROXIDE_DEVICE), or stay attached to the enclave with `nitroxide run`."));
    }
    let image = arguments.eif_path.ok_or_else(|| Failure::new(ErrorCode::MISSING_ARGUMENT, "Which image? Give --eif-path FILE"))?;
    arguments.resources.debug_mode |= arguments.attach_console;
    let request = LaunchRequest::new(&image, &arguments.resources, device, dialect, remarks)?;
    let started = owner::start(request, !arguments.no_wait, remarks, output::json)?;
    match slot_of_enclave_id(&started.enclave_id) {
        Some(slot_uid) if arguments.attach_console => console::follow_console(slot_uid, None, remarks),
        _ => Ok(()),
    }
}
