//! Takes the host's commands from the virtio serial port, until the host closes it.
//!
//! The port is found by its name, as udev would; it carries frames (`nitroxide_parent::frame`).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nitroxide_parent::PORT_NAME;
use nitroxide_parent::frame::{self, Frame, Kind};
use rustix::process::Signal;

use crate::command::Running;

/// Where the kernel lists virtio serial ports.
const PORTS: &str = "/sys/class/virtio-ports";
/// How long the port may take to appear on a busy machine. It only ends hangs.
const PORT_PATIENCE: Duration = Duration::from_secs(60);

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
    let mut from_host = File::options().read(true).write(true).open(find_port(Path::new(PORTS), PORT_PATIENCE)?)?;
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

/// Waits for the port: QEMU tells the driver of it, and of its name, some time after the driver is there (virtio 1.2, 5.3.6.2).
fn find_port(ports: &Path, patience: Duration) -> io::Result<PathBuf> {
    let started = Instant::now();
    loop {
        if let Some(port) = look_for_port(ports)? {
            return Ok(port);
        }
        if started.elapsed() > patience {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no virtio serial port named {PORT_NAME}")));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn look_for_port(ports: &Path) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(ports)? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME) {
            return Ok(Some(PathBuf::from("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Milliseconds since the kernel started.
fn uptime_ms() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1000 + now.tv_nsec / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_appears_late_and_is_named_later_is_found() {
        let folder = std::env::temp_dir().join(format!("virtio-ports-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let of_device = folder.join("vport1p1");
        let late = of_device.clone();
        let kernel = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            fs::create_dir(&late).unwrap();
            thread::sleep(Duration::from_millis(20));
            fs::write(late.join("name"), format!("{PORT_NAME}\n")).unwrap();
        });
        let found = find_port(&folder, PORT_PATIENCE);
        kernel.join().unwrap();
        let none = find_port(&of_device, Duration::ZERO);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.unwrap(), Path::new("/dev/vport1p1"));
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
