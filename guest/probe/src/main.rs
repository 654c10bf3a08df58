//! What tests run inside a guest instead of an application: one way to end, or to misbehave, per word.
//!
//! `nitroxide-probe WORD [ARGUMENT]`, see [`run`]. It may run as the application of an image or, for `panic` and the like, as init itself.

use std::{
    fs,
    io::{self, Write},
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

use rustix::{
    process::{Signal, getpid, kill_process},
    system::{RebootCommand, reboot},
};

const WORDS: &str =
    "exit N | signal N | panic | hang | sleep SECONDS | flood BYTES | poweroff | reboot | orphans N | whoami | wait-term | script FILE";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let word = arguments.first().map_or("", String::as_str);
    let number = arguments.get(1).and_then(|text| text.parse().ok());
    let result = if word == "script" { script(arguments.get(1).map_or("", String::as_str)) } else { run(word, number.unwrap_or(0)) };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            println!("probe: {word}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the word says; returns the exit status.
fn run(word: &str, number: u64) -> io::Result<u8> {
    match word {
        "exit" => return Ok(u8::try_from(number).unwrap_or(u8::MAX)),
        // Ends ourselves by that signal.
        "signal" => {
            let signal = i32::try_from(number).ok().and_then(Signal::from_named_raw);
            let signal = signal.ok_or_else(|| io::Error::other("no such signal"))?;
            // More than once: Rust's own handler for SIGSEGV only restores the default action at the first.
            loop {
                kill_process(getpid(), signal)?;
                thread::sleep(Duration::from_millis(10));
            }
        }
        // A kernel panic: what a broken guest does (Documentation/admin-guide/sysrq.rst).
        "panic" => fs::write("/proc/sysrq-trigger", "c")?,
        "hang" => loop {
            thread::sleep(Duration::from_secs(3600));
        },
        "sleep" => thread::sleep(Duration::from_secs(number)),
        "flood" => flood(number)?,
        "poweroff" => reboot(RebootCommand::PowerOff)?,
        "reboot" => reboot(RebootCommand::Restart)?,
        // Processes that outlive their parent: init has to reap them.
        "orphans" => {
            for _ in 0..number {
                Command::new("/proc/self/exe").arg("sleep").arg("1").spawn()?;
            }
        }
        "whoami" => whoami()?,
        // Ends with status 7 when a termination request arrives; tests that init passes signals on.
        "wait-term" => {
            let signals = nitroxide_guest_sys::signals::Signals::block_all()?;
            println!("probe: waiting for a signal");
            loop {
                if let Some(signal) = signals.next(Duration::from_secs(3600)) {
                    println!("probe: got signal {signal}");
                    return Ok(7);
                }
            }
        }
        _ => {
            println!("probe: words are: {WORDS}");
            return Ok(2);
        }
    }
    Ok(0)
}

/// Runs the commands in a file, one per line, words separated by spaces; shows each command before its output, and its exit status behind.
fn script(file: &str) -> io::Result<u8> {
    for line in fs::read_to_string(file)?.lines() {
        println!("probe: $ {line}");
        let mut words = line.split_whitespace();
        let Some(program) = words.next() else { continue };
        let output = Command::new(program).args(words).output()?;
        let mut console = io::stdout().lock();
        console.write_all(&output.stdout)?;
        console.write_all(&output.stderr)?;
        writeln!(console, "probe: status {}", output.status.code().unwrap_or(-1))?;
    }
    Ok(0)
}

/// Writes numbered lines of 64 bytes to the console, at least so many bytes in all.
fn flood(bytes: u64) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in 0..bytes.div_ceil(64) {
        writeln!(out, "flood {line:>57}")?;
    }
    writeln!(out, "probe: flood of {bytes} bytes done")
}

/// Prints what an image can set: identity, directory, environment, arguments; and what init mounts.
fn whoami() -> io::Result<()> {
    let groups = rustix::process::getgroups()?;
    println!("probe: uid {} gid {} groups {groups:?}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    println!("probe: directory {}", std::env::current_dir()?.display());
    for (name, value) in std::env::vars_os() {
        println!("probe: env {name:?}={value:?}");
    }
    println!("probe: arguments {:?}", std::env::args().skip(2).collect::<Vec<_>>());
    for line in fs::read_to_string("/proc/mounts")?.lines() {
        println!("probe: mount {line}");
    }
    Ok(())
}
