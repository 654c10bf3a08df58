//! Opening an image for a command: the file, its structure, and what to say when either is wrong.

use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nitroxide_eif::{Image, ReadError, ReadErrorKind};

use crate::{codes::ErrorCode, failure::Failure};

/// Opens an image file and checks its structure.
pub fn open(path: &Path) -> Result<Image<File>, Failure> {
    let file = open_file(path)?;
    Image::open(file).map_err(|error| read_failure(path, error))
}

/// Opens a regular file for reading. Does not wait where there is a pipe without a writer in its place.
pub fn open_file(path: &Path) -> Result<File, Failure> {
    let failure = |error: std::io::Error| Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot open {}", path.display())).because(error);
    // Without effect on a regular file, and nothing else is returned.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failure)?;
    if !file.metadata().map_err(failure)?.is_file() {
        return Err(Failure::new(ErrorCode::FILE_OPERATION, format!("{} is not a file", path.display())));
    }
    Ok(file)
}

/// Reads a small file, such as a certificate; a longer one is cut off one byte behind the limit, so that its reader sees that it is too long.
pub fn read_small(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, Failure> {
    let mut content = Vec::new();
    open_file(path)?
        .take(limit_bytes.saturating_add(1))
        .read_to_end(&mut content)
        .map_err(|error| Failure::new(ErrorCode::FILE_OPERATION, format!("Cannot read {}", path.display())).because(error))?;
    Ok(content)
}

/// What a failed read of an image means.
pub fn read_failure(path: &Path, error: ReadError) -> Failure {
    let (code, message, help) = match error.kind() {
        ReadErrorKind::Io => (ErrorCode::FILE_OPERATION, "cannot be read", None),
        ReadErrorKind::NotAnImage => (
            ErrorCode::EIF_PARSING,
            "is not an enclave image",
            Some("An enclave image (EIF) begins with `.eif`; container images have to be built into one first."),
        ),
        ReadErrorKind::Checksum => (ErrorCode::EIF_PARSING, "is damaged", Some("Fetch or build the image again.")),
        _ => (ErrorCode::EIF_PARSING, "is not a valid enclave image", Some("Build the image again; its structure is broken.")),
    };
    let failure = Failure::new(code, format!("{} {message}", path.display())).because(error);
    match help {
        Some(help) => failure.help(help),
        None => failure,
    }
}
