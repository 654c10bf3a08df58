//! The init of a small parent VM: sets up the driver and runs commands for the host.
//!
//! As PID 1 it mounts, loads modules and runs what the plan says ([`setup`]), starts itself once more as the server ([`server`]) and then only reaps
//! orphans. The server takes commands over a virtio serial port; a command on a terminal goes through a second stage ([`terminal`]) that makes the
//! terminal its own. When the host closes the port, or the server ends for another reason, the machine is powered off.
//! docs/parent-vm.md describes it from outside.
#![forbid(unsafe_code)]

mod command;
mod server;
mod setup;
mod terminal;

use std::process::Command;

use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::RebootCommand;

/// Prints one line on the console, marked as ours.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {{
        use std::io::Write;
        // Nobody is left to tell when the console itself cannot be written.
        let _ = writeln!(std::io::stdout().lock(), "nitroxide-parent: {}", format_args!($($part)*));
    }};
}

/// The word that makes this program the server.
const SERVER: &str = "server";

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let role = arguments.next().unwrap_or_default();
    if std::process::id() == 1 {
        init();
    } else if role == SERVER {
        if let Err(error) = server::run() {
            say!("error: the serial port to the host: {error}");
        }
    } else if role == terminal::STAGE {
        say!("{}", terminal::second_stage(arguments));
    } else {
        say!("this is the init of a parent VM and works only as process 1 there");
    }
}

/// PID 1: never returns.
fn init() {
    setup::mounts();
    setup::carry_out_plan();
    match Command::new("/proc/self/exe").arg(SERVER).spawn() {
        Ok(server) => reap_until(Pid::from_child(&server)),
        Err(error) => say!("error: cannot start the server: {error}"),
    }
    rustix::fs::sync();
    say!("powering off");
    // Where even that fails the kernel panics as its init ends, which the host sees.
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
}

/// Reaps everything, until the server has ended.
fn reap_until(server: Pid) {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == server => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
