//! Many threads and dying children at once on one `/dev/nitro_enclaves`, and whether everything is there afterwards: [`run`].
//!
//! `calls` says what an answer may be, `worker` is a thread, `child` a process that is killed, `balance` what is compared, `shared` what all see. The
//! conductor here empties the machine now and then, changes the pool while others begin anew, and takes the device away. docs/conformance.md, "Stress".

mod balance;
mod calls;
mod child;
mod shared;
mod worker;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use balance::Balance;
use calls::Kind;
use shared::{PAGES_EACH, Shared};
use worker::{Worker, write_pool};

use crate::control::Pci;
use crate::machine::{DEVICE, DRIVER, POOL, bound_device, meminfo, tell};
use crate::random::Numbers;

/// Huge pages that are left to the machine.
const SPARE_PAGES: u64 = 4;
/// How long a rest of the run may take at its end, longer than a thread may wait for an end. It only ends hangs.
const END_PATIENCE: Duration = Duration::from_secs(300);
/// How long the pool stays as it is at least: while CPUs come and go nobody makes an enclave.
const POOL_REST: Duration = Duration::from_secs(15);
/// How long figures may take to come back: who tries again waits for up to a minute between two times.
const SETTLE: Duration = Duration::from_secs(180);

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long, without what is done before and after.
    pub seconds: u64,
    /// Threads.
    pub threads: u64,
    /// Where the random numbers begin.
    pub seed: u64,
    /// May the device be taken away, if the driver gets over it?
    pub unbind: bool,
    /// Is the device to be told to fail?
    pub control: bool,
    /// Is only compared what must be equal? A kernel with KASAN keeps for a while what is freed.
    pub exact_only: bool,
}

/// Runs it and prints what was done and found; true if nothing was wrong.
///
/// # Errors
///
/// What is missing: the device, root's rights, huge pages, a pool.
pub fn run(options: &Options) -> io::Result<bool> {
    let device = File::open(DEVICE).map_err(|error| io::Error::new(error.kind(), format!("{DEVICE}: {error}")))?;
    let pool = fs::read(POOL)?.strip_suffix(b"\n").unwrap_or_default().to_vec();
    let free = u64::try_from(meminfo("HugePages_Free")).unwrap_or(0);
    let pages = free.saturating_sub(SPARE_PAGES);
    if pages < PAGES_EACH || pool.is_empty() {
        return Err(io::Error::other(format!("{free} free huge pages and the pool {:?} are too little.", String::from_utf8_lossy(&pool))));
    }
    let control = if options.control { Pci::find() } else { None };
    let shared = Arc::new(Shared::open(device, pages, control, pool)?);
    let unbind = options.unbind && shared.driver.mends(4);
    tell("seed", options.seed);
    tell("threads", options.threads);
    tell("huge pages", pages);
    tell("test control", shared.control.is_some());
    tell("the project's own commands", shared.driver.extension);
    tell("the device is taken away now and then", unbind);

    // What the kernel allocates once and keeps is not to be taken for a leak.
    let warm_up = Duration::from_secs((options.seconds / 6).clamp(2, 8));
    let mut conductor = Conductor {
        shared: Arc::clone(&shared),
        numbers: Numbers::of_thread(options.seed, u64::MAX),
        unbind,
        exact_only: options.exact_only,
    };
    conductor.threads(options, options.seed ^ 0x5EED, warm_up);
    let before = conductor.settled(&Balance::default());
    before.lines("before").iter().for_each(|line| println!("{line}"));
    let _ = io::stdout().flush();

    conductor.threads(options, options.seed, Duration::from_secs(options.seconds));
    let after = conductor.settled(&before);
    after.lines("after").iter().for_each(|line| println!("{line}"));
    shared.tally.lines().iter().for_each(|line| println!("{line}"));
    tell("calls", shared.tally.total());
    tell("enclaves started", shared.tally.successes(Kind::Start));

    // Pages of a file that is there are in use whoever else has them: only without it a pin shows.
    shared.unmap();
    let began = Instant::now();
    let pages_free = || u64::try_from(meminfo("HugePages_Free")).unwrap_or(0);
    while pages_free() != free && began.elapsed() < SETTLE {
        std::thread::sleep(Duration::from_millis(100));
    }
    tell("HugePages_Free before", free);
    tell("HugePages_Free after", pages_free());
    let mut differences = after.compare(&before);
    if pages_free() != free {
        differences.push(format!("HugePages_Free: {free} before, {} now", pages_free()));
    }
    differences.iter().for_each(|line| println!("DIFFERENCE {line}"));
    let (mut failures, mut count) = shared.failures();
    let of_children = shared.tally.complaints();
    count += of_children.len();
    failures.extend(of_children);
    failures.iter().for_each(|line| println!("IMPOSSIBLE {line}"));
    tell("answers that cannot be", count);
    tell("differences", differences.len());
    Ok(count == 0 && differences.is_empty())
}

