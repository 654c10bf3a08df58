//! The virtio-nsm queue from the driver's side: sane drivers, unusual ones, hostile ones.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod driver;

use driver::{BUFFERS, DESCRIBE_NSM, Driver, GET_RANDOM, INDIRECT, INVALID_OPERATION, NEXT, Raw, WRITE};
use nitroxide_attestation::Signer;
use nitroxide_nsm::virtqueue::{Exchange, Progress, QueueError};
use nitroxide_nsm::{Identity, InitialPcrs, Module};
use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const DESCRIBE_PCR_0: &[u8] = b"\xa1\x6bDescribePCR\xa1\x65index\x00";
const EXTEND_16: &[u8] = b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x41x";
const LOCK_16: &[u8] = b"\xa1\x67LockPCR\xa1\x65index\x10";

const USED: Progress = Progress { used: true, more: false };
const NOTHING: Progress = Progress { used: false, more: false };

fn identity() -> Option<Identity> {
    let signer = Signer::local("i-0-enc0", 1_795_500_000_000).unwrap();
    Some(Identity { signer, pcrs: InitialPcrs::of_image([1; 48], [2; 48], [3; 48], None) })
}

struct Device {
    queue: Queue,
    exchange: Exchange,
    module: Module,
}

impl Device {
    /// A device whose module knows its measurements.
    fn ready(driver: &Driver) -> Self {
        let mut device = Self::waiting(driver);
        device.module.identify(identity());
        device
    }

    fn waiting(driver: &Driver) -> Self {
        Self { queue: driver.queue(), exchange: Exchange::default(), module: Module::new("i-0-enc0".into(), false) }
    }

    fn advance(&mut self, driver: &Driver) -> Result<Progress, QueueError> {
        self.exchange.advance(&mut self.queue, &driver.memory, &mut self.module)
    }
}

fn is_description(response: &[u8]) -> bool {
    response.starts_with(b"\xa1\x6bDescribeNSM\xa7")
}

#[test]
fn two_chains_come_back_request_first_and_empty() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.exchange(0, DESCRIBE_NSM);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert_eq!(used[0], (0, 0));
    assert_eq!(used[1].0, 1);
    assert!(is_description(&driver.response(used[1])));
    assert_eq!(used.len(), 2);
    assert_eq!(device.advance(&driver).unwrap(), NOTHING);
}

#[test]
fn a_request_is_kept_until_its_room_comes() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.ask(0, DESCRIBE_NSM);
    assert_eq!(device.advance(&driver).unwrap(), NOTHING);
    driver.make_room(1, 0x3000);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    assert!(is_description(&driver.last_response()));
}

#[test]
fn room_may_come_before_the_request() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.make_room(1, 0x3000);
    driver.ask(0, DESCRIBE_NSM);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert_eq!((used[0], used[1].0), ((0, 0), 1));
    assert!(is_description(&driver.response(used[1])));
}

#[test]
fn one_chain_may_hold_both() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.memory.write_slice(DESCRIBE_NSM, GuestAddress(BUFFERS)).unwrap();
    driver.describe(5, Raw { address: BUFFERS, length: 12, flags: NEXT, next: 6 });
    driver.describe(6, Raw { address: driver.buffer(5), length: 0x3000, flags: WRITE, next: 0 });
    driver.offer(5);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert_eq!((used.len(), used[0].0), (1, 5));
    assert!(is_description(&driver.response(used[0])));
}

#[test]
fn several_in_flight_are_answered_in_order() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    for (index, request) in [EXTEND_16, LOCK_16, EXTEND_16, DESCRIBE_NSM, GET_RANDOM].into_iter().enumerate() {
        driver.exchange(2 * u16::try_from(index).unwrap(), request);
    }
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert!(used.iter().map(|(head, _)| *head).eq(0..10));
    let responses: Vec<Vec<u8>> = used.into_iter().skip(1).step_by(2).map(|entry| driver.response(entry)).collect();
    assert!(responses[0].starts_with(b"\xa1\x69ExtendPCR"));
    assert_eq!(responses[1], b"\x67LockPCR");
    assert_eq!(responses[2], b"\xa1\x65Error\x6dReadOnlyIndex");
    assert!(is_description(&responses[3]));
    assert_eq!(responses[4].len(), 278);
}

#[test]
fn requests_first_and_all_rooms_later_are_paired_in_order() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.ask(0, LOCK_16);
    driver.ask(1, LOCK_16);
    driver.make_room(2, 0x3000);
    driver.make_room(3, 0x3000);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert!(used.iter().map(|(head, _)| *head).eq([0, 2, 1, 3]));
    assert_eq!(driver.response(used[1]), b"\x67LockPCR");
    assert_eq!(driver.response(used[3]), b"\xa1\x65Error\x6dReadOnlyIndex");
}

