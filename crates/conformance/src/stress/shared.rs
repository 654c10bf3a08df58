//! What all threads see: the machine's ways in ([`Shared`]), open enclaves ([`Enclave`]), and who has what ([`Books`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nitroxide_abi::extension::{self, Query};
use nitroxide_abi::limits::GRANULE;

use super::calls::{Asked, Gone, Kind, Tally, WORDS, answer_text};
use crate::control::{Control, Pci};
use crate::sys::{self, Backing};

/// Where the huge pages are mapped, in every process of the test.
pub(super) const PAGES: u64 = 0x3000_0000_0000;
/// Where 4 MiB of ordinary pages are mapped.
pub(super) const SMALL: u64 = 0x3100_0000_0000;
pub(super) const SMALL_BYTES: usize = 4 << 20;
/// Where nothing is mapped.
pub(super) const NOTHING: u64 = 0x3200_0000_0000;
/// Huge pages of 2 MiB that a thread can start an enclave with, without the others' being in the way.
pub(super) const PAGES_EACH: u64 = 33;
/// Enclaves that lie where every thread can take them.
const PLACES: usize = 4;
/// Failures that are printed.
const MOST_FAILURES: usize = 20;

/// Locks; a thread that panicked is reported by its join.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that is odd while something is going on; it moves before the beginning and after the end.
#[derive(Debug, Default)]
pub(super) struct Phase(AtomicU64);

impl Phase {
    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// The beginning, or the end.
    pub(super) fn step(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Was it going on at some time since it was `before`?
    pub(super) fn met(&self, before: u64) -> bool {
        before % 2 == 1 || self.now() != before
    }
}

/// What the driver can do, and what must not be done to it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Driver {
    /// Are there the project's own commands?
    pub(super) extension: bool,
    /// Weaknesses that it says it has mended; W(n+1) is bit n.
    errata: u64,
}

impl Driver {
    /// Asks it.
    pub(super) fn of(device: &File) -> Self {
        let mut query = Query { size: u32::try_from(Query::SIZE).unwrap_or(0), ..Query::default() }.to_bytes();
        let answer = sys::ioctl_with(device.as_raw_fd(), extension::QUERY, &mut query);
        Self { extension: answer.is_ok(), errata: if answer.is_ok() { Query::from_bytes(&query).errata } else { 0 } }
    }

    /// Is weakness W`number` mended?
    pub(super) fn mends(self, number: u32) -> bool {
        self.errata >> (number - 1) & 1 == 1
    }
}

/// Everything.
pub(super) struct Shared {
    pub(super) device: File,
    pub(super) driver: Driver,
    pub(super) tally: Tally,
    pub(super) control: Option<Mutex<Pci>>,
    pub(super) pages: u64,
    pub(super) books: Mutex<Books>,
    pub(super) places: [Mutex<Option<Arc<Enclave>>>; PLACES],
    /// Odd while the device is not bound.
    pub(super) bound: Phase,
    /// Odd while the device refuses commands.
    pub(super) faults: Phase,
    /// One thread at a time tells the device to refuse.
    pub(super) faulty: Mutex<()>,
    /// Shall everything be closed, and nothing be made?
    pub(super) drain: AtomicBool,
    pub(super) stop: AtomicBool,
    /// Enclaves that are open, children's not counted.
    pub(super) open: AtomicUsize,
    /// Children that run.
    pub(super) children: AtomicUsize,
    pub(super) pool: Vec<u8>,
    failures: Mutex<Vec<String>>,
    failed: AtomicUsize,
    serial: AtomicU64,
    file: Mutex<Option<OwnedFd>>,
}

impl Shared {
    pub(super) fn open(device: File, pages: u64, control: Option<Pci>, pool: Vec<u8>) -> io::Result<Self> {
        let driver = Driver::of(&device);
        let file = map(pages)?;
        Ok(Self {
            device,
            driver,
            tally: Tally(sys::shared_words(WORDS)?),
            control: control.map(Mutex::new),
            pages,
            books: Mutex::default(),
            places: Default::default(),
            bound: Phase::default(),
            faults: Phase::default(),
            faulty: Mutex::default(),
            drain: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            children: AtomicUsize::new(0),
            pool,
            failures: Mutex::default(),
            failed: AtomicUsize::new(0),
            serial: AtomicU64::new(1),
            file: Mutex::new(Some(file)),
        })
    }

    /// Unmaps what [`Shared::open`] has mapped, and gives the huge pages back.
    pub(super) fn unmap(&self) {
        sys::unmap(PAGES, usize::try_from(self.pages * GRANULE).unwrap_or(0));
        sys::unmap(SMALL, SMALL_BYTES);
        drop(lock(&self.file).take());
    }

