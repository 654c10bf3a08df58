//! `supervise WORLD CLIENT [ARGUMENT]...`: runs a client in front of a device that starts nothing, for tests.
//!
//! The parent has six CPUs in cores of two threads and the pool 2-5, as the conformance cases want it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use nitroxide_abi::SlotUid;
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
    let device = ServedDevice::with(&options, |_memory| Arc::new(NullLauncher::default())).map_err(|error| error.to_string())?;
    if let Some(path) = std::env::var_os("SUPERVISE_CONTROL") {
        let listener = UnixListener::bind(path).map_err(|error| error.to_string())?;
        let device = device.clone();
        std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| control(&device, &stream)));
    }
    Ok(device)
}

/// A hand on the device, for as long as somebody has it: a line is asked, a line answers. The lines are those of docs/device-pci.md, "Test control".
fn control(device: &ServedDevice, mut stream: &UnixStream) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let uid = || u64::from_str_radix(rest.trim_start_matches("0x"), 16).map(SlotUid);
        let done = match word {
            "replies" => device.device().event_counter().replies.to_string(),
            "memory" => device.device().usage().memory_bytes.to_string(),
            "faults" => rest.parse().map(|faults| device.set_faults(faults)).is_ok().to_string(),
            "event" => {
                device.device().raise_spurious_event();
                true.to_string()
            }
            "end" => uid().is_ok_and(|uid| device.device().report_end(uid)).to_string(),
            "max-regions" => rest.parse().map(|count| device.device().set_max_regions(count)).is_ok().to_string(),
            _ => false.to_string(),
        };
        if writeln!(stream, "{done}").is_err() {
            return;
        }
    }
}
