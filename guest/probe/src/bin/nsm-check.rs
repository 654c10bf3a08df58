//! Asks `/dev/nsm` everything it can be asked and prints each answer; what is right, the test outside decides.
//!
//! Every line is `nsm-check: NAME WORDS`, answers in hex. As PID 1 it prepares the machine first (devices, `/modules/*.ko`) and
//! powers it off afterwards. It goes through all seven requests, the lock rules, broken CBOR, several threads, the kernel's
//! hwrng, and a reload of the driver. Used by `crates/nsm/tests/guest.rs`.

#[path = "../machine.rs"]
mod machine;

use std::io::{self, Read as _};
use std::{fs, thread};

use nitroxide_guest_sys::nsm::Nsm;
use nitroxide_guest_sys::requests::{Fields, Request};
use rustix::system::delete_module;

/// Requests that are none, each wrong in one way.
const BROKEN: [&[u8]; 14] = [
    b"",                                                             // nothing
    b"\x6aDescribeMe",                                               // an unknown word
    b"\xa1\x6bDescribeNSM\xa0",                                      // a map where a word is right
    b"\x6bDescribePCR",                                              // a word where a map is right
    b"\xa1\x6bDescribePCR\xa0",                                      // a field missing
    b"\xa1\x6bDescribePCR\xa1\x65index\x20",                         // a negative index
    b"\xa1\x6bDescribePCR\xa1\x65index\x61\x31",                     // an index that is text
    b"\xa1\x6bDescribePCR\xa1\x65index\x00\x00",                     // a byte too many
    b"\xa1\x6bDescribePCR\xa1\x65index",                             // cut off
    b"\xa1\x67LockPCR\xa2\x65index\x10\x65index\x11",                // a field twice
    b"\xa1\x6bAttestation\xa1\x65other\xf6",                         // an unknown field
    b"\xa2\x67LockPCR\xa1\x65index\x10\x67LockPCR\xa1\x65index\x11", // two requests
    &[0x81; 4096],                                                   // 4096 arrays, one in another
    &[0xff; 16],                                                     // breaks of nothing
];

const THREADS: usize = 4;
const ROUNDS: usize = 25;

fn main() {
    let is_init = std::process::id() == 1;
    machine::prepare(&|text| say("machine", text));
    if let Err(error) = check(is_init) {
        say("failed", &error.to_string());
    }
    machine::power_off();
}

fn say(name: &str, words: &str) {
    println!("nsm-check: {name} {words}");
}

fn check(is_init: bool) -> io::Result<()> {
    let nsm = Nsm::open()?;
    // These two come before the boot measurements are known; the test outside holds them back until it has seen the lines.
    print(&nsm, "describe-nsm", b"\x6bDescribeNSM")?;
    let random = [nsm.request(b"\x69GetRandom")?, nsm.request(b"\x69GetRandom")?];
    say(
        "random",
        &format!("{} {} {}", hex::encode(&random[0][..22]), random[1].len(), if random[0] == random[1] { "same" } else { "differ" }),
    );

    for index in 0..=32 {
        print(&nsm, &format!("describe-pcr {index}"), &Request::DescribePcr(index).encode())?;
    }
    for index in [0, 15, 32] {
        print(&nsm, &format!("lock {index}"), &Request::LockPcr(index).encode())?;
        print(&nsm, &format!("extend {index}"), &Request::ExtendPcr(index, b"abc").encode())?;
    }
    print(&nsm, "extend 16", &Request::ExtendPcr(16, b"abc").encode())?;
    print(&nsm, "extend-again 16", &Request::ExtendPcr(16, b"").encode())?;
    print(&nsm, "extend-much 17", &Request::ExtendPcr(17, &[7; 4000]).encode())?;
    print(&nsm, "lock 16", &Request::LockPcr(16).encode())?;
    print(&nsm, "lock-again 16", &Request::LockPcr(16).encode())?;
    print(&nsm, "extend-locked 16", &Request::ExtendPcr(16, b"abc").encode())?;
    print(&nsm, "lock-range 33", &Request::LockPcrs(33).encode())?;
    print(&nsm, "lock-range 20", &Request::LockPcrs(20).encode())?;
    print(&nsm, "describe-nsm-locked", b"\x6bDescribeNSM")?;

    print(&nsm, "document", &Request::Attestation(Fields::default()).encode())?;
    print(&nsm, "document-full", &attestation(1024))?;
    print(&nsm, "document-too-large", &attestation(1025))?;

    for (number, bytes) in BROKEN.iter().enumerate() {
        print(&nsm, &format!("broken {number}"), bytes)?;
    }
    let too_long = nsm.request(&[0; 4097]).map_or_else(|error| error.raw_os_error().unwrap_or(0).to_string(), |_| "accepted".into());
    say("too-long", &too_long);

    let answered: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|number| scope.spawn(move || talk(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    });
    say("threads", &format!("{answered} of {}", THREADS * ROUNDS));

    let current = fs::read_to_string("/sys/class/misc/hw_random/rng_current")?;
    let mut random = [0; 64];
    fs::File::open("/dev/hwrng")?.read_exact(&mut random)?;
    say("hwrng", &format!("{} {}", current.trim(), if random == [0; 64] { "zero" } else { "random" }));

    drop(nsm);
    if is_init {
        let _ = delete_module(c"nsm", 0).map_err(|error| say("unload", &error.to_string()));
        machine::load("nsm")?;
        let nsm = Nsm::open()?;
        print(&nsm, "extend-after-reload 16", &Request::ExtendPcr(16, b"abc").encode())?;
        print(&nsm, "lock-range 32", &Request::LockPcrs(32).encode())?;
        print(&nsm, "extend-locked 31", &Request::ExtendPcr(31, b"abc").encode())?;
        print(&nsm, "describe-nsm-last", b"\x6bDescribeNSM")?;
    }
    say("done", "");
    Ok(())
}

/// One thread's requests through a descriptor of its own; returns how many answers belonged to their question.
fn talk(number: usize) -> usize {
    let Ok(nsm) = Nsm::open() else { return 0 };
    let random: &[u8] = b"\x69GetRandom";
    let describe = Request::DescribePcr(4).encode();
    let (request, prefix): (&[u8], &[u8]) =
        if number.is_multiple_of(2) { (random, b"\xa1\x69GetRandom") } else { (&describe, b"\xa1\x6bDescribePCR") };
    (0..ROUNDS).filter(|_| nsm.request(request).is_ok_and(|answer| answer.starts_with(prefix))).count()
}

fn print(nsm: &Nsm, name: &str, request: &[u8]) -> io::Result<()> {
    say(name, &hex::encode(nsm.request(request)?));
    Ok(())
}

/// All three fields of that many bytes.
fn attestation(bytes: usize) -> Vec<u8> {
    let [user_data, nonce, public_key] = [1, 2, 3].map(|byte| vec![byte; bytes]);
    Request::Attestation(Fields { user_data: Some(&user_data), nonce: Some(&nonce), public_key: Some(&public_key) }).encode()
}
