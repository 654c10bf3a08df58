//! One PCI function as one QEMU sees it: registers, interrupts and configuration space in front of the device, with the threads that do the work.
//!
//! A [`Function`] lives as long as a connection. Its callbacks (called from the vfio-user thread, with QEMU waiting) only look and note; commands are
//! carried out by the worker thread, switching off by a thread of its own, since a command may hold the worker up. docs/device-pci.md, "Threads".

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nitroxide_abi::limits::DEVICE_TIMEOUT_MS;
use nitroxide_abi::pci::{Command, DISABLED, ENABLE, Reply, SlotFree, VECTOR_EVENT, VECTOR_REPLY, WINDOW_BYTES};
use nitroxide_device::{Device, DeviceCode};

use crate::addresses;
use crate::config::{Config, PENDING_BITS};
use crate::control::{Control, EINVAL, Line, Shown};
use crate::msix::Vectors;
use crate::registers::{Act, Power, Registers};

/// How many commands may wait for the one under way. A driver waits for each reply, so more than one is a driver that gave up waiting.
const MOST_WAITING: usize = 16;

/// After this time Linux' driver has given up and would take the reply for the next command's (weakness W3).
const REPLY_EXPIRES: Duration = Duration::from_millis(DEVICE_TIMEOUT_MS as u64);

/// How long a handshake lasts that is met by early interrupts: the guest has to take them before it is over, on a busy machine, too. Drivers wait for two
/// minutes.
const LINGERS: Duration = Duration::from_secs(2);

/// Which region an access is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Configuration space.
    Config,
    /// The BAR with the MSI-X table, which QEMU keeps itself; only pending bits are read here.
    Interrupts,
    /// BAR 3.
    Registers,
}

/// One PCI function. Dropping it ends its threads; it switches off first, so that nothing stays given away.
pub struct Function {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    device: Arc<Device>,
    /// Late replies are delivered instead of dropped: for tests of drivers.
    late_replies: bool,
    /// Are commands logged for the user to see, not only for debugging?
    trace: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    registers: Registers,
    vectors: Vectors,
    config: Config,
    control: Option<Control>,
    waiting: VecDeque<Job>,
    /// Has the worker taken a job whose reply is not dealt with yet?
    busy: bool,
    /// Counts switchings-off: what began before one has no reply after it.
    epoch: u64,
    /// Is the next handshake to be met by early interrupts?
    early_interrupts: bool,
    /// The thread that switches off, if one runs or has run.
    ending: Option<JoinHandle<()>>,
    closed: bool,
}

struct Job {
    epoch: u64,
    given: Instant,
    number: u32,
    request: Box<[u8; WINDOW_BYTES]>,
}

