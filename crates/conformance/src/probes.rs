//! What no list of steps can say: programs of their own that meet one weakness of the C driver each, and print `what -> answer`.
//!
//! tests/drivers/weaknesses.rs runs them in a machine each, for they may leave the driver broken. W numbers are those of docs/driver.md, "Weaknesses".

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use nitroxide_abi::ioctl;

use crate::control::{Control, Pci};
use crate::machine::{DEVICE, DRIVER, POOL, bound_device, meminfo, tell};
use crate::real::code;
use crate::sys::{self, Backing};

/// Where probes map what they need.
const BASE: u64 = 0x2000_0000_0000;
const HUGE: usize = 2 << 20;

/// The probes.
pub const NAMES: [&str; 14] = [
    "mm-identity",
    "late-reply",
    "lost-info",
    "early-interrupts",
    "slow-start",
    "unbind",
    "create",
    "hold",
    "uid-zero",
    "refused-pages",
    "exec",
    "after-exec",
    "threads",
    "compat",
];

/// Runs one. `argument` is only for `after-exec`.
///
/// # Errors
///
/// What the probe could not do itself.
pub fn run(name: &str, argument: Option<&str>) -> io::Result<()> {
    match name {
        "mm-identity" => mm_identity(),
        "late-reply" => late_reply(),
        "lost-info" => lost_info(),
        "early-interrupts" => early_interrupts(),
        "slow-start" => slow_start(),
        "unbind" => unbind(),
        "create" => in_child("CREATE_VM", &|| create(&File::open(DEVICE).map_err(|_| libc::ENODEV)?).map(|_| 0)),
        "hold" => hold(),
        "uid-zero" => uid_zero(),
        "refused-pages" => refused_pages(),
        "exec" => exec(),
        "after-exec" => after_exec(argument.and_then(|fd| fd.parse().ok()).unwrap_or(-1)),
        "threads" => threads(),
        "compat" => compat(),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, format!("There is no probe `{name}`; {}.", NAMES.join(", ")))),
    }
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
    let mut control = Pci::find().ok_or_else(|| io::Error::other("The device has no test control."))?;
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    // The driver waits for 120 s. The next command has the time until the late reply to be given, and its own reply comes behind that.
    control.line("faults add-vcpu@1=delay:135s,add-vcpu@2=delay:30s");
    let before = control.replies().unwrap_or(0);
    tell("ADD_VCPU whose reply comes too late", said(add_vcpu(enclave.as_raw_fd(), 2)));
    tell("the next one", said(add_vcpu(enclave.as_raw_fd(), 3)));
    tell("replies until it returned", control.replies().unwrap_or(0).wrapping_sub(before));
    done()
}

/// An enclave of 64 MiB and two vCPUs that runs, and its slot. `place` keeps the memory of several apart.
fn started(device: &File, place: u64) -> io::Result<(OwnedFd, u64)> {
    const MEMORY: usize = 64 << 20;
    let mut slot = [0; 8];
    let fd = sys::ioctl_with(device.as_raw_fd(), ioctl::CREATE_VM, &mut slot).map_err(io::Error::from_raw_os_error)?;
    let enclave = sys::own(fd).ok_or_else(|| io::Error::other("The driver gave no descriptor."))?;
    let address = BASE + place * 2 * MEMORY as u64;
    sys::map(address, MEMORY, libc::PROT_READ | libc::PROT_WRITE, Backing::PrivateHuge)?;
    set_memory(enclave.as_raw_fd(), address, MEMORY).map_err(io::Error::from_raw_os_error)?;
    for _ in 0..2 {
        add_vcpu(enclave.as_raw_fd(), 0).map_err(io::Error::from_raw_os_error)?;
    }
    start(enclave.as_raw_fd()).map_err(io::Error::from_raw_os_error)?;
    Ok((enclave, u64::from_le_bytes(slot)))
}

/// An enclave that runs until this process is ended.
fn hold() -> io::Result<()> {
    let device = File::open(DEVICE)?;
    let _enclave = started(&device, 0)?;
    done()
}

/// W2: two enclaves run, one ends, and the second answer about them is lost. Nobody may believe anything of it.
fn lost_info() -> io::Result<()> {
    /// The driver waits for 120 s, once it has come to ask.
    const LONG_ENOUGH: Duration = Duration::from_secs(140);
    let mut control = Pci::find().ok_or_else(|| io::Error::other("The device has no test control."))?;
    let device = File::open(DEVICE)?;
    let enclaves = [started(&device, 0)?, started(&device, 1)?];
    control.line("faults info@2=lost");
    // The C driver asks about the younger one first, and still has its answer in memory when the other's does not come.
    control.line(&format!("end {:#x}", enclaves[1].1));
    std::thread::sleep(LONG_ENOUGH);
    let [other, ended] = enclaves.each_ref().map(|(fd, _)| sys::poll(fd.as_raw_fd(), 0) == Ok(libc::POLLHUP.into()));
    tell("the one that ended is said to have ended, which depends on the order", ended);
    tell("the one that runs is said to have ended", other);
    done()
}

/// The end of this process would close what is open, which is the next fault of the C driver, or waits for a device that does not answer.
fn done() -> ! {
    tell("done", "");
    loop {
        std::thread::park();
    }
}