#[test]
fn request_and_room_may_be_in_pieces_and_in_an_indirect_table() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    let table = BUFFERS;
    let text = driver.buffer(1);
    driver.memory.write_slice(DESCRIBE_NSM, GuestAddress(text)).unwrap();
    for (index, (address, length, flags)) in [
        (text, 1, NEXT),
        (text + 1, 0, NEXT),
        (text + 1, 11, NEXT),
        (driver.buffer(2), 3, WRITE | NEXT),
        (driver.buffer(3), 0, WRITE | NEXT),
        (driver.buffer(4), 0x3000, WRITE),
    ]
    .into_iter()
    .enumerate()
    {
        let index = u16::try_from(index).unwrap();
        driver.describe_at(table, index, Raw { address, length, flags, next: index + 1 });
    }
    driver.describe(9, Raw { address: table, length: 6 * 16, flags: INDIRECT, next: 0 });
    driver.offer(9);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let (head, length) = driver.last_used();
    assert_eq!(head, 9);
    let response = [driver.read(driver.buffer(2), 3), driver.read(driver.buffer(4), length - 3)].concat();
    assert!(is_description(&response));
}

#[test]
fn a_response_is_cut_to_its_room() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    for (index, room) in [(0, 5), (2, 1), (4, 0)] {
        driver.ask(index, DESCRIBE_NSM);
        driver.make_room(index + 1, room);
        assert_eq!(device.advance(&driver).unwrap(), USED);
        let used = driver.used();
        assert_eq!(used, [(index, 0), (index + 1, room)]);
        assert_eq!(driver.response(used[1]), b"\xa1\x6bDes"[..room as usize]);
    }
}

#[test]
fn a_request_beyond_the_limit_is_too_large_however_long_it_says_it_is() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    for length in [0x1001, 0x10_0000, u32::MAX] {
        driver.describe(0, Raw { address: BUFFERS, length, flags: 0, next: 0 });
        driver.offer(0);
        driver.make_room(1, 0x3000);
        assert_eq!(device.advance(&driver).unwrap(), USED);
        assert_eq!(driver.last_response(), b"\xa1\x65Error\x6dInputTooLarge");
    }
}

#[test]
fn addresses_outside_memory_are_an_error_or_get_nothing() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    for address in [2 << 20, (2 << 20) - 1, u64::MAX - 3] {
        driver.describe(0, Raw { address, length: 12, flags: 0, next: 0 });
        driver.offer(0);
        driver.make_room(1, 0x3000);
        assert_eq!(device.advance(&driver).unwrap(), USED);
        assert_eq!(driver.last_response(), b"\xa1\x65Error\x6fInvalidArgument");
        driver.ask(2, DESCRIBE_NSM);
        driver.describe(3, Raw { address, length: 0x3000, flags: WRITE, next: 0 });
        driver.offer(3);
        assert_eq!(device.advance(&driver).unwrap(), USED);
        assert_eq!(driver.used(), [(2, 0), (3, 0)]);
    }
}

#[test]
fn chains_that_hold_nothing_come_back_and_do_not_shift_the_pairs() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    // An indirect table that is not one; one outside memory; a head beyond the table, which cannot come back.
    driver.describe(0, Raw { address: BUFFERS, length: 15, flags: INDIRECT, next: 0 });
    driver.describe(1, Raw { address: 2 << 20, length: 16, flags: INDIRECT, next: 0 });
    driver.offer(0);
    driver.offer(1);
    driver.offer(64);
    driver.offer(u16::MAX);
    driver.exchange(2, DESCRIBE_NSM);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert_eq!(used[..3], [(0, 0), (1, 0), (2, 0)]);
    assert!(is_description(&driver.response(used[3])));
}

#[test]
fn a_chain_that_bites_its_tail_ends() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.describe(0, Raw { address: BUFFERS, length: 1, flags: NEXT, next: 1 });
    driver.describe(1, Raw { address: BUFFERS, length: 1, flags: NEXT | WRITE, next: 0 });
    driver.offer(0);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert_eq!((used.len(), used[0].0, used[0].1 as usize), (1, 0, INVALID_OPERATION.len()));
}

#[test]
fn the_same_room_offered_again_and_again_is_kept_a_bounded_number_of_times() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.describe(1, Raw { address: BUFFERS, length: 0x3000, flags: WRITE, next: 0 });
    let mut returned = 0;
    for _ in 0..10 {
        for _ in 0..64 {
            driver.offer(1);
        }
        let _ = device.advance(&driver).unwrap();
        returned += driver.used().len();
    }
    assert_eq!(returned, 9 * 64, "one queue full is kept, the rest comes back");
}

#[test]
fn an_available_index_ahead_of_the_queue_breaks_it() {
    let driver = Driver::simple();
    let mut device = Device::ready(&driver);
    driver.set_available(65);
    assert!(matches!(device.advance(&driver), Err(QueueError::Broken(_))));
}

#[test]
fn rings_outside_memory_break_the_queue() {
    let mut driver = Driver::simple();
    let mut device = Device::ready(&driver);
    device.queue.try_set_used_ring_address(GuestAddress((2 << 20) - 4)).unwrap();
    driver.exchange(0, DESCRIBE_NSM);
    assert!(device.advance(&driver).is_err());
}

