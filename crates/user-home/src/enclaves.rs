//! The enclaves of all clients: [`Enclaves`]. An enclave lives as long as somebody has its descriptor, the read end of a pipe that hangs up when it
//! has ended.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nitroxide_abi::extension::{self, backend, home, isolation};
use nitroxide_abi::{Code, SlotUid, ioctl};
use nitroxide_client::{DonatedPages, ServedDevice, ServedEnclave};
use nitroxide_driver::extension::{HOME_ERRATA, Home as Facts, Listed, list};
use nitroxide_driver::{Client, Page, call};
use rustix::fs::OFlags;

use crate::answer::Answer;
use crate::caller::{Caller, Owner};
use crate::donation::{Pages, Region, Whose};
use crate::handed::{Handed, Identity, Watch, is_closed};
use crate::huge::HugePages;
use crate::lock;
use crate::vsock::Sockets;

/// What NE_QUERY says of this home.
const FACTS: Facts =
    Facts { home: home::SUPERVISOR, backend: backend::UNKNOWN, isolation: isolation::NONE, errata: HOME_ERRATA, features: 0 };

/// One more than the highest address a program can have: x86-64 and aarch64 with four levels of page tables.
const END_OF_USER_SPACE: u64 = 0x7FFF_FFFF_F000;
/// The largest region, as in the kernel's homes: 1 TiB.
const LARGEST_REGION: u64 = 1 << 40;

/// The device and what is open on it.
#[derive(Debug)]
pub(crate) struct Enclaves {
    device: ServedDevice,
    open: Mutex<HashMap<Identity, Arc<Open>>>,
    /// Held while closed ones are released, so that who needs what they had can wait for it.
    closing: Mutex<()>,
    /// How many descriptors are being handed out.
    in_hand: Mutex<usize>,
    handed: Condvar,
}

/// How long a descriptor that is being handed out is waited for; only a client that is frozen takes as long.
const HANDING: Duration = Duration::from_secs(1);

/// A descriptor is being handed out, as long as this is there.
pub(crate) struct Handing<'a>(&'a Enclaves);

impl Drop for Handing<'_> {
    fn drop(&mut self) {
        let mut count = lock(&self.0.in_hand);
        *count = count.saturating_sub(1);
        self.0.handed.notify_all();
    }
}

/// An enclave that somebody has a descriptor of.
#[derive(Debug)]
pub(crate) struct Open {
    enclave: ServedEnclave,
    owner: Owner,
    user: u32,
    /// The pages that it has. What was copied has no pages of its own, so the device cannot tell that one is given twice.
    given: Mutex<Vec<Pages>>,
}

impl Open {
    /// Lets its heartbeat go to whoever of the clients listens for it.
    pub(crate) fn set_heartbeat(&self, device: &ServedDevice, sockets: &Sockets) {
        let process = sockets.heartbeat_listener(self.owner.process());
        device.set_heartbeat(self.enclave.slot_uid(), process.cast_unsigned());
    }
}

impl Enclaves {
    pub(crate) fn new(device: ServedDevice) -> Self {
        Self { device, open: Mutex::default(), closing: Mutex::default(), in_hand: Mutex::default(), handed: Condvar::new() }
    }

    /// The device.
    pub(crate) fn device(&self) -> &ServedDevice {
        &self.device
    }

    /// The enclave behind a file.
    pub(crate) fn get(&self, file: Identity) -> Option<Arc<Open>> {
        lock(&self.open).get(&file).cloned()
    }

    /// Releases those that nobody has any more. When this returns, their memory and CPUs are free, as after close() of a driver in the kernel.
    pub(crate) fn settle(&self) {
        // Whether it fails because time is up or because a thread has panicked: closed ones are looked for again soon.
        drop(self.handed.wait_timeout_while(lock(&self.in_hand), HANDING, |count| *count > 0));
        let _closing = lock(&self.closing);
        let is_gone = |open: &Open| is_closed(open.enclave.poll_fd());
        let mut open = lock(&self.open);
        let gone: Vec<_> = open.extract_if(|_, open| is_gone(open)).collect();
        drop(open);
        // Stops and frees it, unless a call is under way, which then does so.
        drop(gone);
    }

