//! Two threads that hash the same stream of chunks, read once and by whichever of them is ahead.
//!
//! A thread of its own for reading would take a third processor, a fixed reader would slow its own hashing: a consumer that finds no chunk ready loads the next
//! one (read and checksum), so the work spreads by itself. A window bounds the memory: 16 chunks of 128 KiB. One lock, one condition variable; reading and
//! hashing happen without the lock. Neighbour: [`measure`](crate::measure), the only user.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::ReadError;
use crate::image::Image;
use crate::measure::{CHUNK_BYTES, Chunk, Plan, checksum_start};
use crate::read_at::ReadAt;

/// How many chunks one consumer may be ahead of the other.
const WINDOW: usize = 16;
/// How many consumers there are: one for PCR0 and 1, one for PCR2.
const CONSUMERS: usize = 2;

type Loaded = (Chunk, Vec<u8>);

pub(crate) struct Pipeline<'a, S> {
    image: &'a Image<S>,
    state: Mutex<State<'a>>,
    changed: Condvar,
}

struct State<'a> {
    plan: Plan<'a>,
    /// The checksum so far; `None` while somebody loads a chunk, so only one can.
    crc: Option<crc32fast::Hasher>,
    /// Chunks that at least one consumer still needs.
    window: VecDeque<Arc<Loaded>>,
    /// Which chunk stands first in the window, counted from 0.
    first: u64,
    /// How many chunks has each consumer done with? `u64::MAX`: it needs no more.
    done: [u64; CONSUMERS],
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
    /// Is there nothing left to load?
    exhausted: bool,
    failed: Option<ReadError>,
}

impl<'a, S: ReadAt> Pipeline<'a, S> {
    pub fn new(image: &'a Image<S>) -> Pipeline<'a, S> {
        let state = State {
            plan: Plan::new(image.sections()),
            crc: Some(checksum_start(image)),
            window: VecDeque::with_capacity(WINDOW),
            first: 0,
            done: [0; CONSUMERS],
            spare: Vec::new(),
            exhausted: false,
            failed: None,
        };
        Pipeline { image, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Visits every chunk in order as consumer 0 or 1; returns at the end or once anything has failed.
    pub fn consume(&self, consumer: usize, mut visit: impl FnMut(Chunk, &[u8]) -> Result<(), ReadError>) {
        // Whatever happens to this thread, the other one must not wait for it for ever.
        let _leaving = Leaving { pipeline: self, consumer };
        let mut next = 0;
        while let Some(loaded) = self.get(consumer, next) {
            let (chunk, bytes) = &*loaded;
            if let Err(error) = visit(*chunk, bytes) {
                self.lock().failed.get_or_insert(error);
                self.changed.notify_all();
            }
            next += 1;
        }
    }

    /// The checksum of the whole image, or what went wrong.
    pub fn finish(self) -> Result<u32, ReadError> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (state.failed, state.crc) {
            (Some(error), _) => Err(error),
            (None, crc) => Ok(crc.expect("consumers return with the last chunk loaded, or failed").finalize()),
        }
    }

    /// Chunk `wanted`, loaded by this thread if nobody has; earlier chunks are done with. `None` after the last one and after a failure.
    fn get(&self, consumer: usize, wanted: u64) -> Option<Arc<Loaded>> {
        let mut state = self.lock();
        if state.done_with(consumer, wanted) {
            self.changed.notify_all();
        }
        loop {
            if state.failed.is_some() {
                return None;
            }
            let position = usize::try_from(wanted - state.first).ok();
            if let Some(loaded) = position.and_then(|position| state.window.get(position)) {
                return Some(Arc::clone(loaded));
            }
            if state.exhausted {
                return None;
            }
            state = match (state.window.len() < WINDOW).then(|| state.crc.take()).flatten() {
                Some(crc) => self.load(state, crc),
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Reads the next chunk of the plan into the window, without the lock meanwhile.
    fn load<'s>(&'s self, mut state: MutexGuard<'s, State<'a>>, mut crc: crc32fast::Hasher) -> MutexGuard<'s, State<'a>> {
        let Some(chunk) = state.plan.next() else {
            state.exhausted = true;
            state.crc = Some(crc);
            self.changed.notify_all();
            return state;
        };
        let mut bytes = state.spare.pop().unwrap_or_else(|| Vec::with_capacity(CHUNK_BYTES));
        drop(state);
        bytes.resize(chunk.size, 0);
        let result = self.image.source().read_exact_at(&mut bytes, chunk.offset).map_err(ReadError::io("a section", chunk.offset));
        crc.update(&bytes);
        let mut state = self.lock();
        match result {
            Ok(()) => state.window.push_back(Arc::new((chunk, bytes))),
            Err(error) => {
                state.failed.get_or_insert(error);
            }
        }
        state.crc = Some(crc);
        self.changed.notify_all();
        state
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State<'_> {
    /// Notes that a consumer needs no chunk below `wanted`, and takes back what nobody needs. True if there is room again.
    fn done_with(&mut self, consumer: usize, wanted: u64) -> bool {
        if let Some(done) = self.done.get_mut(consumer) {
            *done = wanted;
        }
        let was_full = self.window.len() == WINDOW;
        let needed = self.done.iter().copied().min().unwrap_or(0);
        while self.first < needed {
            let Some(loaded) = self.window.pop_front() else { break };
            self.first += 1;
            // The consumers have dropped theirs before they came here; should one not have, its buffer is simply not used again.
            if let Ok((_, bytes)) = Arc::try_unwrap(loaded) {
                self.spare.push(bytes);
            }
        }
        was_full && self.window.len() < WINDOW
    }
}

/// Marks a consumer as gone when its thread leaves, by return or by panic.
struct Leaving<'p, 'a, S: ReadAt> {
    pipeline: &'p Pipeline<'a, S>,
    consumer: usize,
}

impl<S: ReadAt> Drop for Leaving<'_, '_, S> {
    fn drop(&mut self) {
        let mut state = self.pipeline.lock();
        state.done_with(self.consumer, u64::MAX);
        if std::thread::panicking() {
            // It may have died while loading; nobody else will finish that chunk.
            let source = std::io::Error::other("the source panicked");
            state.failed.get_or_insert(ReadError::Io { what: "a section", offset: 0, source });
        }
        self.pipeline.changed.notify_all();
    }
}
