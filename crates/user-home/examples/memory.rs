//! `memory`: gives the same and other memory to enclaves in all ways in which a page can be had twice, and says what came of each; then maps and gives while the
//! process is stopped again and again.
#![expect(unsafe_code, reason = "mmap, fork and ioctl have no safe form")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nitroxide_abi::ioctl::{CREATE_VM, SET_USER_MEMORY_REGION, UserMemoryRegion};

/// One huge page, in bytes.
const PAGE: usize = 2 << 20;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
const THREADS: usize = 4;
const ROUNDS: usize = 60;

fn main() -> io::Result<()> {
    let device = File::options().read(true).write(true).open("/dev/nitro_enclaves")?;
    same_memory(&device)?;
    files(&device)?;
    children(&device)?;
    closed_meanwhile(&device)?;
    stopped(&device)
}

fn same_memory(device: &File) -> io::Result<()> {
    let page = map(0, PAGE, PRIVATE, -1)?;
    let (one, other) = (create(device)?, create(device)?);
    say("a page", give(&one, page, PAGE));
    say("to another enclave", give(&other, page, PAGE));
    drop(one);
    say("when the first is closed", give(&other, page, PAGE));
    unmap(page, PAGE);
    let again = map(page, PAGE, PRIVATE | libc::MAP_FIXED, -1)?;
    let third = create(device)?;
    say("a new page in its place", give(&third, again, PAGE));
    say("the first of two that is taken", give(&create(device)?, again, 2 * PAGE));
    Ok(())
}

fn files(device: &File) -> io::Result<()> {
    let (file, another) = (memory_file(2 * PAGE)?, memory_file(PAGE)?);
    let [here, there] = [map(0, 2 * PAGE, libc::MAP_SHARED, file.as_raw_fd())?, map(0, 2 * PAGE, libc::MAP_SHARED, file.as_raw_fd())?];
    let (one, other) = (create(device)?, create(device)?);
    say("a file's page", give(&one, here, PAGE));
    say("under another address", give(&other, there, PAGE));
    say("the file's next page", give(&other, there + PAGE, PAGE));
    let place = map(0, PAGE, libc::MAP_PRIVATE, file.as_raw_fd())?;
    if place.is_multiple_of(PAGE) {
        say("a private page of a file", give(&one, place, PAGE));
        unmap(place, PAGE);
        let replaced = map(place, PAGE, libc::MAP_PRIVATE | libc::MAP_FIXED, another.as_raw_fd())?;
        say("one of another file in its place", give(&other, replaced, PAGE));
    } else {
        // It lies on no border of huge pages here, and cannot be given.
        say("a private page of a file", Ok(()));
        say("one of another file in its place", Ok(()));
    }
    Ok(())
}

fn children(device: &File) -> io::Result<()> {
    for (name, flags) in [("shared memory in a child", SHARED), ("private memory in a child", PRIVATE)] {
        let page = map(0, PAGE, flags, -1)?;
        let enclave = create(device)?;
        give(&enclave, page, PAGE)?;
        // SAFETY: one thread, and the child only makes system calls and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let result = create(device).and_then(|own| give(&own, page, PAGE));
            let status = result.map_or_else(|error| if error.raw_os_error() == Some(262) { 2 } else { 1 }, |()| 0);
            // SAFETY: it ends this process at once.
            unsafe { libc::_exit(status) };
        }
        let mut status = 0;
        // SAFETY: `status` lives for the call.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        say(
            name,
            match libc::WEXITSTATUS(status) {
                0 => Ok(()),
                2 => Err(io::Error::from_raw_os_error(262)),
                _ => Err(io::Error::other("the child failed")),
            },
        );
    }
    Ok(())
}

/// Closed while a call waits for another of the same enclave: what that call gave is nobody's afterwards.
fn closed_meanwhile(device: &File) -> io::Result<()> {
    let (long, short) = (map(0, 64 * PAGE, PRIVATE, -1)?, map(0, PAGE, PRIVATE, -1)?);
    let fd = create(device)?;
    let number = fd.as_raw_fd();
    std::thread::scope(|scope| {
        scope.spawn(|| give_to(number, long, 64 * PAGE));
        std::thread::sleep(Duration::from_millis(2));
        scope.spawn(|| give_to(number, short, PAGE));
        std::thread::sleep(Duration::from_millis(5));
        drop(fd);
    });
    say("what a closed enclave was given", give(&create(device)?, short, PAGE));
    Ok(())
}

fn stopped(device: &File) -> io::Result<()> {
    // SAFETY: one thread, and the child only sends signals and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain system calls.
        unsafe {
            let parent = libc::getppid();
            while libc::getppid() == parent {
                libc::kill(parent, libc::SIGSTOP);
                libc::usleep(1000);
                libc::kill(parent, libc::SIGCONT);
                libc::usleep(3000);
            }
            libc::_exit(0);
        }
    }
    let failures = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    let round = || {
                        let page = map(0, PAGE, PRIVATE, -1)?;
                        let given = give(&create(device)?, page, PAGE);
                        unmap(page, PAGE);
                        given
                    };
                    if let Err(error) = round() {
                        eprintln!("{error}");
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    // SAFETY: the child is ours, and not waited for yet.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    println!("failures while stopped: {}", failures.into_inner());
    Ok(())
}

fn say(what: &str, result: io::Result<()>) {
    match result {
        Ok(()) => println!("{what}: 0"),
        Err(error) => println!("{what}: {}", error.raw_os_error().map_or_else(|| error.to_string(), |code| code.to_string())),
    }
}

fn map(address: usize, bytes: usize, flags: i32, file: RawFd) -> io::Result<usize> {
    let place = std::ptr::without_provenance_mut(address);
    // SAFETY: at an address that the kernel chooses, or where this program has just unmapped.
    let mapped = unsafe { libc::mmap(place, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, file, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.addr()) }
}

fn unmap(address: usize, bytes: usize) {
    // SAFETY: nothing refers to it: this program never looks into what it maps.
    unsafe { libc::munmap(std::ptr::without_provenance_mut(address), bytes) };
}

fn memory_file(bytes: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_HUGETLB) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::fs::ftruncate(&file, bytes as u64)?;
    Ok(file)
}

fn create(device: &File) -> io::Result<OwnedFd> {
    let mut slot = 0_u64;
    // SAFETY: the command writes a number that lives for the call.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), CREATE_VM.into(), &raw mut slot) };
    // SAFETY: the kernel has just made it for us.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

fn give(enclave: &OwnedFd, address: usize, bytes: usize) -> io::Result<()> {
    give_to(enclave.as_raw_fd(), address, bytes)
}

fn give_to(enclave: RawFd, address: usize, bytes: usize) -> io::Result<()> {
    let mut region = UserMemoryRegion { flags: 0, memory_size: bytes as u64, userspace_addr: address as u64 }.to_bytes();
    // SAFETY: the command reads a `struct ne_user_memory_region` that lives for the call; the memory is only given.
    let result = unsafe { libc::ioctl(enclave, SET_USER_MEMORY_REGION.into(), region.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
