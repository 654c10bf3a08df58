//! The system calls that need `unsafe`: ioctl, mmap, fork, descriptors over a socket. One of the two such modules.

#![expect(unsafe_code, reason = "ioctl with arguments that are wrong on purpose, mappings at chosen addresses and fork have no safe form")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use libc::{c_int, c_void};

/// What a mapping is made of.
#[derive(Clone, Copy)]
pub(crate) enum Backing {
    /// A file at an offset, shared.
    Shared(RawFd, i64),
    /// Ordinary private memory.
    Anonymous,
    /// Private huge pages of 2 MiB that children do not get.
    PrivateHuge,
    /// A private huge page of 1 GiB that children do not get.
    PrivateGigantic,
}

/// ioctl: the value, or the errno.
pub(crate) fn ioctl(fd: RawFd, word: u32, argument: u64) -> Result<i64, i32> {
    // SAFETY: the kernel checks `argument` itself; what the commands write goes to memory that the caller keeps for them (or to none).
    let value = unsafe { libc::syscall(libc::SYS_ioctl, fd, u64::from(word), argument) };
    checked(value)
}

/// ioctl with an argument of ours.
pub(crate) fn ioctl_with(fd: RawFd, word: u32, argument: &mut [u8]) -> Result<i64, i32> {
    // The kernel writes no more than the word's size says, and callers give at least that.
    debug_assert!(argument.len() >= usize::try_from(word >> 16 & 0x3fff).unwrap_or(0), "the argument is as large as the word says");
    ioctl(fd, word, argument.as_mut_ptr() as u64)
}

/// ioctl the way of 32-bit programs, with a null pointer: 0 and up, or a negative errno.
pub(crate) fn ioctl_as_32_bit(fd: RawFd, word: u32) -> i32 {
    const IOCTL: i32 = 54;
    let mut value = IOCTL;
    // SAFETY: interrupt 0x80 takes its number in eax and its arguments in ebx, ecx and edx; it changes eax, and zeroes r8 to r11. ebx is
    // given back. The argument is no pointer to anything.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {fd}", "int 0x80", "xchg rbx, {fd}",
            fd = inout(reg) i64::from(fd) => _, inout("eax") value, in("ecx") word, in("edx") 0,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    value
}

/// Lets a descriptor stay open through exec.
pub(crate) fn keep_on_exec(fd: RawFd) {
    // SAFETY: no pointers.
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
}

fn checked(value: i64) -> Result<i64, i32> {
    if value == -1 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(value) }
}

/// Maps at exactly this address.
pub(crate) fn map(address: u64, bytes: usize, protection: c_int, backing: Backing) -> io::Result<()> {
    let (fd, offset, flags) = match backing {
        Backing::Shared(fd, offset) => (fd, offset, libc::MAP_SHARED),
        Backing::Anonymous => (-1, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        Backing::PrivateHuge => (-1, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB),
        Backing::PrivateGigantic => (-1, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB),
    };
    let address = address as *mut c_void;
    // SAFETY: the fixed addresses are far from what the process uses otherwise, and MAP_FIXED_NOREPLACE replaces nothing.
    let at = unsafe { libc::mmap(address, bytes, protection, flags | libc::MAP_FIXED_NOREPLACE, fd, offset) };
    if at != address {
        return Err(io::Error::last_os_error());
    }
    if matches!(backing, Backing::PrivateHuge | Backing::PrivateGigantic) {
        // SAFETY: the range was just mapped.
        unsafe { libc::madvise(address, bytes, libc::MADV_DONTFORK) };
    }
    Ok(())
}

/// mmap of a descriptor anywhere: the errno.
pub(crate) fn map_errno(fd: RawFd) -> Result<i64, i32> {
    // SAFETY: a new mapping where the kernel likes; it is not used.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
    if at == libc::MAP_FAILED { checked(-1) } else { Ok(0) }
}

/// Asks for transparent huge pages.
pub(crate) fn want_transparent(address: u64, bytes: usize) {
    // SAFETY: only advice on a mapping of ours.
    unsafe { libc::madvise(address as *mut c_void, bytes, libc::MADV_HUGEPAGE) };
}

/// Takes away the right to write.
pub(crate) fn make_read_only(address: u64, bytes: usize) {
    // SAFETY: a mapping of ours that no Rust value lies in.
    unsafe { libc::mprotect(address as *mut c_void, bytes, libc::PROT_READ) };
}

/// Unmaps what [`map`] has mapped.
pub(crate) fn unmap(address: u64, bytes: usize) {
    // SAFETY: no Rust value lies in mappings of ours.
    unsafe { libc::munmap(address as *mut c_void, bytes) };
}

/// Writes bytes to a mapping of ours.
pub(crate) fn poke(address: u64, bytes: &[u8]) {
    // SAFETY: callers give addresses within what they have mapped writable, and nothing refers to it.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
}

/// Reads bytes from a mapping of ours.
pub(crate) fn peek<const N: usize>(address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: callers give addresses within what they have mapped readable.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), N) };
    bytes
}