/// W6: interrupts while the driver is being bound.
fn early_interrupts() -> io::Result<()> {
    let mut control = Pci::find().ok_or_else(|| io::Error::other("The device has no test control."))?;
    let name = unbind_driver()?;
    if control.line("early-interrupts") != Some(true) {
        return Err(io::Error::other("The device knows no early interrupts."));
    }
    // The worker of the C driver faults meanwhile, and this may hang with it: that it comes back is told.
    fs::write(format!("{DRIVER}/bind"), &name)?;
    tell("the device file is there", std::path::Path::new(DEVICE).exists());
    let device = File::open(DEVICE)?;
    tell("CREATE_VM", said(create(&device).map(|_| 0)));
    Ok(())
}

/// W9: START takes long, and an event comes meanwhile. What does not need the device must not wait for it, and a kill ends the waiting.
fn slow_start() -> io::Result<()> {
    /// Longer than all that is tried meanwhile, and shorter than the driver waits.
    const LINE: &str = "faults start@1+=delay:110s";
    const SOON: Duration = Duration::from_secs(45);
    let mut control = Pci::find().ok_or_else(|| io::Error::other("The device has no test control."))?;
    control.line(LINE);
    let (socket, child) = sys::server(|socket| {
        let _ = sys::send(socket, &[1], None);
        let started = File::open(DEVICE).and_then(|device| started(&device, 0));
        let _ = sys::send(socket, &[u8::from(started.is_ok())], None);
    })?;
    sys::receive(&socket, &mut [0; 8])?;
    // ALLOC, ADD_MEM at least once, two vCPUs: after that START is all that is left.
    let began = Instant::now();
    while control.memory_bytes() != Some(64 << 20) && began.elapsed() < SOON {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_secs(2));
    control.line("event");
    std::thread::sleep(Duration::from_secs(1));
    let replies = control.replies();
    let (writer, pool) = sys::server(|socket| {
        let text = fs::write(POOL, "2-3").map_err(|error| error.raw_os_error().unwrap_or(0));
        let _ = sys::send(socket, said(text.map(|()| 0)).as_bytes(), None);
    })?;
    tell(
        "the pool is written meanwhile",
        if sys::readable(&writer, SOON) { received(&writer)? } else { "not while START is under way".to_owned() },
    );
    sys::kill(child);
    tell("the killed caller is gone before its reply", sys::ended(child, SOON) && control.replies() == replies);
    sys::kill(pool);
    done()
}

fn received(socket: &OwnedFd) -> io::Result<String> {
    let mut bytes = [0; 64];
    let (count, _) = sys::receive(socket, &mut bytes)?;
    Ok(String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()).into_owned())
}

/// Does something in a child, which a fault of the kernel kills.
fn in_child(what: &str, act: &dyn Fn() -> Result<i64, i32>) -> io::Result<()> {
    let value = sys::in_child(|| act().unwrap_or_else(|errno| -i64::from(errno)));
    tell(what, value.map_or_else(|_| "killed".to_owned(), |value| if value < 0 { code(-value) } else { value.to_string() }));
    Ok(())
}

/// Takes the driver off its device; gives the device's name.
fn unbind_driver() -> io::Result<String> {
    let name = bound_device().ok_or_else(|| io::Error::other("The driver has no device."))?;
    fs::write(format!("{DRIVER}/unbind"), &name)?;
    Ok(name)
}

/// W4: the device goes while descriptors are open.
fn unbind() -> io::Result<()> {
    let (holder, _) = sys::server(|socket| {
        let enclave = File::open(DEVICE).and_then(|device| started(&device, 0));
        let _ = sys::send(socket, &[u8::from(enclave.is_ok())], None);
        let _ = sys::receive(socket, &mut [0; 8]);
        drop(enclave);
        let _ = sys::send(socket, b"0", None);
    })?;
    let mut is_started = [0; 8];
    sys::receive(&holder, &mut is_started)?;
    tell("an enclave runs", is_started[0] == 1);
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    unbind_driver()?;
    tell("the device file is there", std::path::Path::new(DEVICE).exists());
    in_child("poll", &|| sys::poll(enclave.as_raw_fd(), 0))?;
    in_child("CREATE_VM", &|| create(&device).map(|_| 0))?;
    in_child("ADD_VCPU", &|| add_vcpu(enclave.as_raw_fd(), 0))?;
    sys::send(&holder, &[1], None)?;
    let closed = received(&holder)?;
    tell("close of the enclave that ran", if closed.is_empty() { "killed" } else { &closed });
    done()
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

/// W1: pages that were refused, small ones and transparent huge ones.
fn refused_pages() -> io::Result<()> {
    const SMALL: (usize, usize) = (8000, 4096);
    const TRANSPARENT: (usize, usize) = (16, HUGE);
    let device = File::open(DEVICE)?;
    let enclave = made(&device)?;
    for (what, (times, bytes)) in [("of 4 KiB", SMALL), ("transparent huge", TRANSPARENT)] {
        let before = meminfo("MemFree");
        let mut refused = 0;
        for _ in 0..times {
            // Written to, so that it is not the page of zeros.
            sys::map(BASE, bytes, libc::PROT_READ | libc::PROT_WRITE, Backing::Anonymous)?;
            sys::want_transparent(BASE, bytes);
            sys::poke(BASE, &[1]);
            refused += usize::from(set_memory(enclave.as_raw_fd(), BASE, HUGE).is_err());
            sys::unmap(BASE, bytes);
        }
        tell(&format!("refused, {what}"), refused);
        // Both are 32 MB together; what the machine itself takes is far less.
        tell(&format!("memory is lost, {what}"), before - meminfo("MemFree") > 16_000);
    }
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
