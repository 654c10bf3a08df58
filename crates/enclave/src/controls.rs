//! A running enclave as others see it: behind its control socket, and on its console's port of CID 0.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nitroxide_world::{Endpoint, Listener, World};

use crate::console::Console;
use crate::control::Controlled;
use crate::followers;
use crate::life::Life;
use crate::measured::Measured;
use crate::refused::Refused;
use crate::report::{Description, EndReport, Flags, HexMeasurements};
use crate::stage::Stages;

/// The enclave as its control socket shows it.
#[derive(Debug)]
pub(crate) struct Controls {
    /// What does not change.
    pub(crate) description: Description,
    /// What executes it, once it runs.
    pub(crate) engine: OnceLock<String>,
    pub(crate) life: Arc<Life>,
    pub(crate) stages: Arc<Stages>,
    pub(crate) measured: Arc<Measured>,
    pub(crate) console: Arc<Console>,
}

impl Controlled for Controls {
    fn describe(&self, patience: Duration) -> Description {
        let measurements = self.measured.wait(Some(patience));
        Description {
            state: self.life.state(),
            measurements: measurements.as_ref().map(HexMeasurements::from),
            exit: self.life.report(),
            engine: self.engine.get().cloned().unwrap_or_default(),
            stages: self.stages.all(),
            ..self.description.clone()
        }
    }

    fn terminate(&self) {
        self.life.request_stop();
    }

    fn wait_for_end(&self, patience: Duration) -> Option<EndReport> {
        self.life.wait_for_end(patience)
    }

    fn console(&self) -> Option<Arc<Console>> {
        Some(Arc::clone(&self.console))
    }

    fn is_debug(&self) -> bool {
        self.description.flags == Flags::DebugMode
    }
}

/// The raw console on CID 0, for an enclave in debug mode.
#[derive(Debug)]
pub(crate) struct ConsoleService {
    listener: Arc<Listener>,
    readers: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl ConsoleService {
    /// Binds the port and serves it.
    pub(crate) fn start(world: &World, cid: u32, console: &Arc<Console>) -> Result<Self, Refused> {
        let listener = Arc::new(world.bind(Endpoint::Console(cid))?);
        let readers = Arc::<AtomicUsize>::default();
        let (accepting, console, counted) = (Arc::clone(&listener), Arc::clone(console), Arc::clone(&readers));
        let thread = std::thread::Builder::new()
            .name("console-listener".to_owned())
            .spawn(move || followers::serve(&accepting, &console, &counted))
            .map_err(|error| Refused::io("A thread cannot be started", &error))?;
        Ok(Self { listener, readers, thread: Some(thread) })
    }

    /// Waits up to `patience` until every reader has read to the end.
    pub(crate) fn drain(&self, patience: Duration) {
        let begin = Instant::now();
        while self.readers.load(Ordering::Relaxed) > 0 && begin.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ConsoleService {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(self.listener.socket(), rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
