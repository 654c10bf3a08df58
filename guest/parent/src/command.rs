//! One command of the host: a shell with pipes or a terminal, its output sent on as it comes, its end told once.
//!
//! [`Running`] is the server's handle. A thread per command ([`follow`]) sends output and status; another one feeds standard input, so that a command that
//! does not read never holds up the server. A background process that keeps the pipe open after the shell's end is read on, and its output thrown away.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use nitroxide_parent::frame::Kind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::server::Port;
use crate::setup::PATH;
use crate::terminal;

/// The largest piece of output in one frame, in bytes.
const PIECE_BYTES: usize = 32 << 10;

/// A command that was started.
pub struct Running {
    group: Pid,
    input: Sender<Vec<u8>>,
    terminal: Option<File>,
    has_ended: Arc<AtomicBool>,
}

impl Running {
    /// Starts `script` with pipes.
    ///
    /// # Errors
    ///
    /// What making pipes, processes or threads gives.
    pub fn with_pipes(script: &str, number: u32, port: Port) -> io::Result<Self> {
        let (output, theirs) = io::pipe()?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(theirs.try_clone()?).stderr(theirs).process_group(0);
        let mut child = prepare(&mut command).spawn()?;
        // Its copies of the pipe's write end would keep the output from ending.
        drop(command);
        let stdin = child.stdin.take().map(OwnedFd::from);
        Self::follow(child, output, stdin, None, number, port)
    }

    /// Starts `script`, or an interactive shell where it is empty, on a terminal of that size.
    ///
    /// # Errors
    ///
    /// As [`Running::with_pipes`], and what the terminal gives.
    pub fn on_terminal(script: &str, (rows, columns): (u16, u16), number: u32, port: Port) -> io::Result<Self> {
        let (ours, theirs) = terminal::open(rows, columns)?;
        let mut command = Command::new("/proc/self/exe");
        command.args([terminal::STAGE, "/bin/sh"]);
        if !script.is_empty() {
            command.args(["-c", script]);
        }
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        let child = prepare(&mut command).spawn()?;
        drop(command);
        let output = PipeReader::from(OwnedFd::from(ours.try_clone()?));
        let input = OwnedFd::from(ours.try_clone()?);
        Self::follow(child, output, Some(input), Some(ours), number, port)
    }

    /// Gives bytes to standard input; none close it.
    pub fn give(&self, bytes: Vec<u8>) {
        // The command may have ended meanwhile.
        let _ = self.input.send(bytes);
    }

    /// Whether the command has ended and its status was sent: then nothing more can be done with it.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// Sends a signal to the command and what it started.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process_group(self.group, signal);
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = &self.terminal {
            let _ = terminal::resize(terminal, rows, columns);
        }
    }

    fn follow(
        child: Child,
        output: PipeReader,
        stdin: Option<OwnedFd>,
        terminal: Option<File>,
        number: u32,
        port: Port,
    ) -> io::Result<Self> {
        let group = Pid::from_child(&child);
        let closes = terminal.is_none();
        let (input, pieces) = mpsc::channel::<Vec<u8>>();
        thread::Builder::new().spawn(move || {
            let mut stdin = stdin.map(File::from);
            for piece in pieces {
                if piece.is_empty() && closes {
                    stdin = None;
                } else if let Some(stdin) = &mut stdin {
                    // It may have closed its end: then nobody wants the bytes.
                    let _ = stdin.write_all(&piece);
                }
            }
        })?;
        let has_ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&has_ended);
        thread::Builder::new().spawn(move || {
            if let Err(error) = follow(child, output, number, &port, &told) {
                port.send(Kind::Failed, number, format!("following the command: {error}").as_bytes());
            }
        })?;
        Ok(Self { group, input, terminal, has_ended })
    }
}

fn prepare(command: &mut Command) -> &mut Command {
    command.env_clear().envs([("PATH", PATH), ("HOME", "/root"), ("TERM", "linux"), ("USER", "root")]).current_dir("/root")
}

/// Sends the command's output until it has ended, then its status; then reads on until nobody can write any more.
fn follow(mut child: Child, mut output: PipeReader, number: u32, port: &Port, has_ended: &AtomicBool) -> io::Result<()> {
    let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let mut buffer = vec![0; PIECE_BYTES];
    let mut is_open = true;
    while is_open {
        let mut waiting = [PollFd::new(&output, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        poll(&mut waiting, None)?;
        let [has_output, has_ended] = waiting.map(|one| !one.revents().is_empty());
        if has_output {
            is_open = pass_on(&mut output, &mut buffer, number, port);
        } else if has_ended {
            break;
        }
    }
    // Before it is reaped: its number may belong to another process afterwards.
    has_ended.store(true, Ordering::Release);
    let status = child.wait()?;
    // What a child of the shell wrote just before the end.
    while is_open && is_readable(&output)? {
        is_open = pass_on(&mut output, &mut buffer, number, port);
    }
    let code = status.code().unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0));
    port.send(Kind::Exited, number, &code.to_le_bytes());
    while is_open {
        // A terminal gives EIO once nobody has it open.
        is_open = matches!(output.read(&mut buffer), Ok(1..));
    }
    Ok(())
}

/// Sends one piece of output; false at its end.
fn pass_on(output: &mut PipeReader, buffer: &mut [u8], number: u32, port: &Port) -> bool {
    match output.read(buffer) {
        Ok(0) => false,
        Ok(length) => {
            port.send(Kind::Output, number, buffer.get(..length).unwrap_or_default());
            true
        }
        Err(error) => error.kind() == io::ErrorKind::Interrupted,
    }
}

fn is_readable(output: &impl AsFd) -> io::Result<bool> {
    let mut waiting = [PollFd::new(output, PollFlags::IN)];
    Ok(poll(&mut waiting, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
}
