//! The device against a made-up guest: chains, refusals, credit, turns. Beginnings and ends of connections: `tests_ends`.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;

use super::driver_model::{Driver, GUEST_CID, GUEST_PORT, HOST_PORT, INDIRECT, NEXT, WRITE};
use crate::limits;
use crate::packet::{HEADER_BYTES, Header, Operation};

/// Everything that is there to read now.
pub(super) fn read_available(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    all
}

pub(super) fn is_at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0) | Err(_)) && !matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

pub(super) fn operations(packets: &[(Header, Vec<u8>)]) -> Vec<u16> {
    packets.iter().map(|(header, _)| header.operation).collect()
}

pub(super) fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 31 + i / 251 + seed * 7) % 256).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn packets_in_chains_of_any_shape_reach_the_host_unchanged(
        packets in proptest::collection::vec((0..70_000usize, proptest::collection::vec(prop_oneof![0..100usize, 0..9000usize], 0..40)), 1..6),
    ) {
        let mut driver = Driver::new();
        let mut host = driver.open(GUEST_PORT);
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        for (seed, (length, cuts)) in packets.into_iter().enumerate() {
            let payload = pattern(length, seed);
            driver.send_cut(&Driver::data(&payload), &payload, &cuts);
            driver.run();
            prop_assert_eq!(driver.sent() - usize::from(seed == 0), 1);
            got.extend(read_available(&mut host));
            driver.run();
            got.extend(read_available(&mut host));
            expected.extend(payload);
        }
        prop_assert!(got == expected);
        prop_assert_eq!(driver.device.statistics().malformed, 0);
    }

    #[test]
    fn buffers_of_any_shape_give_the_guest_the_hosts_bytes_unchanged(
        length in 1..60_000usize,
        shapes in proptest::collection::vec(proptest::collection::vec(prop_oneof![0..60u32, 0..5000u32], 1..8), 1..20),
    ) {
        let mut driver = Driver::new();
        let mut host = driver.open(GUEST_PORT);
        let expected = pattern(length, 1);
        host.write_all(&expected).unwrap();
        let mut got = Vec::new();
        for shape in &shapes {
            driver.post(shape);
            driver.run();
            for (header, payload) in driver.received() {
                prop_assert_eq!(header.operation, Operation::ReadWrite as u16);
                got.extend(payload);
            }
        }
        for _ in 0..20 {
            driver.post_pages(1);
            driver.run();
            got.extend(driver.received().into_iter().flat_map(|(_, payload)| payload));
        }
        prop_assert!(got == expected);
    }
}

#[test]
fn one_packet_of_a_mebibyte_over_its_credit_is_reset_and_sixteen_of_64_kib_arrive() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    let payload = pattern(65536, 3);
    for _ in 0..16 {
        driver.send_cut(&Driver::data(&payload), &payload, &[HEADER_BYTES, 4096, 4096, 32768]);
        driver.run();
        assert_eq!(
            read_available(&mut host).len() + {
                driver.run();
                read_available(&mut host).len()
            },
            payload.len()
        );
    }
    driver.post_pages(8);
    driver.run();
    assert!(operations(&driver.received()).iter().all(|operation| *operation == Operation::CreditUpdate as u16));

    let huge = pattern(1 << 20, 4);
    driver.send(&Driver::data(&huge), &huge);
    driver.post_pages(1);
    driver.run();

    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert!(is_at_end(&mut host));
}