impl Function {
    /// A function in front of `device`, whose event callback it takes. `test_control` offers the test control and delivers late replies.
    ///
    /// # Errors
    ///
    /// When the system has no thread for it.
    pub fn new(device: &Arc<Device>, test_control: bool) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            device: Arc::clone(device),
            late_replies: test_control,
            trace: AtomicBool::new(false),
            state: Mutex::new(State {
                registers: Registers::default(),
                vectors: Vectors::default(),
                config: Config::new(test_control),
                control: test_control.then(Control::default),
                waiting: VecDeque::new(),
                busy: false,
                epoch: 0,
                early_interrupts: false,
                ending: None,
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let of_worker = Arc::clone(&shared);
        let worker = std::thread::Builder::new().name("ne-commands".to_owned()).spawn(move || work(&of_worker))?;
        let of_events = Arc::downgrade(&shared);
        device.on_event(move || {
            if let Some(shared) = of_events.upgrade() {
                let mut state = shared.lock();
                // Before its handshake is complete a driver cannot take an event, and there is no enclave to ask about.
                if state.registers.power() == Power::On {
                    state.vectors.raise(VECTOR_EVENT);
                }
            }
        });
        Ok(Self { shared, worker: Some(worker) })
    }

    /// Reads from one of the spaces; never waits for a command.
    pub fn read(&self, space: Space, offset: u64, data: &mut [u8]) {
        let state = self.shared.lock();
        match space {
            Space::Config => {
                state.config.read(offset, data);
                if let Some(control) = &state.control {
                    let shown = Shown {
                        replies: self.shared.device.event_counter().replies,
                        memory_bytes: self.shared.device.usage().memory_bytes,
                    };
                    control.overlay(offset, data, shown);
                }
            }
            Space::Interrupts => {
                data.fill(0);
                for (byte, at) in data.iter_mut().zip(addresses(offset)) {
                    *byte = if at == PENDING_BITS { state.vectors.pending_bits() } else { 0 };
                }
            }
            Space::Registers => state.registers.read(offset, data, self.shared.device.event_counter()),
        }
    }

    /// Writes to one of the spaces; never waits for a command.
    pub fn write(&self, space: Space, offset: u64, data: &[u8]) {
        let mut state = self.shared.lock();
        match space {
            Space::Config => {
                state.config.write(offset, data);
                let line = state.control.as_mut().and_then(|control| control.write(offset, data));
                if let Some(line) = line {
                    drop(state);
                    let outcome = self.shared.execute(&line);
                    if let Some(control) = &mut self.shared.lock().control {
                        control.executed(outcome);
                    }
                }
            }
            Space::Interrupts => {}
            Space::Registers if state.early_interrupts && offset == ENABLE && data == [DISABLED] && state.registers.linger() => {
                state.early_interrupts = false;
                self.shared.switch_off(state, LINGERS);
                let mut state = self.shared.lock();
                state.vectors.raise(VECTOR_REPLY);
                state.vectors.raise(VECTOR_EVENT);
            }
            Space::Registers => match state.registers.write(offset, data) {
                None => {}
                Some(Act::Enable) => tracing::debug!("The driver switches the device on."),
                Some(Act::Disable) => {
                    tracing::debug!("The driver switches the device off.");
                    self.shared.switch_off(state, Duration::ZERO);
                }
                Some(Act::Command { number, request }) => self.shared.submit(state, number, request),
            },
        }
    }

    /// Carries out SET_IRQS for the MSI-X index.
    pub fn set_interrupts(&self, flags: u32, start: u32, count: u32, eventfds: Vec<std::fs::File>) {
        self.shared.lock().vectors.set(flags, start, count, eventfds);
    }

    /// A reset of the function: switches off without waiting, and forgets interrupts that were not delivered.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        let control = state.control.is_some();
        state.config = Config::new(control);
        state.vectors.forget_pending();
        if state.registers.force_off() {
            self.shared.switch_off(state, Duration::ZERO);
        } else if state.registers.power() == Power::Off {
            state.registers.switched_off();
        }
    }

