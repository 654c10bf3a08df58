//! `run`: an enclave in the foreground. Its console is our standard output, its application's exit status ours, and Ctrl-C ends it.

use std::{
    os::fd::OwnedFd,
    process::ExitCode,
    sync::{
        Arc, Weak,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use nitroxide_client::DeviceKind as Kind;
use nitroxide_enclave::{
    control::{self, ControlError},
    report::EndReport,
};
use nitroxide_guest_sys::signals::Signals;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Signal, getpid, kill_process};

use crate::{
    Dialect,
    arguments::{DeviceKind, RunArguments},
    codes::ErrorCode,
    commands::console,
    ending, ending_signals,
    failure::Failure,
    heartbeat::Heartbeat,
    host,
    launch::{self, Cancel},
    remarks::Remarks,
    request::LaunchRequest,
    target, world,
};

/// How often a start that is to end is told so.
const AGAIN: Duration = Duration::from_millis(20);

/// What ends the waiting.
enum Event {
    /// A signal to us.
    Signal(i32),
    /// The enclave has ended; its report where the console came with one.
    Ended(Option<EndReport>),
}

/// Runs it to its end.
pub fn run(arguments: RunArguments, device: DeviceKind, dialect: Dialect, remarks: Remarks) -> Result<ExitCode, Failure> {
    let image = arguments.image.or(arguments.eif_path).ok_or_else(|| Failure::new(ErrorCode::MISSING_ARGUMENT, "Which image?"))?;
    let request = LaunchRequest::new(&image, &arguments.resources, device, dialect, remarks)?;
    // Before any thread is there: all of them inherit it, and one waits.
    let signals = ending_signals::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT])
        .map_err(|error| Failure::new(ErrorCode::SIGNAL_MASK, "Signals cannot be blocked").because(error))?;
    let (sender, events) = mpsc::channel();
    let starting = Arc::new(Cancel::default());
    watch_signals(signals, sender.clone(), Arc::downgrade(&starting));

    let progress = remarks.spinner("Starting");
    let running = launch::prepare(&request, &starting, &mut |text| progress.say(text)).and_then(|prepared| {
        if prepared.kind() == Kind::Host {
            answer_heartbeats()?;
        }
        prepared.start(&request)
    });
    drop(progress);
    let running = match running {
        // Whatever the failure says, it is the signal's.
        Err(_) if starting.is_asked_for() => {
            world::sweep_up();
            remarks.note("The start was ended; nothing of the enclave is left");
            return Ok(signalled(&events));
        }
        running => running?,
    };
    drop(starting);
    let kind = running.device.kind();
    let started = &running.started;
    remarks.note(format!("Enclave {} runs with CID {}; Ctrl-C ends it", started.enclave_name, started.enclave_cid));
    let ended = running
        .enclave
        .poll_fd()
        .try_clone_to_owned()
        .map_err(|error| Failure::new(ErrorCode::EVENT_WAIT, "The enclave cannot be waited for").because(error))?;
    match kind {
        Kind::Local => {
            let stream = match control::logs(&world::open()?, running.enclave.slot_uid().0, true) {
                Ok(stream) => Some(stream),
                // Its process was killed just now; the device will tell.
                Err(ControlError::Gone | ControlError::NotFound(_)) => None,
                Err(error) => return Err(target::failure(error)),
            };
            thread::spawn(move || {
                let report = stream.and_then(|mut stream| {
                    // Output that nobody reads any more does not end the enclave.
                    let _ = console::copy(&mut stream, console::Gone::KeepReading);
                    stream.report().cloned()
                });
                if report.is_none() {
                    // The console can end before the enclave: without a machine there is none.
                    wait_for_end(&ended);
                }
                let _ = sender.send(Event::Ended(report));
            });
        }
        Kind::Host => {
            if request.debug {
                copy_host_console(started.enclave_cid);
            } else {
                remarks.note("Without --debug-mode the device shows no console");
            }
            thread::spawn(move || {
                wait_for_end(&ended);
                let _ = sender.send(Event::Ended(None));
            });
        }
    }
    match events.recv() {
        Ok(Event::Signal(signal)) => {
            remarks.note("Ending the enclave");
            drop(running);
            Ok(status_of(signal))
        }
        Ok(Event::Ended(Some(report))) => finish(&report, remarks),
        // The control connection broke off, or the real device: what is known after the end must do.
        Ok(Event::Ended(None)) => match running.into_report() {
            Some(report) => finish(&report, remarks),
            None if kind == Kind::Host => Ok(ExitCode::SUCCESS),
            None => Err(Failure::new(ErrorCode::ENCLAVE_PROCESS_CONNECTION, "The enclave's process ended unexpectedly")),
        },
        Err(_) => Err(Failure::new(ErrorCode::THREAD_JOIN, "Nothing waits for the enclave any more")),
    }
}

/// Waits until the device says that the enclave has ended.
fn wait_for_end(ended: &OwnedFd) {
    let mut event = [PollFd::new(ended, PollFlags::IN)];
    while matches!(rustix::event::poll(&mut event, None), Err(rustix::io::Errno::INTR)) {}
}

fn finish(report: &EndReport, remarks: Remarks) -> Result<ExitCode, Failure> {
    remarks.note(ending::text(report));
    ending::exit_status(report).map(ExitCode::from)
}

/// The exit status after a signal, as a shell shows it.
fn status_of(signal: i32) -> ExitCode {
    ExitCode::from(u8::try_from(signal).unwrap_or(0).saturating_add(128))
}

/// The same for the signal that is known to have come.
fn signalled(events: &Receiver<Event>) -> ExitCode {
    match events.recv() {
        Ok(Event::Signal(signal)) => status_of(signal),
        _ => ExitCode::FAILURE,
    }
}

/// The first signal ends the start or the enclave in order, the second us at once (and the enclave with us).
fn watch_signals(signals: Signals, sender: Sender<Event>, starting: Weak<Cancel>) {
    thread::spawn(move || {
        let mut seen = false;
        loop {
            // A start may be between two things that can be interrupted: as long as it lasts, it is told again.
            let starting = if seen { starting.upgrade() } else { None };
            let patience = if starting.is_some() { AGAIN } else { Duration::from_secs(3600) };
            let Some(signal) = signals.next(patience) else {
                if let Some(starting) = starting {
                    starting.ask();
                }
                continue;
            };
            if seen || sender.send(Event::Signal(signal)).is_err() {
                let _ = kill_process(getpid(), Signal::KILL);
            }
            seen = true;
        }
    });
}

/// On a real device somebody has to answer: AWS's init ends without an answer.
fn answer_heartbeats() -> Result<(), Failure> {
    let heartbeat = Heartbeat::bind(Kind::Host)?;
    thread::spawn(move || {
        // Until the program ends. The CID does not matter: whoever asks is answered.
        loop {
            if heartbeat.answer(0).is_err() {
                thread::sleep(Duration::from_millis(100));
            }
        }
    });
    Ok(())
}

fn copy_host_console(cid: u32) {
    thread::spawn(move || {
        if let Ok(mut stream) = host::console_stream(cid) {
            let _ = console::copy(&mut stream, console::Gone::KeepReading);
        }
    });
}
