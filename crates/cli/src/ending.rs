//! How an enclave ended: in words, as JSON, and as an exit status.

use nitroxide_enclave::report::{ApplicationExit, EndReason, EndReport};
use serde::Serialize;

use crate::{codes::ErrorCode, failure::Failure};

/// What `wait` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct EndingJson {
    enclave_name: String,
    #[serde(rename = "EnclaveID")]
    enclave_id: String,
    reason: EndReason,
    exit_code: Option<u8>,
    signal: Option<u8>,
    detail: String,
}

impl EndingJson {
    /// The ending of one enclave.
    pub fn new(enclave_name: String, enclave_id: String, report: &EndReport) -> Self {
        let (exit_code, signal) = match report.application {
            Some(ApplicationExit::Exited(code)) => (Some(code), None),
            Some(ApplicationExit::Signalled(signal)) => (None, Some(signal)),
            _ => (None, None),
        };
        Self { enclave_name, enclave_id, reason: report.reason, exit_code, signal, detail: report.detail.clone() }
    }
}

/// One line for people.
pub fn text(report: &EndReport) -> String {
    let application = match report.application {
        Some(ApplicationExit::Exited(code)) => format!("the application exited with status {code}; "),
        Some(ApplicationExit::Signalled(signal)) => format!("signal {signal} ended the application; "),
        _ => String::new(),
    };
    let detail = if report.detail.is_empty() { String::new() } else { format!(" ({})", report.detail.trim_end()) };
    format!("The enclave has ended: {application}{}{detail}", report.reason)
}

/// The exit status of `run`: the application's where it is known; otherwise 0 for an orderly end, as AWS's init reports nothing.
///
/// # Errors
///
/// An end that is nobody's wish: a panic, a failed engine, a lost process.
pub fn exit_status(report: &EndReport) -> Result<u8, Failure> {
    if let Some(application) = report.application {
        return Ok(application.shell_status());
    }
    let failed = |code, message: &str| {
        let failure = Failure::new(code, message);
        if report.detail.is_empty() { failure } else { failure.because(report.detail.trim_end().to_owned()) }
    };
    match report.reason {
        EndReason::PoweredOff | EndReason::Rebooted => Ok(0),
        // As a shell shows a process that SIGTERM ended.
        EndReason::Stopped => Ok(143),
        EndReason::Panicked => Err(failed(ErrorCode::BOOT, "The enclave's kernel panicked")
            .help("Its console above says why; too little memory is a frequent reason (--memory).")),
        EndReason::EngineFailed => Err(failed(ErrorCode::BOOT, "The enclave's virtual machine failed")),
        _ => Err(failed(ErrorCode::ENCLAVE_PROCESS_CONNECTION, "The enclave's process ended unexpectedly")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(reason: EndReason, application: Option<ApplicationExit>) -> EndReport {
        EndReport { reason, detail: String::new(), application, console_tail: String::new() }
    }

    #[test]
    fn the_applications_status_is_ours_whatever_the_machine_did_then() {
        for reason in [EndReason::PoweredOff, EndReason::Rebooted, EndReason::Panicked] {
            assert_eq!(exit_status(&report(reason, Some(ApplicationExit::Exited(42)))).unwrap(), 42);
        }
        assert_eq!(exit_status(&report(EndReason::PoweredOff, Some(ApplicationExit::Signalled(9)))).unwrap(), 137);
    }

    #[test]
    fn without_a_report_an_orderly_end_is_success_and_others_are_failures() {
        assert_eq!(exit_status(&report(EndReason::Rebooted, None)).unwrap(), 0);
        assert_eq!(exit_status(&report(EndReason::Stopped, None)).unwrap(), 143);
        assert_eq!(exit_status(&report(EndReason::Panicked, None)).unwrap_err().code(), ErrorCode::BOOT);
        assert_eq!(exit_status(&report(EndReason::ProcessLost, None)).unwrap_err().code(), ErrorCode::ENCLAVE_PROCESS_CONNECTION);
    }
}
