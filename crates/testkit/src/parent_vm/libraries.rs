//! What a program needs beside itself to run in a parent VM: its interpreter and its libraries, stripped of debug information where large.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use crate::Setup;

/// From this size on, in bytes, debug information is left out.
const LARGE_BYTES: u64 = 4 << 20;

/// Interpreter and libraries of a dynamic program of this host, as absolute paths; none for a static one.
///
/// # Panics
///
/// Where a library is missing.
pub fn of_host_program(program: &Path) -> Vec<PathBuf> {
    let Some(interpreter) = interpreter(program) else { return Vec::new() };
    let mut files = listed(Command::new(&interpreter).arg("--list").arg(program), program);
    files.push(interpreter);
    files
}

/// The libraries of a program of the unpacked tree, all of them in that tree.
///
/// # Panics
///
/// Where a library is missing.
pub fn of_setup_program(setup: &Setup, program: &Path) -> Vec<PathBuf> {
    let (loader, folder) = (setup.root().join("usr/lib64/ld-linux-x86-64.so.2"), setup.root().join("usr/lib/x86_64-linux-gnu"));
    let mut files = listed(Command::new(&loader).arg("--library-path").arg(folder).arg("--list").arg(program), program);
    files.push(loader);
    files
}

/// The file itself, or a copy without debug information in `cache` where it is large and the program strip is there.
pub fn stripped(program: &Path, cache: &Path) -> PathBuf {
    let Ok(metadata) = program.metadata() else { return program.to_owned() };
    if metadata.len() < LARGE_BYTES {
        return program.to_owned();
    }
    let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default().as_nanos();
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let copy = cache.join(format!("{name}.{changed:x}.{:x}", metadata.len()));
    if copy.exists() {
        return copy;
    }
    let _ = std::fs::create_dir_all(cache);
    // Copies of older builds of the same program. Not the wanted one, which another test may have made meanwhile and reads now.
    for old in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        if old.path() != copy && old.file_name().to_string_lossy().strip_prefix(&name).is_some_and(|rest| rest.starts_with('.')) {
            let _ = std::fs::remove_file(old.path());
        }
    }
    let new = cache.join(format!("{name}-new-{}-{:?}", std::process::id(), std::thread::current().id()));
    let status = Command::new("strip").arg("--strip-debug").arg("-o").arg(&new).arg(program).status();
    // Another test may do the same at this moment: the last one wins, with the same bytes.
    let is_done = status.is_ok_and(|status| status.success()) && std::fs::rename(&new, &copy).is_ok();
    if is_done { copy } else { program.to_owned() }
}

/// The program's interpreter (its PT_INTERP entry); none for a static program or something else.
fn interpreter(program: &Path) -> Option<PathBuf> {
    let content = std::fs::read(program).ok()?;
    let number = |at: usize, length: usize| -> Option<usize> {
        let mut bytes = [0; 8];
        bytes.get_mut(..length)?.copy_from_slice(content.get(at..at.checked_add(length)?)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    // The 64-bit little-endian layout of elf(5): e_phoff, e_phentsize, e_phnum; p_type, p_offset, p_filesz. PT_INTERP is 3.
    content.starts_with(b"\x7fELF\x02\x01").then_some(())?;
    let (table, entry_bytes, entries) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut headers = (0..entries).map(|index| table + index * entry_bytes);
    let header = headers.find(|&header| number(header, 4) == Some(3))?;
    let (start, length) = (number(header + 8, 8)?, number(header + 32, 8)?);
    let name = content.get(start..start.checked_add(length)?)?.split(|&byte| byte == 0).next()?;
    Some(PathBuf::from(String::from_utf8_lossy(name).into_owned()))
}

/// The files that a dynamic loader's `--list` names.
fn listed(command: &mut Command, program: &Path) -> Vec<PathBuf> {
    let output = command.output().unwrap_or_else(|error| panic!("the loader of {} does not start: {error}", program.display()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && !text.contains("not found"),
        "{} lacks libraries: {text}{}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    files_of_list(&text)
}

/// Reads lines such as `libc.so.6 => /lib/libc.so.6 (0x1)`; the interpreter and the vDSO have no arrow.
fn files_of_list(text: &str) -> Vec<PathBuf> {
    text.lines().filter_map(|line| Some(PathBuf::from(line.split_once(" => ")?.1.rsplit_once(" (")?.0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaders_list_gives_the_libraries_files() {
        let text = "\tlinux-vdso.so.1 (0x7)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7)\n";
        assert_eq!(files_of_list(text), [PathBuf::from("/lib/x/libc.so.6")]);
    }

    #[test]
    fn this_program_has_an_interpreter_and_a_c_library() {
        let program = std::env::current_exe().unwrap();
        let files = of_host_program(&program);
        assert!(files.iter().any(|file| file.to_string_lossy().contains("libc.so")), "{files:?}");
        assert!(files.iter().all(|file| file.is_absolute() && file.exists()), "{files:?}");
        assert_eq!(interpreter(Path::new("/proc/self/status")), None);
    }
}
