//! What to run: read from small files at the root of the ramdisk.
//!
//! `cmd` and `env` are those of AWS's own images (one value per line). Three more are ours: `entrypoint` (put before `cmd`),
//! `workdir` and `user`. A list that contains a NUL byte is separated by NUL bytes instead of line ends, so that values may
//! contain line ends. docs/guest-init.md has the table.

use std::{
    ffi::OsString,
    fmt, fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// The largest of these files that is read, in bytes.
const FILE_MAX_BYTES: u64 = 1 << 20;

const FILES: [&str; 5] = ["entrypoint", "cmd", "env", "workdir", "user"];

/// An application as its image describes it.
#[derive(Debug, PartialEq, Eq)]
pub struct Application {
    /// Program and arguments; never empty.
    pub command: Vec<OsString>,
    /// Environment as (name, value), in the image's order.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it starts; `/` when the image does not say.
    pub directory: PathBuf,
    /// `user[:group]` by name or number, if the image says so.
    pub user: Option<String>,
}

/// Why there is nothing to run.
#[derive(Debug)]
pub enum ReadError {
    /// Neither `/entrypoint` nor `/cmd` names a program.
    NothingToRun,
    /// A file that exists cannot be read.
    Unreadable(PathBuf, io::Error),
    /// A file is larger than one of these files can sensibly be.
    TooLarge(PathBuf),
    /// `/user` or `/workdir` is not text.
    NotText(PathBuf),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NothingToRun => f.write_str("The image names nothing to run: put the program and its arguments into /cmd, one per line"),
            Self::Unreadable(path, error) => write!(f, "Cannot read {}: {error}", path.display()),
            Self::TooLarge(path) => write!(f, "{} is larger than {FILE_MAX_BYTES} bytes", path.display()),
            Self::NotText(path) => write!(f, "{} is not UTF-8 text", path.display()),
        }
    }
}

impl Application {
    /// Reads the files below `root`.
    ///
    /// # Errors
    ///
    /// See [`ReadError`]; a missing file is an empty one.
    pub fn read(root: &Path) -> Result<Self, ReadError> {
        let mut command = list(&read(root, "entrypoint")?);
        command.extend(list(&read(root, "cmd")?));
        if command.is_empty() {
            return Err(ReadError::NothingToRun);
        }
        let environment = list(&read(root, "env")?).into_iter().filter_map(variable).collect();
        let directory = line(root, "workdir")?.map_or_else(|| PathBuf::from("/"), PathBuf::from);
        Ok(Self { command, environment, directory, user: line(root, "user")? })
    }
}

/// Removes the files, so that the application of a ramdisk image does not find them in its root directory.
pub fn remove_files(root: &Path) {
    for name in FILES {
        // A missing file is the ordinary case, and one that stays does no harm.
        let _ = fs::remove_file(root.join(name));
    }
}

fn read(root: &Path, name: &str) -> Result<Vec<u8>, ReadError> {
    let path = root.join(name);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.len() > FILE_MAX_BYTES => Err(ReadError::TooLarge(path)),
        Ok(metadata) if metadata.is_file() => fs::read(&path).map_err(|error| ReadError::Unreadable(path, error)),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ReadError::Unreadable(path, error)),
        _ => Ok(Vec::new()),
    }
}

/// Splits a list file: at NUL bytes if it has any (a last one ends the list), else into its non-empty lines.
fn list(content: &[u8]) -> Vec<OsString> {
    if content.contains(&0) {
        let content = content.strip_suffix(&[0]).unwrap_or(content);
        return content.split(|byte| *byte == 0).map(|value| OsString::from_vec(value.to_vec())).collect();
    }
    content.split(|byte| *byte == b'\n').filter(|value| !value.is_empty()).map(|value| OsString::from_vec(value.to_vec())).collect()
}

/// `NAME=value`; a name alone is an empty value, a missing name is dropped.
fn variable(entry: OsString) -> Option<(OsString, OsString)> {
    let bytes = entry.into_vec();
    let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) => {
            let (name, rest) = bytes.split_at(at);
            (name.to_vec(), rest.get(1..).unwrap_or_default().to_vec())
        }
        None => (bytes, Vec::new()),
    };
    (!name.is_empty()).then(|| (OsString::from_vec(name), OsString::from_vec(value)))
}

fn line(root: &Path, name: &str) -> Result<Option<String>, ReadError> {
    let text = String::from_utf8(read(root, name)?).map_err(|_| ReadError::NotText(root.join(name)))?;
    let text = text.trim_end_matches(['\n', '\0']);
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(root.path().join(name), content).unwrap();
        }
        root
    }

    fn strings(values: &[&str]) -> Vec<OsString> {
        values.iter().map(OsString::from).collect()
    }

    #[test]
    fn cmd_and_env_are_read_line_by_line_as_in_awss_images() {
        let root = image(&[("cmd", b"/bin/app\n--flag\na b\n"), ("env", b"PATH=/bin\nEMPTY=\nEQ=a=b\n")]);
        let application = Application::read(root.path()).unwrap();
        assert_eq!(application.command, strings(&["/bin/app", "--flag", "a b"]));
        let expected = [("PATH", "/bin"), ("EMPTY", ""), ("EQ", "a=b")];
        assert_eq!(application.environment, expected.map(|(name, value)| (name.into(), value.into())));
        assert_eq!(application.directory, Path::new("/"));
        assert_eq!(application.user, None);
    }

    #[test]
    fn entrypoint_comes_before_cmd() {
        let root = image(&[("entrypoint", b"/entry\n"), ("cmd", b"argument\n"), ("workdir", b"/srv\n"), ("user", b"app:app\n")]);
        let application = Application::read(root.path()).unwrap();
        assert_eq!(application.command, strings(&["/entry", "argument"]));
        assert_eq!(application.directory, Path::new("/srv"));
        assert_eq!(application.user.as_deref(), Some("app:app"));
    }

    #[test]
    fn nul_separated_lists_keep_line_ends_and_empty_values() {
        let root = image(&[("cmd", b"/bin/sh\0-c\0echo a\necho b\0\0"), ("env", b"A=1\n2\0")]);
        let application = Application::read(root.path()).unwrap();
        assert_eq!(application.command, strings(&["/bin/sh", "-c", "echo a\necho b", ""]));
        assert_eq!(application.environment, [("A".into(), "1\n2".into())]);
    }

    #[test]
    fn image_without_a_command_is_refused_with_advice() {
        let root = image(&[("env", b"A=1\n")]);
        let error = Application::read(root.path()).unwrap_err();
        assert!(error.to_string().contains("/cmd"), "{error}");
    }

    #[test]
    fn a_directory_called_cmd_is_no_command_file() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("cmd")).unwrap();
        assert!(matches!(Application::read(root.path()), Err(ReadError::NothingToRun)));
    }
}