/// A file of huge pages of 2 MiB.
pub(crate) fn huge_file(bytes: i64) -> io::Result<OwnedFd> {
    let name = CString::new("pages")?;
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: only a length.
    if unsafe { libc::ftruncate(fd, bytes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// A descriptor by its number, as ioctl gave it.
pub(crate) fn own(fd: i64) -> Option<OwnedFd> {
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made it for us.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// F_GETFD and lseek: the value or the errno.
pub(crate) fn descriptor_flags(fd: RawFd) -> Result<i64, i32> {
    // SAFETY: no pointers.
    checked(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into())
}

/// lseek to the beginning.
pub(crate) fn seek(fd: RawFd) -> Result<i64, i32> {
    // SAFETY: no pointers.
    checked(unsafe { libc::lseek(fd, 0, libc::SEEK_SET) })
}

/// read or write of four bytes.
pub(crate) fn transfer(fd: RawFd, write: bool) -> Result<i64, i32> {
    let mut bytes = [0_u8; 4];
    // SAFETY: four bytes that live through the call.
    let value = unsafe {
        if write { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) } else { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) }
    };
    checked(i64::try_from(value).unwrap_or(-1))
}

/// poll for everything: the events.
pub(crate) fn poll(fd: RawFd, timeout_ms: c_int) -> Result<i64, i32> {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN | libc::POLLOUT | libc::POLLPRI, revents: 0 };
    // SAFETY: one entry that lives through the call.
    checked(unsafe { libc::poll(&raw mut entry, 1, timeout_ms) }.into())?;
    Ok(entry.revents.into())
}

/// Does something in a child, which gives a number to its parent. The parent waits for it.
pub(crate) fn in_child(act: impl FnOnce() -> i64) -> io::Result<i64> {
    let (reader, writer) = std::io::pipe()?;
    // SAFETY: this program has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let value = act();
            let _ = io::Write::write_all(&mut &writer, &value.to_ne_bytes());
            quit()
        }
        child => {
            drop(writer);
            let mut bytes = [0; 8];
            let read = io::Read::read_exact(&mut &reader, &mut bytes);
            wait(child);
            read.map(|()| i64::from_ne_bytes(bytes))
        }
    }
}

/// Forks a child of a program with many threads: `act` makes system calls and uses its own memory, takes no lock and asks for no memory. It ends with the
/// thread that made it, if nobody ends it before.
pub(crate) fn fork_from_threads(act: impl FnOnce()) -> io::Result<c_int> {
    // SAFETY: only this thread is in the child, which needs nothing that another one may have locked, by this function's contract.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: only a request to end with the parent.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            act();
            quit()
        }
        child => Ok(child),
    }
}

/// Kills a child that was not reaped yet, and waits for its end.
pub(crate) fn kill_child(child: c_int) {
    // SAFETY: a number; until it is reaped no other process has it.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait(child);
}

/// Becomes user nobody, in a child of [`fork_from_threads`]: the C library's own function would speak to threads that are not there.
pub(crate) fn become_nobody_after_fork() -> bool {
    const NOBODY: u32 = 65534;
    // SAFETY: only numbers.
    unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) == 0 }
}

