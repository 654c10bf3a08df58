//! Takes the host's commands from the virtio serial port, until the host closes it.
//!
//! The port is found by its name, as udev would; it carries frames (`nitroxide_parent::frame`).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nitroxide_parent::PORT_NAME;
use nitroxide_parent::frame::{self, Frame, Kind};
use rustix::process::Signal;

use crate::command::Running;

/// The way to the host, shared by all commands.
#[derive(Clone)]
pub struct Port(Arc<Mutex<File>>);

impl Port {
    /// Sends one frame. A host that is gone is noticed where the port is read.
    pub fn send(&self, kind: Kind, command: u32, content: &[u8]) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = frame::write(&mut *port, kind, command, content);
    }
}

/// Serves until the host is gone.
///
/// # Errors
///
/// No such port, or what reading from it gives.
pub fn run() -> io::Result<()> {
    let mut from_host = File::options().read(true).write(true).open(find_port()?)?;
    let port = Port(Arc::new(Mutex::new(from_host.try_clone()?)));
    port.send(Kind::Ready, 0, uptime_ms().to_string().as_bytes());
    let mut commands: HashMap<u32, Running> = HashMap::new();
    while let Some(frame) = frame::read(&mut from_host)? {
        commands.retain(|_, command| !command.has_ended());
        handle(frame, &mut commands, &port);
    }
    Ok(())
}

fn handle(frame: Frame, commands: &mut HashMap<u32, Running>, port: &Port) {
    let number = frame.command;
    match frame.kind {
        Kind::Run => {
            let script = String::from_utf8_lossy(&frame.content);
            start(Running::with_pipes(&script, number, port.clone()), number, commands, port);
        }
        Kind::Terminal => {
            let (rows, columns, script) = frame::size_from_bytes(&frame.content).unwrap_or((25, 80, &[]));
            let script = String::from_utf8_lossy(script);
            start(Running::on_terminal(&script, (rows, columns), number, port.clone()), number, commands, port);
        }
        Kind::Input => {
            if let Some(command) = commands.get(&number) {
                command.give(frame.content);
            }
        }
        Kind::Signal => {
            let signal = frame.content.first().and_then(|&number| Signal::from_named_raw(i32::from(number)));
            if let (Some(command), Some(signal)) = (commands.get(&number), signal) {
                command.signal(signal);
            }
        }
        Kind::Resize => {
            if let (Some(command), Some((rows, columns, _))) = (commands.get(&number), frame::size_from_bytes(&frame.content)) {
                command.resize(rows, columns);
            }
        }
        // The host never sends these.
        Kind::Ready | Kind::Output | Kind::Exited | Kind::Failed => {}
    }
}

fn start(command: io::Result<Running>, number: u32, commands: &mut HashMap<u32, Running>, port: &Port) {
    match command {
        Ok(running) => {
            commands.insert(number, running);
        }
        Err(error) => port.send(Kind::Failed, number, error.to_string().as_bytes()),
    }
}

fn find_port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no virtio serial port named {PORT_NAME}")))
}

/// Milliseconds since the kernel started.
fn uptime_ms() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1000 + now.tv_nsec / 1_000_000
}
