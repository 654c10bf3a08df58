//! What no list of steps can say: programs of their own that meet one weakness of the C driver each, and print `what -> answer`.
//!
//! tests/weaknesses.rs runs them in a machine each, for they may leave the driver broken. W numbers are those of docs/driver.md, "Weaknesses".

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use nitroxide_abi::ioctl;

use crate::control::{Control, Pci};
use crate::real::code;
use crate::sys::{self, Backing};

const DEVICE: &str = "/dev/nitro_enclaves";
const DRIVER: &str = "/sys/bus/pci/drivers/nitro_enclaves";
/// Where probes map what they need.
const BASE: u64 = 0x2000_0000_0000;
const HUGE: usize = 2 << 20;

/// The probes.
pub const NAMES: [&str; 9] =
    ["mm-identity", "late-reply", "unbind", "uid-zero", "refused-pages", "exec", "after-exec", "threads", "compat"];

/// Runs one. `argument` is only for `after-exec`.
///
/// # Errors
///
/// What the probe could not do itself.
pub fn run(name: &str, argument: Option<&str>) -> io::Result<()> {
    match name {
        "mm-identity" => mm_identity(),
        "late-reply" => late_reply(),
        "unbind" => unbind(),
        "uid-zero" => uid_zero(),
        "refused-pages" => refused_pages(),
        "exec" => exec(),
        "after-exec" => after_exec(argument.and_then(|fd| fd.parse().ok()).unwrap_or(-1)),
        "threads" => threads(),
        "compat" => compat(),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, format!("There is no probe `{name}`; {}.", NAMES.join(", ")))),
    }
}

/// Prints one answer at once: the machine may not last.
fn tell(what: &str, answer: impl std::fmt::Display) {
    println!("{what} -> {answer}");
    let _ = io::stdout().flush();
}

/// A value, or the name of the code.
fn said(result: Result<i64, i32>) -> String {
    result.map_or_else(|errno| code(errno.into()), |value| value.to_string())
}

fn create(device: &File) -> Result<OwnedFd, i32> {
    let fd = sys::ioctl_with(device.as_raw_fd(), ioctl::CREATE_VM, &mut [0; 8])?;
    sys::own(fd).ok_or(0)
}

fn made(device: &File) -> io::Result<OwnedFd> {
    create(device).map_err(io::Error::from_raw_os_error)
}

fn add_vcpu(fd: RawFd, cpu: u32) -> Result<i64, i32> {
    sys::ioctl_with(fd, ioctl::ADD_VCPU, &mut cpu.to_le_bytes())
}

fn set_memory(fd: RawFd, address: u64, bytes: usize) -> Result<i64, i32> {
    let size = u64::try_from(bytes).unwrap_or(0);
    sys::ioctl_with(
        fd,
        ioctl::SET_USER_MEMORY_REGION,
        &mut ioctl::UserMemoryRegion { flags: 0, memory_size: size, userspace_addr: address }.to_bytes(),
    )
}

fn start(fd: RawFd) -> Result<i64, i32> {
    sys::ioctl_with(fd, ioctl::START_ENCLAVE, &mut ioctl::EnclaveStartInfo { flags: 0, enclave_cid: 0 }.to_bytes())
}

/// W7: who made an enclave is remembered by an address. Its maker is gone; do later processes pass for it?
fn mm_identity() -> io::Result<()> {
    /// The kernel uses the address again soon: the 38th child was taken for the maker once.
    const CHILDREN: usize = 400;
    let (socket, maker) = sys::server(|socket| {
        let device = File::open(DEVICE).ok();
        let enclave = device.and_then(|device| create(&device).ok());
        let _ = sys::send(socket, &[1], enclave.as_ref().map(|fd| fd.as_raw_fd()));
    })?;
    let (_, fd) = sys::receive(&socket, &mut [0; 8])?;
    let enclave = fd.ok_or_else(|| io::Error::other("The maker sent no descriptor."))?;
    sys::reap(maker);
    tell("ADD_VCPU by the receiver", said(add_vcpu(enclave.as_raw_fd(), 0)));
    let mut passed = 0;
    for _ in 0..CHILDREN {
        let fd = enclave.as_raw_fd();
        passed += usize::from(sys::in_child(|| i64::from(add_vcpu(fd, 0).is_ok()))? == 1);
    }
    tell("some of 400 strangers are taken for the maker", passed > 0);
    Ok(())
}

