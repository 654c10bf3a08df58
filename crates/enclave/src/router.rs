//! Where an enclave's connections to its parent go.
//!
//! Port 9000 is the boot heartbeat: it goes to the process that created the enclave, or is answered here. Port 9001 is where the guest's init
//! says how its application ended: that is consumed here, by where it comes from. Every other port goes to whoever listens in the world.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nitroxide_vsock::{ConnectRequest, Route, Router};
use nitroxide_world::rendezvous::HEARTBEAT_PORT;
use nitroxide_world::{Endpoint, VsockAddress, World};

use crate::options::Parent;
use crate::report::ApplicationExit;
use crate::stage::{Stage, Stages};

/// The port on which the guest's init tells how its application ended.
const EXIT_STATUS_PORT: u32 = 9001;

/// The byte that a booted enclave sends and wants back (nitro-cli's `HEART_BEAT`).
const HEARTBEAT: u8 = 0xB7;

/// How many of the guest's connections are answered here at a time; a guest needs one of each kind.
const MOST_ANSWERS: usize = 8;

/// How long a guest may take to send the bytes it connected for.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the application ended, as far as init has said.
pub(crate) type ApplicationExitCell = Mutex<Option<ApplicationExit>>;

/// The routes of one enclave.
#[derive(Debug)]
pub(crate) struct EnclaveRouter {
    pub(crate) world: World,
    pub(crate) cid: u32,
    pub(crate) creator_pid: u32,
    pub(crate) parent: Parent,
    pub(crate) stages: Arc<Stages>,
    pub(crate) application: Arc<ApplicationExitCell>,
    pub(crate) answering: Arc<AtomicUsize>,
}

impl Router for EnclaveRouter {
    fn connect(&self, request: ConnectRequest) -> io::Result<Route> {
        if self.parent == Parent::Vm && request.port != EXIT_STATUS_PORT {
            if request.port == HEARTBEAT_PORT {
                self.stages.reach(Stage::Heartbeat);
            }
            let from = VsockAddress { cid: self.cid, port: request.source_port };
            return self.world.ask(Endpoint::ParentVm, Some(from), request.port).map(Route::Asking);
        }
        self.open(request).map(Route::from)
    }
}

impl EnclaveRouter {
    fn open(&self, request: ConnectRequest) -> io::Result<UnixStream> {
        let from = VsockAddress { cid: self.cid, port: request.source_port };
        match request.port {
            EXIT_STATUS_PORT => {
                let application = Arc::clone(&self.application);
                self.answer("exit-status", move |stream| take_exit_status(stream, &application))
            }
            HEARTBEAT_PORT => {
                self.stages.reach(Stage::Heartbeat);
                match self.world.connect(Endpoint::Heartbeat(self.creator_pid), Some(from)) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => self.answer("heartbeat", answer_heartbeat),
                    other => other,
                }
            }
            port => self.world.connect(Endpoint::ParentPort(port), Some(from)),
        }
    }

    /// Answers a connection on a thread of its own, which cannot hold up the device.
    fn answer(&self, name: &str, act: impl FnOnce(UnixStream) -> io::Result<()> + Send + 'static) -> io::Result<UnixStream> {
        let count = AnswerCount::take(&self.answering).ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Err(error) = act(ours) {
                tracing::debug!(%error, "The guest opened a connection to its enclave process and did not use it as agreed.");
            }
            drop(count);
        })?;
        Ok(theirs)
    }
}

/// One of the answers that may run at a time.
struct AnswerCount(Arc<AtomicUsize>);

impl AnswerCount {
    fn take(count: &Arc<AtomicUsize>) -> Option<Self> {
        let more = |running| (running < MOST_ANSWERS).then_some(running + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(Arc::clone(count)))
    }
}

impl Drop for AnswerCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Reads the two bytes of init. The last report counts: init speaks after its application is gone.
fn take_exit_status(mut stream: UnixStream, application: &ApplicationExitCell) -> io::Result<()> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    if let Some(exit) = ApplicationExit::from_bytes(bytes) {
        *application.lock().unwrap_or_else(PoisonError::into_inner) = Some(exit);
    }
    Ok(())
}