    /// To be kept while a descriptor is handed out, until no copy of it is left here.
    pub(crate) fn handing(&self) -> Handing<'_> {
        let mut count = lock(&self.in_hand);
        *count = count.saturating_add(1);
        Handing(self)
    }

    /// Is none open?
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.open).is_empty()
    }

    /// NE_CREATE_VM: the descriptor is the caller's only when its call is answered; until then everything can be taken back.
    pub(crate) fn create(&self, caller: &Caller<'_>, huge: &HugePages, watch: &Watch, argument: u64) -> Answer {
        self.settle();
        let (Ok(owner), Ok(user)) = (Owner::of(caller), caller.user()) else { return Answer::Error(libc::EIO) };
        let enclave = match self.device.create() {
            Ok(enclave) => enclave,
            Err(code) => return Answer::Error(code.number()),
        };
        // Not blocking: a read is an error in the driver, and must never be a wait here.
        let handed = watch.add(enclave.poll_fd()).and_then(|()| Handed::new(enclave.poll_fd(), OFlags::RDONLY | OFlags::NONBLOCK));
        let handed = match handed {
            Ok(handed) => handed,
            Err(error) => return error.into(),
        };
        let mut client = self.calling(caller, huge);
        if let Err(code) = call::create_vm(&mut client, enclave.slot_uid(), argument) {
            return Answer::Error(code.number());
        }
        lock(&self.open).insert(handed.identity(), Arc::new(Open { enclave, owner, user, given: Mutex::default() }));
        Answer::Handed(handed, true)
    }

    /// Notes pages for an enclave; 262 if one of them is another's, or its own already.
    fn note_given(&self, to: &Open, pages: &[Pages]) -> Result<(), Code> {
        let is_taken = |from: &Open| {
            let given = lock(&from.given);
            let mut taken = given.iter().filter(|given| pages.iter().any(|pages| pages.overlap(given)));
            // Addresses of a process that is gone, or has executed another program, are nobody's any more.
            taken.any(|given| matches!(given.whose, Whose::File(_)) || from.owner.lives())
        };
        // Held until they are noted, so that of two who give the same page one is refused.
        let open = lock(&self.open);
        if open.values().any(|open| is_taken(open)) {
            return Err(Code::MEM_REGION_ALREADY_USED);
        }
        lock(&to.given).extend(pages);
        Ok(())
    }

    /// Nobody has these pages: they were mapped this moment, where others may have been before.
    pub(crate) fn renew(&self, pages: &Pages) {
        for open in lock(&self.open).values() {
            lock(&open.given).retain(|given| !given.overlap(pages));
        }
    }

    /// A command on the device that is no NE_CREATE_VM.
    pub(crate) fn device_call(&self, caller: &Caller<'_>, huge: &HugePages, word: u32, argument: u64) -> Answer {
        let mut client = self.calling(caller, huge);
        if word != extension::LIST {
            return self.device.call(&mut client, &FACTS, word, argument).into();
        }
        let Ok(user) = caller.user() else { return Answer::Error(libc::EIO) };
        list(&mut client, argument, |cursor| self.next_after(cursor, user)).into()
    }

    fn calling<'a>(&'a self, caller: &'a Caller<'a>, huge: &'a HugePages) -> Calling<'a> {
        Calling { caller, enclave: None, huge, enclaves: self, region_bytes: 0, noted: Vec::new() }
    }

    fn next_after(&self, cursor: SlotUid, user: u32) -> Option<Listed> {
        let open = lock(&self.open);
        let seen = open.values().filter(|open| user == 0 || open.user == user).map(|open| Listed {
            summary: open.enclave.summary(),
            owner_uid: open.user,
            owner_pid: u32::try_from(open.owner.process()).unwrap_or(0),
        });
        seen.filter(|listed| listed.summary.slot > cursor).min_by_key(|listed| listed.summary.slot)
    }

    /// A command on an enclave.
    pub(crate) fn enclave_call(&self, open: &Open, caller: &Caller<'_>, huge: &HugePages, word: u32, argument: u64) -> Answer {
        if matches!(word, ioctl::ADD_VCPU | ioctl::SET_USER_MEMORY_REGION | ioctl::START_ENCLAVE) {
            // What was closed before this call is free for it.
            self.settle();
        }
        let mut client = Calling { enclave: Some(open), ..self.calling(caller, huge) };
        let result = open.enclave.call(&mut client, &FACTS, word, argument);
        if result.is_err() {
            // It has not got them after all.
            lock(&open.given).retain(|given| !client.noted.contains(given));
        }
        result.into()
    }
}

/// A caller as the driver core sees it.
struct Calling<'a> {
    caller: &'a Caller<'a>,
    /// The enclave, for calls that have one.
    enclave: Option<&'a Open>,
    huge: &'a HugePages,
    enclaves: &'a Enclaves,
    /// Bytes of the region that is being given.
    region_bytes: u64,
    /// Its pages, once they are noted.
    noted: Vec<Pages>,
}

impl Client for Calling<'_> {
    type Pages = DonatedPages;

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Code> {
        self.caller.read(address, bytes)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Code> {
        self.caller.write(address, bytes)
    }

    fn is_owner(&self) -> bool {
        self.enclave.is_some_and(|open| open.owner.is(self.caller))
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        address.checked_add(size).is_some_and(|end| end <= END_OF_USER_SPACE)
    }

    fn begin_pages(&mut self, size: u64) -> Result<DonatedPages, Code> {
        if size > LARGEST_REGION {
            return Err(Code::ENOMEM);
        }
        self.region_bytes = size;
        Ok(DonatedPages::default())
    }

    /// The memory is taken as one page of the size of the region: a copy has no pages of its own.
    fn pin_next(&mut self, pages: &mut DonatedPages, address: u64) -> Result<Page, Code> {
        let region = Region::look(self.caller, self.huge, address, self.region_bytes)?;
        let open = self.enclave.ok_or(Code::EFAULT)?;
        let given = region.pages(open.owner.process());
        self.enclaves.note_given(open, &given)?;
        self.noted = given;
        pages.donate(region.take(self.caller, self.huge, &self.enclaves.device)?)
    }
}
