//! A busy and a hostile guest through a stock kernel's driver: every request gets an answer, and the device is as before afterwards.
//!
//! The guest's program: `guest/probe/src/bin/nsm-stress.rs`. What the driver does not let through is in `queue.rs` and `backend.rs`.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod boot;

use boot::{Guest, some_pcrs};

#[test]
fn noise_lengths_rooms_and_crowds_leave_the_device_as_it_was() {
    let guest = Guest::boot("nsm-stress", false, some_pcrs);
    let lines = guest.lines(|_| {});
    for all in ["truncations", "mutations", "rooms", "crowd"] {
        let word = lines.word(all);
        let (right, of) = word.split_once(" of ").unwrap();
        assert_eq!(right, of, "{all}");
    }
    // 90 is EMSGSIZE, by the driver (NSM_REQUEST_MAX_SIZE of drivers/misc/nsm.c).
    lines.says("lengths", "ExtendPCR, errno 90; ErrorpInv, errno 90, errno 90");
    lines.says("registers", "same");
    lines.says("document", "whole");
}