/// Sends the heartbeat back.
fn answer_heartbeat(mut stream: UnixStream) -> io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    if byte == [HEARTBEAT] {
        stream.write_all(&byte)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router() -> (tempfile::TempDir, EnclaveRouter) {
        let dir = tempfile::tempdir().unwrap();
        let world = World::open(&dir.path().join("world")).unwrap();
        let router = EnclaveRouter {
            world,
            cid: 16,
            creator_pid: 77, // arbitrary
            parent: Parent::Processes,
            stages: Arc::default(),
            application: Arc::default(),
            answering: Arc::default(),
        };
        (dir, router)
    }

    fn request(port: u32) -> ConnectRequest {
        ConnectRequest { source_port: 1234, cid: 3, port }
    }

    #[test]
    fn a_heartbeat_goes_to_the_creator_and_is_answered_here_without_one() {
        let (_dir, router) = router();
        let mut stream = router.open(request(9000)).unwrap();
        stream.write_all(&[0xB7]).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, [0xB7]);
        assert!(router.stages.all().iter().any(|time| time.stage == Stage::Heartbeat));

        let creator = router.world.bind(Endpoint::Heartbeat(77)).unwrap();
        let _stranger = router.world.bind(Endpoint::Heartbeat(78)).unwrap();
        let _stream = router.open(request(9000)).unwrap();
        assert_eq!(creator.accept().unwrap().1, Some(VsockAddress { cid: 16, port: 1234 }));
    }

    #[test]
    fn another_byte_is_no_heartbeat() {
        let (_dir, router) = router();
        let mut stream = router.open(request(9000)).unwrap();
        stream.write_all(&[0xB8]).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty(), "{answer:?}");
    }

    #[test]
    fn exit_status_is_consumed_even_if_somebody_listens_there() {
        let (_dir, router) = router();
        let listener = router.world.bind(Endpoint::ParentPort(9001)).unwrap();
        let mut stream = router.open(request(9001)).unwrap();
        stream.write_all(&[1, 42]).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap(); // Returns when the other end has read and closed.
        assert_eq!(*router.application.lock().unwrap(), Some(ApplicationExit::Exited(42)));
        listener.socket().set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err());
    }

    #[test]
    fn other_ports_go_to_the_world_or_are_refused() {
        let (_dir, router) = router();
        assert_eq!(router.open(request(5000)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listener = router.world.bind(Endpoint::ParentPort(5000)).unwrap();
        let _stream = router.open(request(5000)).unwrap();
        assert_eq!(listener.accept().unwrap().1, Some(VsockAddress { cid: 16, port: 1234 }));
    }

    #[test]
    fn a_parent_that_is_a_vm_is_asked_for_every_port_but_the_exit_status() {
        let (_dir, router) = router();
        let router = EnclaveRouter { parent: Parent::Vm, ..router };
        assert_eq!(router.connect(request(9000)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let vm = router.world.bind(Endpoint::ParentVm).unwrap();
        for port in [9000, 5000] {
            let Ok(Route::Asking(_stream)) = router.connect(request(port)) else { panic!("not asked") };
            let (mut asked, peer) = vm.accept().unwrap();
            let mut line = vec![0; format!("CONNECT {port}\n").len()];
            asked.read_exact(&mut line).unwrap();
            assert_eq!(line, format!("CONNECT {port}\n").as_bytes());
            assert_eq!(peer, Some(VsockAddress { cid: 16, port: 1234 }));
        }
        let Ok(Route::Connected(_)) = router.connect(request(9001)) else { panic!("the exit status is the enclave process's") };
    }

    #[test]
    fn silent_connections_of_a_guest_are_bounded() {
        let (_dir, router) = router();
        let held: Vec<_> = (0..MOST_ANSWERS).map(|_| router.open(request(9001)).unwrap()).collect();
        assert!(router.open(request(9001)).is_err());
        drop(held);
    }
}
