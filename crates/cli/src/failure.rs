//! What a failed command says: a message, the causes below it, what to do, and the E-code.
//!
//! Every command returns a [`Failure`]; [`report`] prints it on standard error as a miette report. The code is also the exit status.

use std::{
    error::Error,
    fmt,
    io::{IsTerminal, Write},
};

use miette::Diagnostic;

use crate::codes::ErrorCode;

/// Why a command failed, as the user sees it.
#[derive(Debug)]
pub struct Failure {
    code: ErrorCode,
    message: String,
    help: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// A failure with a message that says what and where.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), help: None, source: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds the cause, which the report shows below the message.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The causes below the message, in one line.
    pub fn causes(&self) -> Option<String> {
        self.source().map(nitroxide_attestation::in_one_line)
    }

    /// Message and causes in one line.
    pub fn one_line(&self) -> String {
        self.causes().map_or_else(|| self.message.clone(), |causes| format!("{}: {causes}", self.message))
    }

    /// What to do about it, if it says so.
    pub fn help_text(&self) -> Option<&str> {
        self.help.as_deref()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

impl Diagnostic for Failure {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(format!("[{}] {}", self.code, self.code.meaning().title)))
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_deref().map(|help| Box::new(help) as Box<dyn fmt::Display + 'a>)
    }
}

/// Prints a failure on standard error.
pub fn report(failure: Failure) {
    // Lines are broken only for the eyes, and never inside a path: who searches or copies a message wants it whole.
    let wraps = std::io::stderr().is_terminal();
    // Fails only for a second report, which then looks like the first.
    let _ = miette::set_hook(Box::new(move |_| Box::new(miette::MietteHandlerOpts::new().wrap_lines(wraps).break_words(false).build())));
    let report = miette::Report::new(failure);
    // Nobody is left to tell when standard error is closed.
    let _ = write!(std::io::stderr().lock(), "{report:?}");
}
