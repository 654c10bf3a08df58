//! `supervise WORLD CLIENT [ARGUMENT]...`: runs a client in front of a device that starts nothing, for tests.
//!
//! The parent has six CPUs in cores of two threads and the pool 2-5, as the conformance cases want it.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use nitroxide_client::{LocalOptions, ServedDevice, Topology};
use nitroxide_device::testing::NullLauncher;
use nitroxide_user_home::{Execution, RunError, become_program, is_supervised, run};
use nitroxide_world::World;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (Some(world), Some(program)) = (words.next(), words.next()) else {
        eprintln!("usage: supervise WORLD CLIENT [ARGUMENT]...");
        return ExitCode::from(2);
    };
    let execution = Execution { program, arguments: words.collect(), environment: Vec::new() };
    let result = if is_supervised() { Err(become_program(&execution)) } else { run(&execution, || open(world.as_ref())) };
    match result {
        Ok(ended) => ExitCode::from(ended.relay()),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(if let RunError::Program(error) = &error { error.exit_status() } else { 125 })
        }
    }
}

fn open(world: &Path) -> Result<ServedDevice, String> {
    let world = World::open(world).map_err(|error| error.to_string())?;
    let options =
        LocalOptions { world: Some(world), topology: Topology { cpus: 6, threads: 2 }, pool: "2-5".to_owned(), ..LocalOptions::default() };
    ServedDevice::with(&options, |_memory| Arc::new(NullLauncher::default())).map_err(|error| error.to_string())
}
