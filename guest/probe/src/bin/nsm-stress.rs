//! What a hostile or a busy guest does with `/dev/nsm`; afterwards the device has to answer as before.
//!
//! Each part prints `nsm-stress: NAME WORDS`, and the test outside (`crates/nsm/tests/guest_stress.rs`) says what is right. The noise is the same in every run.
//! Parts: [`mutations`] of valid requests, [`lengths`] of requests, [`rooms`] of every size for answers, [`crowd`] of processes and threads.

#[path = "../machine.rs"]
mod machine;

use std::io;
use std::process::{Command, Stdio};
use std::thread;

use nitroxide_guest_sys::nsm::{Nsm, RESPONSE_MAX_BYTES};
use nitroxide_guest_sys::requests::{AskError, Fields, Request};

/// How many mutations of each valid request are sent.
const MUTATIONS: usize = 120;
const PROCESSES: usize = 4;
const THREADS: usize = 4;
const ROUNDS: usize = 12;

/// A register that the parts extend or lock among their noise.
const FREE: u16 = 20;

fn main() {
    if std::env::args().nth(1).as_deref() == Some("member") {
        println!("{}", member());
        return;
    }
    machine::prepare(&|text| println!("nsm-stress: {text}"));
    if let Err(error) = run() {
        println!("nsm-stress: failed {error}");
    }
    machine::power_off();
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let nsm = Nsm::open()?;
    let before: Vec<_> = (0..16).map(|index| nsm.describe_pcr(index)).collect::<Result<_, _>>()?;
    println!("nsm-stress: truncations {}", truncations(&nsm)?);
    println!("nsm-stress: mutations {}", mutations(&nsm)?);
    println!("nsm-stress: lengths {}", lengths(&nsm)?);
    println!("nsm-stress: rooms {}", rooms(&nsm)?);
    println!("nsm-stress: crowd {} of {}", crowd()?, PROCESSES * THREADS * ROUNDS);
    let after: Vec<_> = (0..16).map(|index| nsm.describe_pcr(index)).collect::<Result<_, _>>()?;
    println!("nsm-stress: registers {}", if before == after { "same" } else { "CHANGED" });
    let document = nsm.attest(Fields { nonce: Some(b"still there"), ..Fields::default() })?;
    println!("nsm-stress: document {}", if document.windows(11).any(|piece| piece == b"still there") { "whole" } else { "BROKEN" });
    println!("nsm-stress: done");
    Ok(())
}

/// One of each request, with fields of some length. Locking is left to the mutations.
fn valid() -> Vec<Vec<u8>> {
    let fields = Fields { user_data: Some(b"user data"), nonce: Some(&[9; 40]), public_key: None };
    [
        Request::DescribePcr(4),
        Request::ExtendPcr(FREE, b"some data"),
        Request::LockPcr(FREE + 1),
        Request::LockPcrs(3),
        Request::DescribeNsm,
        Request::Attestation(fields),
        Request::GetRandom,
    ]
    .map(|request| request.encode())
    .into()
}

/// Is it one of the two forms that an answer has: a word or a map with one key?
fn is_answer(bytes: &[u8]) -> bool {
    let mut cbor = minicbor::Decoder::new(bytes);
    let has_form = matches!(bytes.first(), Some(0xa1 | 0x60..=0x77));
    has_form && cbor.skip().is_ok() && cbor.position() == bytes.len()
}

/// Every beginning of every request, the empty one too: how many were refused as they should, of how many.
fn truncations(nsm: &Nsm) -> io::Result<String> {
    let (mut refused, mut all) = (0, 0);
    for request in valid() {
        for length in 0..request.len() {
            let answer = nsm.request(request.get(..length).unwrap_or_default())?;
            all += 1;
            refused += usize::from(answer == b"\xa1\x65Error\x70InvalidOperation");
        }
    }
    Ok(format!("{refused} of {all}"))
}

