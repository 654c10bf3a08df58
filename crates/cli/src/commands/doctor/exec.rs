//! Can unmodified programs run as clients here (`nitroxide exec`)? Found out by doing it.

use std::process::Command;

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};

use super::Check;

const NAME: &str = "unmodified clients";

/// Looks for the device as a client.
pub(super) fn check() -> Check {
    if nitroxide_user_home::is_supervised() {
        return Check::ok(NAME, "this command runs below `nitroxide exec` itself");
    }
    let looked = std::env::current_exe().and_then(|program| {
        Command::new(program).args(["exec", "--engine", "none", "--", "sh", "-c", "test -c /dev/nitro_enclaves"]).output()
    });
    let output = match looked {
        Ok(output) => output,
        Err(error) => return Check::note(NAME, format!("`nitroxide exec` cannot be tried: {error}"), "Look at the message"),
    };
    match output.status.code() {
        Some(0) => sockets(),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            let reason =
                said.lines().map(|line| line.trim_start_matches(['│', '├', '╰', '─', '▶', '×', ' '])).filter(|line| !line.is_empty());
            let reason = reason.skip(1).collect::<Vec<_>>().join(" ");
            let reason = if reason.is_empty() { "A program below it does not see /dev/nitro_enclaves".to_owned() } else { reason };
            Check::note(NAME, "`nitroxide exec` does not work here", reason)
        }
    }
}

fn sockets() -> Check {
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let copy = pidfd_open(getpid(), PidfdFlags::empty()).and_then(|own| pidfd_getfd(own, 0, PidfdGetfdFlags::empty()));
    let is_forbidden = |errno: Option<Errno>| matches!(errno, Some(Errno::PERM | Errno::ACCESS | Errno::NOSYS));
    let forbidden = match (is_forbidden(socket.err()), is_forbidden(copy.err())) {
        (false, false) => return Check::ok(NAME, "`nitroxide exec` shows programs a machine with Nitro Enclaves"),
        (true, false) => "socket(40)",
        (false, true) => "pidfd_getfd",
        (true, true) => "socket(40) and pidfd_getfd",
    };
    Check::note(
        NAME,
        "`nitroxide exec` works, but without AF_VSOCK",
        format!("A container's seccomp profile forbids it; give the container one that allows {forbidden}"),
    )
}
