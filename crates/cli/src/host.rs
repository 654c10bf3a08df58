//! What the owner of an enclave on the real device does beside holding it: the same control socket that local enclaves have, and what the
//! device itself cannot tell: console (debug mode), measurements, the application's exit status.
//!
//! For local enclaves all of this is the enclave process's (docs/enclave.md).

use std::{
    io::{self, Read},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use nitroxide_eif::Image;
use nitroxide_enclave::{
    console::Console,
    control::{Controlled, ServeError, Server},
    report::{ApplicationExit, Description, EndReason, EndReport, Flags, HexMeasurements, Isolation, State, metadata_value},
};
use nitroxide_guest_sys::vsock;
use nitroxide_world::{InstanceId, NameClaim};

use crate::{
    codes::ErrorCode,
    failure::Failure,
    launch::{Running, Started},
    request::LaunchRequest,
    world,
};

/// The port on the parent that nitroxide's init reports to (docs/guest-init.md).
const EXIT_STATUS_PORT: u32 = 9001;
/// What nitro-cli adds to an enclave's CID to get its console's port on CID 0.
const CONSOLE_PORT_OFFSET: u32 = nitroxide_world::rendezvous::CONSOLE_PORT_OFFSET;
/// nitro-cli's own patience with the console.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(20);
/// How often the end of the enclave is looked for while a termination may be asked for.
const LOOK: Duration = Duration::from_millis(200);

/// Where nitro-cli reads the instance's id: Nitro's firmware names it as the board's asset tag.
const ASSET_TAG: &str = "/sys/devices/virtual/dmi/id/board_asset_tag";

/// The id of the instance that this is, as nitro-cli finds it; the default outside of EC2.
pub fn instance_id() -> InstanceId {
    let tag = std::fs::read_to_string(ASSET_TAG).unwrap_or_default();
    tag.trim().parse().unwrap_or_default()
}

/// A served enclave of the real device.
#[derive(Debug)]
pub struct HostServer {
    enclave: Arc<HostEnclave>,
    _server: Server,
    // Held as long as the enclave is ours.
    _name: Option<NameClaim>,
}

/// What is known of the enclave.
#[derive(Debug)]
struct HostEnclave {
    description: Mutex<Description>,
    is_debug: bool,
    console: Option<Arc<Console>>,
    end: Mutex<End>,
    /// The description has its measurements. A condition variable of its own: one may not be used with two locks.
    measured: Condvar,
    /// The end was asked for or has come.
    end_changed: Condvar,
}

#[derive(Debug, Default)]
struct End {
    is_asked_for: bool,
    application: Option<ApplicationExit>,
    report: Option<EndReport>,
}

/// Serves the control socket of a running enclave.
pub fn serve(running: &Running, request: &LaunchRequest) -> Result<HostServer, Failure> {
    let world = world::open()?;
    let slot_uid = running.enclave.slot_uid().0;
    // Names are only for people: without a claim the wanted one is used.
    let name = world.claim_name(&request.name).ok();
    let console = if request.debug { Some(open_console(running.started.enclave_cid)) } else { None };
    let mut description = describe(&running.started, request.debug);
    if let Some(name) = &name {
        description.enclave_name.clone_from(&name.name);
    }
    let enclave = Arc::new(HostEnclave {
        description: Mutex::new(description),
        is_debug: request.debug,
        console,
        end: Mutex::new(End::default()),
        measured: Condvar::new(),
        end_changed: Condvar::new(),
    });
    measure_behind(Arc::clone(&enclave), request);
    listen_for_exit_status(Arc::clone(&enclave), running.started.enclave_cid);
    let failure = |error: ServeError| Failure::new(ErrorCode::SOCKET, "The enclave's control socket cannot be served").because(error);
    let controlled: Arc<dyn Controlled> = Arc::<HostEnclave>::clone(&enclave);
    let server = Server::start(&world, slot_uid, controlled).map_err(failure)?;
    Ok(HostServer { enclave, _server: server, _name: name })
}

impl HostServer {
    /// Waits until the enclave has ended or is to be ended, and notes how.
    pub fn wait(&self, running: &Running) -> io::Result<()> {
        loop {
            if running.enclave.wait_timeout(LOOK)? {
                break;
            }
            if self.enclave.lock_end().is_asked_for {
                break;
            }
        }
        let mut end = self.enclave.lock_end();
        let reason = if end.is_asked_for { EndReason::Stopped } else { EndReason::PoweredOff };
        let console_tail = self.enclave.console.as_ref().map(|console| console.tail()).unwrap_or_default();
        let detail = if end.is_asked_for { String::new() } else { "the device does not say why".to_owned() };
        end.report = Some(EndReport { reason, detail, application: end.application, console_tail });
        drop(end);
        self.enclave.end_changed.notify_all();
        Ok(())
    }
}

impl HostEnclave {
    fn lock_end(&self) -> std::sync::MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Controlled for HostEnclave {
    fn describe(&self, patience: Duration) -> Description {
        let description = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        // Waits for the measurements, within the patience.
        let waited = self.measured.wait_timeout_while(description, patience, |description| description.measurements.is_none());
        let mut description = waited.unwrap_or_else(PoisonError::into_inner).0.clone();
        if let Some(report) = &self.lock_end().report {
            description.state = State::Terminating;
            description.exit = Some(report.clone());
        }
        description
    }

    fn terminate(&self) {
        self.lock_end().is_asked_for = true;
        self.end_changed.notify_all();
    }

    fn wait_for_end(&self, patience: Duration) -> Option<EndReport> {
        let waited = self.end_changed.wait_timeout_while(self.lock_end(), patience, |end| end.report.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.report.clone()
    }

    fn console(&self) -> Option<Arc<Console>> {
        self.console.clone()
    }

    fn is_debug(&self) -> bool {
        self.is_debug
    }
}

fn describe(started: &Started, is_debug: bool) -> Description {
    Description {
        enclave_name: started.enclave_name.clone(),
        enclave_id: started.enclave_id.clone(),
        process_id: std::process::id(),
        enclave_cid: started.enclave_cid,
        number_of_cpus: u32::try_from(started.number_of_cpus).unwrap_or(u32::MAX),
        cpu_ids: started.cpu_ids.clone(),
        memory_mib: started.memory_mib,
        state: State::Running,
        flags: if is_debug { Flags::DebugMode } else { Flags::None },
        measurements: None,
        image_name: None,
        image_version: None,
        metadata: None,
        exit: None,
        engine: "Nitro device".to_owned(),
        isolation: Isolation::Hypervisor,
        notes: Vec::new(),
        stages: Vec::new(),
    }
}

/// Measures the image on a thread, as nitro-cli does: the enclave already runs.
fn measure_behind(enclave: Arc<HostEnclave>, request: &LaunchRequest) {
    let path = request.image.clone();
    thread::spawn(move || {
        let Some(image) = std::fs::File::open(path).ok().and_then(|file| Image::open(file).ok()) else { return };
        let measurements = image.measure().ok();
        let metadata = image.metadata().ok().flatten();
        let mut description = enclave.description.lock().unwrap_or_else(PoisonError::into_inner);
        description.measurements = measurements.as_ref().map(HexMeasurements::from);
        description.image_name = metadata.as_ref().map(|metadata| metadata.image_name.clone());
        description.image_version = metadata.as_ref().map(|metadata| metadata.image_version.clone());
        description.metadata = metadata.as_ref().map(metadata_value);
        drop(description);
        enclave.measured.notify_all();
    });
}

/// The console of an enclave in debug mode: CID 0, port 10000 + CID.
fn open_console(cid: u32) -> Arc<Console> {
    let console = Arc::new(Console::default());
    let filled = Arc::clone(&console);
    thread::spawn(move || {
        match console_stream(cid) {
            Ok(stream) => filled.drain(stream),
            Err(error) => filled.push(format!("nitroxide: the console cannot be connected to: {error}\n").as_bytes()),
        }
        filled.end();
    });
    console
}

/// Connects to the console of an enclave in debug mode.
pub fn console_stream(cid: u32) -> io::Result<impl Read> {
    let port = cid.checked_add(CONSOLE_PORT_OFFSET).ok_or(io::ErrorKind::InvalidInput)?;
    vsock::connect(0, port, CONSOLE_PATIENCE)
}

/// Takes the application's exit status, if the port is free and the image's init reports one.
fn listen_for_exit_status(enclave: Arc<HostEnclave>, cid: u32) {
    let Ok(listener) = vsock::Listener::bind(EXIT_STATUS_PORT) else { return };
    thread::spawn(move || {
        while let Ok((mut stream, peer, _)) = listener.accept() {
            let mut report = [0; 2];
            // Another enclave's report, if several run: the first to listen hears all.
            if stream.read_exact(&mut report).is_ok() && peer == cid {
                enclave.lock_end().application = ApplicationExit::from_bytes(report);
            }
        }
    });
}
