//! Running the application: start, reap every orphan, pass termination on, learn how it ended.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nitroxide_guest_sys::signals::Signals;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};

use crate::{application::Application, finish::Ending, mounts, say, stage_two, users::Identity};

/// The search path when the image sets none: what AWS's init uses, and /usr/local.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long what the application left behind may take to end after SIGTERM.
const LEFTOVERS_FOR: Duration = Duration::from_secs(2);

/// Starts the application and waits for its end.
///
/// # Errors
///
/// The child process cannot be made; anything later is an [`Ending`].
pub fn run(application: &Application, identity: &Identity) -> Result<Ending, String> {
    let signals = Signals::block_all().map_err(|error| format!("Cannot block signals: {error}"))?;
    mounts::give_console(identity.uid, identity.gid);
    let line: Vec<_> = application.command.iter().map(|word| word.to_string_lossy()).collect();
    let mut command = Command::new("/proc/self/exe");
    command
        .args(stage_two::arguments(identity, &application.directory, &application.command))
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &identity.home)
        .env("TERM", "linux")
        .envs(application.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::inherit());
    let child = command.spawn().map_err(|error| format!("Cannot start a process for the application: {error}"))?;
    say!("starting {} as user {}, group {}", line.join(" "), identity.uid, identity.gid);
    // The child is reaped by the loop below, together with every orphan, and not through its handle.
    let application = Pid::from_child(&child);
    let ending = wait_for(application, &signals);
    say!("application {ending}");
    end_leftovers(&signals);
    Ok(ending)
}

fn wait_for(application: Pid, signals: &Signals) -> Ending {
    loop {
        if let Some(ending) = reap(application) {
            return ending;
        }
        let Some(signal) = signals.next(Duration::from_secs(3600)).and_then(Signal::from_named_raw) else { continue };
        if signal != Signal::CHILD {
            // Gone in the meantime: the next round reaps it. The application leads a session, so its whole group is meant.
            let _ = kill_process_group(application, signal).or_else(|_| kill_process(application, signal));
        }
    }
}

/// Reaps everything that has ended; the application's ending if it is among it.
fn reap(application: Pid) -> Option<Ending> {
    let mut ending = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == application {
            ending = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Some(Ending::Exited(u8::try_from(code).unwrap_or(u8::MAX))),
                (None, Some(signal)) => Some(Ending::Signalled(u8::try_from(signal).unwrap_or(u8::MAX))),
                (None, None) => ending,
            };
        }
    }
    ending
}

/// Ends what the application left running, so that file systems and connections close in order.
fn end_leftovers(signals: &Signals) {
    for signal in [Signal::TERM, Signal::KILL] {
        // kill(-1): every process but init itself, to which signals of a group 1 would be sent.
        if kill_process_group(Pid::INIT, signal).is_err() {
            return;
        }
        let begin = Instant::now();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) if begin.elapsed() < LEFTOVERS_FOR => {
                    signals.next(Duration::from_millis(50));
                }
                Ok(None) => break,
                // ECHILD: nobody is left.
                Err(_) => return,
            }
        }
    }
}
