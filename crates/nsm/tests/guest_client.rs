//! AWS's own client library in a guest, through a stock kernel's driver, against our device: every rule of their check holds.
//!
//! The guest's program, which has the rules: `guest/probe/src/bin/nsm-client.rs`.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod boot;

use boot::{Guest, INSTANCE_ID};
use nitroxide_nsm::InitialPcrs;

#[test]
fn every_rule_of_awss_check_holds() {
    // As their check wants it: an image without a signature, an instance without a role.
    let pcrs = || InitialPcrs::of_image([0x11; 48], [0x22; 48], [0x33; 48], None).with_instance_id(INSTANCE_ID);
    let lines = Guest::boot("nsm-client", false, pcrs).lines(|_| {});
    let expected = [
        "ok description",
        "ok registers at boot",
        "ok boot registers cannot be locked",
        "ok boot registers cannot be extended",
        "ok there is no register 32",
        "ok extending hashes old value and data",
        "ok random numbers vary",
        "ok documents repeat every combination of fields",
        "ok empty fields stay empty",
        "ok fields of 1025 bytes are too large",
        "ok documents list what was extended",
        "ok registers lock once",
        "ok ranges lock",
        "ok locked registers stay",
        "done",
    ];
    assert_eq!(lines.0, expected);
}
