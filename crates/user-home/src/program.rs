//! The program that is run: where it is, and whether it can be run as a client ([`Program::find`]).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// Why a program cannot be run.
#[derive(Debug, thiserror::Error, displaydoc::Display)]
pub enum ProgramError {
    /// `{0}` is not found
    NotFound(PathBuf),
    /// `{0}` cannot be executed
    NotExecutable(PathBuf, #[source] io::Error),
    /// `{0}` changes its privileges when it is executed (set-uid, set-gid or file capabilities); nothing below this command can: run this command from it
    Privileged(PathBuf),
}

impl ProgramError {
    /// What a shell would exit with: 127 for what is not found, else 126.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        if matches!(self, Self::NotFound(_)) { 127 } else { 126 }
    }
}

/// A program that exists and can be executed.
#[derive(Debug)]
pub(crate) struct Program {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What it was called.
    pub(crate) name: OsString,
}

impl Program {
    /// Looks for it as a shell does.
    pub(crate) fn find(name: &OsStr, search: Option<&OsStr>) -> Result<Self, ProgramError> {
        let program = |path: PathBuf| Self { path, name: name.to_owned() };
        if name.as_bytes().contains(&b'/') {
            let path = PathBuf::from(name);
            check(&path)?;
            return Ok(program(path));
        }
        let mut refusal = ProgramError::NotFound(name.into());
        let search = search.unwrap_or_else(|| OsStr::new("/usr/local/bin:/bin:/usr/bin"));
        for folder in std::env::split_paths(search).filter(|_| !name.is_empty()) {
            // An empty entry is the working directory.
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder.as_path() };
            match check(&folder.join(name)) {
                Ok(()) => return Ok(program(folder.join(name))),
                Err(ProgramError::NotFound(_)) => {}
                Err(ProgramError::Privileged(path)) => return Err(ProgramError::Privileged(path)),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }
}

fn check(path: &Path) -> Result<(), ProgramError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        // A folder that may not be searched has nothing for us, as far as a shell is concerned.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::PermissionDenied) => {
            return Err(ProgramError::NotFound(path.to_owned()));
        }
        Err(error) => return Err(ProgramError::NotExecutable(path.to_owned(), error)),
    };
    if !metadata.is_file() {
        return Err(ProgramError::NotExecutable(path.to_owned(), io::ErrorKind::PermissionDenied.into()));
    }
    access(path, Access::EXEC_OK).map_err(|errno| ProgramError::NotExecutable(path.to_owned(), errno.into()))?;
    let gains_user = metadata.mode() & libc::S_ISUID != 0 && metadata.uid() != rustix::process::geteuid().as_raw();
    let set_group = libc::S_ISGID | libc::S_IXGRP;
    let gains_group = metadata.mode() & set_group == set_group && metadata.gid() != rustix::process::getegid().as_raw();
    let mut attribute = [0_u8; 64];
    let has_capabilities = rustix::fs::getxattr(path, "security.capability", &mut attribute).is_ok();
    let gains_capabilities = has_capabilities && !rustix::process::geteuid().is_root();
    if gains_user || gains_group || gains_capabilities {
        return Err(ProgramError::Privileged(path.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn programs_are_looked_for_as_a_shell_does() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, mode: u32| {
            let path = folder.path().join(name);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            path
        };
        let (good, plain) = (file("good", 0o755), file("plain", 0o644));
        let search = std::env::join_paths(["/nowhere".as_ref(), folder.path()]).unwrap();
        let find = |name: &str| Program::find(OsStr::new(name), Some(&search));
        assert_eq!(find("good").unwrap().path, good);
        assert_eq!(find(good.to_str().unwrap()).unwrap().path, good);
        assert_eq!(find("missing").unwrap_err().exit_status(), 127);
        assert_eq!(find("").unwrap_err().exit_status(), 127);
        assert_eq!(find("/nowhere/at/all").unwrap_err().exit_status(), 127);
        assert_eq!(find("plain").unwrap_err().exit_status(), 126);
        assert_eq!(find(plain.to_str().unwrap()).unwrap_err().exit_status(), 126);
        assert_eq!(find(folder.path().to_str().unwrap()).unwrap_err().exit_status(), 126);
    }

    #[test]
    fn set_uid_program_of_the_same_user_gains_nothing_and_is_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o4755)).unwrap();
        // Its owner is who runs this test, so nothing would be gained.
        assert!(Program::find(path.as_os_str(), None).is_ok());
    }
}
