//! The server of a control socket: a thread that accepts, and one for each connection.
//!
//! Whatever a client does costs at most one thread, one request of 4 KiB and one piece of output; how many there are is bounded, and those who wait
//! or follow leave room for those who only ask. The enclave's own threads never wait for a client.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nitroxide_world::{BindError, Endpoint, SocketFile, World};

use super::frame;
use super::protocol::{Answer, Command, Failure, MAX_REQUEST_BYTES, Reply, Request, VERSION};
use crate::console::Console;
use crate::followers;
use crate::report::{Description, EndReport};

/// How many connections are served at a time.
const MOST_CONNECTIONS: usize = 64;

/// How many of those may wait or follow. One that ends the enclave may always, as they all have their answer then.
const MOST_LONG: usize = 48;

/// How long a client may take to send its request.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);

/// How long a description waits for measurements. Hashing takes about 2 s per GiB of image on a slow host.
const MEASURE_PATIENCE: Duration = Duration::from_secs(20);

/// How often a waiting thread looks whether its client is still there.
const LOOK: Duration = Duration::from_millis(500);

/// How long a client of `terminate` is kept connected, so that it sees this process end.
const LAST_WORD: Duration = Duration::from_secs(10);

/// What is controlled: an enclave in its process, or one that an owner has from the host's device.
pub trait Controlled: Send + Sync + 'static {
    /// The description now; with a `patience`, it may wait that long for measurements.
    fn describe(&self, patience: Duration) -> Description;

    /// Begins the end, without waiting for it. May be called any number of times.
    fn terminate(&self);

    /// Waits up to `patience` for the end.
    fn wait_for_end(&self, patience: Duration) -> Option<EndReport>;

    /// The console, if there is one.
    fn console(&self) -> Option<Arc<Console>>;

    /// Whether the enclave is in debug mode.
    fn is_debug(&self) -> bool;
}

/// A served control socket. Dropping it ends accepting; connections that are being answered end by themselves.
#[derive(Debug)]
pub struct Server {
    // Dropped first: nobody finds the socket while it closes.
    file: Option<SocketFile>,
    listener: Arc<std::os::unix::net::UnixListener>,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    long: AtomicUsize,
    connections: Mutex<usize>,
    changed: Condvar,
}

/// Why a control socket cannot be served.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum ServeError {
    /// The control socket cannot be bound
    Bind(#[source] BindError),
    /// No thread can be started for the control socket
    Thread(#[source] io::Error),
}

impl Server {
    /// Binds the control socket of the enclave in slot `slot_uid` and serves it.
    ///
    /// # Errors
    ///
    /// When it cannot be bound, or a thread cannot be started.
    pub fn start(world: &World, slot_uid: u64, controlled: Arc<dyn Controlled>) -> Result<Self, ServeError> {
        let (listener, file) = world.bind(Endpoint::Control(slot_uid)).map_err(ServeError::Bind)?.into_parts();
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared::default());
        let (accepting, of_acceptor) = (Arc::clone(&listener), Arc::clone(&shared));
        let acceptor = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&accepting, &of_acceptor, &controlled))
            .map_err(ServeError::Thread)?;
        Ok(Self { file: Some(file), listener, shared, acceptor: Some(acceptor) })
    }

    /// Waits up to `patience` until every client has its answer.
    pub fn drain(&self, patience: Duration) {
        let connections = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let _drained = self.shared.changed.wait_timeout_while(connections, patience, |connections| *connections > 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.file.take());
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// One of the connections that may be served at a time.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut connections = shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if *connections >= MOST_CONNECTIONS {
            return None;
        }
        *connections += 1;
        drop(connections);
        Some(Self(Arc::clone(shared)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.connections.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.changed.notify_all();
    }
}

/// One of the connections that may wait or follow.
struct LongPlace<'s>(&'s AtomicUsize);

impl<'s> LongPlace<'s> {
    fn take(count: &'s AtomicUsize, command: Command) -> Option<Self> {
        let most = if command == Command::Terminate { MOST_CONNECTIONS } else { MOST_LONG };
        let more = |long| (long < most).then_some(long + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(count))
    }
}

