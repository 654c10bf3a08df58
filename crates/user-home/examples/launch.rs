//! `launch IMAGE`: a client as others write it, with crates `nitro-enclaves` and `vsock`: launches the sample image in debug mode, answers its heartbeat, shows its
//! console, and talks to it.

use std::error::Error;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::time::Duration;

use nitro_enclaves::Device;
use nitro_enclaves::launch::{ImageType, Launcher, MemoryInfo, PollTimeout, StartFlags};
use vsock::{VsockAddr, VsockListener, VsockStream};

const MIB: usize = 256;
const PARENT: u32 = 3;
const HYPERVISOR: u32 = 0;
const HEARTBEAT_PORT: u32 = 9000;
const CONSOLE_PORTS: u32 = 10_000;
const SAMPLE_PORT: u32 = 5005;

/// The crate's errors are none of the standard library's.
fn said(error: impl Debug) -> String {
    format!("{error:?}")
}

fn main() -> Result<(), Box<dyn Error>> {
    let image = std::fs::read(std::env::args().nth(1).ok_or("an image is missing")?)?;
    let device = Device::open().map_err(said)?;
    let mut launcher = Launcher::new(&device).map_err(said)?;
    launcher.set_memory(MemoryInfo::new(ImageType::Eif(&image), MIB)).map_err(said)?;
    launcher.add_vcpu(None).map_err(said)?;
    launcher.add_vcpu(None).map_err(said)?;
    // Its launch path knows how long to wait; accept() of the crate has no time limit.
    let _ = PollTimeout::try_from((image.as_slice(), MIB << 20)).map_err(said)?;
    let listener = VsockListener::bind_with_cid_port(PARENT, HEARTBEAT_PORT)?;
    let cid = u32::try_from(launcher.start(StartFlags::DEBUG, None).map_err(said)?)?;

    let (mut stream, peer) = listener.accept()?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)?;
    println!("heartbeat {:#x}, from the enclave: {}", byte[0], peer.cid() == cid);

    let mut console = VsockStream::connect(&VsockAddr::new(HYPERVISOR, cid + CONSOLE_PORTS))?;
    let mut application = loop {
        match VsockStream::connect_with_cid_port(cid, SAMPLE_PORT) {
            Ok(stream) => break stream,
            // It listens a moment after the heartbeat.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    println!("connected to {}, from the parent: {}", application.peer_addr()?, application.local_addr()?.port() > 1023);
    application.write_all(b"echo hello from a parent\nexit 7\n")?;
    let mut said = String::new();
    application.read_to_string(&mut said)?;
    print!("{said}");
    let mut shown = Vec::new();
    console.read_to_end(&mut shown)?;
    println!("console: {}", String::from_utf8_lossy(&shown).lines().any(|line| line.contains("hello: I am an enclave")));
    Ok(())
}
