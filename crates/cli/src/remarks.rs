//! Standard error: progress while something takes long, and remarks. Quiet when asked to be, progress only on a terminal.

use std::{
    io::{IsTerminal, Write},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

/// How talkative the command is.
#[derive(Debug, Clone, Copy)]
pub struct Remarks {
    quiet: bool,
}

impl Remarks {
    /// Remarks unless `quiet`; progress only when standard error is a terminal.
    pub fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// Something the user should know that is no failure.
    pub fn note(self, text: impl std::fmt::Display) {
        if !self.quiet {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        }
    }

    /// A spinner with a message; it goes away when dropped.
    pub fn spinner(self, message: &str) -> Progress {
        let bar = self.bar(ProgressBar::new_spinner());
        bar.set_message(message.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Progress(bar)
    }

    /// A bar for so many bytes; it goes away when dropped.
    pub fn bytes(self, message: &str, total: u64) -> Progress {
        let bar = self.bar(ProgressBar::new(total));
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {eta}") {
            bar.set_style(style);
        }
        bar.set_message(message.to_owned());
        Progress(bar)
    }

    fn bar(self, bar: ProgressBar) -> ProgressBar {
        if self.quiet || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { bar }
    }
}

/// Progress that is shown as long as this lives.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// Says what is going on now.
    pub fn say(&self, message: impl Into<String>) {
        self.0.set_message(message.into());
    }

    /// How far it is, in bytes.
    pub fn at(&self, bytes: u64) {
        self.0.set_position(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
