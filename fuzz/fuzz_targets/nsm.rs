//! The NSM under a hostile guest: a sequence of requests, of anything written to the queue and its memory, and of kicks.
//!
//! The input is a little program: an opcode byte, then its operands. Requests are noise, or right ones made of operands, some with a byte changed: from noise
//! alone a fuzzer without a dictionary finds no request in minutes. Holds for every input: no panic; every answer to a request is
//! one CBOR value of at most 0x3000 bytes; locks only close and what is locked does not change; nothing comes back twice.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_attestation::Signer;
use nitroxide_nsm::virtqueue::Exchange;
use nitroxide_nsm::{Identity, InitialPcrs, Module, response};
use std::sync::LazyLock;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const QUEUE_SIZE: u16 = 8;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const REGION: usize = 0x4000;

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity {
    signer: Signer::local("i-0-enc0", 1_795_500_000_000).unwrap(),
    pcrs: InitialPcrs::of_image([1; 48], [2; 48], [3; 48], None),
});

/// The rest of the input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(count.min(self.0.len()))?;
        self.0 = later;
        Some(now)
    }

    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

/// One of the seven requests, right but for its operands, and in every second case one byte.
fn likely_request(input: &mut Input<'_>) -> Option<Vec<u8>> {
    let which = input.byte()? % 7;
    let index = u16::from(input.byte()? % 40);
    let mut bytes = Vec::new();
    let mut cbor = minicbor::Encoder::new(&mut bytes);
    match which {
        0 => cbor.str("DescribeNSM").unwrap(),
        1 => cbor.str("GetRandom").unwrap(),
        2 | 3 => cbor
            .map(1)
            .unwrap()
            .str(if which == 2 { "DescribePCR" } else { "LockPCR" })
            .unwrap()
            .map(1)
            .unwrap()
            .str("index")
            .unwrap()
            .u16(index)
            .unwrap(),
        4 => cbor.map(1).unwrap().str("LockPCRs").unwrap().map(1).unwrap().str("range").unwrap().u16(index).unwrap(),
        5 => {
            let length = usize::from(input.byte()?);
            let data = input.bytes(length)?;
            cbor.map(1)
                .unwrap()
                .str("ExtendPCR")
                .unwrap()
                .map(2)
                .unwrap()
                .str("index")
                .unwrap()
                .u16(index)
                .unwrap()
                .str("data")
                .unwrap()
                .bytes(data)
                .unwrap()
        }
        _ => {
            cbor.map(1).unwrap().str("Attestation").unwrap().map(3).unwrap();
            for (bit, name) in ["user_data", "nonce", "public_key"].into_iter().enumerate() {
                cbor.str(name).unwrap();
                // Null, or up to a little more than is allowed.
                if index >> bit & 1 == 0 {
                    cbor.null().unwrap()
                } else {
                    cbor.bytes(&vec![7; usize::from(input.word()?) % 1100]).unwrap()
                };
            }
            &mut cbor
        }
    };
    let damage = input.word()?;
    if damage & 1 == 1 {
        let at = usize::from(damage >> 1) % bytes.len();
        bytes[at] = input.byte()?;
    }
    Some(bytes)
}

fn run(mut input: Input<'_>) -> Option<()> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[0, 1, 2].map(|at| (GuestAddress(at * REGION as u64), REGION))).unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    let mut exchange = Exchange::default();
    let mut module = Module::new("i-0-enc0".into(), false);
    let mut available: u16 = 0;
    loop {
        let before = module.pcrs().clone();
        match input.byte()? % 8 {
            operation @ (0 | 1) => {
                let request = match operation {
                    0 => {
                        let length = usize::from(input.word()?) % 0x1100;
                        input.bytes(length)?.to_vec()
                    }
                    _ => likely_request(&mut input)?,
                };
                let answer = module.answer(&request);
                assert!(answer.len() <= response::MAX_BYTES);
                let mut cbor = minicbor::Decoder::new(&answer);
                cbor.skip().unwrap();
                assert_eq!(cbor.position(), answer.len());
            }
            2 => module.identify(Some(IDENTITY.clone())),
            3 => {
                let index = u64::from(input.byte()? % 8);
                let _ = memory.write_slice(input.bytes(16)?, GuestAddress(index * 16));
            }
            4 => {
                // A sane descriptor, so that requests reach the module through the queue, too.
                let (index, kind) = (input.byte()? % 8, input.byte()?);
                let content =
                    if kind & 0x80 == 0 { input.bytes(usize::from(kind >> 2 & 0xf))?.to_vec() } else { likely_request(&mut input)? };
                let length = if kind & 0x40 == 0 { input.word()? % 0x3100 } else { u16::try_from(content.len()).unwrap() };
                let address = 0x400 + u64::from(index) * 0x1000;
                let mut raw = [0; 16];
                raw[..8].copy_from_slice(&address.to_le_bytes());
                raw[8..10].copy_from_slice(&length.to_le_bytes());
                raw[12] = kind & 3;
                raw[14] = index + 1;
                let _ = memory.write_slice(&raw, GuestAddress(u64::from(index) * 16));
                let _ = memory.write_slice(&content, GuestAddress(address));
            }
            5 => {
                let head = u16::from(input.byte()? % 10);
                let _ = memory.write_obj(head.to_le(), GuestAddress(AVAILABLE + 4 + 2 * u64::from(available % QUEUE_SIZE)));
                available = available.wrapping_add(1);
                let _ = memory.write_obj(available.to_le(), GuestAddress(AVAILABLE + 2));
            }
            6 => {
                let at = input.word()? % 0x400;
                let _ = memory.write_slice(input.bytes(2)?, GuestAddress(at.into()));
            }
            _ => {
                let returned = queue.next_used();
                let taken = queue.next_avail();
                if exchange.advance(&mut queue, &memory, &mut module).is_err() {
                    return None;
                }
                let kept = 4 * QUEUE_SIZE; // what may be owed from before
                assert!(queue.next_used().wrapping_sub(returned) <= queue.next_avail().wrapping_sub(taken).wrapping_add(kept));
                continue; // a queue full of requests: the rule below is checked for single ones
            }
        }
        if before.describe(0) != Ok((true, [0; 48])) {
            for index in 0..32 {
                let ((was_locked, was), (is_locked, is)) = (before.describe(index).unwrap(), module.pcrs().describe(index).unwrap());
                assert!(is_locked || !was_locked);
                assert!(!was_locked || was == is);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    run(Input(data));
});