    /// Waits until switching off is over and every command is done. For tests and the fuzz target.
    pub fn settle(&self) {
        let mut state = self.shared.lock();
        while state.registers.power() == Power::Ending || !state.waiting.is_empty() || state.busy {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        let ending = {
            let mut state = self.shared.lock();
            state.closed = true;
            state.epoch = state.epoch.wrapping_add(1);
            state.waiting.clear();
            state.ending.take()
        };
        self.shared.changed.notify_all();
        self.shared.device.on_event(|| {});
        if let Some(ending) = ending {
            let _ = ending.join();
        }
        // Whatever the driver has left, and the command under way.
        drop(self.shared.free_everything());
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("device", &self.shared.device).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a command for the worker.
    fn submit(&self, mut state: MutexGuard<'_, State>, number: u32, request: Box<[u8; WINDOW_BYTES]>) {
        if state.registers.power() != Power::On {
            tracing::debug!(number, "A command for a device that is switched off is refused.");
            state.registers.put_reply(&refusal(DeviceCode::ENODEV));
            state.vectors.raise(VECTOR_REPLY);
        } else if state.waiting.len() >= MOST_WAITING {
            tracing::warn!(number, "The driver does not wait for its replies; a command is dropped.");
        } else {
            let epoch = state.epoch;
            state.waiting.push_back(Job { epoch, given: Instant::now(), number, request });
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Frees everything on a thread of its own; the enable register says when that is done, `lingers` later. The registers are in [`Power::Ending`].
    fn switch_off(self: &Arc<Self>, mut state: MutexGuard<'_, State>, lingers: Duration) {
        state.epoch = state.epoch.wrapping_add(1);
        state.waiting.clear();
        state.vectors.forget_pending();
        let earlier = state.ending.take();
        let shared = Arc::clone(self);
        let end = move || {
            if let Some(earlier) = earlier {
                let _ = earlier.join();
            }
            std::thread::sleep(lingers);
            shared.free_everything().registers.switched_off();
            shared.changed.notify_all();
        };
        match std::thread::Builder::new().name("ne-switch-off".to_owned()).spawn(end) {
            Ok(thread) => state.ending = Some(thread),
            Err(error) => {
                // Without a thread the caller waits: nothing may stay given away.
                tracing::error!(%error, "No thread for switching off; the guest waits meanwhile.");
                drop(state);
                self.free_everything().registers.switched_off();
                self.changed.notify_all();
            }
        }
    }

    /// Frees everything, also what a command gives away that the worker had taken but not begun when the device was reset; on return none is under way.
    /// The caller has emptied the queue and lets nothing new in.
    fn free_everything(&self) -> MutexGuard<'_, State> {
        loop {
            // Asked before the reset: a command that ends between reset and question may have given something away after the reset.
            let was_busy = self.lock().busy;
            self.device.reset();
            let state = self.lock();
            if !was_busy {
                return state;
            }
            // A fault may hold this command until the next reset, so the wait is a short one. What it gives away, the next round takes back.
            drop(self.changed.wait_timeout(state, Duration::from_millis(5)).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Carries out a line of the test control.
    fn execute(&self, text: &str) -> Result<(), i32> {
        const ENOENT: i32 = 2;
        match Line::parse(text).ok_or(EINVAL)? {
            Line::Faults(faults) => self.device.set_faults(faults),
            Line::Event => self.device.raise_spurious_event(),
            Line::End(uid) => return if self.device.report_end(uid) { Ok(()) } else { Err(ENOENT) },
            Line::MaxRegions(count) => self.device.set_max_regions(count),
            Line::Trace(on) => self.trace.store(on, Ordering::Relaxed),
            Line::Usage => {}
            Line::EarlyInterrupts => self.lock().early_interrupts = true,
        }
        Ok(())
    }

    /// Gives the reply to a job, unless nobody waits for it any more.
    fn reply(&self, job: &Job, reply: Option<Reply>) {
        let Some(reply) = reply else { return };
        let late = job.given.elapsed() >= REPLY_EXPIRES && !self.late_replies;
        let mut state = self.lock();
        if state.epoch != job.epoch {
            return;
        }
        if late {
            // The counter has moved, so a driver that looks at it knows that this command is over; the interrupt would be taken for another's.
            tracing::warn!(number = job.number, "A reply is too late to be believed.");
            state.registers.put_reply(&refusal(DeviceCode::ETIMEDOUT));
            drop(state);
            if job.number == Command::SlotAlloc.number() && reply.rc >= 0 {
                // Nobody knows this slot.
                let request = SlotFree { slot_uid: reply.slot_uid }.to_bytes();
                let _ = self.device.command(Command::SlotFree.number(), &request);
            }
        } else {
            state.registers.put_reply(&reply);
            state.vectors.raise(VECTOR_REPLY);
        }
    }
}

fn refusal(code: DeviceCode) -> Reply {
    Reply { rc: code.raw(), ..Reply::default() }
}

/// Carries out commands, one after the other, until the function is closed.
fn work(shared: &Shared) {
    loop {
        let job = {
            let mut state = shared.lock();
            loop {
                if state.closed {
                    return;
                }
                match state.waiting.pop_front() {
                    Some(job) => {
                        state.busy = true;
                        break job;
                    }
                    None => state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            }
        };
        let _busy = Busy(shared);
        let begun = Instant::now();
        let reply = shared.device.command(job.number, job.request.as_slice());
        let (rc, took) = (reply.map(|reply| reply.rc), begun.elapsed());
        if shared.trace.load(Ordering::Relaxed) {
            tracing::info!(number = job.number, rc, ?took, "A command is done.");
        } else {
            tracing::debug!(number = job.number, rc, ?took, "A command is done.");
        }
        shared.reply(&job, reply);
    }
}

/// Says on drop, thus also after a panic in a launcher, that no command is under way.
struct Busy<'a>(&'a Shared);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.lock().busy = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use nitroxide_abi::pci::ENABLE;
    use nitroxide_device::testing::NullLauncher;
    use nitroxide_device::{Faults, Limits, Usage};

    use super::*;

    /// The worker has taken the command, and the device is reset before it has begun.
    #[test]
    fn a_command_that_was_taken_but_not_begun_leaves_nothing_given_away_when_switched_off() {
        let device = Arc::new(Device::new(Limits::default(), Faults::none(), Arc::new(NullLauncher::default())));
        let function = Function::new(&device, false).unwrap();
        function.write(Space::Registers, ENABLE, &[1]);
        function.shared.lock().busy = true;
        let busy = Busy(&function.shared);
        function.write(Space::Registers, ENABLE, &[0]);
        // Refused while the reset runs, so it is given until it comes after one.
        while device.command(Command::SlotAlloc.number(), &[0]).is_none_or(|reply| reply.rc != 0) {}
        let mut enable = [0];
        function.read(Space::Registers, ENABLE, &mut enable);
        assert_eq!(enable, [1]);
        drop(busy);
        function.settle();
        assert_eq!(device.usage(), Usage::default());
    }
}
