//! A real QEMU takes the device of a server by its path, is killed, and the next one takes it again. No guest runs: nothing is booted.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Child, Stdio};
use std::sync::Arc;

use nitroxide_engine::{Discovery, Qemu};
use nitroxide_testkit::Setup;
use nitroxide_vsock::{ConnectRequest, Route, Router, VsockConfig, VsockServer};

#[derive(Debug)]
struct Nobody;

impl Router for Nobody {
    fn connect(&self, _request: ConnectRequest) -> io::Result<Route> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Killed with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_takes_the_device_by_its_path_again_and_again() {
    let setup = Setup::locate();
    let qemu = Qemu::find(&Discovery { chosen: None, path: None, setup: Some(setup.root().to_owned()), answers: None }).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vhost");
    let server = VsockServer::start(UnixListener::bind(&path).unwrap(), VsockConfig::new(3, Arc::new(Nobody))).unwrap();

    for round in 0..3 {
        let mut command = qemu.command();
        for share in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(setup.root().join(share));
        }
        command.args(["-nodefaults", "-display", "none", "-S", "-machine", "q35,accel=tcg,memory-backend=m"]);
        command.args(["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-m", "64M"]);
        command.arg("-chardev").arg(format!("socket,id=v,path={}", path.display()));
        command.args(["-device", "vhost-user-vsock-pci,chardev=v,id=vsock", "-qmp", "stdio"]);
        let mut running = Running(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        // QEMU speaks once the machine with its device is built, which needs answers of the server.
        assert!(lines.next().unwrap().contains("\"QMP\""), "round {round}");
        let mut stdin = running.0.stdin.take().unwrap();
        stdin.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"qom-get\",\"arguments\":{\"path\":\"/machine/peripheral/vsock\",\"property\":\"realized\"}}\n").unwrap();
        assert!(lines.next().unwrap().contains("return"), "round {round}");
        let answer = lines.next().unwrap();
        assert!(answer.contains("true"), "round {round}: {answer}");
    }
    server.stop();
}
