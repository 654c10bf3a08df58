//! `calls`: what system calls take, one line `NAME NANOSECONDS` each; natively or below the supervisor. Calls that need the
//! device are left out where there is none.

use std::error::Error;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::time::Instant;

use nitroxide_client::{Device, DeviceChoice};
use vsock::{VsockListener, VsockStream};

/// Calls that are timed together, since the clock takes about as long as one.
const TOGETHER: u32 = 100;
const ROUNDS: usize = 60;
const PARENT: u32 = 3;
const PORT: u32 = 7300;
const STREAM_BYTES: usize = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let null = File::open("/dev/null")?;
    // No rule of the filter is about it: the kernel does not run the filter.
    time("getppid", rustix::process::getppid);
    // The filter is run and lets it go on.
    time("ioctl(FIONREAD)", || rustix::io::ioctl_fionread(&null));
    time("mmap and munmap", map);
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    time("getsockopt(SO_RCVBUF)", || rustix::net::sockopt::socket_recv_buffer_size(&socket));
    // The supervisor is asked and lets it go on.
    time("open and close", || File::open("/etc/hostname"));
    time("stat", || rustix::fs::stat("/etc/hostname"));
    time("getsockname", || rustix::net::getsockname(&socket));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    time("TCP connect, accept, close", || std::net::TcpStream::connect(address).and_then(|_| listener.accept()));

    if let Ok(device) = Device::open(DeviceChoice::Host("/dev/nitro_enclaves".into())) {
        time("CREATE_VM and close", || device.create_enclave());
        let mut enclave = device.create_enclave()?;
        time("GET_IMAGE_LOAD_INFO", || enclave.image_load_info());
    }
    let Ok(listener) = VsockListener::bind_with_cid_port(PARENT, PORT) else { return Ok(()) };
    time("vsock connect, accept, close", || VsockStream::connect_with_cid_port(PARENT, PORT).and_then(|_| listener.accept()));
    let Ok(mut client) = VsockStream::connect_with_cid_port(PARENT, PORT) else { return Ok(()) };
    let (mut server, _) = listener.accept()?;
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while server.read_exact(&mut byte).is_ok() && byte == [1] && server.write_all(&byte).is_ok() {}
        let mut bytes = vec![0; 1 << 16];
        while server.read(&mut bytes).is_ok_and(|count| count > 0) {}
    });
    time("vsock, a byte there and back", || client.write_all(&[1]).and_then(|()| client.read_exact(&mut [0])));
    client.write_all(&[0])?;
    let (begin, bytes) = (Instant::now(), vec![0; 1 << 16]);
    for _ in 0..STREAM_BYTES / bytes.len() {
        client.write_all(&bytes)?;
    }
    drop(client);
    let _ = echo.join();
    println!("vsock, MiB/s {:.0}", f64::from(1 << 10) / begin.elapsed().as_secs_f64());
    Ok(())
}

fn map() {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    const BYTES: usize = 4096;
    #[expect(unsafe_code, reason = "a mapping that nobody uses")]
    // SAFETY: a new mapping where the kernel likes, unmapped as it was mapped.
    unsafe {
        if let Ok(at) = mmap_anonymous(std::ptr::null_mut(), BYTES, ProtFlags::READ, MapFlags::PRIVATE) {
            let _ = munmap(at, BYTES);
        }
    }
}

fn time<T>(name: &str, mut act: impl FnMut() -> T) {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..TOGETHER {
                std::hint::black_box(act());
            }
            begin.elapsed().as_secs_f64() * 1e9 / f64::from(TOGETHER)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{name} {:.0}", times.get(ROUNDS / 2).copied().unwrap_or_default());
}