#[test]
fn malformed_chains_reset_their_connection_only_and_come_back() {
    let outside = (0x7000_0000u64, 64u32);
    type Send = Box<dyn Fn(&mut Driver)>;
    let mut broken: Vec<(&str, Send)> = Vec::new();
    let header = |length| Header { length, ..Driver::header(Operation::ReadWrite) };
    broken.push(("longer than its chain", Box::new(move |driver| driver.send(&header(100), &[0; 99]))));
    broken.push(("length 4 GiB", Box::new(move |driver| driver.send(&header(u32::MAX), &[0; 99]))));
    let header_at = 0x10_0000u64;
    let header_bytes = u32::try_from(HEADER_BYTES).unwrap();
    broken.push((
        "payload outside of RAM",
        Box::new(move |driver| {
            use vm_memory::Bytes;
            driver.memory.write_slice(&header(64).to_bytes(), vm_memory::GuestAddress(header_at)).unwrap();
            driver.send_raw(&[(header_at, header_bytes), outside], 0);
        }),
    ));
    for (name, send) in broken {
        let mut driver = Driver::new();
        let mut host = driver.open(GUEST_PORT);
        let mut other = driver.open(GUEST_PORT + 1);
        driver.sent();
        driver.post_pages(2);

        send(&mut driver);
        driver.run();

        assert_eq!(driver.sent(), 1, "{name}");
        let received = driver.received();
        assert_eq!(operations(&received), [Operation::Reset as u16], "{name}");
        assert_eq!(received[0].0.destination_port, GUEST_PORT, "{name}");
        assert!(is_at_end(&mut host), "{name}");
        let payload = pattern(10, 1);
        driver.send(&Header { source_port: GUEST_PORT + 1, ..Driver::data(&payload) }, &payload);
        driver.run();
        assert_eq!(read_available(&mut other), payload, "{name}");
    }
}

#[test]
fn chains_without_a_readable_header_are_dropped_and_the_queue_goes_on() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.sent();
    driver.send_raw(&[(0x10_0000, 43)], 0); // a byte too short for a header
    driver.send_raw(&[(0x10_0000, 4096)], WRITE); // the wrong direction
    driver.send_raw(&[(u64::MAX - 10, 44)], 0); // the address space ends within it
    driver.send_descriptor(Descriptor::new(0x10_0000, 4, NEXT, 300)); // the next one does not exist
    driver.send_descriptor(Descriptor::new(0x10_0000, 0, NEXT, 6)); // never ends: number 6 is this one
    driver.send_descriptor(Descriptor::new(0x10_0000, 17, INDIRECT, 0)); // an indirect table of a fraction
    driver.send_descriptor(Descriptor::new(0x7000_0000, 16, INDIRECT, 0)); // an indirect table outside of RAM
    let payload = pattern(5, 5);
    driver.send(&Driver::data(&payload), &payload);

    driver.run();

    assert_eq!(driver.sent(), 8);
    assert_eq!(read_available(&mut host), payload);
    assert!(driver.device.statistics().malformed >= 6);
}

#[test]
fn a_packet_behind_an_indirect_table_arrives() {
    use vm_memory::{Bytes, GuestAddress};
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    let (table, header, payload) = (0x10_0000u64, 0x10_0101u64, 0x10_0201u64);
    driver.memory.write_slice(&Driver::data(b"indirect").to_bytes(), GuestAddress(header)).unwrap();
    driver.memory.write_slice(b"indirect", GuestAddress(payload)).unwrap();
    for (number, (address, length, link)) in [(header, 40, NEXT), (header + 40, 4, NEXT), (payload, 8, 0)].into_iter().enumerate() {
        let next = u16::try_from(number + 1).unwrap();
        let descriptor = RawDescriptor::from(Descriptor::new(address, length, link, next));
        driver.memory.write_obj(descriptor, GuestAddress(table + 16 * number as u64)).unwrap();
    }
    driver.send_descriptor(Descriptor::new(table, 48, INDIRECT, 0));

    driver.run();

    assert_eq!(read_available(&mut host), b"indirect");
    assert_eq!(driver.device.statistics().malformed, 0);
}

#[test]
fn buffers_that_cannot_take_a_packet_are_given_back_empty() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    host.write_all(b"data").unwrap();
    driver.post(&[20, 23]); // too small for a header
    driver.post(&[44]); // no room behind the header
    driver.post(&[44, 0, 3]);
    driver.post(&[45]);

    driver.run();

    let payloads: Vec<_> = driver.received().into_iter().map(|(_, payload)| payload).collect();
    assert_eq!(payloads, [b"dat".to_vec(), b"a".to_vec()]);
}

#[test]
fn a_buffer_that_was_not_needed_serves_the_next_packet() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.post_pages(2);
    for letter in [b"a", b"b"] {
        host.write_all(letter).unwrap();
        driver.run();
        assert_eq!(driver.received().remove(0).1, letter);
    }
}

#[test]
fn a_queue_index_without_sense_does_not_hang_the_device() {
    let mut driver = Driver::new();
    driver.corrupt_tx_index();
    driver.run();
    assert_eq!(driver.sent(), 0);
}

