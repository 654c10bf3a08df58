//! The init of an enclave: mounts, modules, heartbeat, application, exit status, power off.
//!
//! As PID 1 it prepares the machine ([`mounts`], [`modules`]), tells the parent that the enclave is up ([`heartbeat`]), reads what
//! to run ([`application`]), runs it as a child and reaps everything ([`supervise`]), and reports how it ended ([`finish`]).
//! Called as any other process it is the second stage: it becomes the application's user and executes it ([`stage_two`]).
//! docs/guest-init.md describes the image layout it expects.

mod application;
mod finish;
mod heartbeat;
mod modules;
mod mounts;
mod stage_two;
mod supervise;
mod users;

use std::path::Path;

use application::Application;
use finish::Ending;

/// Prints one line on the console, marked as ours.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {{
        use std::io::Write;
        // Nobody is left to tell when the console itself cannot be written.
        let _ = writeln!(std::io::stdout().lock(), "nitroxide-init: {}", format_args!($($part)*));
    }};
}

fn main() {
    if std::process::id() != 1 {
        let failure = stage_two::run();
        say!("{failure}");
        // 126 and 127 as a shell gives them: found but not executable, not found.
        finish::leave_child(failure.exit_code());
    }
    std::panic::set_hook(Box::new(|panic| {
        say!("internal error: {panic}");
        finish::end(Ending::INIT_FAILED);
    }));
    let ending = match run() {
        Ok(ending) => ending,
        Err(reason) => {
            say!("error: {reason}");
            Ending::INIT_FAILED
        }
    };
    finish::end(ending)
}

/// Everything from the first mount to the application's end.
fn run() -> Result<Ending, String> {
    mounts::early();
    mounts::reopen_console();
    say!("version {} on Linux {}", env!("CARGO_PKG_VERSION"), rustix::system::uname().release().to_string_lossy());
    modules::load_all();
    if let Err(error) = nitroxide_guest_sys::net::loopback_up() {
        say!("warning: cannot set up lo: {error}");
    }
    heartbeat::beat(heartbeat::Policy::from_command_line(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default()))?;

    let application = Application::read(Path::new("/")).map_err(|error| error.to_string())?;
    application::remove_files(Path::new("/"));
    let root = if Path::new("/rootfs").is_dir() { mounts::RootKind::Directory } else { mounts::RootKind::Ramdisk };
    mounts::enter_root(root).map_err(|error| format!("cannot make /rootfs the root directory: {error}"))?;
    mounts::complete();
    let identity = users::resolve(application.user.as_deref().unwrap_or("0"), Path::new("/etc")).map_err(|error| error.to_string())?;
    supervise::run(&application, &identity)
}
