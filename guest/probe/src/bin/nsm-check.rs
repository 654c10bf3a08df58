//! Asks `/dev/nsm` everything it can be asked and prints each answer; what is right, the test outside decides.
//!
//! Every line is `nsm-check: NAME WORDS`, answers in hex. As PID 1 it prepares the machine first (devices, `/modules/*.ko`) and
//! powers it off afterwards. It goes through all seven requests, the lock rules, broken CBOR, several threads, the kernel's
//! hwrng, and a reload of the driver. Used by `crates/nsm/tests/guest.rs`.

use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::{fs, thread};

use minicbor::Encoder;
use nitroxide_guest_sys::nsm::Nsm;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, delete_module, finit_module, reboot};

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
    if is_init {
        prepare();
    }
    if let Err(error) = check(is_init) {
        say("failed", &error.to_string());
    }
    if is_init {
        let _ = reboot(RebootCommand::PowerOff);
    }
}

fn say(name: &str, words: &str) {
    println!("nsm-check: {name} {words}");
}

/// Devices, /sys and the modules; every step says if it fails.
fn prepare() {
    for (kind, folder) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        let _ = fs::create_dir(folder);
        if let Err(error) = mount(kind, folder, kind, MountFlags::empty(), None) {
            say("mount", &format!("{folder} {error}"));
        }
    }
    for name in ["virtio_mmio", "nsm"] {
        load(name);
    }
}

fn load(name: &str) {
    let result = fs::File::open(format!("/modules/{name}.ko")).and_then(|module| Ok(finit_module(module, c"", 0)?));
    if let Err(error) = result {
        say("load", &format!("{name} {error}"));
    }
}

fn check(is_init: bool) -> io::Result<()> {
    let nsm = Nsm::open()?;
    // These two come before the boot measurements are known; the test outside holds them back until it has seen the lines.
    print(&nsm, "describe-nsm", b"\x6bDescribeNSM")?;
    let random = [nsm.request(b"\x69GetRandom")?, nsm.request(b"\x69GetRandom")?];
    say("random", &format!("{} {} {}", hex(&random[0][..22]), random[1].len(), if random[0] == random[1] { "same" } else { "differ" }));

    for index in 0..=32 {
        print(&nsm, &format!("describe-pcr {index}"), &indexed("DescribePCR", "index", index))?;
    }
    for index in [0, 15, 32] {
        print(&nsm, &format!("lock {index}"), &indexed("LockPCR", "index", index))?;
        print(&nsm, &format!("extend {index}"), &extend(index, b"abc"))?;
    }
    print(&nsm, "extend 16", &extend(16, b"abc"))?;
    print(&nsm, "extend-again 16", &extend(16, b""))?;
    print(&nsm, "extend-much 17", &extend(17, &[7; 4000]))?;
    print(&nsm, "lock 16", &indexed("LockPCR", "index", 16))?;
    print(&nsm, "lock-again 16", &indexed("LockPCR", "index", 16))?;
    print(&nsm, "extend-locked 16", &extend(16, b"abc"))?;
    print(&nsm, "lock-range 33", &indexed("LockPCRs", "range", 33))?;
    print(&nsm, "lock-range 20", &indexed("LockPCRs", "range", 20))?;
    print(&nsm, "describe-nsm-locked", b"\x6bDescribeNSM")?;

    print(&nsm, "document", &attestation(None))?;
    print(&nsm, "document-full", &attestation(Some(1024)))?;
    print(&nsm, "document-too-large", &attestation(Some(1025)))?;

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
        load("nsm");
        let nsm = Nsm::open()?;
        print(&nsm, "extend-after-reload 16", &extend(16, b"abc"))?;
        print(&nsm, "lock-range 32", &indexed("LockPCRs", "range", 32))?;
        print(&nsm, "extend-locked 31", &extend(31, b"abc"))?;
        print(&nsm, "describe-nsm-last", b"\x6bDescribeNSM")?;
    }
    say("done", "");
    Ok(())
}

/// One thread's requests through a descriptor of its own; returns how many answers belonged to their question.
fn talk(number: usize) -> usize {
    let Ok(nsm) = Nsm::open() else { return 0 };
    let random: &[u8] = b"\x69GetRandom";
    let describe = indexed("DescribePCR", "index", 4);
    let (request, prefix): (&[u8], &[u8]) =
        if number.is_multiple_of(2) { (random, b"\xa1\x69GetRandom") } else { (&describe, b"\xa1\x6bDescribePCR") };
    (0..ROUNDS).filter(|_| nsm.request(request).is_ok_and(|answer| answer.starts_with(prefix))).count()
}

fn print(nsm: &Nsm, name: &str, request: &[u8]) -> io::Result<()> {
    say(name, &hex(&nsm.request(request)?));
    Ok(())
}

fn indexed(request: &str, field: &str, value: u16) -> Vec<u8> {
    encoded(|cbor| {
        cbor.map(1)?.str(request)?.map(1)?.str(field)?.u16(value)?;
        Ok(())
    })
}

fn extend(index: u16, data: &[u8]) -> Vec<u8> {
    encoded(|cbor| {
        cbor.map(1)?.str("ExtendPCR")?.map(2)?.str("index")?.u16(index)?.str("data")?.bytes(data)?;
        Ok(())
    })
}

/// All three fields of that many bytes, or null.
fn attestation(bytes: Option<usize>) -> Vec<u8> {
    encoded(|cbor| {
        cbor.map(1)?.str("Attestation")?.map(3)?;
        for (name, byte) in [("user_data", 1), ("nonce", 2), ("public_key", 3)] {
            cbor.str(name)?;
            match bytes {
                Some(bytes) => cbor.bytes(&vec![byte; bytes])?,
                None => cbor.null()?,
            };
        }
        Ok(())
    })
}

type EncodeError = minicbor::encode::Error<std::convert::Infallible>;

fn encoded(write: impl FnOnce(&mut Encoder<&mut Vec<u8>>) -> Result<(), EncodeError>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to a Vec cannot fail.
    let _ = write(&mut Encoder::new(&mut bytes));
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