/// W3: a reply that comes after the caller was told that none came.
fn late_reply() -> io::Result<()> {
    /// The driver waits for 120 s.
    const OWN_DELAY: Duration = Duration::from_secs(60);
    let mut control = Pci::find().ok_or_else(|| io::Error::other("The device has no test control."))?;
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    control.line("faults add-vcpu@1=delay:130s,add-vcpu@2=delay:60s");
    tell("ADD_VCPU whose reply comes after 130 s", said(add_vcpu(enclave.as_raw_fd(), 0)));
    let started = Instant::now();
    tell("the next one", said(add_vcpu(enclave.as_raw_fd(), 0)));
    tell("the next one returns before its own reply", started.elapsed() < OWN_DELAY / 2);
    Ok(())
}

/// W4: the device goes while descriptors are open.
fn unbind() -> io::Result<()> {
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    let bound = fs::read_dir(DRIVER)?.flatten().map(|entry| entry.file_name()).find(|name| name.to_string_lossy().starts_with("0000:"));
    let name = bound.ok_or_else(|| io::Error::other("The driver has no device."))?;
    fs::write(format!("{DRIVER}/unbind"), name.to_string_lossy().as_bytes())?;
    tell("the device file is there", std::path::Path::new(DEVICE).exists());
    let in_child = |what: &str, act: &dyn Fn() -> Result<i64, i32>| {
        let value = sys::in_child(|| act().unwrap_or_else(|errno| -i64::from(errno)));
        tell(what, value.map_or_else(|_| "killed".to_owned(), |value| if value < 0 { code(-value) } else { value.to_string() }));
    };
    in_child("CREATE_VM", &|| sys::ioctl_with(device.as_raw_fd(), ioctl::CREATE_VM, &mut [0; 8]));
    in_child("ADD_VCPU", &|| add_vcpu(enclave.as_raw_fd(), 0));
    tell("done", "");
    // The end of this process would close what is open, which is the next fault of the C driver.
    loop {
        std::thread::park();
    }
}

/// W20: a device that gives the slot number 0.
fn uid_zero() -> io::Result<()> {
    let mut control = Pci::find().ok_or_else(|| io::Error::other("The device has no test control."))?;
    let device = File::open(DEVICE)?;
    control.line("faults alloc=uid:0");
    let before = control.replies().unwrap_or(0);
    let enclave = create(&device);
    tell("CREATE_VM", enclave.as_ref().map_or_else(|errno| code((*errno).into()), |_| "0".to_owned()));
    tell("commands for it", control.replies().unwrap_or(0).wrapping_sub(before));
    let before = control.replies().unwrap_or(0);
    drop(enclave);
    tell("commands at close", control.replies().unwrap_or(0).wrapping_sub(before));
    Ok(())
}

/// W1: pages that were refused.
fn refused_pages() -> io::Result<()> {
    const TIMES: usize = 8000;
    const PAGE: usize = 4096;
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    let free = || {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("MemFree:")).unwrap_or_default().trim().to_owned();
        line.trim_end_matches(" kB").parse::<i64>().unwrap_or(0)
    };
    let before = free();
    let mut refused = 0;
    for _ in 0..TIMES {
        // One page only, and written to: neither a transparent huge page nor the page of zeros.
        sys::map(BASE, PAGE, libc::PROT_READ | libc::PROT_WRITE, Backing::Anonymous)?;
        sys::poke(BASE, &[1]);
        refused += usize::from(set_memory(enclave.as_raw_fd(), BASE, HUGE).is_err());
        sys::unmap(BASE, PAGE);
    }
    tell("refused", refused);
    // 8000 pages of 4 KiB are 32 MB; what the machine itself takes is far less.
    tell("memory is lost", before - free() > 16_000);
    Ok(())
}

