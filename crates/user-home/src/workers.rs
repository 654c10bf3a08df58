//! Threads for what may take long: [`Workers`]. The thread that takes notifications hands it to them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The most threads. Each thread of a client makes one call at a time, and further calls wait.
const MOST: usize = 4096;
/// How long a thread without work stays.
const PATIENCE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Threads that come when they are needed and go when they are not.
#[derive(Clone, Default)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// A thread has nothing to do any more.
    rest: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

impl Workers {
    /// Has it done soon, by whoever is free. Where no thread can be had it is done here, late rather than never.
    pub(crate) fn hand(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() || state.threads >= MOST {
            drop(state);
            self.shared.work.notify_one();
            return;
        }
        state.threads = state.threads.saturating_add(1);
        drop(state);
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new().name("client-call".to_owned()).spawn(move || work(&shared));
        if spawned.is_err() {
            let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.threads = state.threads.saturating_sub(1);
            let job = if state.threads == 0 { state.jobs.pop_back() } else { None };
            drop(state);
            if let Some(job) = job {
                job();
            }
        }
    }
}

impl Workers {
    /// Waits until everything is done that was handed over, for so long.
    pub(crate) fn finish(&self, patience: Duration) {
        let state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_at_work = |state: &mut State| !state.jobs.is_empty() || state.idle < state.threads;
        // Whether it is done or time is up: nothing more can be done about it.
        drop(self.shared.rest.wait_timeout_while(state, patience, is_at_work));
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        state.idle = state.idle.saturating_add(1);
        shared.rest.notify_all();
        let (next, waited) = shared.work.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner);
        state = next;
        state.idle = state.idle.saturating_sub(1);
        if waited.timed_out() && state.jobs.is_empty() {
            state.threads = state.threads.saturating_sub(1);
            shared.rest.notify_all();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn finishing_waits_for_what_was_handed_over_and_no_longer() {
        let workers = Workers::default();
        workers.finish(Duration::from_secs(60));
        let (done, results) = mpsc::channel();
        for number in 0..3 {
            let done = done.clone();
            workers.hand(move || {
                std::thread::sleep(Duration::from_millis(30));
                done.send(number).unwrap();
            });
        }
        workers.finish(Duration::from_secs(60));
        assert_eq!(results.try_iter().count(), 3);
        let (_never, receiver) = mpsc::channel::<()>();
        workers.hand(move || {
            let _ = receiver.recv();
        });
        workers.finish(Duration::from_millis(20));
    }

    #[test]
    fn jobs_that_wait_for_each_other_are_all_done() {
        let workers = Workers::default();
        let (done, results) = mpsc::channel();
        // Each waits for the next one, so all must have a thread at once.
        let mut previous: Option<mpsc::Sender<()>> = None;
        for number in 0..20 {
            let (sender, receiver) = mpsc::channel();
            let (done, wake) = (done.clone(), previous.replace(sender));
            workers.hand(move || {
                if number < 19 {
                    receiver.recv().unwrap();
                }
                if let Some(wake) = wake {
                    wake.send(()).unwrap();
                }
                done.send(number).unwrap();
            });
        }
        drop(previous);
        let mut numbers: Vec<i32> = results.iter().take(20).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>());
    }
}
