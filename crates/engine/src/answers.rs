//! What emulators have answered, kept so that each is asked once: in this process, and in a file for the next one.
//!
//! Asking costs some 50 ms, which every launch would pay: each enclave has a process of its own. An answer holds for one state of the
//! emulator's file (path, inode, size, time of change). The file is a convenience: one that cannot be read, written or understood changes
//! nothing but the time it takes. "No filter for its system calls" is not kept for other processes. Used by `discover`.

use std::collections::HashMap;
use std::fs::Metadata;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

/// A file with more answers than anybody has emulators is not ours.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// What one QEMU can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// It has `vhost-user-vsock-device`.
    pub(crate) vsock: bool,
    /// It has `vhost-user-test-device`.
    pub(crate) nsm: bool,
    /// It can filter its own system calls.
    pub(crate) sandbox: bool,
    /// It has `vfio-user-pci`, for a parent VM.
    pub(crate) vfio_user: bool,
    /// It has `vhost-user-vsock-pci`, for a parent VM.
    pub(crate) vsock_pci: bool,
}

/// One state of an emulator's file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key(String);

impl Key {
    /// None where the file cannot be looked at: then nothing is remembered.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let metadata: Metadata = std::fs::metadata(path).ok()?;
        let (inode, size, seconds, nanoseconds) = (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec());
        Some(Self(format!("{}:{inode}:{size}:{seconds}.{nanoseconds:09}", path.to_str()?)))
    }
}

/// Where answers are kept between processes: `$XDG_CACHE_HOME/nitroxide/qemu.json`, else below `~/.cache`; none without a home.
pub(crate) fn default_file() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(cache.join("nitroxide/qemu.json"))
}

/// The answer given before for this state of the emulator.
pub(crate) fn recall(key: &Key, file: Option<&Path>) -> Option<Abilities> {
    if let Some(abilities) = known().as_ref().and_then(|known| known.get(key).copied()) {
        return Some(abilities);
    }
    let answer = read(file?)?.remove(&key.0)?;
    let has = |ability: &str| answer.get(ability).and_then(Value::as_bool);
    let abilities = Abilities {
        vsock: has("vsock")?,
        nsm: has("nsm")?,
        sandbox: has("sandbox")?,
        vfio_user: has("vfio_user")?,
        vsock_pci: has("vsock_pci")?,
    };
    // One that could not filter its system calls may have failed for another reason then, and whoever writes the file shall not take the filter away.
    if !abilities.sandbox {
        return None;
    }
    known().get_or_insert_default().insert(key.clone(), abilities);
    Some(abilities)
}

/// Keeps an answer, in this process and, if it can be written, in the file.
pub(crate) fn remember(key: &Key, abilities: Abilities, file: Option<&Path>) {
    known().get_or_insert_default().insert(key.clone(), abilities);
    let Some(file) = file.filter(|_| abilities.sandbox) else { return };
    let Abilities { vsock, nsm, sandbox, vfio_user, vsock_pci } = abilities;
    // An emulator that was replaced is not asked for again: only the newest answer about a path is kept.
    let mut answers = read(file).unwrap_or_default();
    let path = key.0.split(':').next().unwrap_or_default();
    answers.retain(|known, _| known.split(':').next() != Some(path));
    answers
        .insert(key.0.clone(), json!({ "vsock": vsock, "nsm": nsm, "sandbox": sandbox, "vfio_user": vfio_user, "vsock_pci": vsock_pci }));
    if let Err(error) = write(file, &answers) {
        tracing::debug!(file = %file.display(), %error, "the emulator's answer is not remembered");
    }
}

fn known() -> MutexGuard<'static, Option<HashMap<Key, Abilities>>> {
    static KNOWN: Mutex<Option<HashMap<Key, Abilities>>> = Mutex::new(None);
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(file: &Path) -> Option<Map<String, Value>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    match serde_json::from_slice(&bytes).ok()? {
        Value::Object(answers) => Some(answers),
        _ => None,
    }
}

/// Written beside and renamed, so that a reader never sees a half.
fn write(file: &Path, answers: &Map<String, Value>) -> std::io::Result<()> {
    let folder = file.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(folder)?;
    let beside = folder.join(format!("qemu.json.{}", std::process::id()));
    let written = std::fs::write(&beside, serde_json::to_vec(answers)?).and_then(|()| std::fs::rename(&beside, file));
    written.inspect_err(|_| {
        let _already_gone = std::fs::remove_file(&beside);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Abilities = Abilities { vsock: true, nsm: false, sandbox: true, vfio_user: true, vsock_pci: false };

    /// The answer in the file alone: what another process would see.
    fn in_file(key: &Key, file: &Path) -> Option<Abilities> {
        *known() = None;
        recall(key, Some(file))
    }

    #[test]
    fn an_answer_is_found_by_another_process_until_the_emulator_changes_and_junk_is_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let (emulator, file) = (folder.path().join("qemu"), folder.path().join("cache/qemu.json"));
        std::fs::write(&emulator, "one").unwrap();
        let key = Key::of(&emulator).unwrap();
        remember(&key, SOME, Some(&file));
        assert_eq!(in_file(&key, &file), Some(SOME));

        std::fs::write(&emulator, "another").unwrap();
        let changed = Key::of(&emulator).unwrap();
        assert_eq!(in_file(&changed, &file), None);
        remember(&changed, SOME, Some(&file));
        assert_eq!((in_file(&changed, &file), in_file(&key, &file)), (Some(SOME), None));

        for junk in ["", "[]", "{", "{\"x\":1}"] {
            std::fs::write(&file, junk).unwrap();
            assert_eq!(in_file(&changed, &file), None);
        }
        assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn an_emulator_without_its_filter_is_asked_again_by_every_process() {
        let folder = tempfile::tempdir().unwrap();
        let (emulator, file) = (folder.path().join("qemu"), folder.path().join("qemu.json"));
        std::fs::write(&emulator, "one").unwrap();
        let key = Key::of(&emulator).unwrap();
        remember(&key, Abilities { sandbox: false, ..SOME }, Some(&file));
        assert_eq!(in_file(&key, &file), None);

        let claims = json!({ key.0.clone(): { "vsock": true, "nsm": true, "sandbox": false, "vfio_user": true, "vsock_pci": true } });
        std::fs::write(&file, claims.to_string()).unwrap();
        assert_eq!(in_file(&key, &file), None);
    }
}
