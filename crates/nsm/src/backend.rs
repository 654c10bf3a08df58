//! The NSM of a running enclave: its threads, and the socket that QEMU gets.
//!
//! [`spawn`] starts two threads. One makes the [`Identity`]: keys, certificates, and the boot measurements, for which it may have
//! to wait until the image is hashed. The other serves QEMU with [`Handler`] and never waits for the first: it describes itself
//! and gives random numbers at once, because the guest's kernel asks for both while it boots. docs/nsm.md, "Threads".

use crate::module::{Identity, Module};
use crate::pcr::InitialPcrs;
use crate::vhost_user::Handler;
use nitroxide_attestation::{Pki, Signer, SignerError, Timestamp};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use vhost::vhost_user::{BackendReqHandler, Error as VhostUserError};

/// What distinguishes one enclave's NSM from another's.
pub struct NsmConfig {
    /// Its name: parent instance, `-enc`, enclave as 16 hex digits. 1 to 50 ASCII letters, digits, `-`, `.` or `_`, 40 before `-enc`.
    pub module_id: String,
    /// Gives the boot measurements. Called once, on a thread of its own; it may block. Requests about registers wait for it, and
    /// are answered `InternalError` if it panics.
    pub pcrs: Box<dyn FnOnce() -> InitialPcrs + Send>,
    /// Was the enclave started in debug mode, so that its measurements read zero?
    pub debug: bool,
    /// What documents hang from; `None`: a root that is made now and known to nobody. With a PKI that cannot be used, documents are
    /// answered `InternalError` until it can, and the log says why.
    pub pki: Option<Pki>,
}

impl fmt::Debug for NsmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NsmConfig").field("module_id", &self.module_id).field("debug", &self.debug).finish_non_exhaustive()
    }
}

/// A running NSM. It ends when QEMU closes its socket or dies, or when this is dropped.
///
/// Dropping waits for the serving thread, but not for a `pcrs` that still blocks: that thread ends when the closure returns.
#[derive(Debug)]
pub struct NsmBackend {
    frontend: Mutex<Option<OwnedFd>>,
    /// A second handle of the served socket: shutting it down wakes a thread that reads half a message.
    socket: UnixStream,
    stop: Arc<OwnedFd>,
    serving: Option<JoinHandle<()>>,
}

impl NsmBackend {
    /// The socket for QEMU (`-chardev socket,fd=N`), once. Close every copy but QEMU's, or its death goes unnoticed.
    pub fn take_frontend(&self) -> Option<OwnedFd> {
        lock(&self.frontend).take()
    }

    /// Whether the NSM still serves: QEMU has not gone away.
    pub fn is_serving(&self) -> bool {
        self.serving.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for NsmBackend {
    fn drop(&mut self) {
        signal(&self.stop);
        let _ = self.socket.shutdown(Shutdown::Both); // fails when QEMU is gone already, which is as good
        if let Some(thread) = self.serving.take() {
            let _ = thread.join(); // a panic there was reported by the panic hook
        }
    }
}

/// Starts the NSM of one enclave.
///
/// # Errors
///
/// EMFILE and the like: no socket pair, eventfd or thread could be had.
pub fn spawn(config: NsmConfig) -> io::Result<NsmBackend> {
    let NsmConfig { module_id, pcrs, debug, pki } = config;
    let (frontend, socket) = UnixStream::pair()?;
    let stop = Arc::new(new_event()?);
    let made = Arc::new(new_event()?);
    let (sender, receiver) = mpsc::channel();
    let promise = Promise { identity: Some(sender), event: Arc::clone(&made) };
    let identity = Pending { identity: receiver, event: made };
    let handler = Arc::new(Mutex::new(Handler::new(Module::new(module_id.clone(), debug))?));
    let server = Server { socket: socket.try_clone()?, stop: Arc::clone(&stop), identity, handler };
    let serving = thread::Builder::new().name("nsm".into()).spawn(move || server.run())?;
    let backend = NsmBackend { frontend: Mutex::new(Some(frontend.into())), socket, stop, serving: Some(serving) };
    thread::Builder::new().name("nsm-identity".into()).spawn(move || {
        if let (Some(identity), Some(sender)) = (make_identity(&module_id, pki.as_ref(), pcrs), &promise.identity) {
            let _ = sender.send(identity); // fails when the NSM was dropped meanwhile
        }
    })?;
    Ok(backend)
}

fn make_identity(module_id: &str, pki: Option<&Pki>, pcrs: Box<dyn FnOnce() -> InitialPcrs + Send>) -> Option<Identity> {
    match signer(module_id, pki) {
        Ok(signer) => Some(Identity { signer, pcrs: pcrs() }),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, module_id, "The NSM has no key to sign with");
            None
        }
    }
}