#[test]
fn cid_2_and_3_are_the_parent_and_answers_carry_the_one_that_was_asked() {
    for cid in [2, 3] {
        let mut driver = Driver::new();
        driver.post_pages(1);
        driver.send(&Header { destination_cid: cid, ..Driver::header(Operation::Request) }, &[]);
        driver.run();
        let (header, _) = driver.received().remove(0);
        assert_eq!((header.operation, header.source_cid), (Operation::Response as u16, cid));
        assert_eq!((header.source_port, header.destination_port, header.destination_cid), (HOST_PORT, GUEST_PORT, u64::from(GUEST_CID)));
        assert_eq!(driver.router.opened.lock().unwrap()[0].0.cid, 3);
    }
}

#[test]
fn what_is_not_for_the_parent_or_not_a_stream_is_reset_in_kind() {
    let request = Driver::header(Operation::Request);
    let cases = [
        Header { destination_cid: 0, ..request },
        Header { destination_cid: 1, ..request },
        Header { destination_cid: 4, ..request },
        Header { destination_cid: u64::from(GUEST_CID), ..request },
        Header { destination_cid: 3 | 1 << 32, ..request },
        Header { socket_type: 2, ..request },
        Header { socket_type: 3, ..request },
        Header { destination_port: 0, ..request }, // the router refuses it
        Header { operation: Operation::ReadWrite as u16, ..request },
        Header { operation: Operation::CreditRequest as u16, ..request },
        Header { operation: Operation::Response as u16, ..request },
        Header { operation: Operation::Shutdown as u16, ..request },
        Header { operation: 0, ..request },
        Header { operation: 77, ..request },
    ];
    for case in cases {
        let mut driver = Driver::new();
        driver.post_pages(1);
        driver.send(&case, &[]);
        driver.run();
        let received = driver.received();
        assert_eq!(received.len(), 1, "{case:?}");
        assert_eq!(received[0].0, case.reset(), "{case:?}");
    }
}

#[test]
fn a_reset_and_a_foreign_source_are_never_answered() {
    let mut driver = Driver::new();
    driver.post_pages(2);
    driver.send(&Driver::header(Operation::Reset), &[]);
    driver.send(&Header { destination_cid: 9, ..Driver::header(Operation::Reset) }, &[]);
    driver.send(&Header { source_cid: 17, ..Driver::header(Operation::Request) }, &[]);
    driver.run();
    assert_eq!(driver.received(), []);
    assert_eq!(driver.sent(), 3);
}

#[test]
fn a_second_request_with_the_same_ports_resets_the_connection_and_the_ports_can_be_used_again() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.post_pages(1);
    driver.send(&Driver::header(Operation::Request), &[]);
    driver.run();
    assert_eq!(operations(&driver.received()), [Operation::Reset as u16]);
    assert!(is_at_end(&mut host));
    driver.open(GUEST_PORT);
}

#[test]
fn data_beyond_the_credit_reset_the_connection() {
    let mut driver = Driver::new();
    let host = driver.open(GUEST_PORT);
    let payload = pattern(32768, 1);
    driver.post_pages(16);
    // The host reads nothing: its socket takes some, our buffer 256 KiB, then the guest is beyond its credit.
    for _ in 0..40 {
        driver.send(&Driver::data(&payload), &payload);
        driver.run();
        assert!(driver.device.statistics().backlog_bytes <= u64::from(limits::BUFFER_BYTES));
    }
    let received = operations(&driver.received());
    assert!(received.contains(&(Operation::Reset as u16)), "{received:?}");
    assert_eq!(driver.device.statistics().backlog_bytes, 0);
    drop(host);
}