impl Drop for LongPlace<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept(listener: &std::os::unix::net::UnixListener, shared: &Arc<Shared>, controlled: &Arc<dyn Controlled>) {
    while let Some(stream) = followers::next_connection(|| listener.accept().map(|(stream, _)| stream)) {
        let Some(place) = Place::take(shared) else { continue };
        let controlled = Arc::clone(controlled);
        let started = std::thread::Builder::new().name("control-client".to_owned()).spawn(move || {
            if let Err(error) = serve(stream, place, &*controlled) {
                tracing::debug!(%error, "A client of the control socket went away.");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "No thread can be started for a client of the control socket.");
        }
    }
}

/// Answers one connection.
fn serve(mut stream: UnixStream, place: Place, controlled: &dyn Controlled) -> io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_PATIENCE))?;
    if !is_allowed(&stream)? {
        return fail(&mut stream, Failure::NotAllowed, "Only the user who started the enclave, and root, may control it.");
    }
    let request: Request = match frame::read(&mut stream, MAX_REQUEST_BYTES).map(|bytes| serde_json::from_slice(&bytes)) {
        Ok(Ok(request)) => request,
        Ok(Err(_)) => return fail(&mut stream, Failure::Malformed, "The request is not understood; use the same version of nitroxide."),
        Err(error) => return Err(error),
    };
    if request.protocol != VERSION {
        let message =
            format!("The enclave speaks version {VERSION} of the control protocol; use the version of nitroxide that started it.");
        return fail(&mut stream, Failure::Version, &message);
    }
    let shared = Arc::clone(&place.0);
    let _long = if request.command.is_long() {
        match LongPlace::take(&shared.long, request.command) {
            Some(long) => Some(long),
            None => {
                return fail(&mut stream, Failure::Busy, "Too many clients wait for this enclave or follow its console; end some of them.");
            }
        }
    } else {
        None
    };
    match request.command {
        Command::Describe { measured } => {
            let patience = if measured { MEASURE_PATIENCE } else { Duration::ZERO };
            reply(&mut stream, Answer::Description(Box::new(controlled.describe(patience))))
        }
        Command::Terminate => {
            controlled.terminate();
            let report = wait(&stream, controlled)?;
            reply(&mut stream, Answer::Ended(report))?;
            // Whoever waits for all answers need not wait for what follows: the client only wants to see this process end.
            drop(place);
            stream.set_read_timeout(Some(LAST_WORD))?;
            let _closed = stream.read(&mut [0]);
            Ok(())
        }
        Command::Wait => {
            let report = wait(&stream, controlled)?;
            reply(&mut stream, Answer::Ended(report))
        }
        Command::Logs { follow } => stream_console(stream, controlled, follow),
        Command::Console if !controlled.is_debug() => fail(
            &mut stream,
            Failure::NotDebug,
            "The enclave was not started in debug mode, so its console cannot be read; see `nitroxide logs`.",
        ),
        Command::Console => stream_console(stream, controlled, true),
    }
}

fn wait(stream: &UnixStream, controlled: &dyn Controlled) -> io::Result<EndReport> {
    loop {
        if let Some(report) = controlled.wait_for_end(LOOK) {
            return Ok(report);
        }
        if followers::has_hung_up(stream) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

fn stream_console(mut stream: UnixStream, controlled: &dyn Controlled, follow: bool) -> io::Result<()> {
    let Some(console) = controlled.console() else {
        return fail(&mut stream, Failure::NoConsole, "The enclave has no console here.");
    };
    reply(&mut stream, Answer::Stream)?;
    let reader = stream.try_clone()?;
    followers::copy(&console, &reader, follow, |bytes| frame::write(&mut stream, bytes))?;
    frame::write(&mut stream, b"")?;
    // The console ends a moment before the report is there.
    let patience = if follow { Duration::from_secs(5) } else { Duration::ZERO };
    reply(&mut stream, controlled.wait_for_end(patience).map_or(Answer::Detached, Answer::Ended))
}

fn is_allowed(stream: &UnixStream) -> io::Result<bool> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    Ok(peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

fn reply(stream: &mut UnixStream, answer: Answer) -> io::Result<()> {
    frame::write_json(stream, &Reply { protocol: VERSION, answer })
}

fn fail(stream: &mut UnixStream, failure: Failure, message: &str) -> io::Result<()> {
    reply(stream, Answer::Failed { failure, message: message.to_owned() })
}
