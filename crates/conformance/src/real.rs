//! A real `/dev/nitro_enclaves`, by system calls: [`Real`].
//!
//! All memory is mapped once, at fixed addresses; its huge pages are sorted by physical address, so that which of them are neighbours is known and
//! stands in the head ("layout"). Needs root: for physical addresses, the pool and the control.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use nitroxide_abi::limits::GRANULE;
use nitroxide_abi::{Code, ioctl};

use crate::control::Control;
use crate::machine::{DEVICE, POOL, meminfo};
use crate::step::{Area, ENCLAVES, FileCall, On, Op, PAGES, Pointer, Who};
use crate::sys::{self, Backing};
use crate::{LEFT_OUT, NO_ENCLAVE, Target};

const ONLINE: &str = "/sys/devices/system/cpu/online";
/// Where arguments are written, in every process of the test.
const ARGUMENT: u64 = 0x0FFF_0000_0000;
/// The same, read only.
const READ_ONLY_ARGUMENT: u64 = ARGUMENT + 0x1_0000;
/// The largest argument.
const ARGUMENT_BYTES: usize = 32;
/// How long an announced end may take to be seen. It only ends hangs.
const END_PATIENCE_MS: i32 = 5000;
const EVENT_PATIENCE: Duration = Duration::from_secs(5);
const SMALL_BYTES: usize = 4 << 20;
const GRANULE_BYTES: usize = 2 << 20;

/// What was asked of the other process.
const REQUEST_IOCTL: u8 = 0;
const REQUEST_POLL: u8 = 1;
const REQUEST_KEEP: u8 = 2;
const REQUEST_UNKEEP: u8 = 3;

/// A home of the driver behind `/dev/nitro_enclaves`.
pub struct Real {
    device: OwnedFd,
    control: Box<dyn Control>,
    enclaves: [Slot; ENCLAVES],
    helper: Option<OwnedFd>,
    helper_pid: i32,
    layout: Vec<u64>,
    huge_free: i64,
    private: usize,
    /// The device's count of replies at the last [`Op::CountCommands`].
    replies_before: u16,
    _file: OwnedFd,
}

/// One of the case's enclaves.
#[derive(Default)]
struct Slot {
    fd: Option<OwnedFd>,
    uid: u64,
    running: bool,
    ended: bool,
    kept: bool,
}

