//! The second stage: a child of init that becomes the application.
//!
//! Called as `nitroxide-init UID GID GROUP,GROUP DIRECTORY PROGRAM ARGUMENTS…` (see [`arguments`]) with the application's environment.
//! A process of its own, so that changing identity and session needs no code between fork and exec.

use std::{
    ffi::{OsStr, OsString},
    fmt, io,
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
};

use rustix::{
    process::{Gid, Uid},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

use crate::users::Identity;

/// Why the application could not be started.
#[derive(Debug)]
pub struct Failure {
    what: String,
    error: Option<io::Error>,
}

impl Failure {
    /// 127 when the program does not exist, 126 otherwise.
    pub fn exit_code(&self) -> u8 {
        if self.error.as_ref().is_some_and(|error| error.kind() == io::ErrorKind::NotFound) { 127 } else { 126 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            Some(error) => write!(f, "error: {}: {error}", self.what),
            None => write!(f, "error: {}", self.what),
        }
    }
}

/// The arguments with which init calls itself.
pub fn arguments(identity: &Identity, directory: &Path, command: &[OsString]) -> Vec<OsString> {
    let groups: Vec<String> = identity.groups.iter().map(u32::to_string).collect();
    let mut arguments: Vec<OsString> =
        vec![identity.uid.to_string().into(), identity.gid.to_string().into(), groups.join(",").into(), directory.into()];
    arguments.extend_from_slice(command);
    arguments
}

/// Becomes the application. Returns only when that fails.
pub fn run() -> Failure {
    // Init has all of them blocked, and a child inherits that.
    nitroxide_guest_sys::signals::unblock_all();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [uid, gid, groups, directory, program, rest @ ..] = arguments.as_slice() else {
        return Failure { what: "nitroxide-init is the init of an enclave and works only as process 1 there".to_owned(), error: None };
    };
    let (Some(uid), Some(gid), Some(groups)) = (number(uid), number(gid), numbers(groups)) else {
        return Failure { what: "the second stage was called with something else than numbers".to_owned(), error: None };
    };
    if let Err(error) = become_user(uid, gid, &groups) {
        return Failure { what: format!("cannot become user {uid}, group {gid}"), error: Some(error) };
    }
    let directory = Path::new(directory);
    if let Err(error) = std::env::set_current_dir(directory) {
        return Failure { what: format!("cannot enter the image's WORKDIR {}", directory.display()), error: Some(error) };
    }
    let error = Command::new(program).args(rest).exec();
    Failure { what: format!("cannot execute {}", Path::new(program).display()), error: Some(error) }
}

/// Own session, groups, group, user: in this order, since each step needs the rights that the next one gives away.
fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // Fails only for a process group leader, which a fresh child is not.
    let _ = rustix::process::setsid();
    let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    // One thread: the thread's identity is the process's.
    set_thread_groups(&groups)?;
    set_thread_gid(Gid::from_raw(gid))?;
    set_thread_uid(Uid::from_raw(uid))?;
    Ok(())
}

fn number(text: &OsStr) -> Option<u32> {
    // u32::MAX means "no change" to setuid(2) and is no user.
    text.to_str()?.parse().ok().filter(|number| *number != u32::MAX)
}

fn numbers(text: &OsStr) -> Option<Vec<u32>> {
    let text = text.to_str()?;
    if text.is_empty() { Some(Vec::new()) } else { text.split(',').map(|part| number(OsStr::new(part))).collect() }
}
