//! The PCI device with a launcher that starts nothing: what the driver is compared on. Called as `nitroxide device` is; also a part of benches/drivers.rs.

use std::path::PathBuf;
use std::sync::Arc;

use nitroxide_device::testing::NullLauncher;
use nitroxide_device::{Device, Faults, Limits};
use nitroxide_device_pci::{ParentRam, ParentVsock, PciServer, ServerOptions};
use nitroxide_world::World;

/// Serves one VM.
pub fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| arguments.iter().position(|word| word == name).and_then(|place| arguments.get(place + 1)).map(PathBuf::from);
    let (socket, vsock) = (value("--socket").expect("--socket"), value("--vsock").expect("--vsock"));
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from).join("world");
    let world = World::open(&folder).expect("a world");
    let device = Arc::new(Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default())));
    let server = PciServer::bind(&socket, ServerOptions { test_control: true }, device, Arc::new(ParentRam::new())).expect("a socket");
    let _vsock = ParentVsock::listen(&vsock, &world).expect("a socket");
    println!("{{\"Socket\":\"\"}}");
    server.run().expect("serving");
}