/// The thread that does what only one can.
struct Conductor {
    shared: Arc<Shared>,
    numbers: Numbers,
    unbind: bool,
    exact_only: bool,
}

impl Conductor {
    /// Lets threads work for a while; afterwards they are gone, and nothing is open.
    fn threads(&mut self, options: &Options, seed: u64, time: Duration) {
        let shared = Arc::clone(&self.shared);
        shared.stop.store(false, Ordering::SeqCst);
        let threads: Vec<_> = (0..options.threads)
            .map(|number| {
                let worker = Worker::new(&shared, seed, number);
                std::thread::spawn(move || worker.run())
            })
            .collect();
        let began = Instant::now();
        let mut pool_changed = began.checked_sub(POOL_REST / 2).unwrap_or(began);
        while began.elapsed() < time {
            std::thread::sleep(Duration::from_millis(300 + self.numbers.below(1200)));
            match self.numbers.below(3) {
                0 if self.unbind => self.unbind_and_bind(),
                1 if shared.driver.mends(16) && pool_changed.elapsed() > POOL_REST => {
                    self.change_pool();
                    pool_changed = Instant::now();
                }
                _ => {}
            }
            self.see_to_the_pool();
        }
        shared.stop.store(true, Ordering::SeqCst);
        let stopped = Instant::now();
        for thread in threads {
            while !thread.is_finished() {
                if stopped.elapsed() > END_PATIENCE {
                    shared.fail("a thread does not come back from a call".to_owned());
                    // Everything that follows would wait for it as well.
                    println!("IMPOSSIBLE a thread does not come back from a call; the kernel's stacks: echo w > /proc/sysrq-trigger");
                    let _ = fs::write("/proc/sysrq-trigger", "w");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            if thread.join().is_err() {
                shared.fail("a thread ended in a panic".to_owned());
            }
        }
        if shared.control.is_some() {
            worker::clear_faults(&shared);
            // What could not be given back while the device refused is tried again.
            shared.tell("event");
        }
        self.see_to_the_pool();
    }

    /// Looks until everything is as `before`, or for long enough.
    fn settled(&self, before: &Balance) -> Balance {
        let began = Instant::now();
        loop {
            let now = Balance::of(&self.shared, self.exact_only);
            if (*before == Balance::default() && began.elapsed() > Duration::from_secs(1))
                || (*before != Balance::default() && now.compare(before).is_empty())
                || began.elapsed() > SETTLE
            {
                return now;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// The device goes while descriptors are open, and comes back.
    fn unbind_and_bind(&mut self) {
        let Some(name) = bound_device() else {
            self.shared.fail("no device is bound".to_owned());
            return;
        };
        let act = |what: &str, kind: Kind| {
            let result = fs::write(format!("{DRIVER}/{what}"), &name);
            let answer = result.as_ref().err().and_then(io::Error::raw_os_error).map_or(0, |errno| -i64::from(errno));
            self.shared.tally.count(kind, answer);
            if answer != 0 {
                self.shared.fail(format!("{what}: {result:?}"));
            }
        };
        self.shared.bound.step();
        act("unbind", Kind::Unbind);
        std::thread::sleep(Duration::from_micros(self.numbers.below(30_000)));
        act("bind", Kind::Bind);
        self.shared.bound.step();
    }

    /// All enclaves are closed, and the pool changes while the first new ones are made.
    fn change_pool(&mut self) {
        self.shared.drain.store(true, Ordering::SeqCst);
        let began = Instant::now();
        let busy = || self.shared.open.load(Ordering::SeqCst) > 0 || self.shared.children.load(Ordering::SeqCst) > 0;
        while busy() && began.elapsed() < END_PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if busy() {
            self.shared.fail("not all enclaves were closed".to_owned());
        }
        let release_first = self.numbers.once_in(2);
        if release_first {
            self.shared.drain.store(false, Ordering::SeqCst);
        }
        write_pool(&self.shared, &self.shared.pool);
        self.shared.drain.store(false, Ordering::SeqCst);
    }

    /// A pool that got lost (a CPU could not go offline at that moment) is set again.
    fn see_to_the_pool(&self) {
        let began = Instant::now();
        while fs::read(POOL).is_ok_and(|text| text == b"\n") && began.elapsed() < END_PATIENCE {
            write_pool(&self.shared, &self.shared.pool);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