impl fmt::Debug for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Real").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Real {
    /// Opens the device and maps the memory.
    ///
    /// # Errors
    ///
    /// What is missing: the device, 110 free huge pages of 2 MiB, or root's rights.
    pub fn open(control: Box<dyn Control>) -> io::Result<Self> {
        let what = |what: &'static str| move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
        let device: OwnedFd = File::open(DEVICE).map_err(what(DEVICE))?.into();
        map_arguments()?;
        // Before the rest is mapped: it needs none of it.
        let (helper, helper_pid) = sys::server(serve)?;
        let (file, layout) = map_pages().map_err(what("Huge pages (110 of 2 MiB must be free, and root's rights are needed)"))?;
        let mut real = Self {
            device,
            control,
            enclaves: Default::default(),
            helper: Some(helper),
            helper_pid,
            layout,
            huge_free: 0,
            private: 0,
            replies_before: 0,
            _file: file,
        };
        real.huge_free = meminfo("HugePages_Free");
        Ok(real)
    }

    /// An ioctl by anybody.
    fn call(&mut self, fd: RawFd, who: Who, word: u32, argument: &[u8], pointer: Pointer) -> Result<i64, i64> {
        match who {
            Who::Owner => unfold(do_ioctl(fd, word, argument, pointer)),
            Who::Child => {
                let child = sys::in_child(|| do_ioctl(fd, word, argument, pointer));
                child.map_or_else(|_| Err(i64::from(libc::ECHILD)), unfold)
            }
            Who::Other => {
                let mut request = vec![REQUEST_IOCTL, pointer_number(pointer)];
                request.extend(word.to_le_bytes());
                request.extend(argument);
                self.ask(&request, Some(fd))
            }
        }
    }

    /// The other process: its answer, folded, and then what stands in its argument.
    fn ask(&mut self, request: &[u8], fd: Option<RawFd>) -> Result<i64, i64> {
        let lost = Err(i64::from(libc::ECHILD));
        let Some(helper) = &self.helper else { return lost };
        let mut reply = [0; 8 + ARGUMENT_BYTES];
        if sys::send(helper, request, fd).is_err() || !sys::receive(helper, &mut reply).is_ok_and(|(count, _)| count == reply.len()) {
            return lost;
        }
        let (value, argument) = reply.split_at(8);
        // What it wrote is looked at where the owner's would be.
        sys::poke(ARGUMENT, argument);
        unfold(i64::from_le_bytes(value.try_into().unwrap_or_default()))
    }

    fn fd(&self, on: On) -> Option<RawFd> {
        match on {
            On::Device => Some(self.device.as_raw_fd()),
            On::Enclave(enclave) => self.enclaves.get(enclave)?.fd.as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    fn create(&mut self, enclave: usize, pointer: Pointer) -> String {
        if self.enclaves.get(enclave).is_none_or(|slot| slot.fd.is_some() || slot.kept) {
            return "in use".to_owned();
        }
        match unfold(do_ioctl(self.device.as_raw_fd(), ioctl::CREATE_VM, &[0; 8], pointer)) {
            Err(errno) => code(errno),
            Ok(value) => {
                let uid = u64::from_le_bytes(sys::peek(ARGUMENT));
                if let (Some(slot), Some(fd)) = (self.enclaves.get_mut(enclave), sys::own(value)) {
                    *slot = Slot { fd: Some(fd), uid, ..Slot::default() };
                }
                if value < 0 { format!("returns {value}") } else { "0".to_owned() }
            }
        }
    }

    fn enclave_call(&mut self, op: &Op) -> String {
        let Some((enclave, fd)) = op.enclave().and_then(|enclave| Some((enclave, self.fd(On::Enclave(enclave))?))) else {
            return NO_ENCLAVE.to_owned();
        };
        match *op {
            Op::AddVcpu { who, cpu, pointer, .. } => match self.call(fd, who, ioctl::ADD_VCPU, &cpu.to_le_bytes(), pointer) {
                Ok(0) if who == Who::Child => "0".to_owned(),
                Ok(0) => format!("0 cpu {}", u32::from_le_bytes(sys::peek(ARGUMENT))),
                other => plain(other),
            },
            Op::LoadInfo { who, flags, pointer, .. } => {
                let argument = ioctl::ImageLoadInfo { flags, memory_offset: 7 }.to_bytes();
                match self.call(fd, who, ioctl::GET_IMAGE_LOAD_INFO, &argument, pointer) {
                    Ok(0) if who == Who::Child => "0".to_owned(),
                    Ok(0) => {
                        let info = ioctl::ImageLoadInfo::from_bytes(&sys::peek(ARGUMENT));
                        format!("0 flags {} offset {}", info.flags, info.memory_offset)
                    }
                    other => plain(other),
                }
            }
            Op::SetMemory { who, flags, place, size, pointer, .. } => {
                let region = ioctl::UserMemoryRegion { flags, memory_size: size, userspace_addr: place.address() };
                plain(self.call(fd, who, ioctl::SET_USER_MEMORY_REGION, &region.to_bytes(), pointer))
            }
            Op::Start { who, flags, cid, pointer, .. } => {
                let argument = ioctl::EnclaveStartInfo { flags, enclave_cid: cid }.to_bytes();
                let result = self.call(fd, who, ioctl::START_ENCLAVE, &argument, pointer);
                if let (Ok(0), Some(slot)) = (&result, self.enclaves.get_mut(enclave)) {
                    slot.running = true;
                }
                // Started, but the caller was not told.
                if let (Err(errno), Pointer::ReadOnly, Some(slot)) = (&result, pointer, self.enclaves.get_mut(enclave)) {
                    slot.running |= *errno == i64::from(libc::EFAULT);
                }
                match result {
                    Ok(0) if who == Who::Child => "0".to_owned(),
                    Ok(0) => format!("0 cid {}", ioctl::EnclaveStartInfo::from_bytes(&sys::peek(ARGUMENT)).enclave_cid),
                    other => plain(other),
                }
            }
            _ => NO_ENCLAVE.to_owned(),
        }
    }

    fn poll(&mut self, on: On, who: Who) -> String {
        let Some(fd) = self.fd(on) else { return NO_ENCLAVE.to_owned() };
        let ended = matches!(on, On::Enclave(enclave) if self.enclaves.get(enclave).is_some_and(|slot| slot.ended));
        let patience = if ended { END_PATIENCE_MS } else { 0 };
        let fold = |result: Result<i64, i32>| result.unwrap_or_else(|errno| -i64::from(errno));
        let events = match who {
            Who::Owner => fold(sys::poll(fd, patience)),
            Who::Child => sys::in_child(|| fold(sys::poll(fd, patience))).unwrap_or(-1),
            Who::Other => {
                let mut request = vec![REQUEST_POLL, 0];
                request.extend(patience.to_le_bytes());
                self.ask(&request, Some(fd)).unwrap_or(-1)
            }
        };
        format!("{events:#x}")
    }

    fn file(&self, on: On, call: FileCall) -> String {
        let Some(fd) = self.fd(on) else { return NO_ENCLAVE.to_owned() };
        if call == FileCall::Link {
            let link = fs::read_link(format!("/proc/self/fd/{fd}"));
            return link.map_or_else(|error| error.to_string(), |path| path.display().to_string());
        }
        let result = match call {
            FileCall::Read => sys::transfer(fd, false),
            FileCall::Write => sys::transfer(fd, true),
            FileCall::Seek => sys::seek(fd),
            FileCall::Map => sys::map_errno(fd),
            FileCall::CloseOnExec | FileCall::Link => sys::descriptor_flags(fd),
        };
        plain(result.map_err(i64::from))
    }

    fn keep(&mut self, enclave: usize, keep: bool) -> String {
        let Some(slot) = self.enclaves.get(enclave) else { return NO_ENCLAVE.to_owned() };
        let fd = slot.fd.as_ref().map(AsRawFd::as_raw_fd);
        if keep == slot.kept || (keep && fd.is_none()) {
            return NO_ENCLAVE.to_owned();
        }
        let request = [if keep { REQUEST_KEEP } else { REQUEST_UNKEEP }, u8::try_from(enclave).unwrap_or(u8::MAX)];
        let answer = self.ask(&request, fd.filter(|_| keep));
        if let Some(slot) = self.enclaves.get_mut(enclave) {
            slot.kept = keep;
            forget_closed(slot);
        }
        plain(answer)
    }

    fn close(&mut self, enclave: usize) -> String {
        let Some(slot) = self.enclaves.get_mut(enclave) else { return NO_ENCLAVE.to_owned() };
        if slot.fd.take().is_none() {
            return NO_ENCLAVE.to_owned();
        }
        forget_closed(slot);
        "0".to_owned()
    }

    /// Does what raises an event, and waits until the driver has looked at every enclave that runs.
    fn raise(&mut self, line: &str) -> String {
        // A driver does not ask for enclaves that it has hung up.
        let hung_up = |slot: &Slot| {
            slot.fd.as_ref().is_some_and(|fd| sys::poll(fd.as_raw_fd(), 0).is_ok_and(|events| events & i64::from(libc::POLLHUP) != 0))
        };
        let running = self.enclaves.iter().filter(|slot| slot.running && !slot.ended && !hung_up(slot)).count();
        let Some(before) = self.control.replies() else { return LEFT_OUT.to_owned() };
        let interrupts = event_interrupts();
        match self.control.line(line) {
            None => return LEFT_OUT.to_owned(),
            Some(false) => return "refused".to_owned(),
            Some(true) => {}
        }
        let started = Instant::now();
        let is_seen = |replies: Option<u16>| {
            let has_come = interrupts.is_none() || event_interrupts() != interrupts;
            has_come && replies.is_some_and(|now| usize::from(now.wrapping_sub(before)) >= running)
        };
        while started.elapsed() < EVENT_PATIENCE && !is_seen(self.control.replies()) {
            std::thread::sleep(Duration::from_micros(200));
        }
        // The driver has its answer and notes it under the enclave's lock, for which this call waits; its size is refused, so it changes nothing and asks nobody.
        for fd in self.enclaves.iter().filter_map(|slot| slot.fd.as_ref()) {
            let mut argument = ioctl::UserMemoryRegion { flags: 0, memory_size: 1, userspace_addr: 0 }.to_bytes();
            let _ = sys::ioctl_with(fd.as_raw_fd(), ioctl::SET_USER_MEMORY_REGION, &mut argument);
        }
        if running == 0 || self.enclaves.iter().any(|slot| slot.fd.is_none() && slot.kept) {
            // Nobody is asked, or the other process alone has it.
            std::thread::sleep(Duration::from_millis(20));
        }
        "0".to_owned()
    }

    fn end(&mut self, enclave: usize) -> String {
        let Some(slot) = self.enclaves.get(enclave).filter(|slot| slot.fd.is_some() || slot.kept) else { return NO_ENCLAVE.to_owned() };
        let answer = self.raise(&format!("end {:#x}", slot.uid));
        if let Some(slot) = self.enclaves.get_mut(enclave).filter(|_| answer == "0") {
            slot.ended = true;
        }
        answer
    }

    fn map(&mut self, pages: u64) -> String {
        let bytes = usize::try_from(pages * GRANULE).unwrap_or_default();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        if self.private != 0 {
            return "in use".to_owned();
        }
        match sys::map(Area::Private.base(), bytes, protection, Backing::PrivateHuge) {
            Ok(()) => {
                self.private = bytes;
                "0".to_owned()
            }
            Err(error) => code(error.raw_os_error().unwrap_or(0).into()),
        }
    }
}

impl Target for Real {
    fn head(&self) -> Vec<(String, String)> {
        let read = |path: &str| fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned());
        let module = File::open(POOL).is_ok();
        let pairs = [
            ("transcript", "1".to_owned()),
            ("target", DEVICE.to_owned()),
            ("kernel", read("/proc/sys/kernel/osrelease")),
            ("module", if module { "nitro_enclaves" } else { "unknown" }.to_owned()),
            ("pool", read(POOL)),
            ("cpus", read("/sys/devices/system/cpu/possible")),
            ("cpu 0 with", read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")),
            ("layout", self.layout.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")),
            ("control", self.control.name().to_owned()),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn perform(&mut self, op: &Op) -> String {
        match op {
            Op::WritePool { text, privileged } => write_pool(text, *privileged),
            Op::ReadPool => fs::read(POOL).map_or_else(|_| LEFT_OUT.to_owned(), |bytes| format!("{:?}", String::from_utf8_lossy(&bytes))),
            Op::Online => fs::read_to_string(ONLINE).unwrap_or_default().trim().to_owned(),
            Op::SetOnline { cpu, online } => {
                let result = fs::write(format!("/sys/devices/system/cpu/cpu{cpu}/online"), if *online { "1" } else { "0" });
                result.map_or_else(|error| code(error.raw_os_error().unwrap_or(0).into()), |()| "0".to_owned())
            }
            Op::Create { enclave, pointer } => self.create(*enclave, *pointer),
            Op::AddVcpu { .. } | Op::LoadInfo { .. } | Op::SetMemory { .. } | Op::Start { .. } => self.enclave_call(op),
            Op::Ioctl { on, word } => match self.fd(*on) {
                Some(fd) => plain(unfold(do_ioctl(fd, *word, &[0; ARGUMENT_BYTES], Pointer::Good))),
                None => NO_ENCLAVE.to_owned(),
            },
            Op::File { on, call } => self.file(*on, *call),
            Op::Poll { on, who } => self.poll(*on, *who),
            Op::Keep(enclave) => self.keep(*enclave, true),
            Op::Unkeep(enclave) => self.keep(*enclave, false),
            Op::Close(enclave) => self.close(*enclave),
            Op::Map(pages) => self.map(*pages),
            Op::Unmap => {
                sys::unmap(Area::Private.base(), std::mem::take(&mut self.private));
                "0".to_owned()
            }
            Op::HugeFree => (self.huge_free - meminfo("HugePages_Free")).to_string(),
            Op::Faults(rules) => told(self.control.line(&format!("faults {rules}"))),
            Op::Event => self.raise("event"),
            Op::End(enclave) => self.end(*enclave),
            Op::MaxRegions(count) => told(self.control.line(&format!("max-regions {count}"))),
            Op::CountCommands => match self.control.replies() {
                Some(now) => {
                    self.replies_before = now;
                    "0".to_owned()
                }
                None => LEFT_OUT.to_owned(),
            },
            Op::Commands => {
                let before = self.replies_before;
                self.control.replies().map_or_else(|| LEFT_OUT.to_owned(), |now| now.wrapping_sub(before).to_string())
            }
            Op::Usage => self.control.memory_bytes().map_or_else(|| LEFT_OUT.to_owned(), |bytes| format!("{}M", bytes >> 20)),
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.helper = None;
        sys::reap(self.helper_pid);
    }
}

/// Event interrupts that the driver has had so far; both drivers give the vector this name. None where the driver is no part of the kernel.
fn event_interrupts() -> Option<u64> {
    let text = fs::read_to_string("/proc/interrupts").ok()?;
    let line = text.lines().find(|line| line.ends_with("enclave_evt"))?;
    Some(line.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
}

fn forget_closed(slot: &mut Slot) {
    if slot.fd.is_none() && !slot.kept {
        *slot = Slot::default();
    }
}

fn told(answer: Option<bool>) -> String {
    match answer {
        None => LEFT_OUT,
        Some(true) => "0",
        Some(false) => "refused",
    }
    .to_owned()
}

/// Two pages for arguments, the second read only.
fn map_arguments() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    sys::map(ARGUMENT, 4096, protection, Backing::Anonymous)?;
    sys::map(READ_ONLY_ARGUMENT, 4096, protection, Backing::Anonymous)
}

/// Maps every area, and gives the lengths of physically contiguous stretches.
fn map_pages() -> io::Result<(OwnedFd, Vec<u64>)> {
    let all = usize::try_from(PAGES * GRANULE).unwrap_or_default();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let bytes = i64::try_from(PAGES * GRANULE).unwrap_or_default();
    let file = sys::huge_file(bytes)?;
    let fd = file.as_raw_fd();
    let base = Area::Pages.base();
    sys::map(base, all, protection, Backing::Shared(fd, 0))?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut pages = Vec::new();
    for index in 0..PAGES {
        let address = base + index * GRANULE;
        sys::poke(address, &[1]);
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, address / 4096 * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        pages.push((frame, i64::try_from(index * GRANULE).unwrap_or_default()));
    }
    if pages.iter().all(|(frame, _)| *frame == 0) {
        // An ordinary user sees no physical addresses, and needs none where the driver is in user space: no page is a neighbour of another.
        pages.iter_mut().zip(1..).for_each(|((frame, _), index)| *frame = index * 2 * (GRANULE / 4096));
    }
    pages.sort_unstable();
    if pages.iter().any(|(frame, _)| *frame == 0) {
        return Err(io::Error::other("physical addresses cannot be seen"));
    }
    sys::unmap(base, all);
    let one = GRANULE_BYTES;
    for (index, (_, offset)) in (0..).zip(&pages) {
        for area in [Area::Pages, Area::Alias] {
            sys::map(area.base() + index * GRANULE, one, protection, Backing::Shared(fd, *offset))?;
        }
    }
    let odd = [(Area::ReadOnly, libc::PROT_READ), (Area::NoAccess, libc::PROT_NONE), (Area::Half, protection)];
    for ((area, protection), (_, offset)) in odd.into_iter().zip(pages.iter().rev()) {
        sys::map(area.base(), one, protection, Backing::Shared(fd, *offset))?;
    }
    // Where there is no free page of 1 GiB, nothing is there.
    let _ = sys::map(Area::Gigantic.base(), 1 << 30, protection, Backing::PrivateGigantic);
    for area in [Area::Small, Area::Transparent] {
        sys::map(area.base(), SMALL_BYTES, protection, Backing::Anonymous)?;
        if area == Area::Transparent {
            sys::want_transparent(area.base(), SMALL_BYTES);
        }
        for page in 0..u64::try_from(SMALL_BYTES / 4096).unwrap_or_default() {
            sys::poke(area.base() + page * 4096, &[1]);
        }
    }
    let mut layout: Vec<u64> = Vec::new();
    let mut before = None;
    for (frame, _) in &pages {
        match layout.last_mut() {
            Some(length) if before == Some(frame - GRANULE / 4096) => *length += 1,
            _ => layout.push(1),
        }
        before = Some(*frame);
    }
    Ok((file, layout))
}

/// An ioctl in this process, whoever it is; folded into one number.
fn do_ioctl(fd: RawFd, word: u32, argument: &[u8], pointer: Pointer) -> i64 {
    let at = match pointer {
        Pointer::Good => ARGUMENT,
        Pointer::Null => 0,
        Pointer::ReadOnly => READ_ONLY_ARGUMENT,
    };
    match pointer {
        Pointer::Good => sys::poke(ARGUMENT, argument),
        Pointer::Null => {}
        Pointer::ReadOnly => {
            // Anew each time: the last call has made it read only.
            sys::unmap(at, 4096);
            if sys::map(at, 4096, libc::PROT_READ | libc::PROT_WRITE, Backing::Anonymous).is_ok() {
                sys::poke(at, argument);
                sys::make_read_only(at, 4096);
            }
        }
    }
    fold(sys::ioctl(fd, word, at))
}

/// Values as they are, errnos below -1 million: values of the C driver can be negative themselves.
fn fold(result: Result<i64, i32>) -> i64 {
    result.unwrap_or_else(|errno| -1_000_000 - i64::from(errno))
}

fn unfold(value: i64) -> Result<i64, i64> {
    if value < -1_000_000 { Err(-1_000_000 - value) } else { Ok(value) }
}

fn plain(result: Result<i64, i64>) -> String {
    match result {
        Ok(value) if value < 0 => format!("returns {value}"),
        Ok(value) => value.to_string(),
        Err(errno) => code(errno),
    }
}

/// An errno by name.
pub(crate) fn code(errno: i64) -> String {
    let known = i32::try_from(errno).ok().and_then(Code::new).map(Code::name).filter(|name| *name != "unknown");
    known.map_or_else(|| format!("errno {errno}"), str::to_owned)
}

fn pointer_number(pointer: Pointer) -> u8 {
    match pointer {
        Pointer::Good => 0,
        Pointer::Null => 1,
        Pointer::ReadOnly => 2,
    }
}

/// The other process.
fn serve(socket: &OwnedFd) {
    let mut kept: [Option<OwnedFd>; ENCLAVES] = Default::default();
    let mut request = [0; 64];
    while let Ok((count, mut fd)) = sys::receive(socket, &mut request) {
        let Some([kind, second, rest @ ..]) = request.get(..count).filter(|request| !request.is_empty()) else { return };
        let raw = fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.get(..4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default());
        let pointer = [Pointer::Good, Pointer::Null, Pointer::ReadOnly].get(usize::from(*second)).copied().unwrap_or(Pointer::Good);
        let mut value = 0;
        match *kind {
            REQUEST_IOCTL => value = do_ioctl(raw, number(rest), rest.get(4..).unwrap_or_default(), pointer),
            REQUEST_POLL => value = fold(sys::poll(raw, i32::try_from(number(rest)).unwrap_or(0))),
            REQUEST_KEEP | REQUEST_UNKEEP => {
                if let Some(place) = kept.get_mut(usize::from(*second)) {
                    *place = fd.take();
                }
            }
            _ => return,
        }
        // Before the answer: the owner's close may be the last one, and must not wait for ours.
        drop(fd);
        let mut reply = value.to_le_bytes().to_vec();
        reply.extend(sys::peek::<ARGUMENT_BYTES>(ARGUMENT));
        if sys::send(socket, &reply, None).is_err() {
            return;
        }
    }
}

fn write_pool(text: &str, privileged: bool) -> String {
    let Ok(mut file) = OpenOptions::new().write(true).open(POOL) else { return LEFT_OUT.to_owned() };
    let mut write = || match file.write(text.as_bytes()) {
        Ok(count) => i64::try_from(count).unwrap_or(-1),
        Err(error) => fold(Err(error.raw_os_error().unwrap_or(0))),
    };
    let value = if privileged { write() } else { sys::in_child(|| if sys::become_nobody() { write() } else { -1 }).unwrap_or(-1) };
    plain(unfold(value))
}