    /// Something is not as it should be.
    pub(super) fn fail(&self, text: String) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut failures = lock(&self.failures);
        if failures.len() < MOST_FAILURES {
            failures.push(text);
        }
    }

    /// What failed, and how often something did.
    pub(super) fn failures(&self) -> (Vec<String>, usize) {
        (lock(&self.failures).clone(), self.failed.load(Ordering::Relaxed))
    }

    /// Counts and judges an answer of the node.
    pub(super) fn note(&self, asked: &Asked, answer: i64, what: &dyn Fn() -> String) {
        self.tally.count(asked.kind, answer);
        if !asked.allows(answer) {
            self.fail(format!("{}: {} -> {} ({asked:?})", what(), asked.kind.name(), answer_text(answer)));
        }
    }

    /// Is the device gone for a call on the node that began when [`Shared::bound`] was `before`?
    pub(super) fn node_gone(&self, before: u64) -> Gone {
        if self.bound.met(before) { Gone::Maybe } else { Gone::No }
    }

    pub(super) fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Tells the device a line; false if it refused or there is no control.
    pub(super) fn tell(&self, line: &str) -> bool {
        self.control.as_ref().is_some_and(|control| lock(control).line(line) == Some(true))
    }
}

/// Maps huge pages and ordinary ones.
fn map(pages: u64) -> io::Result<OwnedFd> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let bytes = pages * GRANULE;
    let file = sys::huge_file(i64::try_from(bytes).unwrap_or(0))?;
    sys::map(PAGES, usize::try_from(bytes).unwrap_or(0), protection, Backing::Shared(file.as_raw_fd(), 0))?;
    for page in 0..pages {
        sys::poke(PAGES + page * GRANULE, &[1]);
    }
    sys::map(SMALL, SMALL_BYTES, protection, Backing::Anonymous)?;
    for page in 0..u64::try_from(SMALL_BYTES / 4096).unwrap_or(0) {
        sys::poke(SMALL + page * 4096, &[1]);
    }
    Ok(file)
}

/// An open enclave; dropped, its descriptor is closed.
pub(super) struct Enclave {
    shared: Arc<Shared>,
    pub(super) serial: u64,
    pub(super) uid: u64,
    /// [`Shared::bound`] when it was made; none if that moved meanwhile.
    made: Option<u64>,
    /// Has a START of this process succeeded?
    pub(super) started: AtomicBool,
    /// Was it seen that it has ended?
    pub(super) hung_up: AtomicBool,
    pub(super) fd: OwnedFd,
}

impl Enclave {
    /// Takes a descriptor that NE_CREATE_VM gave; `before` is what [`Shared::bound`] was then.
    pub(super) fn new(shared: &Arc<Shared>, fd: OwnedFd, uid: u64, before: u64) -> Arc<Self> {
        let made = (!shared.bound.met(before)).then_some(before);
        shared.open.fetch_add(1, Ordering::SeqCst);
        let enclave = Self {
            shared: Arc::clone(shared),
            serial: shared.next_serial(),
            uid,
            made,
            started: AtomicBool::new(false),
            hung_up: AtomicBool::new(false),
            fd,
        };
        if uid == 0 {
            shared.fail("an enclave has the slot number 0".to_owned());
        }
        enclave.take(Thing::Slot(uid));
        Arc::new(enclave)
    }

    /// Is its device gone?
    pub(super) fn gone(&self) -> Gone {
        match (self.made, self.shared.bound.now()) {
            (Some(made), now) if made == now => Gone::No,
            // Long enough ago that no call of that time goes on.
            (Some(made), now) if made + 4 <= now => Gone::Yes,
            _ => Gone::Maybe,
        }
    }

    /// Notes that it has something that nobody else can have at the same time.
    pub(super) fn take(&self, thing: Thing) {
        let Some(made) = self.made else { return };
        let before = lock(&self.shared.books).insert(thing, (self.serial, made));
        // Enclaves of a device that is gone have nothing any more, and somebody else may have it.
        let Some((other, _)) = before.filter(|(other, then)| *other != self.serial && *then == made) else { return };
        if self.shared.bound.now() == made {
            self.shared.fail(format!("{thing:?} belongs to two enclaves at once: number {other} and number {}", self.serial));
        }
    }
}

impl Drop for Enclave {
    fn drop(&mut self) {
        // Before the descriptor goes, after which others may be given what it had.
        lock(&self.shared.books).retain(|_, (serial, _)| *serial != self.serial);
        self.shared.open.fetch_sub(1, Ordering::SeqCst);
        self.shared.tally.count(Kind::Close, 0);
    }
}

/// What one enclave alone can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Thing {
    Slot(u64),
    Cpu(u32),
    /// A huge page, by its number.
    Page(u64),
}

/// Who has what: the enclave's number, and when it was made.
pub(super) type Books = BTreeMap<Thing, (u64, u64)>;