#[test]
fn describing_and_random_numbers_do_not_wait_for_the_measurements() {
    let mut driver = Driver::simple();
    let mut device = Device::waiting(&driver);
    driver.exchange(0, EXTEND_16);
    driver.exchange(2, LOCK_16);
    driver.exchange(4, DESCRIBE_NSM);
    driver.exchange(6, GET_RANDOM);
    driver.exchange(8, b"rubbish");
    assert_eq!(device.advance(&driver).unwrap(), USED);
    assert!(driver.used().iter().map(|(head, _)| *head).eq(4..10));
    assert_eq!(device.advance(&driver).unwrap(), NOTHING);
    driver.exchange(4, EXTEND_16);
    device.module.identify(identity());
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let used = driver.used();
    assert!(used.iter().map(|(head, _)| *head).eq(0..6));
    assert!(driver.response(used[1]).starts_with(b"\xa1\x69ExtendPCR"));
    assert_eq!(driver.response(used[3]), b"\x67LockPCR");
    assert_eq!(driver.response(used[5]), b"\xa1\x65Error\x6dReadOnlyIndex");
}

#[test]
fn without_measurements_requests_about_registers_fail() {
    let mut driver = Driver::simple();
    let mut device = Device::waiting(&driver);
    driver.exchange(0, DESCRIBE_PCR_0);
    let _ = device.advance(&driver).unwrap();
    device.module.identify(None);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    assert_eq!(driver.last_response(), b"\xa1\x65Error\x6dInternalError");
}

#[test]
fn more_than_a_queue_full_of_waiting_requests_is_refused() {
    let mut driver = Driver::simple();
    let mut device = Device::waiting(&driver);
    let mut refused = 0;
    for _ in 0..100 {
        driver.exchange(0, LOCK_16);
        let _ = device.advance(&driver).unwrap();
        refused += driver.used().len() / 2;
    }
    assert_eq!(refused, 100 - 64);
}

#[test]
fn a_queue_that_is_set_up_anew_has_no_old_requests() {
    let mut driver = Driver::simple();
    let mut device = Device::waiting(&driver);
    driver.exchange(0, LOCK_16);
    driver.ask(2, LOCK_16);
    assert_eq!(device.advance(&driver).unwrap(), NOTHING);
    device.exchange.reset();
    device.module.identify(identity());
    assert_eq!(device.advance(&driver).unwrap(), NOTHING);
    assert!(device.module.pcrs().locked().eq(0..16));
}

#[test]
fn buffers_may_cross_from_one_region_into_the_next() {
    let regions: Vec<(GuestAddress, usize)> = (0..32).map(|index| (GuestAddress(index << 16), 1 << 16)).collect();
    let mut driver = Driver::new(GuestMemoryMmap::from_ranges(&regions).unwrap(), 64);
    let mut device = Device::ready(&driver);
    let border = 5 << 16;
    driver.memory.write_slice(GET_RANDOM, GuestAddress(border - 3)).unwrap();
    driver.describe(0, Raw { address: border - 3, length: 10, flags: 0, next: 0 });
    driver.describe(1, Raw { address: 2 * border - 100, length: 0x3000, flags: WRITE, next: 0 });
    driver.offer(0);
    driver.offer(1);
    assert_eq!(device.advance(&driver).unwrap(), USED);
    let (_, length) = driver.last_used();
    assert_eq!(length, 278);
    assert!(driver.read(2 * border - 100, length).starts_with(b"\xa1\x69GetRandom\xa1\x66random\x59\x01\x00"));
}

proptest! {
    /// Whatever stands in the table and rings: no panic, and nothing comes back that was not offered.
    #[test]
    fn no_queue_content_does_harm(
        table in prop::collection::vec((0_u64..0x21_0000, prop_oneof![0_u32..0x5000, any::<u32>()], 0_u16..8, 0_u16..70), 64),
        offers in prop::collection::vec(prop::collection::vec(0_u16..70, 0..64), 1..6),
        identified in any::<bool>(),
    ) {
        let mut driver = Driver::simple();
        let mut device = if identified { Device::ready(&driver) } else { Device::waiting(&driver) };
        for (index, (address, length, flags, next)) in (0..).zip(table) {
            // Buffers stay clear of the rings, so that the test can tell what is wrong.
            driver.describe(index, Raw { address: address.max(BUFFERS), length, flags, next });
        }
        let mut offered = 0;
        let mut returned = 0;
        for offer in offers {
            offered += offer.len();
            for head in offer {
                driver.offer(head);
            }
            let progress = device.advance(&driver).unwrap();
            prop_assert!(!progress.more);
            let used = driver.used();
            prop_assert_eq!(progress.used, !used.is_empty());
            prop_assert!(used.iter().all(|(head, length)| *head < 64 && *length <= 0x3000));
            returned += used.len();
        }
        prop_assert!(returned <= offered);
    }
}
