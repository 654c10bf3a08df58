//! `console` and `logs`: what an enclave prints.
//!
//! `logs` is ours and works in every mode for local enclaves, from the beginning; `console` follows nitro-cli: only in debug mode.

use std::{
    io::{self, Read},
    sync::mpsc,
    thread,
    time::Duration,
};

use nitroxide_enclave::{control, report::EndReport};

use crate::{
    arguments::{ConsoleArguments, LogsArguments},
    codes::ErrorCode,
    ending,
    failure::Failure,
    output,
    remarks::Remarks,
    target, world,
};

/// Follows the console until the enclave ends or the time is up.
pub fn console(arguments: &ConsoleArguments, remarks: Remarks) -> Result<(), Failure> {
    let world = world::open()?;
    let slot_uid = target::find(&world, &arguments.target)?;
    follow_console(slot_uid, arguments.disconnect_timeout.map(Duration::from_secs), remarks)
}

/// As [`console`], for an enclave that was just started.
pub fn follow_console(slot_uid: u64, timeout: Option<Duration>, remarks: Remarks) -> Result<(), Failure> {
    let world = world::open()?;
    let mut stream = control::console(&world, slot_uid).map_err(target::failure)?;
    let id = control::describe_now(&world, slot_uid)
        .map_or_else(|_| nitroxide_world::enclave_id(slot_uid), |description| description.enclave_id);
    remarks.note(format!("Connected to the console of {id}"));
    let Some(timeout) = timeout else {
        copy(&mut stream, Gone::Stop)?;
        say_ending(stream.report(), remarks);
        return Ok(());
    };
    // The stream itself has no end of time: a thread reads it, and ends with the program.
    let (sender, finished) = mpsc::channel();
    thread::spawn(move || {
        let result = copy(&mut stream, Gone::Stop);
        // Nobody listens any more once the time is up.
        let _ = sender.send((result, stream.report().cloned()));
    });
    match finished.recv_timeout(timeout) {
        Ok((result, report)) => {
            say_ending(report.as_ref(), remarks);
            result
        }
        Err(_) => {
            remarks.note("Disconnected from the console: the time is up");
            Ok(())
        }
    }
}

/// Prints what has been printed so far; with `--follow`, until the enclave ends.
pub fn logs(arguments: &LogsArguments, remarks: Remarks) -> Result<(), Failure> {
    let world = world::open()?;
    let slot_uid = target::find(&world, &arguments.target)?;
    let mut stream = control::logs(&world, slot_uid, arguments.follow).map_err(target::failure)?;
    copy(&mut stream, Gone::Stop)?;
    if arguments.follow {
        say_ending(stream.report(), remarks);
    }
    Ok(())
}

/// What to do when nobody reads our standard output any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// Nothing is left to do.
    Stop,
    /// The reading itself is of use.
    KeepReading,
}

/// Copies a console to standard output, as it comes.
pub fn copy(stream: &mut impl Read, gone: Gone) -> Result<(), Failure> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failure::new(ErrorCode::CONSOLE_READ, "The console broke off").because(error)),
        };
        match output::write(buffer.get(..count).unwrap_or_default()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe && gone == Gone::Stop => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(Failure::new(ErrorCode::CONSOLE_WRITE, "Standard output cannot be written").because(error));
            }
            _ => {}
        }
    }
}

fn say_ending(report: Option<&EndReport>, remarks: Remarks) {
    if let Some(report) = report {
        remarks.note(ending::text(report));
    }
}