/// Requests with one to four bytes changed, bytes put in or taken out: how many got an answer, of how many.
fn mutations(nsm: &Nsm) -> io::Result<String> {
    let mut noise = Noise(0x6e73_6d21);
    let (mut answered, mut all) = (0, 0);
    for request in valid() {
        for _ in 0..MUTATIONS {
            let mut bytes = request.clone();
            for _ in 0..=noise.below(3) {
                let at = noise.below(bytes.len());
                match noise.below(4) {
                    0 if bytes.len() > 1 => drop(bytes.remove(at)),
                    1 => bytes.insert(at, noise.byte()),
                    _ => {
                        if let Some(byte) = bytes.get_mut(at) {
                            *byte = noise.byte();
                        }
                    }
                }
            }
            all += 1;
            answered += usize::from(is_answer(&nsm.request(&bytes)?));
        }
    }
    Ok(format!("{answered} of {all}"))
}

/// The longest request and one byte more: what each leads to. An ExtendPCR of 4096 bytes is a right one.
fn lengths(nsm: &Nsm) -> io::Result<String> {
    let overhead = Request::ExtendPcr(FREE, &[0; 4000]).encode().len() - 4000;
    let outcome = |bytes: &[u8]| match nsm.request(bytes) {
        Ok(answer) => String::from_utf8_lossy(&answer).chars().filter(char::is_ascii_alphanumeric).skip(1).take(9).collect(),
        Err(error) => format!("errno {}", error.raw_os_error().unwrap_or(0)),
    };
    let extend = |bytes: usize| outcome(&Request::ExtendPcr(FREE, &vec![7; bytes - overhead]).encode());
    let zeroes = |bytes: usize| outcome(&vec![0; bytes]);
    Ok(format!("{}, {}; {}, {}, {}", extend(0x1000), extend(0x1001), zeroes(0x1000), zeroes(0x1001), zeroes(0x10000)))
}

/// Room of every size from nothing to more than the answer, then of some sizes up to more than any: how many answers were the beginning of the whole one,
/// of how many.
fn rooms(nsm: &Nsm) -> io::Result<String> {
    let request = Request::DescribePcr(4).encode();
    let whole = nsm.request(&request)?;
    let sizes = (0..whole.len() + 3).chain([
        255,
        256,
        257,
        4095,
        4096,
        4097,
        RESPONSE_MAX_BYTES - 1,
        RESPONSE_MAX_BYTES,
        RESPONSE_MAX_BYTES + 1,
        0x10001,
    ]);
    let (mut right, mut all) = (0, 0);
    for size in sizes {
        // What lies behind the room must stay as it is.
        let mut buffer = vec![0xee; size + 64];
        let Some(room) = buffer.get_mut(..size) else { continue };
        let used = nsm.request_into(&request, room)?;
        all += 1;
        let (answer, rest) = buffer.split_at(used);
        right += usize::from(whole.starts_with(answer) && used == whole.len().min(size) && rest.iter().all(|byte| *byte == 0xee));
    }
    Ok(format!("{right} of {all}"))
}

/// Several processes of several threads: how many answers belonged to their questions.
fn crowd() -> io::Result<usize> {
    let member = || Command::new("/proc/self/exe").arg("member").stdout(Stdio::piped()).spawn();
    let members = (0..PROCESSES).map(|_| member()).collect::<io::Result<Vec<_>>>()?;
    let mut right = 0;
    for member in members {
        let output = member.wait_with_output()?;
        right += String::from_utf8_lossy(&output.stdout).trim().parse::<usize>().unwrap_or(0);
    }
    Ok(right)
}

/// One process's share. Threads ask for different things, so that an answer to somebody else's question is seen.
fn member() -> usize {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|number| scope.spawn(move || talk(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    })
}

fn talk(number: usize) -> usize {
    let Ok(nsm) = Nsm::open() else { return 0 };
    let ask = |round: usize| -> Result<bool, AskError> {
        let nonce =
            [std::process::id().to_le_bytes(), [u8::try_from(number).unwrap_or(0), u8::try_from(round).unwrap_or(0), 0x5a, 0xa5]].concat();
        Ok(match number % 4 {
            0 => nsm.random()?.len() == 256,
            1 => nsm.describe_pcr(4)?.0,
            2 => nsm.attest(Fields { nonce: Some(&nonce), ..Fields::default() })?.windows(8).any(|piece| piece == nonce),
            _ => nsm.describe()?.max_pcrs == 32,
        })
    };
    (0..ROUNDS).filter(|round| ask(*round).unwrap_or(false)).count()
}

/// xorshift64: reproducible noise.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[4]
    }
}