/// Numbers that children share, all 0 at first; they stay for as long as the program runs.
pub(crate) fn shared_words(count: usize) -> io::Result<&'static [AtomicU64]> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), count * size_of::<AtomicU64>(), protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a mapping of that many bytes, aligned to a page, zeros at first, never unmapped, and used only through these atomic numbers.
    Ok(unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>(), count) })
}

/// Waits a little, without a lock and without memory, so that children of a program with many threads may.
pub(crate) fn pause_us(us: u32) {
    // SAFETY: only a number.
    unsafe { libc::usleep(us) };
}

fn quit() -> ! {
    // SAFETY: ends this process at once; nothing of the parent's is flushed twice.
    unsafe { libc::_exit(0) }
}

fn wait(child: c_int) {
    // SAFETY: our own child; no status is asked for.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
}

/// Becomes user and group nobody.
pub(crate) fn become_nobody() -> bool {
    const NOBODY: u32 = 65534;
    // SAFETY: only numbers.
    unsafe { libc::setgid(NOBODY) == 0 && libc::setuid(NOBODY) == 0 }
}

/// Forks a process that serves requests over a socket until it is closed, and gives our end.
pub(crate) fn server(serve: impl FnOnce(&OwnedFd)) -> io::Result<(OwnedFd, c_int)> {
    let mut pair = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: two new descriptors that nobody else owns.
    let [ours, theirs] = pair.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: this program has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ours);
            // SAFETY: only a request to end with the parent.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            serve(&theirs);
            quit()
        }
        child => Ok((ours, child)),
    }
}

/// Is there something to receive, or has the other end gone, within this time?
pub(crate) fn readable(socket: &OwnedFd, patience: Duration) -> bool {
    let timeout = c_int::try_from(patience.as_millis()).unwrap_or(c_int::MAX);
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry that lives through the call.
    unsafe { libc::poll(&raw mut entry, 1, timeout) == 1 }
}

/// Kills a child of ours.
pub(crate) fn kill(child: c_int) {
    // SAFETY: only numbers.
    unsafe { libc::kill(child, libc::SIGKILL) };
}

/// Has a child of ours ended within this time? It is reaped then.
pub(crate) fn ended(child: c_int, patience: Duration) -> bool {
    let began = Instant::now();
    loop {
        // SAFETY: our own child; no status is asked for.
        if unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) } != 0 {
            return true;
        }
        if began.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for the end of a child.
pub(crate) fn reap(child: c_int) {
    wait(child);
}

/// Sends bytes, and a descriptor if there is one.
pub(crate) fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<RawFd>) -> io::Result<()> {
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut space = [0_u64; 4];
    // SAFETY: an all-zero header is a valid one.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    if let Some(fd) = fd {
        header.msg_control = space.as_mut_ptr().cast();
        header.msg_controllen = 24;
        // SAFETY: `space` has room for one message with one descriptor (24 bytes), and is aligned for it.
        unsafe {
            let message = libc::CMSG_FIRSTHDR(&raw const header);
            (*message).cmsg_level = libc::SOL_SOCKET;
            (*message).cmsg_type = libc::SCM_RIGHTS;
            (*message).cmsg_len = 20;
            libc::CMSG_DATA(message).cast::<c_int>().write_unaligned(fd);
        }
    }
    // SAFETY: everything that the header points to lives through the call.
    if unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Receives bytes, and a descriptor if one came; 0 bytes at the end.
pub(crate) fn receive(socket: &OwnedFd, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut space = [0_u64; 4];
    // SAFETY: an all-zero header is a valid one.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    header.msg_control = space.as_mut_ptr().cast();
    header.msg_controllen = 24;
    // SAFETY: everything that the header points to lives through the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let mut fd = None;
    // SAFETY: the kernel has filled header and space; a message of this kind carries one descriptor, which is now ours.
    unsafe {
        let message = libc::CMSG_FIRSTHDR(&raw const header);
        if !message.is_null() && (*message).cmsg_type == libc::SCM_RIGHTS {
            fd = Some(OwnedFd::from_raw_fd(libc::CMSG_DATA(message).cast::<c_int>().read_unaligned()));
        }
    }
    Ok((count, fd))
}
