//! Processes that never outlive the test: started from a thread that lasts, with the kernel's parent-death signal, and ended when dropped.
//!
//! The kernel sends that signal when the *thread* that made the process ends (prctl(2), PR_SET_PDEATHSIG), so one thread that never ends starts all of
//! them; setpriv(1), part of every Debian, asks for the signal. Whoever was killed before that is noticed by [`GUARD`].

use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a process may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(20);

/// Becomes the program, if the process that started it is still there: the signal for its death has been asked for by now.
const GUARD: &str = r#"[ "$PPID" = "$0" ] && exec "$@""#;

/// What a process has printed so far, in whole lines; more comes while it runs.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// All of it as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Takes what comes from one pipe, line by line: the other pipe's lines must not land in the middle of one, as they are looked for by their beginnings.
    fn fill_from(&self, output: impl Read + Send + 'static) {
        let log = self.clone();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while let Ok(1..) = output.read_until(b'\n', &mut line) {
                log.0.lock().unwrap_or_else(PoisonError::into_inner).append(&mut line);
            }
        });
    }
}

/// A running process. Dropped, it is ended: asked first, then killed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Log,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts the program of `command` with nothing to read; its standard output and error become [`Process::log`].
    ///
    /// # Errors
    ///
    /// What starting setpriv(1) gives. A program that cannot be executed shows in the log and the status.
    pub fn start(command: &Command) -> io::Result<Self> {
        let mut guarded = Command::new("setpriv");
        guarded.args(["--pdeathsig", "KILL", "--", "/bin/sh", "-c", GUARD, &std::process::id().to_string()]);
        guarded.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(name, value),
                None => guarded.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            guarded.current_dir(directory);
        }
        guarded.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn_from_lasting_thread(guarded)?;
        let log = Log::default();
        if let Some(output) = child.stdout.take() {
            log.fill_from(output);
        }
        if let Some(output) = child.stderr.take() {
            log.fill_from(output);
        }
        Ok(Self { child, log, ended: None })
    }

    /// What it has printed.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// Sends it a signal, if it still runs.
    pub fn signal(&mut self, signal: Signal) {
        if self.status().is_none() {
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    /// Waits for its end; none where it still runs after `patience`.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while self.status().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
        if self.wait(GRACE).is_none() {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

type Job = (Command, mpsc::SyncSender<io::Result<Child>>);

fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, received) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in received {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (answer, answered) = mpsc::sync_channel(1);
    let gone = |_| io::Error::other("the thread that starts processes has ended");
    spawner.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer)).map_err(|_| gone(mpsc::RecvError))?;
    answered.recv().map_err(gone)?
}