fn signer(module_id: &str, pki: Option<&Pki>) -> Result<Signer, SignerError> {
    let Some(pki) = pki else { return Signer::local(module_id, Timestamp::now().0) };
    pki.signer(module_id, Timestamp::now().0).or_else(|error| {
        tracing::error!(error = &error as &dyn std::error::Error, "Attestation documents cannot be made as long as this is so");
        pki.signer_later(module_id)
    })
}

/// The sender of the identity. Gone, without one or with, it has woken the serving thread.
struct Promise {
    identity: Option<Sender<Identity>>,
    event: Arc<OwnedFd>,
}

impl Drop for Promise {
    fn drop(&mut self) {
        drop(self.identity.take()); // first, so that whoever wakes finds either an identity or that none will come
        signal(&self.event);
    }
}

/// The other end of a [`Promise`].
#[derive(Debug)]
struct Pending {
    identity: Receiver<Identity>,
    event: Arc<OwnedFd>,
}

/// The serving thread's own.
struct Server {
    socket: UnixStream,
    stop: Arc<OwnedFd>,
    identity: Pending,
    handler: Arc<Mutex<Handler>>,
}

/// What woke the serving thread.
#[derive(Debug, Default)]
struct Woken {
    stop: bool,
    message: bool,
    kick: bool,
    kick_broken: bool,
    identity: bool,
}

impl Server {
    fn run(self) {
        self.serve();
        // The owner of the NSM has a handle of the socket, too: without this QEMU would wait for answers for ever.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn serve(&self) {
        let Self { socket, stop, identity, handler } = self;
        let mut messages = match socket.try_clone() {
            Ok(socket) => BackendReqHandler::from_stream(socket, Arc::clone(handler)),
            Err(error) => return tracing::error!(%error, "The NSM cannot serve"),
        };
        let mut more = false;
        loop {
            let woken = match wait(socket, stop, identity, &lock(handler), more) {
                Ok(woken) => woken,
                Err(error) => return tracing::error!(%error, "The NSM cannot wait for requests"),
            };
            if woken.stop {
                return;
            }
            if woken.message {
                match messages.handle_request() {
                    Ok(()) | Err(VhostUserError::SocketRetry(_)) => {}
                    Err(VhostUserError::Disconnected | VhostUserError::PartialMessage | VhostUserError::SocketBroken(_)) => return,
                    // Whole and understood, but refused, e.g. a queue that the guest put outside its memory: QEMU is told.
                    Err(error @ (VhostUserError::InvalidParam | VhostUserError::ReqHandlerError(_))) => {
                        tracing::warn!(%error, "The NSM refused a message of QEMU");
                    }
                    Err(error) => return tracing::error!(%error, "QEMU and the NSM do not understand each other"),
                }
            }
            let mut handler = lock(handler);
            if woken.identity {
                let identity = identity.identity.try_recv().ok();
                if identity.is_none() {
                    tracing::error!("The NSM got no boot measurements; it refuses every request about registers");
                }
                handler.module_mut().identify(identity);
            }
            if woken.kick_broken {
                handler.drop_kick();
            }
            // A message may have started the queue with requests already in it, so it is looked at whatever woke the thread.
            more = handler.advance();
        }
    }
}

fn wait(socket: &UnixStream, stop: &OwnedFd, identity: &Pending, handler: &Handler, more: bool) -> io::Result<Woken> {
    let waits_for_identity = !handler.module().is_identified();
    let mut watched = vec![PollFd::new(stop, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
    let identity_at = waits_for_identity.then(|| {
        watched.push(PollFd::new(&*identity.event, PollFlags::IN));
        watched.len() - 1
    });
    let kick = handler.kick();
    let kick_at = kick.map(|kick| {
        watched.push(PollFd::new(kick, PollFlags::IN));
        watched.len() - 1
    });
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut watched, more.then_some(&now)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let happened = |at: Option<usize>| at.and_then(|at| watched.get(at)).map_or(PollFlags::empty(), PollFd::revents);
    let mut woken = Woken {
        stop: !happened(Some(0)).is_empty(),
        message: !happened(Some(1)).is_empty(),
        identity: !happened(identity_at).is_empty(),
        ..Woken::default()
    };
    let kicked = happened(kick_at);
    woken.kick = kicked.contains(PollFlags::IN);
    woken.kick_broken = !woken.kick && !kicked.is_empty();
    if woken.kick
        && let Some(kick) = kick
    {
        let _ = rustix::io::read(kick, &mut [0; 8]); // only empties it; the queue says what is to be done
    }
    Ok(woken)
}

fn new_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes()); // can only fail when it is signalled already
}

/// The values behind these locks are whole at every moment, so a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
