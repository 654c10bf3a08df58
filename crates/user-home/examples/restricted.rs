//! `restricted CALL,CALL... PROGRAM [ARGUMENT]...`: runs a program where these system calls are EPERM, as a container's profile has them. `vsock` is socket(AF_VSOCK).
#![expect(unsafe_code, reason = "a seccomp filter has no safe form")]

use std::error::Error;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nitroxide_user_home::filter::{ALLOW, Instruction};

/// `SECCOMP_RET_ERRNO | EPERM`.
const REFUSE: u32 = 0x0005_0001;
const AF_VSOCK: u32 = 40;
const OFFSET_CALL: u32 = 0;
const OFFSET_FIRST_ARGUMENT: u32 = 16;

const fn load(number: u32) -> Instruction {
    Instruction { code: 0x20, when_true: 0, when_false: 0, number }
}

/// Passes over `when_false` instructions if it is another number.
const fn is(number: u32, when_false: u8) -> Instruction {
    Instruction { code: 0x15, when_true: 0, when_false, number }
}

const fn give(number: u32) -> Instruction {
    Instruction { code: 0x06, when_true: 0, when_false: 0, number }
}

fn refusal(name: &str) -> Result<Vec<Instruction>, Box<dyn Error>> {
    let call = match name {
        "pidfd_getfd" => libc::SYS_pidfd_getfd,
        "kcmp" => libc::SYS_kcmp,
        "process_vm_readv" => libc::SYS_process_vm_readv,
        "ptrace" => libc::SYS_ptrace,
        "vsock" => {
            let socket = is(u32::try_from(libc::SYS_socket)?, 4);
            return Ok(vec![socket, load(OFFSET_FIRST_ARGUMENT), is(AF_VSOCK, 1), give(REFUSE), give(ALLOW)]);
        }
        other => return Err(format!("unknown call {other}").into()),
    };
    Ok(vec![is(u32::try_from(call)?, 1), give(REFUSE)])
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args_os().skip(1);
    let calls = words.next().ok_or("calls are missing")?.into_string().map_err(|_| "calls are text")?;
    let program = words.next().ok_or("a program is missing")?;
    let mut filter = vec![load(OFFSET_CALL)];
    for name in calls.split(',') {
        filter.extend(refusal(name)?);
    }
    filter.push(give(ALLOW));
    let whole = libc::sock_fprog { len: u16::try_from(filter.len())?, filter: filter.as_mut_ptr().cast() };
    // SAFETY: no pointers.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: `whole` and the instructions that it points to, laid out as `sock_filter`, live for the call.
    let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const whole) };
    if privileges != 0 || installed != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Err(Command::new(program).args(words).exec().into())
}