#[test]
fn a_slow_host_costs_one_buffer_and_the_guest_hears_when_there_is_room() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    driver.post_pages(64);
    let payload = pattern(8192, 2);
    let (mut sent, mut buffer, mut forwarded) = (0u32, limits::BUFFER_BYTES, 0u32);
    let mut read = 0;
    let total = 3 * 1024 * 1024u32;
    let mut waits = 0;
    while sent < total {
        if buffer - (sent - forwarded) >= 8192 {
            driver.send(&Driver::data(&payload), &payload);
            sent += 8192;
        } else {
            waits += 1;
            assert!(driver.device.statistics().backlog_bytes > 0, "the guest waits although nothing waits for the host");
            read += read_available(&mut host).len();
        }
        driver.run();
        assert!(driver.device.statistics().backlog_bytes <= u64::from(limits::BUFFER_BYTES));
        driver.sent();
        for (header, _) in driver.received() {
            (buffer, forwarded) = (header.buffer_bytes, header.forwarded);
            driver.post_pages(1);
        }
    }
    while read < usize::try_from(sent).unwrap() {
        let now = read_available(&mut host).len();
        assert!(now > 0);
        read += now;
        driver.run();
    }
    assert!(waits > 1);
    assert_eq!(driver.device.statistics().backlog_bytes, 0);
}

#[test]
fn the_guests_credit_is_respected_asked_for_and_used_when_it_comes() {
    let mut driver = Driver::new();
    driver.post_pages(10);
    driver.send(&Header { buffer_bytes: 100, ..Driver::header(Operation::Request) }, &[]);
    driver.run();
    driver.received();
    let mut host = driver.router.opened.lock().unwrap().pop().unwrap().1;
    host.write_all(&pattern(250, 1)).unwrap();
    driver.run();
    let received = driver.received();
    assert_eq!(operations(&received), [Operation::ReadWrite as u16, Operation::CreditRequest as u16]);
    assert_eq!(received[0].1.len(), 100);

    driver.send(&Header { buffer_bytes: 100, forwarded: 60, ..Driver::header(Operation::CreditUpdate) }, &[]);
    driver.run();
    let received = driver.received();
    assert_eq!(operations(&received), [Operation::ReadWrite as u16, Operation::CreditRequest as u16]);
    assert_eq!(received[0].1.len(), 60);

    driver.send(&Header { buffer_bytes: 1000, forwarded: 160, ..Driver::header(Operation::CreditUpdate) }, &[]);
    driver.run();
    assert_eq!(driver.received()[0].1.len(), 90);
}

#[test]
fn a_credit_request_is_answered() {
    let mut driver = Driver::new();
    let _host = driver.open(GUEST_PORT);
    driver.post_pages(1);
    driver.send(&Driver::header(Operation::CreditRequest), &[]);
    driver.run();
    let (header, _) = driver.received().remove(0);
    assert_eq!((header.operation, header.buffer_bytes), (Operation::CreditUpdate as u16, limits::BUFFER_BYTES));
}

#[test]
fn connections_take_turns_when_buffers_are_scarce() {
    let mut driver = Driver::new();
    let mut hosts: Vec<_> = (0..4).map(|i| driver.open(GUEST_PORT + i)).collect();
    for host in &mut hosts {
        host.write_all(&pattern(50_000, 1)).unwrap();
    }
    driver.run();
    let mut ports = Vec::new();
    for _ in 0..12 {
        driver.post_pages(1);
        driver.run();
        ports.extend(driver.received().into_iter().map(|(header, _)| header.destination_port));
    }
    for turn in ports.chunks(4) {
        let mut turn = turn.to_vec();
        turn.sort_unstable();
        assert_eq!(turn, [GUEST_PORT, GUEST_PORT + 1, GUEST_PORT + 2, GUEST_PORT + 3]);
    }
}

#[test]
fn answers_that_find_no_room_stop_the_guest_instead_of_growing() {
    let mut driver = Driver::new();
    let mut given = 0;
    let mut returned = 0;
    let stray = Driver::header(Operation::CreditUpdate);
    while given - returned < 100 {
        driver.send(&stray, &[]);
        given += 1;
        driver.run();
        returned += driver.sent();
        assert!(returned <= limits::RESETS_QUEUED);
    }
    let mut answers = 0;
    while answers < given {
        driver.post_pages(20);
        driver.run();
        let now = driver.received().len();
        assert!(now > 0);
        answers += now;
    }
    assert_eq!(returned + driver.sent(), given);
}

#[test]
fn interrupts_are_asked_for_once_per_batch() {
    let mut driver = Driver::new();
    let mut host = driver.open(GUEST_PORT);
    let before = driver.interrupts.0;
    driver.post_pages(20);
    host.write_all(&pattern(50_000, 1)).unwrap();
    driver.run();
    assert_eq!(driver.received().len(), 14);
    assert_eq!(driver.interrupts.0 - before, 1);
}
