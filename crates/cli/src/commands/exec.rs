//! `exec`: runs an unmodified client of the driver as if this machine were an instance with Nitro Enclaves (docs/user-home.md).
//!
//! It ends as the client does: with its exit status, or by the signal that killed it. Failures of its own have a shell's: 127 for a program that is
//! not found, 126 for one that cannot be run, 125 for everything else.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt as _;
use std::process::ExitCode;

use nitroxide_client::{LocalOptions, ServedDevice};
use nitroxide_user_home::{Execution, RunError, become_program, is_supervised};
use nitroxide_world::World;

use crate::{
    arguments::{EngineKind, ExecArguments},
    codes::ErrorCode,
    failure::{self, Failure},
    launch, world,
};

/// Of failures that are neither the client's nor a shell's.
const OWN_FAILURE: u8 = 125;

/// Runs the client.
pub fn run(arguments: &ExecArguments) -> Result<ExitCode, Failure> {
    let options = local_options(arguments)?;
    let mut words = arguments.client.clone().into_iter();
    // The parser does not let an empty command pass.
    let program = words.next().unwrap_or_default();
    let mut execution = Execution { program, arguments: words.collect(), environment: Vec::new() };
    if is_supervised() {
        if has_options(arguments) {
            return Err(Failure::new(
                ErrorCode::CONFLICTING_ARGUMENTS,
                "This exec runs inside another one, whose device its client gets: it cannot have options of its own",
            )
            .help("Give the options to the outer exec, or leave them out."));
        }
        return Ok(complain(become_program(&execution)));
    }
    execution.environment = environment()?;
    let ended = nitroxide_user_home::run(&execution, || ServedDevice::open(&options).map_err(|error| whole_text(&error)));
    match ended {
        Ok(ended) => Ok(ExitCode::from(ended.relay())),
        Err(error) => Ok(complain(error)),
    }
}

/// Folders of nitro-cli's that are an administrator's elsewhere: where they are, and what the variable is called that says so.
const FOLDERS: [(&str, &str); 2] = [("NITRO_CLI_SOCKETS_PATH", "sockets"), ("NITRO_CLI_LOGS_PATH", "logs")];

/// What clients find in their environment: folders of this user's in the world, so that every exec sees the enclaves of the others, unless the user has
/// said where they are.
fn environment() -> Result<Vec<(OsString, OsString)>, Failure> {
    let unsaid = FOLDERS.iter().filter(|(variable, _)| std::env::var_os(variable).is_none());
    let world = World::open_default().map_err(world::unusable)?;
    let made = unsaid.map(|(variable, name)| {
        let folder = world.path().join("nitro-cli").join(name);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        Ok((OsString::from(variable), folder.into_os_string()))
    });
    made.collect::<std::io::Result<_>>()
        .map_err(|error| Failure::new(ErrorCode::READ_DISK, "nitro-cli's folders cannot be made in the runtime directory").because(error))
}

fn whole_text(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source()).fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

/// Says why there is no client (any more), and gives the status that a shell would.
fn complain(error: RunError) -> ExitCode {
    let (code, status) = match &error {
        RunError::Program(program) => (ErrorCode::SPAWN, program.exit_status()),
        _ => (ErrorCode::SPAWN, OWN_FAILURE),
    };
    failure::report(Failure::new(code, "The client cannot be run").because(error));
    ExitCode::from(status)
}

fn local_options(arguments: &ExecArguments) -> Result<LocalOptions, Failure> {
    Ok(LocalOptions {
        topology: arguments.parent.topology(),
        pool: arguments.parent.pool(),
        faults: launch::faults(&arguments.behaviour)?,
        limits: launch::limits(&arguments.behaviour),
        launch: launch::options(
            "enclave",
            arguments.launch.engine,
            arguments.launch.virtio_discovery,
            arguments.parent.identity.identity(),
        ),
        ..LocalOptions::default()
    })
}

/// Was anything said about the device? What comes from the environment was not said here.
fn has_options(arguments: &ExecArguments) -> bool {
    let is_said = |is_there: bool, variable: &str| is_there && std::env::var_os(variable).is_none();
    let identity = &arguments.parent.identity;
    let engine_is_said = is_said(arguments.launch.engine != EngineKind::default(), "NITROXIDE_ENGINE");
    arguments.parent.topology.is_some()
        || arguments.parent.pool.is_some()
        || arguments.behaviour.max_regions.is_some()
        || arguments.behaviour.max_enclaves.is_some()
        || !arguments.behaviour.fault.is_empty()
        || is_said(identity.instance_id.is_some(), "NITROXIDE_INSTANCE_ID")
        || is_said(identity.iam_role.is_some(), "NITROXIDE_IAM_ROLE")
        || engine_is_said
}
