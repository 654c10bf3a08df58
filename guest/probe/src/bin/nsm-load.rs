//! How fast `/dev/nsm` is as an application sees it: requests one after the other and from several threads, timed by the guest's own clock.
//!
//! Prints `nsm-load: begin NAME`, then `nsm-load: NAME COUNT requests, LEAST MEDIAN MOST us each, TOTAL us`. Used by `crates/nsm/benches/documents.rs`.

#[path = "../machine.rs"]
mod machine;

use std::thread;
use std::time::Instant;

use nitroxide_guest_sys::nsm::Nsm;
use nitroxide_guest_sys::requests::{AskError, Fields, Request};

const ROUNDS: usize = 400;
const THREADS: usize = 4;

fn main() {
    machine::prepare(&|text| println!("nsm-load: {text}"));
    if let Err(error) = run() {
        println!("nsm-load: failed {error}");
    }
    println!("nsm-load: done");
    machine::power_off();
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let field = [7; 1024];
    let full = Fields { user_data: Some(&field), nonce: Some(&field), public_key: Some(&field) };
    let nonce = Fields { nonce: Some(&field[..32]), ..Fields::default() };
    let nsm = Nsm::open()?;
    // What the emulator has to translate is translated, and the identity is there.
    measure("warm-up", 1, || nsm.attest(nonce).map(drop))?;
    measure("describe-pcr", 1, || nsm.describe_pcr(4).map(drop))?;
    measure("random", 1, || nsm.random().map(drop))?;
    measure("document", 1, || nsm.attest(nonce).map(drop))?;
    measure("document-full", 1, || nsm.attest(full).map(drop))?;
    measure("document-threads", THREADS, || nsm.attest(nonce).map(drop))?;
    println!("nsm-load: size {}", nsm.request(&Request::Attestation(nonce).encode())?.len());
    Ok(())
}

/// Asks so often, by so many threads at a time.
fn measure(name: &str, threads: usize, ask: impl Fn() -> Result<(), AskError> + Sync) -> Result<(), Box<dyn std::error::Error>> {
    println!("nsm-load: begin {name}");
    let started = Instant::now();
    let share = || -> Result<Vec<u128>, AskError> {
        (0..ROUNDS / threads)
            .map(|_| {
                let asked = Instant::now();
                ask().map(|()| asked.elapsed().as_micros())
            })
            .collect()
    };
    let shares: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(share)).collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let total = started.elapsed().as_micros();
    let mut times = Vec::new();
    for share in shares {
        times.extend(share.map_err(|_| "a thread panicked")??);
    }
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or(0);
    let count = times.len();
    println!("nsm-load: {name} {count} requests, {} {} {} us each, {total} us", at(0), at(count / 2), at(count.saturating_sub(1)));
    Ok(())
}