/// The descriptor goes through exec.
fn exec() -> io::Result<()> {
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    tell("ADD_VCPU", said(add_vcpu(enclave.as_raw_fd(), 0)));
    sys::keep_on_exec(enclave.as_raw_fd());
    let error = Command::new("/proc/self/exe").args(["probe", "after-exec", &enclave.as_raw_fd().to_string()]).exec();
    Err(error)
}

fn after_exec(fd: RawFd) -> io::Result<()> {
    tell("ADD_VCPU after exec", said(add_vcpu(fd, 0)));
    sys::map(BASE, HUGE, libc::PROT_READ | libc::PROT_WRITE, Backing::PrivateHuge)?;
    tell("SET_MEMORY after exec", said(set_memory(fd, BASE, HUGE)));
    tell("LOAD_INFO after exec", {
        let mut argument = ioctl::ImageLoadInfo { flags: 1, memory_offset: 0 }.to_bytes();
        said(sys::ioctl_with(fd, ioctl::GET_IMAGE_LOAD_INFO, &mut argument))
    });
    tell("START after exec", said(start(fd)));
    Ok(())
}

/// Two threads make the same calls on one enclave at once: afterwards it is as after one of the orders.
fn threads() -> io::Result<()> {
    const ROUNDS: usize = 30;
    const CPUS: u32 = 4;
    const MEMORY: usize = 64 << 20;
    let device = File::open(DEVICE)?;
    let (mut cpus, mut regions, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    sys::map(BASE, MEMORY, libc::PROT_READ | libc::PROT_WRITE, Backing::PrivateHuge)?;
    for _ in 0..ROUNDS {
        let enclave = Arc::new(made(&device)?);
        let barrier = Arc::new(Barrier::new(2));
        let both: Vec<_> = (0..2)
            .map(|_| {
                let (enclave, barrier) = (Arc::clone(&enclave), Arc::clone(&barrier));
                std::thread::spawn(move || {
                    let fd = enclave.as_raw_fd();
                    barrier.wait();
                    let got: Vec<_> = (0..CPUS).map(|_| said(add_vcpu(fd, 0))).collect();
                    barrier.wait();
                    let region = said(set_memory(fd, BASE, MEMORY));
                    barrier.wait();
                    (got, region, said(start(fd)))
                })
            })
            .collect();
        let (mut got, mut set, mut started) = (Vec::new(), Vec::new(), Vec::new());
        for thread in both {
            let (some, region, start) = thread.join().map_err(|_| io::Error::other("A thread ended in a panic."))?;
            got.extend(some);
            set.push(region);
            started.push(start);
        }
        for list in [&mut got, &mut set, &mut started] {
            list.sort();
        }
        cpus.push(got.join(" "));
        regions.push(set.join(" "));
        starts.push(started.join(" "));
    }
    for (what, mut list) in [("ADD_VCPU", cpus), ("SET_MEMORY", regions), ("START", starts)] {
        list.dedup();
        tell(what, list.join("; or "));
    }
    Ok(())
}

/// A caller that makes its system call as a 32-bit program does.
fn compat() -> io::Result<()> {
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    let said = |value: i32| if value < 0 { code(-i64::from(value)) } else { value.to_string() };
    tell("CREATE_VM", said(sys::ioctl_as_32_bit(device.as_raw_fd(), ioctl::CREATE_VM)));
    tell("ADD_VCPU", said(sys::ioctl_as_32_bit(enclave.as_raw_fd(), ioctl::ADD_VCPU)));
    Ok(())
}
